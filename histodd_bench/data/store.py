"""Patch sets on disk: written as a stream, opened by memory mapping, never half there.

A store is a folder: ``images.npy`` (uint8 [N,3,H,W]), one ``.npy`` per column (labels, groups, and where known centres,
slides, x, y, level, mpp), and ``meta.json`` (names, shape, version, fingerprint). A cached dataset is a folder with a ``train``
and a ``test`` store, ``dataset.json`` and, where it was made from slides, ``template.json``. Everything is written beside its
final place and renamed when complete.
"""

import json
import mmap
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch

from histodd_bench.data.patchset import PatchSet
from histodd_bench.errors import HistoddError
from histodd_bench.files import PARTIAL, digest, locked, move_folder, write_text, writing
from histodd_bench.wording import absent_classes

if TYPE_CHECKING:
    from histodd_bench.stain import Preprocessing

VERSION = 1
FORMAT = "histodd-bench patch store"
# A private writable mapping is charged in full against memory unless it says NORESERVE: without it Linux refuses to map
# a store larger than RAM. Python names the flag only from 3.13 on.
_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)


class StoreError(HistoddError):
    """A store on disk that cannot be used: absent, truncated, corrupt or written by another version."""


@dataclass(frozen=True)
class Dataset:
    """Training and test patches.

    Attributes:
        procedural: True where the pictures are computer-made; said wherever numbers of this dataset are shown.
        notes: what a reader of the results must know (skipped files, how the split was made), one sentence each.
        preprocessing: channel statistics and stain template of the training patches where they are stored with them.
        folder: where the stores are.
    """

    name: str
    train: PatchSet
    test: PatchSet
    procedural: bool
    notes: tuple[str, ...] = ()
    preprocessing: "Preprocessing | None" = None
    folder: Path | None = None


