"""The JPEG tiles of a TIFF slide, decoded directly.

OpenSlide spends longer on putting a region together than on decoding its tiles. Where the file is a plain TIFF of JPEG
tiles and the region lies on whole pixels of a level, the tiles can be decoded and cut without it. OpenSlide stays the authority:
a level is only read here once a coloured region of it has come out the same through both, and whatever the strict decoder
here refuses, or does not know, is OpenSlide's to read or to refuse.
"""

import os
from collections import OrderedDict
from pathlib import Path

import numpy as np
import openslide
import simplejpeg
import tifffile
from PIL import Image

_VENDORS = ("aperio", "generic-tiff")
_CACHE_BYTES = 32 << 20  # of decoded tiles of a level; OpenSlide's own default
_COLOURED = 16  # grey levels between a pixel's channels; a grey region comes out the same in a wrong colour space
_START = b"\xff\xd8"
_ADOBE = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00"  # and one byte: 0 = RGB, 1 = YCbCr


class JpegTiles:
    """The tiles of one level.

    Args:
        page: a directory of the file with JPEG tiles of three bytes per pixel.
    """

    def __init__(self, page: tifffile.TiffPage):
        self.width, self.height = page.imagewidth, page.imagelength
        self._side = page.tilewidth, page.tilelength
        self._across = -(-self.width // page.tilewidth)
        self._offsets, self._counts = page.dataoffsets, page.databytecounts
        tables = page.jpegtables or _START + b"\xff\xd9"
        transform = 0 if page.photometric == tifffile.PHOTOMETRIC.RGB else 1
        self._head = _START + _ADOBE + bytes([transform]) + tables[2:-2]
        self.trusted = False  # whether a coloured region has been compared
        self._cache: OrderedDict[int, np.ndarray] = OrderedDict()

    def region(self, file: int, x: int, y: int, width: int, height: int) -> Image.Image | None:
        """RGBA region at (x, y) of this level, or None where OpenSlide has to read it.

        Args:
            file: descriptor of the open slide.
        """
        if x < 0 or y < 0 or x + width > self.width or y + height > self.height:
            return None
        tile_w, tile_h = self._side
        rows, columns = range(y // tile_h, -(-(y + height) // tile_h)), range(x // tile_w, -(-(x + width) // tile_w))
        if (x % tile_w, y % tile_h, width, height) == (0, 0, tile_w, tile_h):  # seldom needed again: not kept
            pixels = self._decode(file, rows[0] * self._across + columns[0])
        else:
            pixels = np.empty((height, width, 4), dtype=np.uint8)
            for row in rows:
                for column in columns:
                    tile = self._cached(file, row * self._across + column)
                    if tile is None:
                        return None
                    top, left = row * tile_h - y, column * tile_w - x  # of the tile within the region
                    part = tile[max(-top, 0) : height - top, max(-left, 0) : width - left]
                    top, left = max(top, 0), max(left, 0)
                    pixels[top : top + part.shape[0], left : left + part.shape[1]] = part
        return None if pixels is None else Image.frombuffer("RGBA", (width, height), pixels, "raw", "RGBA", 0, 1)

    def same(self, mine: Image.Image, theirs: Image.Image) -> bool:
        """Whether OpenSlide read the same region alike; from the first coloured one on, this level is trusted."""
        pixels = np.asarray(mine)
        alike = bool((pixels == np.asarray(theirs)).all())
        rgb = pixels[..., :3]
        self.trusted = alike and int((rgb.max(axis=2) - rgb.min(axis=2)).max()) >= _COLOURED
        return alike

    def _cached(self, file: int, index: int) -> np.ndarray | None:
        if index in self._cache:
            self._cache.move_to_end(index)
            return self._cache[index]
        tile = self._decode(file, index)
        if tile is not None:
            self._cache[index] = tile
            while len(self._cache) * tile.nbytes > _CACHE_BYTES:
                self._cache.popitem(last=False)
        return tile

    def _decode(self, file: int, index: int) -> np.ndarray | None:
        width, height = self._side
        tile = np.empty((height, width, 4), dtype=np.uint8)
        if index >= len(self._offsets) or not 0 < self._counts[index] <= tile.nbytes:
            return None
        try:
            data = os.pread(file, self._counts[index], self._offsets[index])
            if not data.startswith(_START):
                return None
            decoded = simplejpeg.decode_jpeg(self._head + data[2:], "RGBA", buffer=tile)
        except (ValueError, OSError, OverflowError):  # damaged, of other dimensions than its tile, or not in the file
            return None
        return tile if decoded.shape == tile.shape else None


class JpegLevels:
    """The levels of one open slide that can be read without OpenSlide; empty where none can.

    Args:
        path: the slide.
        handle: the same, opened by OpenSlide.
    """

    def __init__(self, path: Path, handle: openslide.OpenSlide):
        self._handle = handle
        self._levels = _levels(path, handle)
        self._file = os.open(path, os.O_RDONLY) if self._levels else -1

    def read_region(self, x: int, y: int, level: int, size: tuple[int, int]) -> Image.Image:
        """As OpenSlide's ``read_region``: (x, y) in level-0 pixels; RGBA.

        Raises:
            OpenSlideError: as there.
        """
        tiles = self._levels.get(level)
        down = self._handle.level_downsamples[level]
        if tiles is None or (x / down) % 1 or (y / down) % 1:
            return self._handle.read_region((x, y), level, size)
        mine = tiles.region(self._file, int(x / down), int(y / down), *size)
        if mine is None:
            return self._handle.read_region((x, y), level, size)
        if not tiles.trusted:
            theirs = self._handle.read_region((x, y), level, size)
            if not tiles.same(mine, theirs):
                del self._levels[level]
            return theirs
        return mine

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
        self._levels, self._file = {}, -1


def _levels(path: Path, handle: openslide.OpenSlide) -> dict[int, JpegTiles]:
    if handle.properties.get("openslide.vendor") not in _VENDORS:
        return {}
    try:
        with tifffile.TiffFile(path) as file:
            pages = [p for p in file.pages if isinstance(p, tifffile.TiffPage) and _plain(p)]
            found = {}
            for level, size in enumerate(handle.level_dimensions):
                same = [p for p in pages if (p.imagewidth, p.imagelength) == size]
                if len(same) == 1:
                    found[level] = JpegTiles(same[0])
            return found
    except Exception:  # tifffile raises many types for what it does not understand; OpenSlide reads the slide then
        return {}


def _plain(page: tifffile.TiffPage) -> bool:
    return (
        page.is_tiled
        and page.compression == tifffile.COMPRESSION.JPEG
        and page.photometric in (tifffile.PHOTOMETRIC.RGB, tifffile.PHOTOMETRIC.YCBCR)
        and page.samplesperpixel == 3
        and page.bitspersample == 8
        and page.planarconfig == tifffile.PLANARCONFIG.CONTIG
    )
