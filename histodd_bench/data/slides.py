"""Anyone's slides: a folder with ``slides.csv``, columns slide, label and optionally split, patient, centre, annotation, mpp, outside.

- ``slide`` and ``annotation`` are files, relative to the folder or absolute; annotations are ASAP XML or QuPath GeoJSON.
- Without annotation every patch of the slide has the slide's ``label``. With one, patches inside the outlines have it; what
  is outside has the class ``outside`` where that column names one, and is left out otherwise. An annotated slide without
  ``label`` takes the classes from the outlines: the names of ASAP groups or QuPath classes.
- ``split`` is train or test, for all slides or for none; without it 30 % of the patients are drawn by the seed.
- ``patient`` (the slide itself where absent) is never on both sides of a split.
- ``mpp`` is the scale of level 0 in microns per pixel, for files that do not say it themselves.
"""

from collections.abc import Sequence
from glob import escape
from pathlib import Path

import numpy as np

from histodd_bench.data.annotations import read_annotation
from histodd_bench.data.csv_tables import read_table
from histodd_bench.data.images import printable
from histodd_bench.data.jobs import SlideJob, Source, Tiling
from histodd_bench.data.split import draw_groups
from histodd_bench.data.wsi import MPP_RANGE, SlideError
from histodd_bench.errors import HistoddError

FILE = "slides.csv"
OPTIONAL = ("label", "split", "patient", "centre", "annotation", "outside", "mpp")
TEST_FRACTION = 0.3
TILING = Tiling(size=256, mpp=1.0)
_NAMED = 5
_NO_SLIDES = (".xml", ".geojson", ".json", ".csv", ".txt")  # what may lie beside a slide under its name


def source(root: Path, seed: int) -> Source:
    """Slides listed in ``slides.csv`` under ``root``.

    Raises:
        HistoddError: a table that cannot be used; the message names the line or the value.
    """
    path = root / FILE
    rows = read_table(path, ("slide",), optional=OPTIONAL)
    notes: list[str] = []
    rows = _without_repeats(rows, path, notes)
    repeats = len(notes)
    found = [row for row in rows if (root / row["slide"]).is_file()]
    absent = [row["slide"] for row in rows if row not in found]
    ending = _without_ending(root, absent)
    if not found:
        raise HistoddError(
            f"{path} lists {len(rows)} slides and none is there{ending or f': paths must be relative to {root}'}"
        )
    if absent:
        notes.append(f"{len(absent)} of {len(rows)} slides of {FILE} are not there: {some(absent)}{ending}")
    outlines = {row["slide"]: _outline_names(root, row, notes) for row in found}
    left = f"{path}: {'; '.join(notes[repeats:])}; what is left" if len(notes) > repeats else str(path)
    found = [row for row in found if outlines[row["slide"]] is not None]
    classes = sorted({name for row in found for name in (outlines[row["slide"]] or ())})
    if len(classes) < 2:
        raise HistoddError(
            f"{left} has one class only ({', '.join(classes) or 'none'}): a classifier needs at least two"
        )
    spelled: dict[str, str] = {}
    for name in classes:
        if (other := spelled.setdefault(name.casefold(), name)) != name:
            raise HistoddError(
                f"{path}: the classes {other!r} and {name!r} differ only in case: write them alike in the table and its annotations"
            )
    index = {name: label for label, name in enumerate(classes)}
    centres = (
        tuple(sorted({row.get("centre") or "unknown" for row in found})) if any(r.get("centre") for r in found) else ()
    )
    splits, note = _splits(found, path, left, [index[min(outlines[r["slide"]] or ())] for r in found], seed)
    notes += _unknown_patients(found) + note
    jobs = []
    for row, split in zip(found, splits, strict=True):
        annotated, label = bool(row.get("annotation")), row.get("label", "")
        names = sorted(set(outlines[row["slide"]] or ()) - {row.get("outside") or None})
        inside = (("*", index[label]),) if label else tuple((name, index[name]) for name in names)
        jobs.append(
            SlideJob(
                slide=row["slide"],
                path=root / row["slide"],
                patient=row.get("patient") or row["slide"],
                split=split,
                label=index[label] if label and not annotated else None,
                centre=centres.index(row.get("centre") or "unknown") if centres else None,
                annotation=root / row["annotation"] if annotated else None,
                inside=inside if annotated else (),
                outside=index[row["outside"]] if annotated and row.get("outside") else None,
                mpp=_scale(row, path),
            )
        )
    return Source("slides", tuple(classes), tuple(jobs), TILING, TILING.size, centres, tuple(notes))


