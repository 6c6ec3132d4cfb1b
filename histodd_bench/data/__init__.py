"""Datasets: one file per adapter, one line each in :data:`DATASETS`."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from histodd_bench.data import camelyon16, demo, idc, imagefolder, pathmnist, pcam, slides, tcga_idh, unitopatho
from histodd_bench.data.extract import load_source
from histodd_bench.data.jobs import Source
from histodd_bench.data.listing import Counts
from histodd_bench.data.patchset import PatchSet
from histodd_bench.data.prepared import is_prepared, load_prepared
from histodd_bench.data.split import split_groups
from histodd_bench.data.store import Dataset
from histodd_bench.errors import UsageError, unknown_name
from histodd_bench.option_types import MOST_PIXELS

__all__ = ["DATASETS", "Dataset", "DatasetEntry", "PatchSet", "load_dataset", "split_groups"]


@dataclass(frozen=True)
class DatasetEntry:
    """How to load a dataset, one line about it, and whether the user must say where its files are.

    Attributes:
        source: lists the slides under a root with a split drawn by a seed; for datasets that are extracted slide by slide.
        count: patches per class under a root, with a split drawn by a seed, where that takes no reading of patches.
    """

    load: Callable[..., Dataset]
    description: str
    needs_root: bool
    source: Callable[[Path, int], Source] | None = None
    count: Callable[[Path, int], Counts] | None = None


def _slide_wise(source: Callable[[Path, int], Source], description: str) -> DatasetEntry:
    def load(*, root: Path, image_size: int, seed: int, cache: Path, workers: int, progress: Any) -> Dataset:
        return load_source(source(root, seed), image_size, cache, workers, progress)

    return DatasetEntry(load, description, True, source)


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
    "camelyon16": _slide_wise(
        camelyon16.source, "lymph node slides, normal against tumour, 256 px at 5x (the paper's)"
    ),
    "tcga-idh": _slide_wise(
        tcga_idh.source, "glioma slides, IDH mutant against wild type, 1,024 px at 10x (the paper's)"
    ),
    "unitopatho-dg": _slide_wise(
        unitopatho.source("dg"), "colorectal adenomas, high against low grade, 800 and 7000 microns (the paper's)"
    ),
    "unitopatho-pt": _slide_wise(
        unitopatho.source("pt"), "colorectal polyps, six types, 800 and 7000 microns (the paper's)"
    ),
    "idc": DatasetEntry(idc.load, "breast IDC patches, 2 classes, split by patient (Cruz-Roa et al. 2014)", True),
    "pcam": DatasetEntry(pcam.load, "PatchCamelyon, 96 px, 2 classes, from its HDF5 files", True, count=pcam.count),
    "pathmnist": DatasetEntry(
        pathmnist.load, "colorectal tissue, 9 classes, from pathmnist*.npz", True, count=pathmnist.count
    ),
    "imagefolder": DatasetEntry(
        imagefolder.load,
        "your own patches: train/<class>/*, test/<class>/*, optional groups.csv",
        True,
        count=imagefolder.count,
    ),
    "slides": _slide_wise(
        slides.source, "your own slides: slides.csv with slide, label, optional split and annotation"
    ),
}


def load_dataset(
    name: str, *, root: Path | None = None, image_size: int, seed: int = 0, cache: Path, workers: int = 1, progress: Any
) -> Dataset:
    """Load a dataset, from the cache where it has been read before.

    Args:
        name: a key of :data:`DATASETS`.
        root: folder of the dataset's files, where it needs one; or a folder that 'data prepare' wrote.
        image_size: side in pixels to which patches are resized, when they are first read.
        seed: of the split where the dataset has none of its own, and of generated data.
        cache: folder for the memory-mapped stores; may be read-only once they are there.
        workers: threads or processes used to read; the result does not depend on it.
        progress: a :class:`histodd_bench.progress.Progress`.

    Raises:
        UsageError: unknown name, missing or absent root, image size below 1 or above 4096.
        HistoddError: the files cannot be used; the message names the folder or file.
    """
    if name not in DATASETS:
        raise unknown_name("dataset", name, DATASETS)
    if not 1 <= image_size <= MOST_PIXELS:
        raise UsageError(f"--image-size must be 1 to {MOST_PIXELS} pixels, got {image_size}")
    entry = DATASETS[name]
    options: dict[str, Any] = {}
    if root is not None:
        root = Path(root)
        if not root.is_dir():
            raise UsageError(f"--data-root {root} is not a folder")
        if is_prepared(root):
            return load_prepared(root, name, image_size, Path(cache), workers, progress)
        if not entry.needs_root:
            raise UsageError(f"dataset {name!r} is drawn: it reads no --data-root but a folder that 'data prepare' wrote")
        options["root"] = root
    elif entry.needs_root:
        raise UsageError(f"dataset {name!r} reads your files: say where they are with --data-root")
    return entry.load(
        image_size=image_size, seed=seed, cache=Path(cache), workers=workers, progress=progress, **options
    )
