"""How differently the slides of a dataset are stained, before and after normalisation to its template: a table and a picture.

One Macenko fit per slide, pooled over up to 64 of its patches, evenly spaced; after normalisation patches are normalised one by
one, as in training, and fitted again the same way. A stain is a unit vector of optical densities; how far slides differ is
the mean angle between a slide's vector and the mean of all.
"""

import csv
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from histodd_bench.data import store
from histodd_bench.data.store import Dataset
from histodd_bench.files import write_bytes, write_text
from histodd_bench.ops.macenko_fit import OK, STATUS_NAMES
from histodd_bench.stain import MacenkoNormalizer, describe
from histodd_bench.stain_stream import fit_pooled

PATCHES = 64  # per slide
_CELL, _MARGIN, _LABEL = 24, 8, 130  # px of the picture
_COLUMNS = ("h_red", "h_green", "h_blue", "e_red", "e_green", "e_blue", "h_max", "e_max")


@dataclass(frozen=True)
class SlideStain:
    """One slide's fit: ``stain`` ``[3,2]`` (columns haematoxylin, eosin), ``top`` ``[2]`` maximum concentrations, or None each."""

    stain: np.ndarray | None
    top: np.ndarray | None
    status: str


@dataclass(frozen=True)
class Row:
    """One slide of the report."""

    slide: str
    split: str
    centre: str
    patches: int
    before: SlideStain
    after: SlideStain


def stain_rows(dataset: Dataset, progress: Any) -> list[Row]:
    """Fit every slide of both splits; where slides are unknown, every group (patient) counts as one."""
    template = (dataset.preprocessing or describe(dataset.train)).template
    normalizer = MacenkoNormalizer(template)
    rows: list[Row] = []
    for split, patches in (("train", dataset.train), ("test", dataset.test)):
        if len(patches) == 0:
            continue
        names: tuple[str, ...] = ()
        columns: dict[str, np.ndarray] = {}
        if dataset.folder is not None:
            names, columns = store.slide_names(dataset.folder / split), store.load_columns(dataset.folder / split)
        which = columns["slides"] if names else patches.groups.numpy()
        names = names or patches.group_names
        order = np.argsort(which, kind="stable")
        found, starts = np.unique(which[order], return_index=True)
        with progress.task(f"stains, {split}", len(found)) as task:
            for slide, here in zip(found.tolist(), np.split(order, starts[1:]), strict=True):
                chosen = here[np.linspace(0, len(here) - 1, min(PATCHES, len(here))).round().astype(int)]
                images = patches.images[torch.from_numpy(np.unique(chosen))]
                centre = "" if patches.centres is None else patches.centre_names[int(patches.centres[here[0]])]
                after = _fit(normalizer.normalize(images))
                rows.append(Row(names[slide], split, centre, len(here), _fit(images), after))
                task.advance(1)
    return rows


def _fit(images: Tensor) -> SlideStain:
    stain, top, status = fit_pooled(images)
    if int(status[0]) != OK:
        return SlideStain(None, None, STATUS_NAMES[int(status[0])])
    return SlideStain(stain[0].double().numpy(), top[0].double().numpy(), "ok")


def spread(rows: list[Row], after: bool) -> tuple[float, float, float, float]:
    """Mean angles in degrees of haematoxylin and eosin to their means, and coefficients of variation of the two maxima."""
    fits = [row.after if after else row.before for row in rows]
    stains = np.array([fit.stain for fit in fits if fit.stain is not None]).reshape(-1, 3, 2)
    tops = np.array([fit.top for fit in fits if fit.top is not None]).reshape(-1, 2)
    if not len(stains):
        return (float("nan"),) * 4
    stains = stains / np.linalg.norm(stains, axis=1, keepdims=True)
    mean = stains.mean(0)
    mean /= np.linalg.norm(mean, axis=0)
    angles = np.degrees(np.arccos(np.clip((stains * mean).sum(1), -1, 1))).mean(0)
    varied = tops.std(0) / tops.mean(0)
    return float(angles[0]), float(angles[1]), float(varied[0]), float(varied[1])


def write_report(rows: list[Row], out: Path) -> None:
    """Write ``stains.csv`` (one line per slide) and ``stains.png`` (one column per slide, by centre) into ``out``."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    head = [f"{when}_{name}" for when in ("before", "after") for name in ("status", *_COLUMNS)]
    table.writerow(["slide", "split", "centre", "patches", *head])
    for row in rows:
        table.writerow([row.slide, row.split, row.centre, row.patches, *_cells(row.before), *_cells(row.after)])
    write_text(out / "stains.csv", text.getvalue())
    picture = io.BytesIO()
    _picture(rows).save(picture, "PNG")
    write_bytes(out / "stains.png", picture.getvalue())


def _cells(fit: SlideStain) -> list[str]:
    if fit.stain is None or fit.top is None:
        return [fit.status, *[""] * len(_COLUMNS)]
    return [fit.status, *(f"{value:.4f}" for value in (*fit.stain[:, 0], *fit.stain[:, 1], *fit.top))]


def _picture(rows: list[Row]) -> Image.Image:
    """Colours of both stains at their maximum, before and after, one column per slide; a line between centres."""
    rows = sorted(rows, key=lambda row: (row.centre, row.split != "train", row.slide))
    width = _LABEL + len(rows) * _CELL + _MARGIN
    picture = Image.new("RGB", (width, 6 * _CELL + 3 * _MARGIN), "white")
    draw = ImageDraw.Draw(picture)
    lines = (("haematoxylin", "before", 0), ("eosin", "before", 1), ("haematoxylin", "after", 0), ("eosin", "after", 1))
    for index, (name, when, stain) in enumerate(lines):
        top = _MARGIN + int((index + 0.5 * (index >= 2)) * _CELL)
        draw.text((_MARGIN, top + 6), f"{name}, {when}", fill="black")
        for column, row in enumerate(rows):
            fit = row.before if when == "before" else row.after
            left = _LABEL + column * _CELL
            box = (left, top, left + _CELL - 2, top + _CELL - 2)
            if fit.stain is None or fit.top is None:
                draw.line((left, top, left + _CELL - 2, top + _CELL - 2), fill="gray")
                continue
            light = 255 * np.exp(-fit.stain[:, stain] * fit.top[stain])
            draw.rectangle(box, fill=tuple(int(v) for v in np.clip(light, 0, 255)))
    for column, row in enumerate(rows):
        if column == 0 or row.centre != rows[column - 1].centre:
            left = _LABEL + column * _CELL
            draw.line((left - 2, _MARGIN, left - 2, 6 * _CELL), fill="black")
            draw.text((left, int(5.2 * _CELL)), row.centre or "slides", fill="black")
    return picture
