"""Whole-slide images: physical scale, tissue, tiles and polygon annotations, through OpenSlide.

Positions are always level-0 pixels. Scales are microns per pixel (mpp); 0.25 is 40x, 0.5 is 20x, 1 is 10x.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import defusedxml.ElementTree as ElementTree
import numpy as np
import openslide
from defusedxml import DefusedXmlException
from PIL import Image, ImageDraw

from histodd_bench.data.images import resize
from histodd_bench.errors import HistoddError

MPP_RANGE = (0.05, 20.0)  # a scale outside is a wrong tag, not a microscope
LEVEL_TOLERANCE = 0.01  # a level this close to the scale asked for is used as it is
TISSUE_MPP = 8.0
_SATURATION_FLOOR, _SATURATION_CEILING = 15, 50  # of 255; bounds on Otsu's threshold, see tissue_mask
_BLACK = 20  # of 255; darker pixels have no meaningful saturation
_OVERVIEW_SIDE = 4096  # px; larger overviews are made coarser, so that memory stays bounded
_BLOCK = 4096  # px read at once


class SlideError(HistoddError):
    """A slide or annotation that cannot be used. ``reason`` is short enough to be counted and listed."""

    def __init__(self, path: Path, reason: str):
        super().__init__(f"{path}: {reason}")
        self.path, self.reason = path, reason


class UnreadableTile(SlideError):
    """One region that could not be decoded; the slide has been reopened and other regions can still be read."""


def level0_mpp(properties: Mapping[str, str], override: float | None = None) -> float | None:
    """Microns per pixel of level 0: the override, else the slide's mpp, else 10 / objective power, else None.

    Values that are no numbers, or outside 0.05 to 20, count as missing.
    """

    def plausible(name: str, convert: Callable[[float], float]) -> float | None:
        try:
            mpp = convert(float(properties[name]))
        except (KeyError, ValueError, ZeroDivisionError):
            return None
        return mpp if MPP_RANGE[0] <= mpp <= MPP_RANGE[1] else None

    if override is not None:
        return override
    x, y = (plausible(f"openslide.mpp-{axis}", lambda mpp: mpp) for axis in "xy")
    if x is not None and y is not None:
        return (x + y) / 2
    return x or y or plausible("openslide.objective-power", lambda power: 10 / power)


class Slide:
    """An open slide of known scale. Open one per worker; use as a context manager.

    Args:
        path: any file OpenSlide reads.
        mpp: microns per pixel of level 0, overrides what the file says.

    Raises:
        SlideError: the file is refused by OpenSlide, or its scale is unknown and no override is given.
    """

    def __init__(self, path: Path, mpp: float | None = None):
        self.path = Path(path)
        self._handle = self._open()
        found = level0_mpp(self._handle.properties, mpp)
        if found is None:
            self.close()
            raise SlideError(
                self.path, "the file gives no believable scale (mpp or objective power): say it with --mpp"
            )
        self.mpp = found
        self.width, self.height = self._handle.dimensions
        self._downsamples = self._handle.level_downsamples

    def _open(self) -> openslide.OpenSlide:
        try:
            return openslide.OpenSlide(self.path)
        except openslide.OpenSlideUnsupportedFormatError:
            reason = "not a slide that OpenSlide reads" if self.path.exists() else "no such file"
            raise SlideError(self.path, reason) from None
        except (openslide.OpenSlideError, OSError) as error:
            raise SlideError(self.path, f"cannot be opened ({error})") from None

    def close(self) -> None:
        self._handle.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def side(self, size: int, mpp: float) -> float:
        """Length in level-0 pixels of ``size`` pixels at ``mpp``."""
        return size * mpp / self.mpp

    def read(self, x: int, y: int, width: int, height: int, mpp: float) -> np.ndarray:
        """Read a region at a physical scale.

        The coarsest level that is at least as fine as ``mpp`` (within 1 %) is read and area-averaged down to ``mpp``.
        What is transparent or outside the slide is white.

        Args:
            x, y: top-left corner in level-0 pixels.
            width, height: of the result in pixels.
            mpp: microns per pixel of the result.

        Returns:
            ``[height,width,3]`` uint8.

        Raises:
            UnreadableTile: the region cannot be decoded; the slide stays usable.
            SlideError: ``mpp`` is finer than the slide.
        """
        level = self._level_for(mpp)
        factor = mpp / (self.mpp * self._downsamples[level])
        if abs(factor - 1) <= LEVEL_TOLERANCE:
            factor = 1.0
        size = round(width * factor), round(height * factor)
        try:
            region = self._handle.read_region((x, y), level, size)
        except openslide.OpenSlideError as error:
            # After one failure OpenSlide fails every later read of the same handle.
            self.close()
            self._handle = self._open()
            raise UnreadableTile(self.path, f"region at ({x}, {y}) cannot be decoded ({error})") from None
        return resize(_on_white(region), height, width)

    def _level_for(self, mpp: float) -> int:
        fine_enough = [i for i, d in enumerate(self._downsamples) if self.mpp * d <= mpp * (1 + LEVEL_TOLERANCE)]
        if not fine_enough:
            raise SlideError(
                self.path, f"scanned at {self.mpp:.3g} mpp, too coarse for {mpp:.3g} mpp: choose a larger mpp"
            )
        return max(fine_enough, key=lambda i: self._downsamples[i])

    def overview(self, mpp: float = TISSUE_MPP) -> tuple[np.ndarray, float]:
        """The whole slide at ``mpp``, or coarser where it would exceed 4096 px, and the scale it came out at.

        Read in blocks, so that memory stays bounded whatever the levels of the slide. A block that cannot be decoded is white.
        """
        mpp = max(mpp, self.mpp, max(self.width, self.height) * self.mpp / _OVERVIEW_SIDE)
        scale = mpp / self.mpp
        width, height = max(int(self.width / scale), 1), max(int(self.height / scale), 1)
        result = np.full((height, width, 3), 255, dtype=np.uint8)
        step = max(int(_BLOCK / (scale / self._downsamples[self._level_for(mpp)])), 1)
        for top in range(0, height, step):
            for left in range(0, width, step):
                h, w = min(step, height - top), min(step, width - left)
                try:
                    block = self.read(round(left * scale), round(top * scale), w, h, mpp)
                except UnreadableTile:
                    continue
                result[top : top + h, left : left + w] = block
        return result, mpp

    def grid(self, size: int, mpp: float, stride: int | None = None) -> np.ndarray:
        """Top-left corners of all tiles of ``size`` px at ``mpp`` that lie inside the slide, row by row.

        Args:
            stride: distance between tiles in pixels at ``mpp``; default ``size`` (no overlap, no gap).

        Returns:
            ``[N,2]`` int64, (x, y) in level-0 pixels.
        """
        side, step = self.side(size, mpp), self.side(stride or size, mpp)
        if step < 1:
            raise HistoddError(f"stride must be at least one pixel, got {stride}")
        # Rounding of positions may overhang by less than a pixel of level 0: not a reason to lose a row of tiles.
        xs = np.arange(0, max(self.width - side + 1, 0), step)
        ys = np.arange(0, max(self.height - side + 1, 0), step)
        grid = np.stack(np.meshgrid(xs, ys), axis=-1).reshape(-1, 2)
        return np.round(grid).astype(np.int64)

    def tiles(self, corners: np.ndarray, size: int, mpp: float) -> Iterator[tuple[int, np.ndarray | UnreadableTile]]:
        """Yield (index into ``corners``, tile or what was wrong with it), in order; a bad tile never ends the loop."""
        for index, (x, y) in enumerate(corners.tolist()):
            try:
                yield index, self.read(x, y, size, size, mpp)
            except UnreadableTile as error:
                yield index, error


def _on_white(region: Image.Image) -> np.ndarray:
    """RGBA to ``[H,W,3]`` uint8 on white; plain RGB conversion would make transparent pixels black."""
    if region.getchannel("A").getextrema() != (255, 255):
        region = Image.alpha_composite(Image.new("RGBA", region.size, (255, 255, 255, 255)), region)
    return np.asarray(region.convert("RGB"))


@dataclass(frozen=True)
class Mask:
    """A binary picture of a slide: ``values`` ``[h,w]`` bool, one pixel per ``scale`` level-0 pixels."""

    values: np.ndarray
    scale: float

    def fraction(self, corners: np.ndarray, side: float) -> np.ndarray:
        """Share of each square that is True, ``[N]`` float in [0, 1].

        Args:
            corners: ``[N,2]`` top-left (x, y) in level-0 pixels.
            side: of the squares in level-0 pixels.
        """
        height, width = self.values.shape
        sums = np.zeros((height + 1, width + 1), dtype=np.int64)
        np.cumsum(np.cumsum(self.values, axis=0), axis=1, out=sums[1:, 1:])
        low = np.round(corners / self.scale).astype(np.int64)
        high = np.maximum(np.round((corners + side) / self.scale).astype(np.int64), low + 1)
        (left, top), (right, bottom) = (np.clip(low, 0, (width, height)).T, np.clip(high, 0, (width, height)).T)
        total = sums[bottom, right] - sums[top, right] - sums[bottom, left] + sums[top, left]
        return total / np.prod(high - low, axis=1)


def otsu(values: np.ndarray) -> int:
    """Otsu's threshold of uint8 values: v > threshold is the upper class. Constant values are their own threshold."""
    counts = np.bincount(values.ravel(), minlength=256).astype(np.float64)
    weight = np.cumsum(counts)
    moment = np.cumsum(counts * np.arange(256))
    with np.errstate(invalid="ignore", divide="ignore"):
        between = (moment[-1] * weight - moment * weight[-1]) ** 2 / (weight * (weight[-1] - weight))
    if not np.isfinite(between).any():
        return int(values.flat[0]) if values.size else 0
    return int(np.nanargmax(np.where(np.isfinite(between), between, -1.0)))


