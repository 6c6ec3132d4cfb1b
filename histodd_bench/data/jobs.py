"""Slides as jobs: each turns one slide (or one slide's image files) into a store of labelled patches, all or nothing.

Which class a patch of an annotated slide belongs to: outlines cover a share of it, counted in 32 x 32 points. From
``positive`` on (half, by default) it has the class of the outline that covers most of it, where a smaller outline goes
before a larger one around it; up to ``negative`` (nothing at all, by default) it has the class of what is outside, where the
slide has one; between the two it is left out.
"""

import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from histodd_bench.data.annotations import Polygon, coverage, read_annotation
from histodd_bench.data.clam import file_name, read_coordinates
from histodd_bench.data.images import Fit, UnreadableImage, printable, read_rgb, resize, square
from histodd_bench.data.store import StoreWriter
from histodd_bench.data.tissue import tissue_mask
from histodd_bench.data.wsi import MPP_RANGE, TISSUE_MPP, Slide, SlideError, UnreadableTile
from histodd_bench.errors import UsageError
from histodd_bench.files import digest

VERSION = 1  # of the extraction; changes with every change to what a patch shows
_BATCH = 32  # patches held before they are written
_FINEST_MASK = 2.0  # mpp
_NAMED = 5  # unreadable tiles listed with their position

Report = Callable[[int], object]


@dataclass(frozen=True)
class Tiling:
    """How slides are cut into patches.

    Attributes:
        size: side of a patch in pixels at ``mpp``.
        mpp: microns per pixel at which patches are read; 0.5 is 20x, 1 is 10x, 2 is 5x.
        stride: distance between patches in pixels at ``mpp``; None: ``size``.
        min_tissue: a patch is kept when more than this share of it is tissue.
        positive, negative: see the module.
        override: microns per pixel of level 0, for all slides, whatever their files say.
        coordinates: folder of ``<slide>.h5`` files of CLAM to take patches from, instead of grid and tissue detection.
    """

    size: int = 256
    mpp: float = 1.0
    stride: int | None = None
    min_tissue: float = 0.5
    positive: float = 0.5
    negative: float = 0.0
    override: float | None = None
    coordinates: str | None = None

    def __post_init__(self) -> None:
        for name, value in (("target scale", self.mpp), ("--mpp", self.override)):
            if value is not None and not MPP_RANGE[0] <= value <= MPP_RANGE[1]:
                raise UsageError(f"{name}: {value:g} microns per pixel is not a microscope's: expected 0.05 to 20")
        if not 1 <= self.size <= 4096:
            raise UsageError(f"--size must be 1 to 4096 pixels, got {self.size}")
        if not 0 <= self.min_tissue < 1:
            raise UsageError(f"--min-tissue must be at least 0 and below 1, got {self.min_tissue:g}")
        if not 0 <= self.negative < self.positive <= 1:
            raise UsageError(
                f"--negative {self.negative:g} and --positive {self.positive:g} must be shares with 0 <= negative < positive <= 1"
            )


