"""Anyone's patches: ``train/<class>/*`` and ``test/<class>/*``, or ``<class>/*`` to be split here.

``groups.csv`` beside them (columns path, group and, optionally, centre; paths relative to the folder) says which slide or
patient a file comes from. Without it every file is its own group. Without ``test/`` 30 % of the groups are drawn by the seed.
Images that are not square are cropped to their central square, then resized.
"""

import re
import unicodedata
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from histodd_bench.data import idc
from histodd_bench.data.csv_tables import read_table
from histodd_bench.data.images import FileEntry, Splits, printable, split_files, without, write_stores
from histodd_bench.data.listing import Counts, fingerprint, image_files, subfolders
from histodd_bench.data.prepared import is_prepared
from histodd_bench.data.slides import some
from histodd_bench.data.store import Dataset, cached_dataset
from histodd_bench.errors import HistoddError

TEST_FRACTION = 0.3
_VERSION = 2
_SPLIT_WORDS = frozenset(("train", "training", "test", "testing", "val", "valid", "validation"))
_FEW = 20  # folders of the same names that may well be the classes
# Endings of what is left in folders of images: not even opened.
_NO_IMAGES = frozenset(
    ".csv .db .doc .docx .geojson .gz .h5 .htm .html .ini .ipynb .json .lnk .lock .log .md .npy .npz .ods .pdf .pkl .pt .py .rtf "
    ".safetensors .tar .tex .tsv .txt .xls .xlsx .xml .yaml .yml .zip".split()
)
# Files that mark a folder this program wrote, and what it writes into a folder of results.
_WRITTEN = frozenset((".lock", ".collecting.lock", "plan.json", "card.json", "stains.csv"))
_RESULTS = (".lock", "plan.json", "records", "sets", "sheets", "slides", "stains", "work")


@dataclass(frozen=True)
class _Listing:
    """What lies under a root: files by side, where ``test`` is empty unless there is a test folder."""

    classes: list[str]
    listed: Splits
    has_test: bool
    centre_names: tuple[str, ...]
    no_images: list[tuple[Path, str]]
    notes: list[str]

    def splits(self, unreadable: Collection[Path], seed: int) -> Splits:
        """Training and test files, drawn by the seed where there is no test folder."""
        readable = {split: without(entries, unreadable) for split, entries in self.listed.items()}
        return readable if self.has_test else split_files(readable["train"], TEST_FRACTION, seed)

    def split_notes(self, sides: Splits, seed: int) -> list[str]:
        """What there is to say of a split."""
        on = {split: {e.group for e in entries} for split, entries in sides.items()}
        notes = []
        if not self.has_test:
            count = len(on["train"]) + len(on["test"])
            notes.append(
                f"no test/ folder: {len(on['test'])} of {count} groups are the test set, drawn with seed {seed}"
            )
        shared = on["train"] & on["test"]
        if shared:
            notes.append(
                f"WARNING: {len(shared)} groups of groups.csv are in train/ and in test/ (e.g. {printable(min(shared))}): "
                "the test set is not independent of the training set"
            )
        return notes


def load(*, root: Path, image_size: int, seed: int, cache: Path, workers: int, progress: Any) -> Dataset:
    """Read the images under ``root`` at ``image_size`` px; classes are the sorted names of the class folders.

    Raises:
        HistoddError: no class folders, or folders that are no classes; one class only, a class without images, a test class
            that training lacks, or a ``groups.csv`` that cannot be used.
    """
    found = _list(root)

    def splits(unreadable: Collection[Path]) -> Splits:
        return found.splits(unreadable, seed)

    def build(folder: Path) -> list[str]:
        written, told = write_stores(
            folder,
            splits,
            root=root,
            classes=found.classes,
            centre_names=found.centre_names,
            image_size=image_size,
            fit="crop",
            workers=workers,
            skipped=found.no_images,
            progress=progress,
        )
        return [*found.notes, *found.split_notes(written, seed), *told]

    files = [entry.path for side in ("train", "test") for entry in found.listed[side]]
    files += [root / "groups.csv", *(path for path, _ in found.no_images)]
    key = {
        "adapter": f"imagefolder {_VERSION}",
        "classes": found.classes,
        "notes": [*found.notes, *found.split_notes(splits(()), seed)],
        "files": fingerprint(files, root),
        "size": image_size,
        "seed": None if found.has_test else seed,
    }
    return cached_dataset(cache, "imagefolder", key, False, build, progress)


