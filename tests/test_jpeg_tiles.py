"""Tiles decoded without OpenSlide: the same pixels and the same refusals, always."""

import io
import os
from pathlib import Path

import numpy as np
import openslide
import pytest
import tifffile
from PIL import Image
from slide_makers import draw

from histodd_bench.data.jpeg_tiles import JpegLevels

WIDTH, HEIGHT = 700, 500  # no multiple of any tile


def encode(tile: np.ndarray, *, rgb: bool, subsampling: int, streamtype: int = 0) -> bytes:
    buffer = io.BytesIO()
    options = {"keep_rgb": True} if rgb else {"subsampling": subsampling}
    Image.fromarray(tile).save(buffer, "JPEG", quality=80, streamtype=streamtype, **options)
    return buffer.getvalue()


def write(
    path: Path, *, tile: tuple[int, int] = (256, 256), photometric: str = "ycbcr", rgb: bool = False, subsampling: int = 0,
    tables: bool = False,
) -> Path:  # fmt: skip
    """Two levels, (width, height) tiles; ``tables`` keeps the quantisation and Huffman tables once for all tiles."""
    with tifffile.TiffWriter(path) as file:
        level = draw(WIDTH, HEIGHT, 0, (0, 0, WIDTH, HEIGHT), (100, 100, 400, 300))
        for index in range(2):
            if index:
                level = np.asarray(Image.fromarray(level).reduce(2))
            tiles = [
                np.pad(part, [(0, tile[1] - part.shape[0]), (0, tile[0] - part.shape[1]), (0, 0)], mode="edge")
                for y in range(0, level.shape[0], tile[1])
                for x in range(0, level.shape[1], tile[0])
                for part in [level[y : y + tile[1], x : x + tile[0]]]
            ]
            kind = {"rgb": rgb, "subsampling": subsampling}
            file.write(
                iter([encode(t, **kind, streamtype=2 if tables else 0) for t in tiles]), shape=level.shape, dtype=np.uint8,
                tile=(tile[1], tile[0]), photometric="ycbcr", compression="jpeg", subfiletype=index,
                subsampling=(2, 2) if subsampling == 2 and photometric == "ycbcr" else (1, 1),
                jpegtables=encode(tiles[0], **kind, streamtype=1) if tables else None, resolution=(20000, 20000),
                resolutionunit="centimeter", metadata=None, software=False,
            )  # fmt: skip
    if photometric == "rgb":  # tifffile writes JPEG as YCbCr whatever it is told
        with tifffile.TiffFile(path, mode="r+b") as file:
            for page in file.pages:
                page.tags["PhotometricInterpretation"].overwrite(2)
    return path


def outcome(read, *where) -> bytes | str:  # type: ignore[no-untyped-def]
    try:
        return np.asarray(read(*where)).tobytes()
    except openslide.OpenSlideError:
        return "refused"


