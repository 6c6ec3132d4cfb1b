"""Datasets: one file per adapter, one line each in :data:`DATASETS`."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from histodd_bench.data import demo, idc, imagefolder
from histodd_bench.data.patchset import PatchSet
from histodd_bench.data.split import split_groups
from histodd_bench.data.store import Dataset
from histodd_bench.errors import UsageError, unknown_name

__all__ = ["DATASETS", "Dataset", "DatasetEntry", "PatchSet", "load_dataset", "split_groups"]


@dataclass(frozen=True)
class DatasetEntry:
    """How to load a dataset, one line about it, and whether the user must say where its files are."""

    load: Callable[..., Dataset]
    description: str
    needs_root: bool


DATASETS: dict[str, DatasetEntry] = {
    "demo": DatasetEntry(
        demo.load, "computer-drawn H&E slides of two centres, normal against tumour; made on first use", False
    ),
    "demo-uniform": DatasetEntry(
        partial(demo.load, params=demo.DemoParams(stain_variation=0.0)), "the demo with every slide stained alike", False
    ),
    "demo-varied": DatasetEntry(
        partial(demo.load, params=demo.DemoParams(stain_variation=2.0)), "the demo with stains that vary twice as much", False
    ),
    "idc": DatasetEntry(idc.load, "breast IDC patches, 2 classes, split by patient (Cruz-Roa et al. 2014)", True),
    "imagefolder": DatasetEntry(
        imagefolder.load, "your own patches: train/<class>/*, test/<class>/*, optional groups.csv", True
    ),
}


def load_dataset(
    name: str, *, root: Path | None = None, image_size: int, seed: int = 0, cache: Path, workers: int = 1, progress: Any
) -> Dataset:
    """Load a dataset, from the cache where it has been read before.

    Args:
        name: a key of :data:`DATASETS`.
        root: folder of the dataset's files, where it needs one.
        image_size: side in pixels to which patches are resized, when they are first read.
        seed: of the split where the dataset has none of its own, and of generated data.
        cache: folder for the memory-mapped stores; may be read-only once they are there.
        workers: threads or processes used to read; the result does not depend on it.
        progress: a :class:`histodd_bench.progress.Progress`.

    Raises:
        UsageError: unknown name, missing or absent root, image size below 1.
        HistoddError: the files cannot be used; the message names the folder or file.
    """
    if name not in DATASETS:
        raise unknown_name("dataset", name, DATASETS)
    if image_size < 1:
        raise UsageError(f"--image-size must be at least 1, got {image_size}")
    entry = DATASETS[name]
    options: dict[str, Any] = {}
    if entry.needs_root:
        if root is None:
            raise UsageError(f"dataset {name!r} reads your files: say where they are with --data-root")
        root = Path(root)
        if not root.is_dir():
            raise UsageError(f"--data-root {root} is not a folder")
        options["root"] = root
    return entry.load(
        image_size=image_size, seed=seed, cache=Path(cache), workers=workers, progress=progress, **options
    )