def count(root: Path, seed: int) -> Counts:
    """Images per class of each split, of which none is opened.

    Raises:
        HistoddError: as :func:`load`.
    """
    found = _list(root)
    sides = found.splits((), seed)
    train, test = (
        np.bincount([e.label for e in sides[s]], minlength=len(found.classes)).tolist() for s in ("train", "test")
    )
    unread = "images are counted by name: 'data prepare' says which can be read"
    return Counts(found.classes, train, test, (*found.notes, *found.split_notes(sides, seed), unread))


def _list(root: Path) -> _Listing:
    by_name = {folder.name.lower(): folder for folder in subfolders(root)}
    notes: list[str] = []
    if "test" in by_name and "train" not in by_name:
        raise HistoddError(
            f"{root} has {by_name['test'].name}/ but no train/: training images belong in train/<class>/"
        )
    train_root, test_root = by_name.get("train", root), by_name.get("test")
    others = sorted(folder.name for name, folder in by_name.items() if name not in ("train", "test"))
    if "train" in by_name and others:
        notes.append(f"folders beside train and test are not used: {', '.join(map(printable, others))}")

    if "train" not in by_name and any((root / name).exists() for name in _RESULTS[:2]):
        results = [name for name in _RESULTS if (root / name).exists()]
        raise HistoddError(
            f"{root} holds results of this program among its classes: move {', '.join(results)} away and choose another --out"
        )

    no_images: list[tuple[Path, str]] = []
    written: list[Path] = []
    classes, train = _class_files(train_root, no_images, written)
    notes += _layout(train_root, classes, train, "train" in by_name, (root / "groups.csv").exists())
    test: list[tuple[Path, int]] = []
    if test_root is not None:
        test_classes, test = _class_files(test_root, no_images, written)
        unknown = sorted(set(test_classes) - set(classes))
        if unknown:
            raise HistoddError(
                f"{test_root}: class {unknown[0]!r} is not in {train_root}: classes must have the same names in both"
            )
        test = [(path, classes.index(test_classes[label])) for path, label in test]

    if written:
        names = [str(path.relative_to(root)) for path in sorted(written)]
        notes.append(f"{len(names)} folders that this program wrote are not used: {some(names)}")

    table, group_notes = _read_groups(root, [path for path, _ in train + test])
    notes += group_notes
    centre_names = tuple(sorted({centre for _, centre in table.values()}))
    centres = {name: index for index, name in enumerate(centre_names)}
    has_centres = any(centre_names)

    def entry(path: Path, label: int) -> FileEntry:
        group, centre = table[path]
        return FileEntry(path, label, group, (("centres", centres[centre]),) if has_centres else ())

    listed = {"train": [entry(*item) for item in train], "test": [entry(*item) for item in test]}
    groups = sorted({e.group for e in listed["train"]})
    if test_root is None and len(groups) < 2:
        raise HistoddError(
            f"{root} has no test/ folder and one group only ({groups[0]}): a split needs at least two groups"
        )

    return _Listing(
        classes,
        listed,
        test_root is not None,
        tuple(name or "unknown" for name in centre_names) if has_centres else (),
        no_images,
        notes,
    )


def _class_files(
    folder: Path, no_images: list[tuple[Path, str]], written: list[Path]
) -> tuple[list[str], list[tuple[Path, int]]]:
    """Class names and (path, label) of every image in the class folders.

    Adds to ``no_images`` the files, and to ``written`` the folders, that take no part. A folder with nothing else is no class.
    """
    classes: list[str] = []
    found: list[tuple[Path, int]] = []
    for class_folder in subfolders(folder):
        ours: list[Path] = []

        def leave_out(part: Path, names: list[str], ours: list[Path] = ours) -> bool:
            if is_ours := _is_ours(part, names):
                ours.append(part)
            return is_ours

        files = image_files(class_folder, leave_out)
        images = [path for path in files if path.suffix.lower() not in _NO_IMAGES]
        if ours and not images:
            written.append(class_folder)
            continue
        if not images:
            raise HistoddError(f"class folder {printable(class_folder)} has no images: add some or remove the folder")
        written += ours
        found += [(path, len(classes)) for path in images]
        no_images += [(path, "not an image") for path in sorted(set(files) - set(images))]
        classes.append(printable(class_folder.name))
    if not classes:
        raise HistoddError(
            f"no class folders in {printable(folder)}: expected {printable(folder)}/<class>/<image files>"
        )
    if len(classes) == 1:
        raise HistoddError(f"one class only ({classes[0]}) in {printable(folder)}: a classifier needs at least two")
    return classes, found