def some(names: Sequence[str]) -> str:
    """The first five names of a list."""
    return ", ".join(map(printable, names[:_NAMED])) + (
        f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    )


def _without_repeats(rows: list[dict[str, str]], path: Path, notes: list[str]) -> list[dict[str, str]]:
    seen: dict[str, dict[str, str]] = {}
    repeated = []
    for row in rows:
        if not row["slide"]:
            raise HistoddError(f"{path}, line {row['#line']}: no slide is named")
        first = seen.setdefault(row["slide"], row)
        if first is row:
            continue
        differing = [name for name in row if name != "#line" and row[name] != first.get(name)]
        if differing:
            raise HistoddError(
                f"{path}, line {row['#line']}: {row['slide']} is listed again with another {differing[0]} than on line {first['#line']}"
            )
        repeated.append(row["slide"])
    if repeated:
        notes.append(f"{len(repeated)} slides are listed twice in {path.name} and used once: {some(repeated)}")
    return list(seen.values())


def _outline_names(root: Path, row: dict[str, str], notes: list[str]) -> set[str] | None:
    """Classes that the patches of a row can have; None where its annotation cannot be used."""
    label, outside = row.get("label", ""), row.get("outside", "")
    if not row.get("annotation"):
        if not label:
            raise HistoddError(f"{root / FILE}, line {row['#line']}: {row['slide']} has neither label nor annotation")
        return {label}
    if label:
        return {label, outside} - {""}
    try:
        names = {p.name for p in read_annotation(root / row["annotation"], any_group=True) if p.inside}
    except SlideError as error:
        notes.append(f"{row['slide']} is left out: {error}")
        return None
    return (names | {outside}) - {""}


def _unknown_patients(rows: list[dict[str, str]]) -> list[str]:
    unknown = [row["slide"] for row in rows if not row.get("patient")]
    if len(unknown) == len(rows):
        return [
            f"WARNING: {FILE} names no patients: every slide counts as its own patient, so slides of one patient may be on "
            "both sides of a split"
        ]
    if unknown:
        return [f"WARNING: {len(unknown)} slides have no patient in {FILE} and count as their own: {some(unknown)}"]
    return []


def _without_ending(root: Path, absent: list[str]) -> str:
    """Says so where a slide that is not there is the name of one that is, less its ending."""
    for name in absent[:_NAMED]:
        path = root / name
        there = sorted(path.parent.glob(f"{escape(path.name)}.*"))
        there = [p for p in there if p.is_file() and p.suffix.lower() not in _NO_SLIDES]
        if there:
            return f": {printable(name)} must be written with its ending, as {printable(there[0].name)}"
    return ""


def _splits(
    rows: list[dict[str, str]], path: Path, left: str, labels: list[int], seed: int
) -> tuple[list[str], list[str]]:
    given = [row.get("split", "").lower() for row in rows]
    patients = [row.get("patient") or row["slide"] for row in rows]
    if not any(given):
        names, groups = np.unique(patients, return_inverse=True)
        if len(names) < 2:
            raise HistoddError(f"{left} has one patient only ({names[0]}): a split needs at least two")
        test = draw_groups(np.array(labels), groups, TEST_FRACTION, seed)
        note = f"no split given: {int(test.sum())} of {len(names)} patients are the test set, drawn with seed {seed}"
        return ["test" if test[group] else "train" for group in groups], [note]
    for row, split in zip(rows, given, strict=True):
        if split not in ("train", "test"):
            raise HistoddError(f"{path}, line {row['#line']}: split must be train or test, got {split!r}")
    both = {p for p, s in zip(patients, given, strict=True) if s == "train"} & {
        p for p, s in zip(patients, given, strict=True) if s == "test"
    }
    if both:
        raise HistoddError(
            f"{path}: patient {min(both)} has slides in train and in test: a patient belongs to one split"
        )
    return given, []


def _scale(row: dict[str, str], path: Path) -> float | None:
    text = row.get("mpp", "")
    if not text:
        return None
    try:
        mpp = float(text)
    except ValueError:
        mpp = 0.0
    if not MPP_RANGE[0] <= mpp <= MPP_RANGE[1]:
        raise HistoddError(f"{path}, line {row['#line']}: mpp must be microns per pixel from 0.05 to 20, got {text!r}")
    return mpp
