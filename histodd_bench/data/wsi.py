"""Whole-slide images: physical scale, regions and tiles, through OpenSlide.

Plain JPEG tiles, which most slides have, are decoded without it, to the same pixels (:mod:`histodd_bench.data.jpeg_tiles`).
Positions are always level-0 pixels. Scales are microns per pixel (mpp); 0.25 is 40x, 0.5 is 20x, 1 is 10x. Tissue is found in
:mod:`histodd_bench.data.tissue`, annotations are read in :mod:`histodd_bench.data.annotations`. Slide files are not trusted:
no region, tile or overview takes more memory than a fixed bound, whatever dimensions a file claims.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import openslide
from PIL import Image

from histodd_bench.data.images import resize
from histodd_bench.data.jpeg_tiles import JpegLevels
from histodd_bench.errors import HistoddError

MPP_RANGE = (0.05, 20.0)  # a scale outside is a wrong tag, not a microscope
LEVEL_TOLERANCE = 0.01  # a level this close to the scale asked for is used as it is
TISSUE_MPP = 8.0
OVERVIEW_SIDE = 4096  # px; larger overviews are made coarser, so that memory stays bounded
_BLOCK = 4096  # px; a larger region of a level is read in blocks of this side
_SMALL_BLOCK = 256  # px; a block of an overview that cannot be decoded is quartered down to this
_LARGEST_SIDE, _LARGEST_AREA = 1 << 20, 1 << 38  # px; the largest slides there are have about 2^18 x 2^18
_LARGEST_TILE = 1 << 26  # px; OpenSlide decodes whole tiles
_MOST_TILES = 20_000_000
_EXACT = (2, 4, 8, 16)  # factors for which Pillow's box average rounds as resize does


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
        self._pixels = JpegLevels(self.path, self._handle)
        found = level0_mpp(self._handle.properties, mpp)
        if found is None:
            self.close()
            raise SlideError(
                self.path,
                "the file gives no believable scale (mpp or objective power): say it with --mpp of 'data prepare', or in a "
                "column mpp of slides.csv",
            )
        self.mpp = found
        self.width, self.height = self._handle.dimensions
        self._downsamples = self._handle.level_downsamples
        try:
            self._refuse_absurd()
        except SlideError:
            self.close()
            raise

    def _open(self) -> openslide.OpenSlide:
        try:
            return openslide.OpenSlide(self.path)
        except openslide.OpenSlideUnsupportedFormatError:
            reason = "not a slide that OpenSlide reads" if self.path.exists() else "no such file"
            raise SlideError(self.path, reason) from None
        except (openslide.OpenSlideError, OSError) as error:
            raise SlideError(self.path, f"cannot be opened ({error})") from None

    def _refuse_absurd(self) -> None:
        if max(self.width, self.height) > _LARGEST_SIDE or self.width * self.height > _LARGEST_AREA:
            raise SlideError(self.path, f"claims to have {self.width} x {self.height} pixels, more than any real slide")
        for level in range(len(self._downsamples)):
            # A strip is a tile as wide as its level: only its product counts.
            sides = [
                self._handle.properties.get(f"openslide.level[{level}].tile-{a}", "0") for a in ("width", "height")
            ]
            if all(side.isdigit() for side in sides) and int(sides[0]) * int(sides[1]) > _LARGEST_TILE:
                raise SlideError(
                    self.path, f"has tiles of {sides[0]} x {sides[1]} pixels, too large to be decoded safely"
                )

    @property
    def quickhash(self) -> str | None:
        """OpenSlide's hash of the picture's coarsest level and properties: equal for copies of one slide."""
        return self._handle.properties.get("openslide.quickhash-1")

    @property
    def levels(self) -> tuple[tuple[int, int, float], ...]:
        """(width, height, downsample) of every level, finest first."""
        return tuple(
            (*size, float(d)) for size, d in zip(self._handle.level_dimensions, self._downsamples, strict=True)
        )

    def close(self) -> None:
        self._pixels.close()
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
        level, factor = self.level_for(mpp)
        if round(width * factor) * round(height * factor) <= _BLOCK * _BLOCK:
            return self._read(x, y, width, height, level, factor)
        result = np.empty((height, width, 3), dtype=np.uint8)
        step, scale = max(int(_BLOCK / factor), 1), mpp / self.mpp
        for top in range(0, height, step):
            for left in range(0, width, step):
                h, w = min(step, height - top), min(step, width - left)
                corner = round(x + left * scale), round(y + top * scale)
                result[top : top + h, left : left + w] = self._read(*corner, w, h, level, factor)
        return result

    def _read(self, x: int, y: int, width: int, height: int, level: int, factor: float) -> np.ndarray:
        size = max(round(width * factor), 1), max(round(height * factor), 1)
        try:
            region = self._pixels.read_region(x, y, level, size)
        except openslide.OpenSlideError as error:
            # After one failure OpenSlide fails every later read of the same handle.
            self.close()
            self._handle = self._open()
            self._pixels = JpegLevels(self.path, self._handle)
            raise UnreadableTile(self.path, f"region at ({x}, {y}) cannot be decoded ({error})") from None
        whole = round(factor)
        if whole in _EXACT and (width * whole, height * whole) == size:
            return _on_white(region, whole)
        return resize(_on_white(region), height, width)

    def level_for(self, mpp: float) -> tuple[int, float]:
        """The level that ``mpp`` is read from, and how many of its pixels make one pixel at ``mpp`` (1 within 1 %).

        Raises:
            SlideError: the slide is coarser than ``mpp``.
        """
        fine_enough = [i for i, d in enumerate(self._downsamples) if self.mpp * d <= mpp * (1 + LEVEL_TOLERANCE)]
        if not fine_enough:
            raise SlideError(
                self.path, f"scanned at {self.mpp:.3g} mpp, too coarse for {mpp:.3g} mpp: choose a larger mpp"
            )
        level = max(fine_enough, key=lambda i: self._downsamples[i])
        factor = mpp / (self.mpp * self._downsamples[level])
        return level, 1.0 if abs(factor - 1) <= LEVEL_TOLERANCE else factor

    def overview(self, mpp: float = TISSUE_MPP) -> "Overview":
        """The whole slide at ``mpp``, or coarser where it would exceed 4096 px.

        Read in blocks, so that memory stays bounded whatever the levels of the slide. What cannot be decoded is white.
        """
        mpp = max(mpp, self.mpp, max(self.width, self.height) * self.mpp / OVERVIEW_SIDE)
        scale = mpp / self.mpp
        width, height = max(int(self.width / scale), 1), max(int(self.height / scale), 1)
        pixels = np.full((height, width, 3), 255, dtype=np.uint8)
        unreadable = np.zeros((height, width), dtype=bool)
        _, factor = self.level_for(mpp)
        step = max(int(_BLOCK / factor), 1)
        blocks = [(t, left, step) for t in range(0, height, step) for left in range(0, width, step)]
        while blocks:
            top, left, side = blocks.pop()
            h, w = min(side, height - top), min(side, width - left)
            if h <= 0 or w <= 0:
                continue
            part = np.s_[top : top + h, left : left + w]
            try:
                pixels[part] = self.read(round(left * scale), round(top * scale), w, h, mpp)
            except UnreadableTile:
                half = (side + 1) // 2
                if side > 1 and side * factor > _SMALL_BLOCK:
                    blocks += [(top + i, left + j, half) for i in (0, half) for j in (0, half)]
                else:
                    unreadable[part] = True
        return Overview(pixels, unreadable, mpp)

    def grid(self, size: int, mpp: float, stride: int | None = None) -> np.ndarray:
        """Top-left corners of all tiles of ``size`` px at ``mpp`` that lie inside the slide, row by row.

        Args:
            stride: distance between tiles in pixels at ``mpp``; default ``size`` (no overlap, no gap).

        Returns:
            ``[N,2]`` int64, (x, y) in level-0 pixels.
        """
        side, step = self.side(size, mpp), self.side(size if stride is None else stride, mpp)
        if step < 1:
            raise SlideError(self.path, f"stride must be at least one pixel of level 0, got {step:.3g}")
        if (self.width / step) * (self.height / step) > _MOST_TILES:
            raise SlideError(
                self.path, f"has more than {_MOST_TILES:,} tiles of this size and stride: choose a larger stride"
            )
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


def _on_white(region: Image.Image, shrink: int = 1) -> np.ndarray:
    """RGBA to ``[H,W,3]`` uint8 on white, box-averaged by ``shrink``; plain RGB conversion would make transparent pixels black.

    The result is a view of planes ``[3,H,W]``: stores want them so, and splitting is far cheaper than transposing later.
    """
    if np.frombuffer(region.tobytes(), dtype="<u4").min() < 0xFF000000:  # alpha is the fourth byte
        region = Image.alpha_composite(Image.new("RGBA", region.size, (255, 255, 255, 255)), region)
    planes = np.empty((3, region.height // shrink, region.width // shrink), dtype=np.uint8)
    for channel in range(3):
        plane = region.getchannel(channel)
        planes[channel] = np.asarray(plane if shrink == 1 else plane.reduce(shrink))
    return planes.transpose(1, 2, 0)


@dataclass(frozen=True)
class Overview:
    """A slide seen as a whole: ``pixels`` ``[H,W,3]`` uint8 at ``mpp``; ``unreadable`` ``[H,W]`` bool where decoding failed."""

    pixels: np.ndarray
    unreadable: np.ndarray
    mpp: float
