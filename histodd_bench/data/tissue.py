"""Where the tissue of a slide is: Otsu's threshold on the saturation of an overview, without pen marks."""

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter

from histodd_bench.data.wsi import TISSUE_MPP, Slide

_SATURATION_FLOOR, _SATURATION_CEILING = 15, 50  # of 255; bounds on Otsu's threshold, see tissue_mask
_BLACK = 20  # of 255; darker pixels have no meaningful saturation
_PEN_SHARE = 0.4  # of a pixel's neighbourhood that must look like ink before it counts as a pen mark
_PEN_RADIUS = 4  # px of the overview: neighbourhood, and how far a mark is grown over its pale edge


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


def pen_mask(pixels: np.ndarray) -> np.ndarray:
    """Marks of felt pens on an overview of H&E tissue.

    In H&E green is the weakest channel: haematoxylin passes blue and some red, eosin passes red and some blue. Ink that
    is green, teal or blue breaks that order, red ink passes neither green nor blue, black ink is dark without colour.
    A pixel counts where 40 % of its neighbourhood looks so; marks are grown by 4 px over their pale edges.

    Args:
        pixels: ``[H,W,3]`` uint8, at the scale of an overview (several microns per pixel: single cells must not show).

    Returns:
        ``[H,W]`` bool.
    """
    r, g, b = (pixels[..., c].astype(np.int16) for c in range(3))
    green = (g - r > 12) & (g >= b - 40) & (r < 190)
    blue = (b - r > 60) & (g - r > 0) & (r < 150)
    red = (r > 130) & (g < 70) & (b < 80) & (r - b > 90)
    black = (np.maximum(np.maximum(r, g), b) < 75) & (abs(r - b) < 18) & (abs(r - g) < 18)
    ink = green | blue | red | black
    if not ink.any():
        return ink
    picture = Image.fromarray(ink.astype(np.uint8) * 255).filter(ImageFilter.BoxBlur(_PEN_RADIUS))
    core = Image.fromarray((np.asarray(picture) >= 255 * _PEN_SHARE).astype(np.uint8) * 255)
    return np.asarray(core.filter(ImageFilter.MaxFilter(2 * _PEN_RADIUS + 1))) > 0


def tissue_pixels(pixels: np.ndarray) -> np.ndarray:
    """Tissue of an overview ``[H,W,3]`` uint8: ``[H,W]`` bool; see :func:`tissue_mask`."""
    value = pixels.max(-1).astype(np.int32)
    saturation = ((value - pixels.min(-1)) * 255 // np.maximum(value, 1)).astype(np.uint8)
    seen = (value >= _BLACK) & ~pen_mask(pixels)
    threshold = otsu(saturation[seen]) if seen.any() else 255
    threshold = min(max(threshold, _SATURATION_FLOOR), _SATURATION_CEILING)
    return (saturation > threshold) & seen


def tissue_mask(slide: Slide, mpp: float = TISSUE_MPP) -> Mask:
    """Tissue: pixels of an overview whose HSV saturation exceeds Otsu's threshold.

    The threshold is kept between 15 and 50 of 255: the floor so that the noise of a blank slide is not tissue, the ceiling so
    that a slide without glass does not lose its paler half. Nearly black pixels (voids of the scanner) and pen marks are
    not tissue. What cannot be decoded counts as tissue, so that its tiles are tried, fail and are reported.
    """
    seen = slide.overview(mpp)
    return Mask(tissue_pixels(seen.pixels) | seen.unreadable, seen.mpp / slide.mpp)