@dataclass(frozen=True)
class SlideJob:
    """One slide and what is known of it.

    Attributes:
        slide: its name, unique within the dataset; path: its file.
        label: class of all its patches, where it has no annotation.
        annotation: outlines; ``inside`` says which class (by outline name, ``*`` for any) is within them, ``outside`` which
            class the rest is, None where it is unknown and left out.
        mpp: microns per pixel of level 0, of this slide alone.
    """

    slide: str
    path: Path
    patient: str
    split: str
    label: int | None = None
    centre: int | None = None
    annotation: Path | None = None
    inside: tuple[tuple[str, int], ...] = ()
    outside: int | None = None
    strict: bool = False
    mpp: float | None = None

    def key(self, tiling: Tiling, image_size: int, classes: Sequence[str]) -> str:
        """Changes with everything that the extracted patches depend on."""
        coordinates = self._coordinates(tiling)
        described = {
            "version": VERSION,
            "files": [_state(path) for path in (self.path, self.annotation, coordinates) if path is not None],
            "rule": [self.label, list(map(list, self.inside)), self.outside, self.strict, self.mpp],
            "tiling": {**asdict(tiling), "coordinates": coordinates is not None},
            "size": image_size,
            "classes": list(classes),
        }
        return digest([self.slide, described])

    def _coordinates(self, tiling: Tiling) -> Path | None:
        if tiling.coordinates is None:
            return None
        folder = Path(tiling.coordinates)
        ours, clams = folder / file_name(self.slide), folder / f"{self.path.stem}.h5"
        return ours if ours.is_file() and not clams.is_file() else clams

    def plan(self, slide: Slide, tiling: Tiling) -> tuple[np.ndarray, np.ndarray]:
        """Patches to cut out of an open slide: corners ``[N,2]`` in level-0 pixels and labels ``[N]``, int64."""
        side = slide.side(tiling.size, tiling.mpp)
        slide.level_for(tiling.mpp)  # refuses a slide that is too coarse
        coordinates = self._coordinates(tiling)
        if coordinates is not None:
            corners = read_coordinates(coordinates, slide, side)
        else:
            corners = slide.grid(tiling.size, tiling.mpp, tiling.stride)
            if len(corners):
                mask = tissue_mask(slide, min(max(tiling.size * tiling.mpp / 16, _FINEST_MASK), TISSUE_MPP))
                corners = corners[mask.fraction(corners, side) > tiling.min_tissue]
        labels = self._labels(corners, side, tiling)
        return corners[labels >= 0], labels[labels >= 0]

    def _labels(self, corners: np.ndarray, side: float, tiling: Tiling) -> np.ndarray:
        if self.annotation is None:
            return np.full(len(corners), -1 if self.label is None else self.label, dtype=np.int64)
        polygons = read_annotation(self.annotation, any_group=not self.strict)
        labels = np.full(len(corners), -1, dtype=np.int64)
        most = np.zeros(len(corners))
        for name, label in self.inside:
            # Outlines of another class take away from larger ones around them, as cut-outs do.
            chosen = [Polygon(p.points, p.inside and name in ("*", p.name)) for p in polygons]
            share = coverage(chosen, corners, side)
            here = (share >= tiling.positive) & (share > most)
            labels[here], most[here] = label, share[here]
        if self.outside is not None:
            rest = coverage(polygons, corners, side) <= tiling.negative
            # A patch within a cut-out is not inside, but nobody said that it is the other class.
            cut = [Polygon(p.points, True) for p in polygons if not p.inside]
            rest &= coverage(cut, corners, side) <= tiling.negative
            labels[rest] = self.outside
        return labels

    def count(self, tiling: Tiling, classes: Sequence[str]) -> list[int]:
        """Number of patches per class, without reading them."""
        with Slide(self.path, self.mpp or tiling.override) as slide:
            return np.bincount(self.plan(slide, tiling)[1], minlength=len(classes)).tolist()

    def extract(self, target: Path, tiling: Tiling, image_size: int, classes: Sequence[str], report: Report) -> None:
        """Write the patches into a new store at ``target``; ``report`` is called with numbers of patches just done.

        Raises:
            SlideError: the slide or its annotation cannot be used, or not one of its tiles can be decoded.
            HistoddError: the store cannot be written.
        """
        size, mpp = tiling.size, tiling.mpp
        with Slide(self.path, self.mpp or tiling.override) as slide:
            corners, labels = self.plan(slide, tiling)
            level, _ = slide.level_for(mpp)
            bad: list[tuple[int, int]] = []
            tiles = np.empty((_BATCH, 3, image_size, image_size), dtype=np.uint8)
            with StoreWriter(target, (image_size, image_size), classes) as writer:
                for start in range(0, len(corners), _BATCH):
                    part = corners[start : start + _BATCH]
                    good: list[int] = []
                    for i, tile in slide.tiles(part, size, mpp):
                        if isinstance(tile, UnreadableTile):
                            bad.append((int(part[i][0]), int(part[i][1])))
                        else:
                            tiles[len(good)] = resize(tile, image_size, image_size).transpose(2, 0, 1)
                            good.append(start + i)
                    if good:
                        n, (x, y) = len(good), corners[good].T.tolist()
                        columns = {"x": x, "y": y, "level": [level] * n, "mpp": [size * mpp / image_size] * n}
                        writer.append(tiles[:n], labels[good].tolist(), [self.slide] * n, **columns)
                    report(len(part))
                if len(bad) and len(bad) == len(corners):
                    raise SlideError(self.path, f"not one of its {len(corners)} tiles can be decoded")
                about = {
                    "sides": {size: len(writer)},
                    "unreadable": len(bad),
                    "tiles": [f"({x}, {y})" for x, y in bad[:_NAMED]],
                    "quickhash": slide.quickhash,
                    "mpp": slide.mpp,
                    "levels": slide.levels,
                }
                writer.finish(about=about, fingerprint=False)