class StoreWriter:
    """Streams patches into a new store; nothing appears at ``folder`` before :meth:`finish`.

    Args:
        folder: where the store will be; an old store there is replaced at the end.
        image_size: height and width of every patch, in pixels.
        classes: class names in label order.
        centre_names: scanning centres in index order; empty where centres are unknown.

    Use as a context manager: leaving it without :meth:`finish` removes what was written.
    """

    def __init__(
        self, folder: Path, image_size: tuple[int, int], classes: Sequence[str], centre_names: Sequence[str] = ()
    ):
        self.folder = Path(folder)
        self.classes, self.centre_names = tuple(classes), tuple(centre_names)
        self._size = (image_size[0], image_size[1])
        self._count = 0
        self._groups: dict[str, int] = {}
        self._slides: dict[str, int] = {}
        self._columns: dict[str, list[np.ndarray]] = {}
        self._partial = self.folder.with_name(self.folder.name + PARTIAL)
        with writing(self._partial):
            shutil.rmtree(self._partial, ignore_errors=True)
            self._partial.mkdir(parents=True)
            self._file = open(self._partial / "images.npy", "wb")
            self._write_header()

    def _write_header(self) -> None:
        # NumPy pads headers so that the first axis can grow in place up to 21 digits.
        header = {"descr": "|u1", "fortran_order": False, "shape": (self._count, 3, *self._size)}
        np.lib.format.write_array_header_1_0(self._file, header)

    def __len__(self) -> int:
        return self._count

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the patches in pixels."""
        return self._size

    def append(
        self, images: np.ndarray, labels: Sequence[int], groups: Sequence[str], **columns: Sequence[Any]
    ) -> None:
        """Add one batch.

        Args:
            images: ``[B,3,H,W]`` uint8.
            labels: ``[B]`` class indices.
            groups: ``[B]`` slide or patient names.
            columns: ``[B]`` numbers each; ``centres`` (indices into ``centre_names``), ``x``, ``y``, ``level``, ``mpp``;
                ``slides`` takes names. Every batch must bring the same columns.
        """
        if images.dtype != np.uint8 or images.shape[1:] != (3, *self._size):
            raise HistoddError(f"a store of {self._size} px takes uint8 [B,3,H,W], got {images.dtype} {images.shape}")
        ids = [self._groups.setdefault(name, len(self._groups)) for name in groups]
        batch = {"labels": labels, "groups": ids, **columns}
        if "slides" in columns:
            batch["slides"] = [self._slides.setdefault(name, len(self._slides)) for name in columns["slides"]]
        if self._count and batch.keys() != self._columns.keys():
            raise HistoddError(f"columns changed between batches: {sorted(self._columns)} then {sorted(batch)}")
        for name, values in batch.items():
            if len(values) != len(images):
                raise HistoddError(f"column {name!r} has {len(values)} values for {len(images)} patches")
            dtype = np.float64 if name == "mpp" else np.int64
            self._columns.setdefault(name, []).append(np.asarray(values, dtype=dtype))
        with writing(self._partial):
            self._file.write(np.ascontiguousarray(images).data)
        self._count += len(images)

    def finish(self, *, about: dict[str, Any] | None = None, fingerprint: bool = True) -> PatchSet:
        """Complete the store, move it into place and open it.

        Args:
            about: JSON values kept with the store, see :func:`about`.
            fingerprint: whether to compute it now, which reads all pixels once more, or leave it to whoever asks.
        """
        with writing(self._partial):
            self._file.seek(0)
            self._write_header()
            self._sync_close()
            columns = {name: np.concatenate(parts) for name, parts in self._columns.items()}
            for name in ("labels", "groups"):
                columns.setdefault(name, np.zeros(0, dtype=np.int64))
            for name, values in columns.items():
                with open(self._partial / f"{name}.npy", "wb") as file:
                    np.save(file, values)
                    file.flush()
                    os.fsync(file.fileno())
        meta = {
            "format": FORMAT,
            "version": VERSION,
            "shape": [self._count, 3, *self._size],
            "classes": self.classes,
            "centre_names": self.centre_names,
            "columns": sorted(columns),
            "group_names": list(self._groups),
            "slide_names": list(self._slides),
            "about": about or {},
        }
        if fingerprint:
            meta["fingerprint"] = _open(self._partial, meta).fingerprint()
        write_text(self._partial / "meta.json", json.dumps(meta))
        move_folder(self._partial, self.folder)
        return load(self.folder)

    def _sync_close(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        try:
            self._file.close()  # may fail to flush on a full disk; the error already under way says so
        except OSError:
            pass
        shutil.rmtree(self._partial, ignore_errors=True)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StoreError(f"{path.parent} is not a finished patch store: {path.name} is missing") from None
    except (OSError, ValueError) as error:
        raise StoreError(f"{path} cannot be read ({error}): delete {path.parent} to have it rebuilt") from None
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise StoreError(f"{path} does not describe a patch store: delete {path.parent} to have it rebuilt")
    if value.get("version") != VERSION:
        raise StoreError(
            f"{path.parent} was written by another version (store {value.get('version')}, this program writes {VERSION}): "
            "delete it to have it rebuilt"
        )
    return value


def _column(folder: Path, name: str, count: int) -> np.ndarray:
    path = folder / f"{name}.npy"
    try:
        values = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise StoreError(f"{path} is missing or damaged ({error}): delete {folder} to have it rebuilt") from None
    if values.shape != (count,):
        raise StoreError(f"{path} holds {values.shape} values for {count} patches: delete {folder} to have it rebuilt")
    return values


def _open(folder: Path, meta: dict[str, Any]) -> PatchSet:
    shape = tuple(meta["shape"])
    path = folder / "images.npy"
    try:
        with open(path, "rb") as file:
            np.lib.format.read_magic(file)
            found, _, dtype = np.lib.format.read_array_header_1_0(file)
            offset = file.tell()
            size = os.fstat(file.fileno()).st_size
            if found != shape or dtype != np.uint8 or size != offset + int(np.prod(shape, dtype=np.int64)):
                raise ValueError(f"{size} bytes and shape {found}, expected shape {shape}")
            # Copy-on-write: an in-place operation on a batch can never reach the file.
            protection = mmap.PROT_READ | mmap.PROT_WRITE
            buffer = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE | _NORESERVE, prot=protection)
    except (OSError, ValueError) as error:
        raise StoreError(f"{path} is missing or damaged ({error}): delete {folder} to have it rebuilt") from None
    columns = {name: torch.from_numpy(_column(folder, name, shape[0])) for name in ("labels", "groups")}
    if "centres" in meta["columns"]:
        columns["centres"] = torch.from_numpy(_column(folder, "centres", shape[0]))
    return PatchSet(
        images=torch.from_numpy(np.ndarray(shape, np.uint8, buffer=buffer, offset=offset)),
        group_names=tuple(meta["group_names"]),
        classes=tuple(meta["classes"]),
        centre_names=tuple(meta["centre_names"]),
        _known_fingerprint=meta.get("fingerprint"),
        **columns,
    )


def load(folder: Path) -> PatchSet:
    """Open a store. Reads the columns, maps the images: the time does not depend on their size.

    Raises:
        StoreError: no finished store there, truncated, damaged, or written by another version.
    """
    folder = Path(folder)
    meta = _read_json(folder / "meta.json")
    try:
        return _open(folder, meta)
    except StoreError:
        raise
    except (KeyError, TypeError, ValueError, HistoddError) as error:
        raise StoreError(f"{folder / 'meta.json'} is damaged ({error}): delete {folder} to have it rebuilt") from None


def load_columns(folder: Path) -> dict[str, np.ndarray]:
    """All columns of a store by name, ``[N]`` each: positions and scales that a PatchSet does not carry among them."""
    meta = _read_json(Path(folder) / "meta.json")
    return {name: _column(Path(folder), name, meta["shape"][0]) for name in meta["columns"]}


def slide_names(folder: Path) -> tuple[str, ...]:
    """Names that the column ``slides`` of a store counts in; empty where it has none."""
    return tuple(_read_json(Path(folder) / "meta.json").get("slide_names", ()))


def about(folder: Path) -> dict[str, Any]:
    """What was kept with a store when it was finished."""
    found = _read_json(Path(folder) / "meta.json").get("about", {})
    return found if isinstance(found, dict) else {}


def write_dataset(folder: Path, notes: Sequence[str], **more: Any) -> None:
    """Write ``dataset.json``, which makes a folder with the stores ``train`` and ``test`` a dataset; ``more`` are JSON values.

    Warnings of classes that a split lacks are added to the notes.
    """
    told = list(notes)
    for split in ("train", "test"):
        patches = load(folder / split)
        told += absent_classes(split, patches.classes, patches.class_counts())
    described = {"format": FORMAT, "version": VERSION, "notes": list(dict.fromkeys(told)), **more}
    write_text(folder / "dataset.json", json.dumps(described))


def read_dataset(folder: Path) -> dict[str, Any]:
    """What :func:`write_dataset` wrote.

    Raises:
        StoreError: no dataset there, damaged, or written by another version.
    """
    return _read_json(Path(folder) / "dataset.json")


def cached_dataset(
    cache: Path, name: str, key: dict[str, Any], procedural: bool, build: Callable[[Path], Sequence[str]], progress: Any
) -> Dataset:
    """Open the dataset built from ``key``, building it first where the cache has none that can be used.

    Args:
        cache: folder of cached datasets.
        key: everything the result depends on, as JSON values; another key is another entry.
        procedural: see :class:`Dataset`.
        build: called with a folder in which it must write the stores ``train`` and ``test``; returns the notes.
        progress: where a rebuild is reported.
    """
    folder = Path(cache) / f"{name}-{digest([VERSION, key])[:16]}"
    if folder.exists():
        try:
            return open_dataset(folder, name, procedural)
        except StoreError as error:
            progress.log(f"rebuilding a cached dataset: {error}")
    with locked(folder.with_name(folder.name + ".lock")):
        try:
            return open_dataset(folder, name, procedural)  # another process may have built it meanwhile
        except StoreError:
            pass
        partial = folder.with_name(folder.name + PARTIAL)
        try:
            with writing(partial):
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir()
            notes = list(build(partial))
            if not len(load(partial / "test")):
                raise HistoddError(f"{name}: there is no test patch: nothing could be scored; add some, or change the split")
            write_dataset(partial, notes)
            move_folder(partial, folder)
        except HistoddError:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        return open_dataset(folder, name, procedural)


def open_dataset(folder: Path, name: str, procedural: bool) -> Dataset:
    """Open the dataset in a folder.

    Raises:
        StoreError: not a finished dataset, or damaged.
    """
    from histodd_bench.data.template import read_template

    notes = tuple(_read_json(folder / "dataset.json").get("notes", ()))
    train = load(folder / "train")
    template = read_template(folder, train.fingerprint())
    return Dataset(name, train, load(folder / "test"), procedural, notes, template, folder)
