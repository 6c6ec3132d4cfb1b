"""PathMNIST of MedMNIST v2 (Yang et al. 2023): colorectal tissue, 9 classes, from ``pathmnist.npz`` (28 px) or its larger versions.

The files are those that the package ``medmnist`` downloads (``pathmnist.npz``, ``pathmnist_64.npz``, ``_128``, ``_224``); they are
read here without it. Of several the smallest that has ``image_size`` pixels is taken. The official training set is the training
set, its validation set is not used, its test set (another centre's) is the test set. Slides are not published.
"""

import zipfile
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from histodd_bench.data.arrays import read_zip_array, write_arrays, zip_array
from histodd_bench.data.images import enlarged
from histodd_bench.data.listing import Counts, fingerprint
from histodd_bench.data.store import Dataset, StoreWriter, cached_dataset
from histodd_bench.errors import HistoddError

CLASSES = (
    "adipose",
    "background",
    "debris",
    "lymphocytes",
    "mucus",
    "smooth muscle",
    "normal colon mucosa",
    "cancer-associated stroma",
    "colorectal adenocarcinoma epithelium",
)
PATCHES = {"train": 89_996, "val": 10_004, "test": 7_180}
SIDES = (28, 64, 128, 224)
_VERSION = 1


def file_name(side: int) -> str:
    """Name of the file with patches of ``side`` pixels."""
    return "pathmnist.npz" if side == 28 else f"pathmnist_{side}.npz"


def load(*, root: Path, image_size: int, seed: int, cache: Path, workers: int, progress: Any) -> Dataset:
    """Read the patches under ``root`` at ``image_size`` px.

    Raises:
        HistoddError: no such file, or not PathMNIST's.
    """
    path = _choose(root, image_size)
    with progress.task("reading PathMNIST's labels", 1), _opened(path) as archive:
        labels = {split: _labels(archive, split) for split in ("train", "test")}

    def build(folder: Path) -> list[str]:
        sides: Counter[int] = Counter()
        try:
            with _opened(path) as archive:
                for split, values in labels.items():
                    groups = [f"{split} {i}" for i in range(len(values))]
                    with (
                        progress.task(f"reading {path.name}, {split}", len(values)) as task,
                        StoreWriter(folder / split, (image_size, image_size), CLASSES) as writer,
                    ):
                        images = read_zip_array(archive, f"{split}_images")
                        sides += write_arrays(writer, images, values, groups, {}, task)
                        writer.finish()
        except (ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise HistoddError(f"{path} is damaged ({error}): fetch it again") from None
        return [
            "slides are not published: every patch counts as its own slide, and splits within the training set may divide one",
            "the official validation set is not used",
            *enlarged(sides, sides.total(), image_size),
        ]

    key = {"adapter": f"pathmnist {_VERSION}", "file": fingerprint([path], root), "size": image_size}
    return cached_dataset(cache, "pathmnist", key, False, build, progress)


def count(root: Path, seed: int) -> Counts:
    """Patches per class of each split; ``seed`` is not used."""
    with _opened(_choose(root, min(SIDES))) as archive:
        train, test = (np.bincount(_labels(archive, s), minlength=len(CLASSES)).tolist() for s in ("train", "test"))
    return Counts(CLASSES, train, test)


def _choose(root: Path, image_size: int) -> Path:
    there = [side for side in SIDES if (root / file_name(side)).is_file()]
    if not there:
        raise HistoddError(f"no pathmnist.npz in {root}: 'data fetch pathmnist --out {root}' downloads it")
    return root / file_name(next((side for side in there if side >= image_size), there[-1]))


def _opened(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile) as error:
        raise HistoddError(f"{path} is no .npz file ({error}): fetch it again") from None


def _labels(archive: zipfile.ZipFile, split: str) -> np.ndarray:
    try:
        shape, dtype = zip_array(archive, f"{split}_images")
        labels = np.concatenate([*read_zip_array(archive, f"{split}_labels")]).reshape(-1).astype(np.int64)
    except (KeyError, ValueError, TypeError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise HistoddError(f"{archive.filename} is not PathMNIST's ({error}): fetch it again") from None
    if (
        len(shape) != 4
        or shape[3] != 3
        or dtype != np.uint8
        or shape[0] != len(labels)
        or labels.max(initial=0) >= len(CLASSES)
        or labels.min(initial=0) < 0
    ):
        raise HistoddError(
            f"{archive.filename} is not PathMNIST's: {split}_images is {dtype} {shape} for {len(labels)} labels"
        )
    return labels