@dataclass(frozen=True)
class FilesJob:
    """The image files that were cut out of one slide: (path, class, x, y, side in microns) each; unknown is 0."""

    slide: str
    patient: str
    split: str
    files: tuple[tuple[Path, int, int, int, float], ...]
    centre: int | None = None
    fit: Fit = "crop"
    max_pixels: int | None = None

    def key(self, tiling: Tiling, image_size: int, classes: Sequence[str]) -> str:
        """Changes with everything that the extracted patches depend on."""
        files = [[*_state(path), label, x, y, field] for path, label, x, y, field in self.files]
        return digest([self.slide, VERSION, files, self.fit, image_size, list(classes)])

    def count(self, tiling: Tiling, classes: Sequence[str]) -> list[int]:
        """Number of files per class."""
        return np.bincount([label for _, label, *_ in self.files], minlength=len(classes)).tolist()

    def extract(self, target: Path, tiling: Tiling, image_size: int, classes: Sequence[str], report: Report) -> None:
        """As :meth:`SlideJob.extract`; files that cannot be read are counted, one at a time is in memory."""
        bad: list[str] = []
        sides: Counter[int] = Counter()
        with StoreWriter(target, (image_size, image_size), classes) as writer:
            for path, label, x, y, field in self.files:
                try:
                    pixels = square(read_rgb(path, max_pixels=self.max_pixels, at_least=2 * image_size), self.fit)
                except UnreadableImage as error:
                    bad.append(f"{printable(path.name)} ({error.reason})")
                    continue
                patch = resize(pixels, image_size, image_size).transpose(2, 0, 1)[None]
                writer.append(patch, [label], [self.slide], x=[x], y=[y], level=[0], mpp=[field / image_size])
                sides[len(pixels)] += 1
                report(1)
            if len(bad) == len(self.files):
                raise SlideError(self.files[0][0].parent, f"no readable image of slide {self.slide}: {bad[0]}")
            writer.finish(about={"sides": sides, "unreadable": len(bad), "tiles": bad[:_NAMED]}, fingerprint=False)


Job = SlideJob | FilesJob


@dataclass(frozen=True)
class Source:
    """What an adapter found on disk: everything needed to extract a dataset.

    Attributes:
        classes: class names in label order; centres: names, empty where unknown.
        jobs: one per slide, each with its split, ``train`` or ``test``.
        tiling: how its slides are cut up, unless the user says otherwise.
        image_size: side in pixels at which patches are stored, unless the user says otherwise.
        notes: what a reader of the results must know, one sentence each.
    """

    name: str
    classes: tuple[str, ...]
    jobs: tuple[Job, ...]
    tiling: Tiling = Tiling()
    image_size: int = 256
    centres: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    procedural: bool = False


def _state(path: Path) -> list[Any]:
    """Name, size and time of a file: others as soon as it is replaced."""
    try:
        status = os.stat(path)
        return [printable(path.name), status.st_size, status.st_mtime_ns]
    except OSError:
        return [printable(path.name), None, None]
