"""UniToPatho (Barbano et al. 2021): colorectal polyps; grading of adenomas (DG, 2 classes) and polyp types (PT, 6 classes).

The root has a folder for each scale, ``800`` and ``7000`` (side of a patch in microns), or a folder ``unitopath-public`` with
them; in each lie ``train.csv``, ``test.csv`` (columns image_id, top_label_name, wsi, mpp, x, y, w, h among others) and a folder
of PNG files per class. Both scales together are the paper's data: 9,536 patches of 292 slides. DG asks for low or high grade
and so uses the adenomas (TA, TVA) only. Every slide is a patient of its own; the split is the official one.
"""

import math
from collections.abc import Callable
from pathlib import Path

from histodd_bench.data.csv_tables import read_table
from histodd_bench.data.jobs import FilesJob, Source
from histodd_bench.data.slides import some
from histodd_bench.errors import HistoddError

TYPES = ("HP", "NORM", "TA.HG", "TA.LG", "TVA.HG", "TVA.LG")
GRADES = ("HG", "LG")
SCALES = ("800", "7000")
MAX_PIXELS = 300_000_000  # the patches of 7000 microns have 251 million
SLIDES = {"pt": {"train": 204, "test": 88}, "dg": {"train": 160, "test": 70}}
PATCHES = {"pt": {"train": 6889, "test": 2647}, "dg": {"train": 5631, "test": 2277}}
_COLUMNS = ("image_id", "top_label_name", "wsi")


def source(kind: str) -> Callable[[Path, int], Source]:
    """The listing function of one of the two tasks, ``dg`` or ``pt``."""

    def of_task(root: Path, seed: int) -> Source:
        return _source(root, kind)

    return of_task


def _source(root: Path, kind: str) -> Source:
    classes = TYPES if kind == "pt" else GRADES
    folders = {scale: folder for scale in SCALES if (folder := _folder(root, scale)) is not None}
    if not folders:
        raise HistoddError(
            f"no folder 800 or 7000 in {root}: expected UniToPatho's unitopath-public/800/train.csv and so on"
        )
    notes = [f"no folder {scale} in {root}: the paper uses both scales" for scale in SCALES if scale not in folders]
    files: dict[str, list[tuple[Path, int, int, int, float]]] = {}
    splits: dict[str, str] = {}
    absent = []
    for scale, folder in folders.items():
        for split in ("train", "test"):
            table = folder / f"{split}.csv"
            for row in read_table(table, _COLUMNS):
                where = f"{table}, line {row['#line']}"
                if row["top_label_name"] not in TYPES:
                    raise HistoddError(f"{where}: unknown class {row['top_label_name']!r}, expected {', '.join(TYPES)}")
                label = _label(row["top_label_name"], kind)
                if label is None:
                    continue
                if not row["wsi"]:
                    raise HistoddError(f"{where}: no slide (wsi) is named")
                if splits.setdefault(row["wsi"], split) != split:
                    raise HistoddError(
                        f"{where}: slide {row['wsi']} is in train and in test: the tables contradict each other"
                    )
                path = folder / row["top_label_name"] / row["image_id"]
                if not path.resolve().is_relative_to(folder.resolve()):
                    raise HistoddError(f"{where}: image_id {row['image_id']!r} leaves {folder}")
                if not path.is_file():
                    absent.append(str(path.relative_to(root)))
                    continue
                x, y = _number(row, "x", where), _number(row, "y", where)
                files.setdefault(row["wsi"], []).append((path, label, int(x), int(y), float(scale)))
    if not files:
        raise HistoddError(
            f"none of the images that the tables list is in {root}: expected {SCALES[0]}/<class>/<image_id>"
        )
    if absent:
        notes.append(f"{len(absent)} images of the tables are not there: {some(absent)}")
    jobs = tuple(
        FilesJob(slide=slide, patient=slide, split=splits[slide], files=tuple(files[slide]), max_pixels=MAX_PIXELS)
        for slide in sorted(files)
    )
    return Source(f"unitopatho-{kind}", classes, jobs, image_size=256, notes=tuple(notes))


def _folder(root: Path, scale: str) -> Path | None:
    for folder in (root / scale, root / "unitopath-public" / scale):
        if folder.is_dir():
            return folder
    return None


def _label(name: str, kind: str) -> int | None:
    if kind == "pt":
        return TYPES.index(name)
    grade = name.partition(".")[2]
    return GRADES.index(grade) if grade else None


def _number(row: dict[str, str], name: str, where: str) -> float:
    try:
        value = float(row.get(name) or 0)
    except ValueError:
        value = math.nan
    if not abs(value) < 1e9:
        raise HistoddError(f"{where}: {name} must be a number, got {row[name]!r}")
    return value
