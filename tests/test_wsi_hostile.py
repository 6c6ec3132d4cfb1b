"""Slides that are not what they say: absurd dimensions, undecodable parts, pen marks; memory and time stay bounded."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image
from slide_makers import draw, slide
from tiny_project import environment

from histodd_bench.data import wsi
from histodd_bench.data.images import read_rgb, resize
from histodd_bench.data.pyramid import write_pyramid
from histodd_bench.data.tissue import pen_mask, tissue_mask, tissue_pixels
from histodd_bench.data.wsi import Slide, SlideError, UnreadableTile


def patch_tags(path: Path, values: dict[str, int], page: int = 0) -> None:
    with tifffile.TiffFile(path, mode="r+") as file:
        for name, value in values.items():
            file.pages[page].tags[name].overwrite(value)


@pytest.mark.parametrize("size", [(4_000_000, 4_000_000), (2_000_000, 300), (1_000_000, 1_000_000)])
def test_absurd_dimensions_are_refused(tmp_path: Path, size: tuple[int, int]) -> None:
    path = slide(tmp_path / "bomb.tif", size=(512, 512), levels=1)
    patch_tags(path, {"ImageWidth": size[0], "ImageLength": size[1]})
    with pytest.raises(SlideError, match=r"more than any real slide|cannot be opened|not a slide") as error:
        Slide(path)
    assert "bomb.tif" in str(error.value)


def test_absurd_tiles_are_refused(tmp_path: Path) -> None:
    path = slide(tmp_path / "bomb.tif", size=(512, 512), levels=1)
    patch_tags(path, {"TileWidth": 65_520, "TileLength": 65_520})
    with pytest.raises(SlideError, match=r"too large to be decoded safely|cannot be opened|not a slide"):
        Slide(path)


def test_too_many_tiles_are_refused_before_they_are_listed(tmp_path: Path) -> None:
    with Slide(slide(tmp_path / "a.tif", size=(8192, 4096), levels=1)) as opened:
        with pytest.raises(SlideError, match=r"more than 20,000,000 tiles .*choose a larger stride"):
            opened.grid(16, 1.0, stride=1)
        with pytest.raises(SlideError, match="stride must be at least one pixel"):
            opened.grid(16, 1.0, stride=0)


def test_a_huge_region_is_read_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = slide(tmp_path / "a.tif", size=(3000, 2000), levels=1)
    with Slide(path) as opened:
        whole = opened.read(0, 0, 300, 200, 10.0)
        monkeypatch.setattr(wsi, "_BLOCK", 512)
        blocks = opened.read(0, 0, 300, 200, 10.0)
        assert np.abs(whole.astype(int) - blocks).max() <= 1
        monkeypatch.setattr(wsi, "_BLOCK", 1)
        assert np.abs(opened.read(0, 0, 9, 9, 10.0).astype(int) - whole[:9, :9]).max() <= 1


def test_a_large_slide_of_one_level_takes_bounded_memory(tmp_path: Path) -> None:
    """A single-level slide of 40,000 x 40,000 pixels (4.8 GB as RGB; its tiles are one tile, over and over)."""
    path = tmp_path / "large.tif"
    tile = draw(256, 256, 0, (0, 0, 256, 256))
    side = 40_000 // 256 * 256
    from histodd_bench.data.pyramid import _jpeg_tiles

    (jpeg,) = _jpeg_tiles(tile, 90)
    with tifffile.TiffWriter(path) as file:
        file.write((jpeg for _ in range((side // 256) ** 2)), shape=(side, side, 3), dtype=np.uint8, tile=(256, 256),
                   photometric="ycbcr", subsampling=(1, 1), compression="jpeg", resolution=(20000, 20000),
                   resolutionunit="centimeter", metadata=None, software=False)  # fmt: skip
    code = (
        "import resource, sys\nfrom pathlib import Path\nfrom histodd_bench.data.wsi import Slide\n"
        "import histodd_bench.data.tissue, histodd_bench.data.extract\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        f"with Slide(Path({str(path)!r})) as s:\n    s.read(0, 0, 128, 128, 20.0); s.read(0, 0, 512, 512, 8.0)\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment(tmp_path), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 600, f"{done.stdout} MiB"


@pytest.mark.parametrize("factor", [2, 4, 8, 16])
def test_whole_factors_give_what_the_area_average_gives(factor: int) -> None:
    pixels = np.random.default_rng(factor).integers(0, 256, (16 * factor, 12 * factor, 4), dtype=np.uint8)
    for alpha in (255, None):
        if alpha is not None:
            pixels[..., 3] = alpha
        region = Image.fromarray(pixels, "RGBA")
        assert np.array_equal(wsi._on_white(region, factor), resize(wsi._on_white(region), 16, 12))


def damaged(tmp_path: Path, tiles: tuple[int, ...], levels: int = 1) -> Path:
    path = slide(tmp_path / "hole.tif", size=(2048, 1024), levels=levels)
    with tifffile.TiffFile(path) as file:
        page = file.pages[0]
        places = [(page.dataoffsets[i], page.databytecounts[i]) for i in tiles]
    with open(path, "rb+") as file:
        for offset, count in places:
            file.seek(offset)
            file.write(b"\xab" * count)
    return path


def test_an_overview_loses_only_what_cannot_be_decoded(tmp_path: Path) -> None:
    with Slide(damaged(tmp_path, (0, 9))) as opened:
        seen = opened.overview(8.0)
        assert seen.unreadable.sum() == 2 * 32 * 32
        assert seen.unreadable[:32, :32].all() and seen.unreadable[32:64, 32:64].all()
        assert (seen.pixels[~seen.unreadable] == 255).mean() < 0.01 and (seen.pixels[seen.unreadable] == 255).all()
        mask = tissue_mask(opened, 8.0)
        grid = opened.grid(256, 1.0)
        assert (mask.fraction(grid, 256) > 0.5).all(), "undecodable tiles are tried, so that they are counted"
        bad = [i for i, tile in opened.tiles(grid, 256, 1.0) if isinstance(tile, UnreadableTile)]
    assert bad == [0, 9]


# ---- pen marks -------------------------------------------------------------------------------------------------------


INKS = {"green": (40, 130, 90), "blue": (35, 60, 150), "red": (200, 30, 50), "black": (30, 30, 32)}


@pytest.mark.parametrize("ink", INKS)
def test_marks_of_every_ink_are_found_and_tissue_is_not(ink: str) -> None:
    pixels = draw(400, 300, 0, (50, 50, 350, 250), (200, 100, 300, 200))
    clean = tissue_pixels(pixels)
    assert not pen_mask(pixels).any()
    pixels[120:150, :] = np.clip(np.array(INKS[ink]) + np.random.default_rng(1).normal(0, 6, (30, 400, 3)), 0, 255)
    found = pen_mask(pixels)
    assert found[122:148].mean() > 0.99 and not found[:105].any() and not found[165:].any()
    marked = tissue_pixels(pixels)
    assert not marked[122:148].any() and (marked[:100] == clean[:100]).mean() > 0.99


def test_real_pen_marks_and_real_tissue(shared_data: Path) -> None:
    green = pen_mask(read_rgb(shared_data / "hard_tiles" / "tcga-green-pen.png"))
    assert (
        0.12 < green.mean() < 0.25
        and green[:200, 380:420].mean() > 0.9
        and not green[:, 520:].any()
        and not green[:, :140].any()
    )
    assert pen_mask(read_rgb(shared_data / "hard_tiles" / "high-nuclei-score-red-pen-level1.png")).any()
    for name, mpp in (("CMU-1-Small-Region.svs", None), ("tcga-cr-7395-01a-01-ts1.svs", 0.5)):
        with Slide(shared_data / "wsi" / name, mpp) as opened:
            assert pen_mask(opened.overview(8.0).pixels).mean() < 0.001
    for name in ("source_image.png", "target_image.png"):
        image = Image.fromarray(read_rgb(shared_data / "stain" / "tiatoolbox" / name)).reduce(4)
        assert not pen_mask(np.asarray(image)).any()


def test_nearly_white_real_tiles_are_no_tissue(shared_data: Path) -> None:
    for name in ("almost-white-1.png", "almost-white-ihc.png"):
        assert tissue_pixels(read_rgb(shared_data / "hard_tiles" / name)).mean() < 0.02


# ---- physical scale on a real slide ------------------------------------------------------------------------------------


def box_average(pixels: np.ndarray, n: int) -> np.ndarray:
    """``[H,W,3]`` to ``[n,n,3]`` by exact area averages, from integrals along each axis."""
    for axis in (0, 1):
        edges = np.linspace(0, pixels.shape[axis], n + 1)
        integral = np.concatenate([np.zeros_like(pixels.take([0], axis)), pixels.cumsum(axis)], axis)
        low = np.minimum(np.floor(edges).astype(int), pixels.shape[axis] - 1)
        weight = (edges - low).reshape(-1, *[1] * (2 - axis))
        at = integral.take(low, axis) * (1 - weight) + integral.take(low + 1, axis) * weight
        pixels = np.diff(at, axis=axis) / (edges[1] - edges[0])
    return pixels


@pytest.mark.parametrize("magnification", [5, 10, 20])
def test_real_fields_agree_with_full_resolution_at_every_magnification(shared_data: Path, magnification: int) -> None:
    """Fields of 256 microns against the box average of full resolution: within 2 grey levels (20x is full resolution, the
    slide has 0.499 microns per pixel, which is within the tolerance of 1 %)."""
    with Slide(shared_data / "wsi" / "CMU-1-Small-Region.svs") as opened:
        mpp, n = 10 / magnification, 256 * magnification // 10
        fields = opened.grid(256, 1.0)[::5]
        for x, y in fields.tolist():
            got = opened.read(x, y, n, n, mpp).astype(float)
            side = n if magnification == 20 else round(n * mpp / opened.mpp)
            assert side * opened.mpp == pytest.approx(256, rel=0.003)
            full = opened.read(x, y, side, side, opened.mpp).astype(float)
            assert np.abs(got - box_average(full, n)).mean() < 2
    assert len(fields) >= 4


def test_write_pyramid_is_what_is_read(tmp_path: Path) -> None:
    pixels = draw(700, 500, 3, (0, 0, 700, 500))
    write_pyramid(tmp_path / "a.tif", pixels, 1.0, levels=1, quality=95)
    with Slide(tmp_path / "a.tif") as opened:
        assert np.abs(opened.read(0, 0, 700, 500, 1.0).astype(int) - pixels).mean() < 3