def _layout(
    folder: Path, classes: list[str], found: list[tuple[Path, int]], within_train: bool, grouped: bool
) -> list[str]:
    """A warning where class folders may be slides or patients, which ``grouped`` data say themselves.

    Raises:
        HistoddError: they are parts of a split, or the patients of the IDC patches.
    """
    inside: list[set[str]] = [set() for _ in classes]  # per class the folders that images lie in; "" is its own
    for path, label in found:
        parts = path.relative_to(folder).parts
        inside[label].add(parts[1] if len(parts) > 2 else "")
    names = set().union(*inside)
    nested = "" not in names and len(names) > 1
    alike = nested and all(here == names for here in inside)
    shown = some(classes)
    sides = [name for name in classes if _SPLIT_WORDS & set(re.split("[^a-z]+", name.lower()))]
    if not within_train and (len(sides) > 1 or (sides and alike)):
        raise HistoddError(
            f"{printable(folder)}: {shown} look like the parts of a split and not like classes: rename them to train and test "
            "(if they are classes, move all of them into a folder train)"
        )
    if any(_of_patient(path, classes[label]) for path, label in found):
        raise HistoddError(
            f"{printable(folder)}: {shown} are patients of the IDC patches and not classes: use the data set idc, not imagefolder"
        )
    if nested and not grouped and len(names) <= _FEW and (alike or len(names) < len(classes)):
        return [
            f"WARNING: the {len(classes)} class folders ({shown}) hold only the folders {some(sorted(names))}: if those are the "
            "classes, and the outer ones slides or patients, move the images to <class>/<patient>/ and list them in groups.csv"
        ]
    return []


def _of_patient(path: Path, name: str) -> bool:
    """Whether a file is an IDC patch in the folders of its patient, ``<patient>/<0|1>/``, and that is the class's name."""
    named = idc.NAME.fullmatch(path.name)
    return named is not None and named["patient"] == name == path.parent.parent.name and path.parent.name in ("0", "1")


def _is_ours(folder: Path, names: list[str]) -> bool:
    """Whether a folder holds a run, a saved set, a report of stains, or a prepared or cached dataset."""
    return not _WRITTEN.isdisjoint(names) or ("dataset.json" in names and is_prepared(folder))


def _read_groups(root: Path, paths: list[Path]) -> tuple[dict[Path, tuple[str, str]], list[str]]:
    """(group, centre) of every file, and what there is to say about them."""
    own = {path: (str(path.relative_to(root)), "") for path in paths}
    source = root / "groups.csv"
    if not source.exists():
        return own, [
            "WARNING: no groups.csv: every file counts as its own slide, so patches of one slide or patient may be on both sides of a split"
        ]
    listed: dict[PurePosixPath, tuple[str, str]] = {}
    for row in read_table(source, ("path", "group"), optional=("centre",)):
        path, group = row["path"], row["group"]
        if not path or not group:
            raise HistoddError(f"{source}, line {row['#line']}: path or group is empty")
        value = (group, row.get("centre", ""))
        if listed.setdefault(_spelled(path.replace("\\", "/")), value) != value:
            raise HistoddError(
                f"{source}, line {row['#line']}: {path} is listed twice with different groups or centres"
            )
    names = {path: _spelled(path.relative_to(root).as_posix()) for path in paths}
    by_path = {path: listed.get(name) for path, name in names.items()}
    unlisted = [path for path, value in by_path.items() if value is None]
    if len(unlisted) == len(paths):
        raise HistoddError(f"{source} lists none of the {len(paths)} files: its paths must be relative to {root}")
    notes = []
    if unlisted:
        first = printable(unlisted[0].relative_to(root))
        notes.append(
            f"WARNING: {len(unlisted)} files are not in groups.csv (e.g. {first}) and count as slides of their own"
        )
    extra = len(listed.keys() - set(names.values()))
    if extra:
        notes.append(f"groups.csv lists {extra} files that are not there")
    return {path: value or own[path] for path, value in by_path.items()}, notes


def _spelled(path: str) -> PurePosixPath:
    """A path with accents as one character each: macOS names files with two, where a table has one."""
    return PurePosixPath(unicodedata.normalize("NFC", path))
