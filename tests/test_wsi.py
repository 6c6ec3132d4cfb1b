"""Slides: physical scale, tissue, tiles, faults and annotations, on real files and on pyramids made here."""

import os

import numpy as np
import pytest
import tifffile
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from histodd_bench.data.annotations import Polygon, polygon_mask, read_asap
from histodd_bench.data.pyramid import write_pyramid
from histodd_bench.data.tissue import Mask, otsu, tissue_mask
from histodd_bench.data.wsi import Slide, SlideError, UnreadableTile, level0_mpp
from histodd_bench.errors import HistoddError


def picture(height, width, seed=0, detail=40):
    """A smooth coloured picture, so that JPEG changes little."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(60, 240, (height // detail + 2, width // detail + 2, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


@pytest.fixture(scope="module")
def slide_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("slides") / "made.tif"
    write_pyramid(path, picture(1100, 1500), 0.5)
    return path


@pytest.mark.parametrize(
    ("properties", "override", "expected"),
    [
        ({"openslide.mpp-x": "0.25", "openslide.mpp-y": "0.25", "openslide.objective-power": "20"}, None, 0.25),
        ({"openslide.mpp-x": "0.5", "openslide.mpp-y": "0.52"}, None, 0.51),
        ({"openslide.objective-power": "40"}, None, 0.25),
        ({"openslide.mpp-x": "352.9", "openslide.mpp-y": "352.9", "openslide.objective-power": "20"}, None, 0.5),
        ({"openslide.mpp-x": "352.9", "openslide.mpp-y": "352.9"}, None, None),
        ({"openslide.mpp-x": "0", "openslide.mpp-y": "nan"}, None, None),
        ({"openslide.mpp-x": "wide"}, None, None),
        ({"openslide.objective-power": "0"}, None, None),
        ({}, None, None),
        ({"openslide.mpp-x": "0.25"}, 0.5, 0.5),
    ],
)
def test_scale_comes_from_mpp_then_objective(properties, override, expected):
    assert level0_mpp(properties, override) == (expected if expected is None else pytest.approx(expected))


def test_a_written_pyramid_has_its_scale_levels_and_colours(slide_path):
    with Slide(slide_path) as slide:
        assert slide.mpp == pytest.approx(0.5) and (slide.width, slide.height) == (1500, 1100)
        assert slide._downsamples == pytest.approx((1, 2, 4), rel=0.01)
        got = slide.read(0, 0, 1500, 1100, 0.5)
    assert np.abs(got.astype(int) - picture(1100, 1500)).mean() < 2


@pytest.mark.parametrize("mpp", [0.5, 0.7, 1.0, 1.3, 2.0, 3.1, 8.0])
def test_the_same_field_agrees_at_every_scale(slide_path, mpp):
    x, y, side = 200, 100, 640  # level-0 pixels
    n = round(side * 0.5 / mpp)
    with Slide(slide_path) as slide:
        got = slide.read(x, y, n, n, mpp).astype(float)
    full = Image.fromarray(picture(1100, 1500)[y : y + side, x : x + side])
    expected = np.asarray(full.resize((n, n), Image.Resampling.BOX)).astype(float)
    assert np.abs(got - expected).mean() < 2


def test_a_level_within_one_percent_is_used_as_it_is(slide_path):
    with Slide(slide_path) as slide:
        assert [slide.level_for(mpp)[0] for mpp in (0.995, 0.98, 99)] == [1, 0, 2]
        with pytest.raises(SlideError, match=r"scanned at 0.5 mpp, too coarse for 0.25"):
            slide.read(0, 0, 8, 8, 0.25)


def test_outside_the_slide_is_white(slide_path):
    with Slide(slide_path) as slide:
        region = slide.read(-64, -64, 128, 128, 0.5)
    assert (region[:64] == 255).all() and (region[:, :64] == 255).all() and (region[70:, 70:] < 250).all()


@given(st.integers(16, 300), st.sampled_from([0.5, 0.9, 1.0, 2.0]), st.integers(8, 400))
def test_the_grid_lies_inside_and_misses_nothing(slide_path, size, mpp, stride):
    with Slide(slide_path) as slide:
        grid, side, step = slide.grid(size, mpp, stride), slide.side(size, mpp), slide.side(stride, mpp)
        width, height = slide.width, slide.height
    columns = max(int((width - side) // step) + 1, 0) if side <= width else 0
    rows = max(int((height - side) // step) + 1, 0) if side <= height else 0
    assert len(grid) == columns * rows
    if len(grid):
        assert grid.min() == 0 and (grid + side <= np.array([width, height]) + 0.51).all()


def test_tiles_agree_with_the_slide(slide_path):
    with Slide(slide_path) as slide:
        grid = slide.grid(100, 1.0)
        tiles = dict(slide.tiles(grid, 100, 1.0))
    assert len(tiles) == len(grid) == 7 * 5
    x, y = grid[9]
    expected = picture(1100, 1500)[y : y + 200, x : x + 200].reshape(100, 2, 100, 2, 3).mean((1, 3))
    assert np.abs(tiles[9] - expected).mean() < 2


def test_after_an_unreadable_tile_the_next_are_right(tmp_path):
    path = tmp_path / "hole.tif"
    write_pyramid(path, picture(600, 1100), 0.5, levels=1)
    with Slide(path) as slide:
        whole = dict(slide.tiles(slide.grid(256, 0.5), 256, 0.5))
    with tifffile.TiffFile(path) as file:
        offset, count = file.pages[0].dataoffsets[1], file.pages[0].databytecounts[1]
    with open(path, "rb+") as file:
        file.seek(offset)
        file.write(b"\xab" * count)
    with Slide(path) as slide:
        damaged = dict(slide.tiles(slide.grid(256, 0.5), 256, 0.5))
    assert isinstance(damaged[1], UnreadableTile) and "hole.tif: region at (256, 0) cannot be decoded" in str(
        damaged[1]
    )
    for index in set(whole) - {1}:
        assert np.array_equal(damaged[index], whole[index]), index


def test_truncated_and_missing_slides_are_named(tmp_path, slide_path):
    path = tmp_path / "cut.tif"
    path.write_bytes(slide_path.read_bytes()[:5000])
    for name in (path, tmp_path / "none.svs", tmp_path):
        with pytest.raises(SlideError) as error:
            Slide(name)
        assert str(error.value).startswith(str(name)) and "\n" not in str(error.value)


def test_a_pyramid_that_cannot_be_written_leaves_nothing(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(HistoddError, match="cannot write"):
        write_pyramid(tmp_path / "file" / "a.tif", picture(300, 300), 0.5)


# ---- tissue ----------------------------------------------------------------------------------------------------------


def test_otsu_separates_two_groups():
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.normal(40, 8, 3000), rng.normal(180, 10, 1000)]).clip(0, 255).astype(np.uint8)
    assert 60 < otsu(values) < 160
    assert otsu(np.full(10, 7, dtype=np.uint8)) == 7


def glass_with(tmp_path, name, paint):
    rng = np.random.default_rng(0)
    pixels = np.clip(243 + rng.normal(0, 2, (1200, 1200, 3)), 0, 255).astype(np.uint8)
    paint(pixels)
    write_pyramid(tmp_path / name, pixels, 0.5)
    with Slide(tmp_path / name) as slide:
        return tissue_mask(slide)


def test_tissue_is_found_and_glass_is_not(tmp_path):
    def paint(pixels):
        pixels[400:800, 400:800] = (190, 90, 160)

    mask = glass_with(tmp_path, "a.tif", paint)
    corners = np.array([[0, 0], [500, 500], [300, 500], [1100, 1100]])
    assert mask.fraction(corners, 200).tolist() == pytest.approx([0, 1, 0.5, 0], abs=0.03)


def test_a_blank_slide_has_no_tissue(tmp_path):
    assert not glass_with(tmp_path, "a.tif", lambda pixels: None).values.any()


def test_black_is_no_tissue(tmp_path):
    def paint(pixels):
        pixels[:600] = np.random.default_rng(1).integers(0, 6, (600, 1200, 3))

    assert glass_with(tmp_path, "a.tif", paint).values.mean() < 0.01


def test_a_slide_without_glass_is_all_tissue(tmp_path):
    def paint(pixels):
        pixels[:] = (225, 150, 190)
        pixels[:600] = (150, 60, 130)

    assert glass_with(tmp_path, "a.tif", paint).values.all()


@given(st.integers(0, 1000))
def test_mask_fractions_are_means(seed):
    rng = np.random.default_rng(seed)
    values = rng.random((13, 17)) < 0.4
    x, y, side = int(rng.integers(0, 10)), int(rng.integers(0, 8)), int(rng.integers(1, 5))
    got = Mask(values, 16.0).fraction(np.array([[x * 16, y * 16]]), side * 16)
    assert got[0] == pytest.approx(values[y : y + side, x : x + side].mean())


# ---- annotations -----------------------------------------------------------------------------------------------------


def asap(path, *areas):
    body = "".join(
        f'<Annotation Name="{n}" Type="Polygon" PartOfGroup="{group}"><Coordinates>'
        + "".join(f'<Coordinate Order="{i}" X="{x}" Y="{y}"/>' for i, (x, y) in reversed(list(enumerate(points))))
        + "</Coordinates></Annotation>"
        for n, (group, points) in enumerate(areas)
    )
    path.write_text(f"<?xml version='1.0'?><ASAP_Annotations><Annotations>{body}</Annotations></ASAP_Annotations>")
    return path


def box(x0, y0, x1, y1):
    return [(x0, y0), (x1, y0), (x1, y1), (x0, y1)]


def test_areas_and_cut_outs(tmp_path, slide_path):
    path = asap(
        tmp_path / "a.xml",
        ("_2", box(200, 200, 600, 600)),
        ("Tumor", box(100, 100, 900, 900)),
        ("_0", box(300, 300, 500, 500)),
    )
    polygons = read_asap(path)
    assert [p.inside for p in polygons] == [False, True, True]
    assert polygons[0].points.tolist() == [list(p) for p in box(200, 200, 600, 600)], (
        "points follow their order, not the file's"
    )
    with Slide(slide_path) as slide:
        mask = polygon_mask(polygons, slide, 4.0)
    corners = np.array([[110, 110], [220, 220], [360, 360], [700, 700], [1000, 0]])
    assert mask.fraction(corners, 64).tolist() == pytest.approx([1, 0, 1, 1, 0], abs=0.15)
    assert mask.values.sum() * mask.scale**2 == pytest.approx(800**2 - 400**2 + 200**2, rel=0.05)


def test_a_half_covered_square(slide_path):
    with Slide(slide_path) as slide:
        mask = polygon_mask([Polygon(np.array(box(0, 0, 400, 1000), dtype=float), True)], slide, 2.0)
    assert mask.fraction(np.array([[336, 100]]), 128)[0] == pytest.approx(0.5, abs=0.04)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<ASAP_Annotations><Annotations>", "no readable annotation XML"),
        ("", "no readable annotation XML"),
        ('<!DOCTYPE a [<!ENTITY x "y">]><ASAP_Annotations>&x;</ASAP_Annotations>', "no readable annotation XML"),
    ],
)
def test_broken_or_hostile_xml_is_named(tmp_path, text, message):
    (tmp_path / "a.xml").write_text(text)
    with pytest.raises(SlideError, match=message) as error:
        read_asap(tmp_path / "a.xml")
    assert "a.xml" in str(error.value)


def test_areas_that_are_none(tmp_path):
    with pytest.raises(SlideError, match="'0' is no area: it has 2 points"):
        read_asap(asap(tmp_path / "a.xml", ("Tumor", [(1, 1), (2, 2)])))
    with pytest.raises(SlideError, match="coordinate that is no number"):
        read_asap(asap(tmp_path / "a.xml", ("Tumor", [(1, 1), (2, 2), ("x", 3)])))
    with pytest.raises(SlideError, match="not finite"):
        read_asap(asap(tmp_path / "a.xml", ("Tumor", [(1, 1), (2, 2), ("nan", 3)])))
    with pytest.raises(SlideError, match="unknown group 'Exclusion'"):
        read_asap(asap(tmp_path / "a.xml", ("Exclusion", box(0, 0, 9, 9))))


# ---- real slides -----------------------------------------------------------------------------------------------------


def test_a_real_aperio_slide(shared_data):
    with Slide(shared_data / "wsi" / "CMU-1-Small-Region.svs") as slide:
        assert slide.mpp == pytest.approx(0.499) and (slide.width, slide.height) == (2220, 2967)
        for mpp, size, count in ((0.499, 256, 8 * 11), (0.998, 256, 4 * 5), (1.996, 256, 2 * 2)):
            assert len(slide.grid(size, mpp)) == count
        full = slide.read(0, 0, 2220, 2967, slide.mpp).astype(float)
        for k in (2, 4):  # 10x and 5x against the box-averaged full resolution
            w, h = 2220 // k, 2967 // k
            box_mean = full[: h * k, : w * k].reshape(h, k, w, k, 3).mean((1, 3))
            assert np.abs(slide.read(0, 0, w, h, slide.mpp * k) - box_mean).mean() < 0.5
        assert 0.25 < tissue_mask(slide).values.mean() < 0.4


def test_a_real_slide_without_scale_needs_the_override(shared_data):
    path = shared_data / "wsi" / "tcga-cr-7395-01a-01-ts1.svs"
    with pytest.raises(SlideError, match=r"no believable scale .*--mpp"):
        Slide(path)
    with Slide(path, mpp=0.5) as slide:
        assert len(slide.grid(256, 1.0)) == (4443 // 512) * (3567 // 512)
        fine, coarse = slide.read(1000, 1000, 400, 400, 0.5), slide.read(1000, 1000, 200, 200, 1.0)
        mean = fine.reshape(200, 2, 200, 2, 3).mean((1, 3))
        off = np.abs(mean - coarse).mean()
        assert off < 8, "level 1 was resampled and compressed by the scanner"
        assert off < 0.6 * np.abs(mean - slide.read(1008, 1000, 200, 200, 1.0)).mean(), "and lies where level 0 says"
        assert 0.5 < tissue_mask(slide).values.mean() < 0.7


def test_a_real_slide_with_a_senseless_scale(shared_data):
    with pytest.raises(SlideError, match="no believable scale"):
        Slide(shared_data / "wsi" / "small_HE_levels.tiff")


def test_refused_files_are_named_and_the_rest_goes_on(shared_data):
    wsi = shared_data / "wsi"
    refused, opened = [], []
    for name in sorted(os.listdir(wsi / "rejected")) + ["../CMU-1-Small-Region.svs"]:
        try:
            with Slide(wsi / "rejected" / name) as slide:
                opened.append(slide.path.name)
        except SlideError as error:
            assert name in str(error) and "not a slide that OpenSlide reads" in str(error)
            refused.append(name)
    assert len(refused) >= 2 and opened == ["CMU-1-Small-Region.svs"]


def test_a_real_annotation(shared_data):
    (polygon,) = read_asap(shared_data / "camelyon16" / "annotations" / "tumor_001_excerpt.xml")
    assert polygon.inside and polygon.points.shape == (8, 2)
    assert polygon.points[0].tolist() == [71924.3984, 131761]
