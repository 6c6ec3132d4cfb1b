"""TCGA-IDH: gliomas, IDH mutant (MU) against wild type (WT), from slide-level labels (paper 4.1).

Slides are ``TCGA-XX-XXXX-01Z-00-DX1.<uuid>.svs``, anywhere under the root; the patient is the first 12 characters.
``labels.csv`` has the columns slide_id (a file name, with or without its end, or the barcode before the first dot) and label
(MU or WT, also mutant, wildtype, 1, 0). The paper's split is not public: ``split.csv`` (slide_id or patient, and split) gives
your own, otherwise patients are drawn by the seed, one in nine for the test set as in the paper (149 of 1,340 slides).
Patches are 1,024 px at 10x with more than half tissue, resized to the size asked for.
"""

from pathlib import Path

import numpy as np

from histodd_bench.data.csv_tables import read_table
from histodd_bench.data.jobs import SlideJob, Source, Tiling
from histodd_bench.data.listing import image_files
from histodd_bench.data.slides import some
from histodd_bench.data.split import draw_groups
from histodd_bench.errors import HistoddError

CLASSES = ("MU", "WT")
TILING = Tiling(size=1024, mpp=1.0, min_tissue=0.5)
SLIDES = {"train": (477, 714), "test": (59, 90)}  # MU, WT, paper 4.1
TEST_FRACTION = 149 / 1340
_LABELS = {"mu": 0, "mutant": 0, "1": 0, "wt": 1, "wildtype": 1, "wild type": 1, "wild-type": 1, "0": 1}
_SUFFIXES = (".svs", ".tif", ".tiff", ".ndpi", ".mrxs")


def source(root: Path, seed: int) -> Source:
    """Slides under ``root`` that ``labels.csv`` lists.

    Raises:
        HistoddError: no slides, no labels, or tables that contradict themselves or each other.
    """
    notes: list[str] = []
    slides: dict[str, Path] = {}
    repeated = []
    for path in image_files(root):
        if path.suffix.lower() in _SUFFIXES and slides.setdefault(path.stem, path) is not path:
            repeated.append(str(path.relative_to(root)))
    if not slides:
        raise HistoddError(f"no TCGA slides in {root}: expected TCGA-XX-XXXX-01Z-00-DX1.<uuid>.svs files")
    if repeated:
        notes.append(f"{len(repeated)} slides are there twice and used once: {some(repeated)}")
    labels, absent = _labels(root, slides)
    if absent:
        notes.append(f"{len(absent)} slides of labels.csv are not there: {some(absent)}")
    unlabelled = sorted(slides.keys() - labels.keys())
    if unlabelled:
        notes.append(f"{len(unlabelled)} slides are not in labels.csv and are left out: {some(unlabelled)}")
    if not labels:
        raise HistoddError(f"{root / 'labels.csv'} lists none of the {len(slides)} slides in {root}")
    names = sorted(labels)
    splits = _splits(root, names, labels, seed, notes)
    jobs = [
        SlideJob(slide=name, path=slides[name], patient=name[:12], split=splits[name], label=labels[name])
        for name in names
        if name in splits
    ]
    return Source("tcga-idh", CLASSES, tuple(jobs), TILING, 256, (), tuple(notes))


def _matches(slides: dict[str, Path]) -> dict[str, list[str]]:
    """Slides by everything that a table may call them."""
    found: dict[str, list[str]] = {}
    for stem, path in slides.items():
        for key in {stem, path.name, stem.partition(".")[0]}:
            found.setdefault(key, []).append(stem)
    return found


def _labels(root: Path, slides: dict[str, Path]) -> tuple[dict[str, int], list[str]]:
    path = root / "labels.csv"
    if not path.is_file():
        raise HistoddError(f"no {path}: it must have the columns slide_id and label (MU or WT)")
    by_name = _matches(slides)
    labels: dict[str, int] = {}
    absent = []
    for row in read_table(path, ("slide_id", "label")):
        label = _LABELS.get(row["label"].lower())
        if label is None:
            raise HistoddError(f"{path}, line {row['#line']}: label must be MU or WT, got {row['label']!r}")
        if row["slide_id"] not in by_name:
            absent.append(row["slide_id"])
        for name in by_name.get(row["slide_id"], []):
            if labels.setdefault(name, label) != label:
                raise HistoddError(
                    f"{path}, line {row['#line']}: {row['slide_id']} is listed twice with different labels"
                )
    return labels, absent


def _splits(root: Path, names: list[str], labels: dict[str, int], seed: int, notes: list[str]) -> dict[str, str]:
    path = root / "split.csv"
    patients = [name[:12] for name in names]
    if not path.is_file():
        found, groups = np.unique(patients, return_inverse=True)
        if len(found) < 2:
            raise HistoddError(f"one patient only ({found[0]}) in {root}: a patient-disjoint split needs at least two")
        test = draw_groups(np.array([labels[name] for name in names]), groups, TEST_FRACTION, seed)
        notes.append(
            f"no split.csv: {int(test.sum())} of {len(found)} patients are the test set, drawn with seed {seed} (the paper's "
            "split is not public)"
        )
        return {name: "test" if test[group] else "train" for name, group in zip(names, groups, strict=True)}
    rows = read_table(path, ("split",))
    by_name: dict[str, str] = {}
    for row in rows:
        if row["split"].lower() not in ("train", "test"):
            raise HistoddError(f"{path}, line {row['#line']}: split must be train or test, got {row['split']!r}")
        key = row.get("slide_id") or row.get("patient") or ""
        if not key:
            raise HistoddError(f"{path}, line {row['#line']}: names neither slide_id nor patient")
        if by_name.setdefault(key, row["split"].lower()) != row["split"].lower():
            raise HistoddError(f"{path}, line {row['#line']}: {key} is listed in both splits")
    result: dict[str, str] = {}
    sides: dict[str, str] = {}
    for name in names:
        side = next(
            (by_name[k] for k in (name, f"{name}.svs", name.partition(".")[0], name[:12]) if k in by_name), None
        )
        if side is None:
            continue
        if sides.setdefault(name[:12], side) != side:
            raise HistoddError(
                f"{path}: patient {name[:12]} has slides in train and in test: a patient belongs to one split"
            )
        result[name] = side
    missing = [name for name in names if name not in result]
    if missing:
        notes.append(f"{len(missing)} slides are not in split.csv and are left out: {some(missing)}")
    return result