def compare(path: Path, regions: int = 60, seed: int = 0) -> dict[int, bool]:
    """Random regions through both; which levels were read directly in the end."""
    rng = np.random.default_rng(seed)
    handle = openslide.OpenSlide(path)
    levels = JpegLevels(path, handle)
    for _ in range(regions):
        level = int(rng.integers(2))
        x, y = (2 * int(v) for v in rng.integers(-20, (WIDTH // 2, HEIGHT // 2)))
        size = tuple(int(v) for v in rng.integers(1, 400, 2))
        with openslide.OpenSlide(path) as fresh:  # a handle fails for good after a damaged tile
            theirs = outcome(fresh.read_region, (x, y), level, size)
        mine = outcome(levels.read_region, x, y, level, size)
        assert mine == theirs, (x, y, level, size)
        if mine == "refused":
            levels.close()
            handle = openslide.OpenSlide(path)
            levels = JpegLevels(path, handle)
    used = {level: tiles.trusted for level, tiles in levels._levels.items()}
    levels.close()
    return used


@pytest.mark.parametrize(
    "kind",
    [
        {},
        {"tile": (240, 176)},
        {"subsampling": 2},
        {"subsampling": 2, "tables": True},
        {"photometric": "rgb", "rgb": True},
        {"photometric": "rgb", "rgb": True, "tables": True},
    ],
)
def test_regions_are_openslides_to_the_bit(tmp_path: Path, kind: dict) -> None:
    assert compare(write(tmp_path / "slide.tif", **kind)) == {0: True, 1: True}


@pytest.mark.parametrize("kind", [{"rgb": True}, {"photometric": "rgb"}])
def test_a_wrong_tag_shows_as_openslide_shows_it(tmp_path: Path, kind: dict) -> None:
    compare(write(tmp_path / "slide.tif", **kind))


def test_a_level_that_comes_out_otherwise_is_left_to_openslide(tmp_path: Path) -> None:
    path = write(tmp_path / "slide.tif")
    with openslide.OpenSlide(path) as handle:
        levels = JpegLevels(path, handle)
        wrong = levels._levels[0]
        wrong._offsets = wrong._offsets[::-1]
        read = np.asarray(levels.read_region(256, 0, 0, (256, 256)))
        assert (read == np.asarray(handle.read_region((256, 0), 0, (256, 256)))).all()
        assert set(levels._levels) == {1}
        levels.close()


def test_grey_regions_do_not_earn_trust(tmp_path: Path) -> None:
    path = tmp_path / "grey.tif"
    with tifffile.TiffWriter(path) as file:
        tile = encode(np.full((256, 256, 3), 200, np.uint8), rgb=False, subsampling=0)
        file.write(
            iter([tile] * 4), shape=(512, 512, 3), dtype=np.uint8, tile=(256, 256), photometric="ycbcr",
            subsampling=(1, 1), compression="jpeg", metadata=None,
        )  # fmt: skip
    with openslide.OpenSlide(path) as handle:
        levels = JpegLevels(path, handle)
        levels.read_region(0, 0, 0, (256, 256))
        assert not levels._levels[0].trusted
        levels.close()


def test_tiles_that_are_not_in_the_file_are_openslides(tmp_path: Path) -> None:
    path = write(tmp_path / "slide.tif")
    with openslide.OpenSlide(path) as handle:
        levels = JpegLevels(path, handle)
        tiles, file = levels._levels[0], levels._file
        assert tiles.region(file, 0, 0, 256, 256) is not None
        right, counts = list(tiles._offsets), list(tiles._counts)
        for offset, count in ((1 << 40, counts[0]), ((1 << 64) - 1, counts[0]), (right[0] + 1, counts[0]), (right[0], 0)):
            tiles._offsets, tiles._counts = [offset, *right[1:]], [count, *counts[1:]]
            assert tiles.region(file, 0, 0, 256, 256) is None
        assert tiles.region(file, 256, 0, 256, 256) is not None
        levels.close()


@pytest.mark.parametrize("seed", range(6))
def test_damaged_tiles_are_openslides_to_refuse(tmp_path: Path, seed: int) -> None:
    """Bytes overwritten anywhere in a tile, its header included, which may then claim other dimensions."""
    path = write(tmp_path / "slide.tif", tile=(128, 128), subsampling=2 * (seed % 2))
    rng = np.random.default_rng(seed)
    with tifffile.TiffFile(path) as file:
        page = file.pages[0]
        spans = list(zip(page.dataoffsets, page.databytecounts, strict=True))
    data = bytearray(path.read_bytes())
    for index in rng.choice(len(spans), 6, replace=False):
        offset, count = spans[index]
        at = offset + int(rng.integers(0, count - 16))
        data[at : at + 8] = rng.bytes(8)
    path.write_bytes(data)
    compare(path, regions=40, seed=seed)


def test_what_is_no_jpeg_tiff_is_openslides(tmp_path: Path) -> None:
    path = tmp_path / "deflate.tif"
    tifffile.imwrite(
        path, draw(512, 512, 0), tile=(256, 256), photometric="rgb", compression="deflate", resolution=(20000, 20000),
        resolutionunit="centimeter", metadata=None,
    )  # fmt: skip
    with openslide.OpenSlide(path) as handle:
        levels = JpegLevels(path, handle)
        assert levels._levels == {}
        assert levels.read_region(3, 5, 0, (64, 64)).tobytes() == handle.read_region((3, 5), 0, (64, 64)).tobytes()


def test_nothing_stays_open(tmp_path: Path) -> None:
    path = write(tmp_path / "slide.tif")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with openslide.OpenSlide(path) as handle:
            levels = JpegLevels(path, handle)
            levels.read_region(0, 0, 0, (64, 64))
            levels.close()
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("name", ["CMU-1-Small-Region.svs", "tcga-cr-7395-01a-01-ts1.svs", "small_HE_levels.tiff"])
def test_real_slides(shared_data: Path, name: str) -> None:
    path = shared_data / "wsi" / name
    rng = np.random.default_rng(0)
    with openslide.OpenSlide(path) as handle:
        levels = JpegLevels(path, handle)
        for _ in range(40):
            x, y = (int(v) for v in rng.integers(0, handle.dimensions))
            size = tuple(int(v) for v in rng.integers(1, 500, 2))
            mine, theirs = levels.read_region(x, y, 0, size), handle.read_region((x, y), 0, size)
            assert mine.tobytes() == theirs.tobytes()
        levels.close()
