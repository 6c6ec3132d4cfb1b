"""PatchCamelyon (Veeling et al. 2018): 96 px patches of Camelyon16 at 10x, tumour in the central 32 px or not, from HDF5 files.

Files are ``camelyonpatch_level_2_split_{train,test}_{x,y}.h5`` and, so that patches of one slide stay together,
``..._meta.csv`` (columns wsi, coord_x, coord_y), in the root or in ``pcam/``. The official validation set is not used.
"""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from histodd_bench.data.arrays import require_file, write_arrays
from histodd_bench.data.clam import hdf5
from histodd_bench.data.csv_tables import read_table
from histodd_bench.data.images import enlarged
from histodd_bench.data.listing import Counts, fingerprint
from histodd_bench.data.store import Dataset, StoreWriter, cached_dataset
from histodd_bench.errors import HistoddError

CLASSES = ("normal", "tumour")
PATCHES = {"train": 262_144, "valid": 32_768, "test": 32_768}
_VERSION, _CHUNK, _SIDE = 1, 512, 96


def name(split: str, what: str) -> str:
    """Name of a file: ``what`` is ``x.h5``, ``y.h5`` or ``meta.csv``."""
    return f"camelyonpatch_level_2_split_{split}_{what}"


def load(*, root: Path, image_size: int, seed: int, cache: Path, workers: int, progress: Any) -> Dataset:
    """Read the patches under ``root`` at ``image_size`` px.

    Raises:
        HistoddError: a file is missing, damaged or does not belong to PatchCamelyon; or h5py is not installed.
    """
    h5py = hdf5()
    labels = {split: _labels(root, split) for split in ("train", "test")}
    tables = {split: _meta(root, split, len(values)) for split, values in labels.items()}

    def build(folder: Path) -> list[str]:
        sides: Counter[int] = Counter()
        for split, values in labels.items():
            groups, columns = tables[split] or ([f"{split} {i}" for i in range(len(values))], {})
            path = _file(root, split, "x.h5")
            try:
                with (
                    h5py.File(path, "r") as file,
                    progress.task(f"reading {path.name}", len(values)) as task,
                    StoreWriter(folder / split, (image_size, image_size), CLASSES) as writer,
                ):
                    images = file["x"]
                    if (
                        images.dtype != np.uint8
                        or images.ndim != 4
                        or images.shape[3] != 3
                        or max(images.shape[1:3]) > 4096
                    ):
                        raise ValueError(f"x is {images.dtype} {images.shape}")
                    batches = (images[i : i + _CHUNK] for i in range(0, len(images), _CHUNK))
                    sides += write_arrays(writer, batches, values, groups, columns, task)
                    writer.finish()
            except (KeyError, ValueError, OSError, AttributeError) as error:
                raise HistoddError(f"{path} is damaged or not PatchCamelyon's ({error}): fetch it again") from None
        notes = ["the official validation set is not used"]
        if not all(tables.values()):
            notes.append(
                "WARNING: no ..._meta.csv: every patch counts as its own slide, so splits within the training set may divide one"
            )
        return notes + enlarged(sides, sides.total(), image_size)

    files = [_file(root, s, what) for s in labels for what in ("x.h5", "y.h5")]
    files += [p for s in labels if (p := _find_meta(root, s)) is not None]
    key = {"adapter": f"pcam {_VERSION}", "files": fingerprint(files, root), "size": image_size}
    return cached_dataset(cache, "pcam", key, False, build, progress)


def count(root: Path, seed: int) -> Counts:
    """Patches per class of each split; ``seed`` is not used."""
    train, test = (np.bincount(_labels(root, s), minlength=len(CLASSES)).tolist() for s in ("train", "test"))
    return Counts(CLASSES, train, test)


def _file(root: Path, split: str, what: str) -> Path:
    wanted = name(split, what)
    try:
        return require_file(root, wanted, f"pcam/{wanted}")
    except HistoddError as error:
        packed = any((root / folder / f"{wanted}.gz").is_file() for folder in ("", "pcam"))
        remedy = "unpack it with gunzip" if packed else f"'data fetch pcam --out {root}' downloads it"
        raise HistoddError(f"{error}: {remedy}") from None


def _find_meta(root: Path, split: str) -> Path | None:
    wanted = name(split, "meta.csv")
    return next((root / f / wanted for f in ("", "pcam") if (root / f / wanted).is_file()), None)


def _labels(root: Path, split: str) -> np.ndarray:
    h5py, path = hdf5(), _file(root, split, "y.h5")
    try:
        with h5py.File(path, "r") as file:
            labels = file["y"][:].reshape(-1).astype(np.int64)
    except (OSError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise HistoddError(f"{path} is damaged or not PatchCamelyon's ({error}): fetch it again") from None
    if len(labels) and (labels.min() < 0 or labels.max() > 1):
        raise HistoddError(f"{path} is not PatchCamelyon's: labels must be 0 or 1")
    return labels


def _meta(root: Path, split: str, count: int) -> tuple[list[str], dict[str, Any]] | None:
    path = _find_meta(root, split)
    if path is None:
        return None
    rows = read_table(path, ("wsi", "coord_x", "coord_y"))
    if len(rows) != count:
        raise HistoddError(f"{path} has {len(rows)} lines for {count} patches: it belongs to another file")
    try:
        columns = {axis: np.array([int(float(row[f"coord_{axis}"])) for row in rows], dtype=np.int64) for axis in "xy"}
    except (ValueError, OverflowError) as error:
        raise HistoddError(f"{path} has a coordinate that is no number ({error})") from None
    return [row["wsi"] for row in rows], columns
