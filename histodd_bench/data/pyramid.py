"""Writing pyramidal tiled TIFFs that OpenSlide opens with their physical scale."""

import io
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tifffile
from PIL import Image

from histodd_bench.files import PARTIAL, writing

_TILE = 256


def write_pyramid(path: Path, pixels: np.ndarray, mpp: float, *, levels: int = 3, quality: int = 90) -> None:
    """Write a slide: JPEG tiles of 256 px, each level half the one before, resolution tags on every level.

    Args:
        path: where to; appears only when complete.
        pixels: ``[H,W,3]`` uint8, level 0.
        mpp: microns per pixel of level 0.
        levels: at most; a level smaller than one tile is left out.
        quality: of the JPEG compression, 1 to 95.
    """
    partial = path.with_name(path.name + PARTIAL)
    with writing(path):
        with tifffile.TiffWriter(partial) as file:
            level = pixels
            for index in range(levels):
                if index:
                    level = np.asarray(Image.fromarray(level).reduce(2))
                    if min(level.shape[:2]) < _TILE:
                        break
                per_cm = 1e4 / (mpp * 2**index)
                file.write(
                    _jpeg_tiles(level, quality),
                    shape=level.shape,
                    dtype=np.uint8,
                    tile=(_TILE, _TILE),
                    photometric="ycbcr",
                    subsampling=(1, 1),
                    compression="jpeg",
                    subfiletype=1 if index else 0,
                    resolution=(per_cm, per_cm),
                    resolutionunit="centimeter",
                    metadata=None,
                    software=False,
                )
        with open(partial, "rb+") as written:
            os.fsync(written.fileno())
        os.replace(partial, path)


def _jpeg_tiles(level: np.ndarray, quality: int) -> Iterator[bytes]:
    # Encoded here: tifffile's own encoder marks these as YCbCr but leaves them RGB, and OpenSlide then shows wrong colours.
    for y in range(0, level.shape[0], _TILE):
        for x in range(0, level.shape[1], _TILE):
            tile = level[y : y + _TILE, x : x + _TILE]
            missing = [(0, _TILE - tile.shape[0]), (0, _TILE - tile.shape[1]), (0, 0)]
            buffer = io.BytesIO()
            Image.fromarray(np.pad(tile, missing, mode="edge")).save(buffer, "JPEG", quality=quality, subsampling=0)
            yield buffer.getvalue()
