"""Camelyon16 (Ehteshami Bejnordi et al. 2017): lymph nodes, normal against tumour, from two centres.

Slides are found by their names, anywhere under the root: ``training/normal/normal_001.tif``, ``training/tumor/tumor_001.tif`` and
``testing/images/test_001.tif`` as distributed first, ``images/*.tif`` as in the open-data bucket. ASAP annotations are
``<slide>.xml``, anywhere; ``reference.csv`` says which test slides have tumour. The paper cuts patches of 256 px at 5x.
``metadata.csv`` (columns slide_name, hospital_corrected; 0 is Radboud, 1 Utrecht), where there is one, gives the centres.
"""

import re
from pathlib import Path

from histodd_bench.data.csv_tables import read_table
from histodd_bench.data.jobs import SlideJob, Source, Tiling
from histodd_bench.data.listing import image_files
from histodd_bench.data.slides import some
from histodd_bench.errors import HistoddError

CLASSES = ("normal", "tumour")
CENTRES = ("Radboud", "Utrecht")
TILING = Tiling(size=256, mpp=2.0)  # 5x, paper 4.1
SLIDES = {"train": (159, 111), "test": (80, 49)}  # normal, tumour

# Slides whose outlines are not exhaustive, by the organisers' list: what lies outside them may be tumour, and is not used.
PARTLY_ANNOTATED = frozenset(
    f"tumor_{number:03d}"
    for number in (10, 15, 18, 20, 25, 29, 33, 34, 44, 46, 51, 54, 55, 56, 67, 79, 85, 92, 95, 110)
) | {"test_114"}
# normal_086 turned out to have a tumour and became tumor_111; test_049 is a duplicate.
REMOVED = {"normal_086": "it became tumor_111", "test_049": "a duplicate, taken out by the organisers"}

_NAME = re.compile(r"(normal|tumor|test)_(\d{3})\.tiff?", re.IGNORECASE)


def source(root: Path, seed: int) -> Source:
    """Slides under ``root``; the split is the challenge's, ``seed`` is not used.

    Raises:
        HistoddError: no slides there, or no ``reference.csv`` for the test slides.
    """
    files = image_files(root)
    notes: list[str] = []
    slides: dict[str, Path] = {}
    repeated = []
    for path in files:
        if _NAME.fullmatch(path.name):
            name = path.stem.lower()
            if "mask" in (part.lower() for part in path.relative_to(root).parts[:-1]):
                continue
            if slides.setdefault(name, path) is not path:
                repeated.append(str(path.relative_to(root)))
    if not slides:
        raise HistoddError(f"no Camelyon16 slides in {root}: expected normal_001.tif, tumor_001.tif, test_001.tif, ...")
    if repeated:
        notes.append(f"{len(repeated)} slides are there twice and used once: {some(repeated)}")
    removed = sorted(REMOVED.keys() & slides.keys())
    notes += [f"{name} is left out: {REMOVED[name]}" for name in removed]
    annotations = {path.stem.lower(): path for path in files if path.suffix.lower() == ".xml"}
    tumours = _test_tumours(root, files, any(name.startswith("test") for name in slides))
    centres = _centres(files)
    jobs, unannotated, unknown = [], [], []
    for name in sorted(slides.keys() - REMOVED.keys()):
        split = "test" if name.startswith("test") else "train"
        if split == "test" and name not in tumours:
            unknown.append(name)
            continue
        tumour = tumours[name] if split == "test" else name.startswith("tumor")
        if tumour and name not in annotations:
            unannotated.append(name)
            continue
        jobs.append(
            SlideJob(
                slide=name,
                path=slides[name],
                patient=name,
                split=split,
                label=None if tumour else 0,
                centre=centres.get(name, len(CENTRES)) if centres else None,
                annotation=annotations[name] if tumour else None,
                inside=(("*", 1),) if tumour else (),
                outside=0 if tumour and name not in PARTLY_ANNOTATED else None,
                strict=True,
            )
        )
    if unannotated:
        notes.append(f"{len(unannotated)} tumour slides have no <slide>.xml and are left out: {some(unannotated)}")
    if unknown:
        notes.append(f"{len(unknown)} test slides are not in reference.csv and are left out: {some(unknown)}")
    if not centres:
        notes.append("no metadata.csv: scanning centres are unknown")
    expected = sum(map(sum, SLIDES.values()))
    if len(jobs) != expected:
        notes.append(f"{len(jobs)} of the {expected} slides of Camelyon16 are used")
    names = (*CENTRES, "unknown") if centres and any(j.centre == len(CENTRES) for j in jobs) else CENTRES
    return Source("camelyon16", CLASSES, tuple(jobs), TILING, TILING.size, names if centres else (), tuple(notes))


def _find(files: list[Path], name: str) -> Path | None:
    return next((path for path in files if path.name.lower() == name), None)


def _test_tumours(root: Path, files: list[Path], needed: bool) -> dict[str, bool]:
    path = _find(files, "reference.csv")
    if path is None:
        if needed:
            raise HistoddError(f"{root} has test slides but no reference.csv: it says which of them have tumour")
        return {}
    rows = read_table(path, ("slide", "class"), header=("slide", "class", "type", "size"))
    found = {}
    for row in rows:
        name, kind = Path(row["slide"]).stem.lower(), row["class"].lower()
        if not _NAME.fullmatch(f"{name}.tif"):
            continue  # a header line
        if kind not in ("tumor", "normal"):
            raise HistoddError(f"{path}, line {row['#line']}: expected Tumor or Normal, got {row['class']!r}")
        found[name] = kind == "tumor"
    return found


def _centres(files: list[Path]) -> dict[str, int]:
    path = _find(files, "metadata.csv")
    if path is None:
        return {}
    found = {}
    for row in read_table(path, ("slide_name", "hospital_corrected")):
        value = row["hospital_corrected"]
        if value not in ("0", "1", "0.0", "1.0"):
            raise HistoddError(f"{path}, line {row['#line']}: hospital_corrected must be 0 or 1, got {value!r}")
        found[Path(row["slide_name"]).stem.lower()] = int(float(value))
    return found