def tissue_mask(slide: Slide, mpp: float = TISSUE_MPP) -> Mask:
    """Tissue: pixels of an overview whose HSV saturation exceeds Otsu's threshold.

    The threshold is kept between 15 and 50 of 255: the floor so that the noise of a blank slide is not tissue, the ceiling so
    that a slide without glass does not lose its paler half. Nearly black pixels (voids of the scanner) are not tissue.
    """
    pixels, mpp = slide.overview(mpp)
    value = pixels.max(-1).astype(np.int32)
    saturation = ((value - pixels.min(-1)) * 255 // np.maximum(value, 1)).astype(np.uint8)
    seen = value >= _BLACK
    threshold = otsu(saturation[seen]) if seen.any() else 255
    threshold = min(max(threshold, _SATURATION_FLOOR), _SATURATION_CEILING)
    return Mask((saturation > threshold) & seen, mpp / slide.mpp)


@dataclass(frozen=True)
class Polygon:
    """An annotated outline: ``points`` ``[K,2]`` float level-0 pixels; ``inside`` False for an area cut out."""

    points: np.ndarray
    inside: bool


def read_asap(path: Path) -> list[Polygon]:
    """Outlines of an ASAP annotation file. Groups ``Tumor``, ``_0`` and ``_1`` are tumour, ``_2`` are cut-outs.

    Points and measurement marks are left out: they have no area.

    Raises:
        SlideError: not well-formed XML, an area with fewer than three points, or coordinates that are no numbers.
    """
    try:
        tree = ElementTree.parse(path)
    except (ElementTree.ParseError, DefusedXmlException, OSError) as error:
        raise SlideError(Path(path), f"no readable annotation XML ({error})") from None
    polygons = []
    for node in tree.iter("Annotation"):
        name, group, kind = node.get("Name", "?"), node.get("PartOfGroup", ""), node.get("Type", "Polygon")
        if kind in ("Dot", "PointSet", "Measurement"):
            continue
        if group not in ("Tumor", "_0", "_1", "_2"):
            raise SlideError(
                Path(path), f"annotation {name!r} is of unknown group {group!r}: expected Tumor, _0, _1 or _2"
            )
        points = _points(node, Path(path), name)
        polygons.append(Polygon(points, inside=group != "_2"))
    return polygons


def _points(node: Any, path: Path, name: str) -> np.ndarray:
    try:
        rows = [
            (float(c.get("Order", i)), float(c.get("X")), float(c.get("Y")))
            for i, c in enumerate(node.iter("Coordinate"))
        ]
    except (TypeError, ValueError):
        raise SlideError(path, f"annotation {name!r} has a coordinate that is no number") from None
    points = np.array([(x, y) for _, x, y in sorted(rows, key=lambda row: row[0])], dtype=np.float64).reshape(-1, 2)
    if len(points) < 3 or not np.isfinite(points).all():
        raise SlideError(path, f"annotation {name!r} is no area: it has {len(points)} points, or not finite ones")
    return points


def polygon_mask(polygons: list[Polygon], slide: Slide, mpp: float = TISSUE_MPP) -> Mask:
    """Rasterise outlines over a slide; larger ones first, so that an island in a cut-out stays."""
    mpp = max(mpp, slide.mpp, max(slide.width, slide.height) * slide.mpp / _OVERVIEW_SIDE)
    scale = mpp / slide.mpp
    picture = Image.new("1", (max(int(slide.width / scale), 1), max(int(slide.height / scale), 1)))
    draw = ImageDraw.Draw(picture)
    for polygon in sorted(polygons, key=lambda p: -_area(p.points)):
        # Pixel i covers i..i+1, its centre is i + 0.5.
        draw.polygon([tuple(point) for point in (polygon.points / scale - 0.5).tolist()], fill=int(polygon.inside))
    return Mask(np.asarray(picture), scale)


def _area(points: np.ndarray) -> float:
    x, y = points.T
    return float(abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))) / 2)
