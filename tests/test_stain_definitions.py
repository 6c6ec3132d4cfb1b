"""Presets against each package's formula, transcribed independently in float64 numpy; and against torchstain itself."""

import math
from functools import cache

import numpy as np
import pytest
import torch
from small_sets import render, stained

from histodd_bench.data.demo_render import draw_stain, render_slide
from histodd_bench.errors import UsageError
from histodd_bench.ops.macenko_fit import LITTLE_TISSUE, OK
from histodd_bench.stain import MacenkoNormalizer, StainTemplate
from histodd_bench.stain_definitions import DEFINITIONS, Definition, definition, luminosity_mask

HE = np.array([[0.5626, 0.2159], [0.7201, 0.8012], [0.4062, 0.5581]])
TOP = np.array([1.9705, 1.0308])


def extremes(od, vectors, low, high):
    projected = od @ vectors
    phi = np.arctan2(projected[:, 1], projected[:, 0])
    ends = [vectors @ np.array([math.cos(a), math.sin(a)]) for a in (np.percentile(phi, low), np.percentile(phi, high))]
    return np.stack(ends if ends[0][0] > ends[1][0] else ends[::-1], 1)


def torchstain_numpy(image, stain_ref=HE, top_ref=TOP):
    """[3,H,W] uint8 -> stain matrix, maxima, normalised grey levels before truncation."""
    od = -np.log((image.reshape(3, -1).T.astype(np.float64) + 1) / 240)
    tissue = od[~np.any(od < 0.15, axis=1)]
    vectors = np.linalg.eigh(np.cov(tissue.T))[1][:, 1:3]
    vectors = vectors * np.where(tissue.mean(0) @ vectors < 0, -1, 1)  # chance in the package
    stain = extremes(tissue, vectors, 1, 99)
    concentration = np.linalg.lstsq(stain, od.T, rcond=None)[0]
    top = np.percentile(concentration, 99, axis=1)
    out = 240 * np.exp(-stain_ref @ (concentration * (top_ref / top)[:, None]))
    return stain, top, np.minimum(out, 255).reshape(image.shape)


def first_positive(vectors):
    return vectors * np.where(vectors[0] < 0, -1, 1)


def cucim(image, stain_ref=HE, top_ref=TOP):
    absorbance = -np.log(np.clip(image.reshape(3, -1).astype(np.float64), 1, 240) / 240)
    tissue = absorbance[:, np.all(absorbance > 0.345, axis=0)]
    vectors = first_positive(np.linalg.eigh(np.cov(tissue))[1][:, [2, 1]])
    stain = extremes(tissue.T, vectors, 1, 99)
    stain = stain / np.linalg.norm(stain, axis=0)
    concentration = np.linalg.inv(stain.T @ stain) @ stain.T @ absorbance
    top = np.percentile(concentration, 99, axis=1)
    out = np.exp(-stain_ref @ (concentration * (top_ref / top)[:, None])) * 240
    return stain, top, np.clip(out, 0, 255).reshape(image.shape)


def tiatoolbox(image, stain_ref=HE, top_ref=TOP):
    rgb = image.transpose(1, 2, 0)
    low, high = np.percentile(rgb, (2, 98))
    stretched = ((np.clip(rgb.astype(np.float64), low, high) - low) / (high - low) * 255).astype(np.uint8) / 255
    linear = np.where(stretched > 0.04045, ((stretched + 0.055) / 1.055) ** 2.4, stretched / 12.92)
    luminance = linear @ np.array([0.212671, 0.715160, 0.072169])
    lightness = np.where(luminance > 0.008856, 116 * np.cbrt(luminance) - 16, 903.3 * luminance)
    mask = np.rint(lightness * 255 / 100) / 255 < 0.8
    od = np.maximum(-np.log(np.where(rgb == 0, 1, rgb) / 255), 1e-6)
    tissue = od[mask]
    vectors = first_positive(np.linalg.eigh(np.cov(tissue, rowvar=False))[1][:, [2, 1]])
    stain = extremes(tissue, vectors, 1, 99)
    stain = stain / np.linalg.norm(stain, axis=0)
    concentration = np.linalg.lstsq(stain, od.reshape(-1, 3).T, rcond=-1)[0]
    top = np.percentile(concentration, 99, axis=1)
    out = 255 * np.exp(-stain_ref @ (concentration * (top_ref / top)[:, None]))
    return stain, top, np.clip(out, 0, 255).reshape(image.shape)


FORMULAS = {"torchstain-numpy": torchstain_numpy, "cucim": cucim, "tiatoolbox": tiatoolbox}


def made_up(size=64):
    """Noise in two stains, and glass."""
    g = torch.Generator().manual_seed(4)
    nuclei = (torch.rand(3, size, size, generator=g) > 0.7) * (1 + torch.rand(3, size, size, generator=g))
    glass = (torch.rand(3, size, size, generator=g) > 0.15).float()
    return render(nuclei * glass, 0.9 * torch.rand(3, size, size, generator=g) * glass)


@cache
def demo():
    """Patches of two slides of the demo, the parts without tissue included."""
    patches = []
    for seed, centre in ((0, 0), (1, 1)):
        rng = np.random.default_rng(seed)
        light, _ = render_slide(rng, 300.0, draw_stain(rng, centre, 1.0), 0.3)
        slide = torch.from_numpy(light).permute(2, 0, 1)
        patches += [slide[:, y : y + 128, x : x + 128].contiguous() for y in (0, 180, 300) for x in (160, 290)]
    return patches


@pytest.fixture
def images(request, read_rgb):
    if request.param == "made up":
        return list(made_up())
    if request.param == "demo":
        return demo()
    data = request.getfixturevalue("shared_data")
    if request.param == "idc":
        found = [read_rgb(f) for f in sorted((data / "idc").glob("*/*/*.png"))[5::600]]
        return [p for p in found if p.shape == (3, 50, 50)]
    return [
        read_rgb(data / "stain" / name)
        for name in ("torchstain/source.png", "torchstain/target.png", "tiatoolbox/source_image.png")
    ]


@pytest.mark.parametrize("images", ["made up", "demo", "idc", "stain"], indirect=True)
@pytest.mark.parametrize("name", list(FORMULAS))
def test_preset_follows_the_formula_of_its_package(images, name):
    normalizer = MacenkoNormalizer(definition=name)
    tested = 0
    for image in images:
        exact = image[None].double() / 255
        fit = normalizer.estimate(exact)
        if fit.status.item() != OK:
            continue  # a guard of ours, where the package divides by next to nothing
        stain, top, levels = FORMULAS[name](image.numpy())
        tested += 1
        # TIAToolbox floors densities at 1e-6, where ours is 0.
        np.testing.assert_allclose(fit.stain_matrix[0].numpy(), stain, atol=1e-5)
        np.testing.assert_allclose(fit.max_concentration[0].numpy(), top, rtol=1e-5)
        got = normalizer.normalize(exact)[0] * 255
        assert np.abs(got.numpy() - levels).max() < 0.01
        whole = normalizer.definition.to_uint8(normalizer.normalize(image[None]))[0].numpy().astype(int)
        rounded = np.rint(levels) if name == "cucim" else np.floor(levels)
        assert np.abs(whole - rounded).max() <= 1 and np.abs(whole - rounded).mean() < 0.01
    assert tested >= len(images) * 2 // 3 and tested > 1


def test_definitions_differ_where_they_should():
    images = made_up()
    matrices = {name: d.fit(images).stain_matrix for name, d in DEFINITIONS.items()}
    names = list(matrices)
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            assert not torch.allclose(matrices[a], matrices[b], atol=1e-6), (a, b)


def test_tiatoolbox_preset_gives_its_expected_image(shared_data, read_rgb):
    folder = shared_data / "stain" / "tiatoolbox"
    normalizer = MacenkoNormalizer(definition="tiatoolbox").fit(read_rgb(folder / "target_image.png"))
    got = normalizer.definition.to_uint8(normalizer.normalize(read_rgb(folder / "source_image.png")[None]))[0]
    difference = (got.int() - read_rgb(folder / "norm_macenko.png").int()).abs()
    assert difference.double().mean() / 255 < 2e-3  # the package's own test allows 1e-2


@pytest.mark.parametrize("images", ["made up", "demo", "idc", "stain"], indirect=True)
def test_torchstain_itself(images):
    torchstain = pytest.importorskip("torchstain", reason="pip install 'histodd-bench[peers]' to compare with it")
    ours, theirs = MacenkoNormalizer(), torchstain.normalizers.MacenkoNormalizer(backend="torch")
    tested = 0
    for image in images:
        fit = ours.estimate(image[None])
        if fit.status.item() != OK:
            continue
        expected = theirs.normalize(image, stains=False)[0].permute(2, 0, 1)
        got = ours.definition.to_uint8(ours.normalize(image[None]))[0].int()
        tested += 1
        assert (got - expected).abs().max() <= 1
        assert (got - expected).abs().double().mean() <= 0.03
    assert tested >= len(images) * 2 // 3 and tested > 1


@pytest.mark.parametrize("name", list(DEFINITIONS))
def test_hard_tiles_never_give_nan(shared_data, read_rgb, name):
    files = sorted((shared_data / "hard_tiles").glob("*.png"))
    assert files
    for file in files:
        image = read_rgb(file)[None]
        for batch in (image, image.float() / 255):
            normalizer = MacenkoNormalizer(definition=name)
            fit = normalizer.estimate(batch)
            assert fit.stain_matrix.isfinite().all() and fit.max_concentration.isfinite().all(), file.name
            out = normalizer(batch)
            assert out.isfinite().all() and out.min() >= 0 and out.max() <= 1, file.name


def test_luminosity_mask_keeps_the_dark():
    image = torch.full((1, 3, 20, 20), 245, dtype=torch.uint8)
    image[:, :, :10] = torch.tensor([140, 70, 150], dtype=torch.uint8).view(1, 3, 1, 1)
    mask = luminosity_mask(image, 0.8)
    assert mask[0, :10].all() and not mask[0, 10:].any()
    assert torch.equal(luminosity_mask(image.double() / 255, 0.8), mask)
    assert not luminosity_mask(torch.full((1, 3, 4, 4), 255, dtype=torch.uint8), 0.8).any()
    assert luminosity_mask(torch.zeros(0, 3, 4, 4), 0.8).shape == (0, 4, 4)


@pytest.mark.parametrize("name", list(DEFINITIONS))
def test_blank_and_broken_patches_come_back_as_they_are(name):
    images = made_up().float() / 255
    images[0], images[1, 0, 0, 0] = 1.0, torch.nan
    normalizer = MacenkoNormalizer(definition=name)
    assert normalizer.estimate(images).status.tolist()[0] == LITTLE_TISSUE
    out = normalizer(images)
    assert torch.equal(out[0], images[0])
    torch.testing.assert_close(out[1], images[1], equal_nan=True)
    alone = normalizer(images[2:])
    torch.testing.assert_close(out[2:], alone)
    assert (out[2] - images[2]).abs().max() > 0.01


@pytest.mark.parametrize("name", ["torchstain", "cucim"])
def test_gradients_reach_the_image(name):
    images = (made_up(8).double() / 255).requires_grad_()
    normalizer = MacenkoNormalizer(definition=name)
    fit = normalizer.estimate(images)
    assert torch.autograd.gradcheck(lambda x: normalizer.normalize(x, fit), (images,))


def test_unknown_definition_is_refused():
    with pytest.raises(UsageError, match="did you mean 'torchstain'"):
        MacenkoNormalizer(definition="torchstains")
    own = Definition(io=250.0)
    assert definition(own) is own


def test_rounding_rules():
    x = torch.tensor([0.0, 10.4, 10.6, 254.99, 255.0]) / 255
    assert Definition(rounding="floor").to_uint8(x).tolist() == [0, 10, 10, 254, 255]
    assert Definition(rounding="nearest").to_uint8(x).tolist() == [0, 10, 11, 255, 255]


def test_normalizer_is_a_module_that_keeps_its_target():
    target = stained(1, 48, seed=3)
    normalizer = MacenkoNormalizer().fit(target)
    other = MacenkoNormalizer(StainTemplate())
    other.load_state_dict(normalizer.state_dict())
    images = stained(2, 32)
    assert torch.equal(other(images), normalizer(images))
    assert other.template == normalizer.template
    assert not list(normalizer.parameters())
    model = torch.nn.Sequential(normalizer, torch.nn.Conv2d(3, 1, 3))
    assert "0.target_stain" in model.state_dict()


def test_fits_can_be_cached_and_shared():
    images = stained(3, 40)
    normalizer = MacenkoNormalizer()
    fit = normalizer.estimate(images)
    assert torch.equal(normalizer(images, fit), normalizer(images))
    one = type(fit)(*(t[:1] for t in fit))
    shared = normalizer(images, one)
    assert torch.equal(shared[:1], normalizer(images[:1]))
    assert not torch.allclose(shared[1:], normalizer(images)[1:], atol=1e-4)
    with pytest.raises(ValueError, match="got 2 fits for 3 patches"):
        normalizer(images, type(fit)(*(t[:2] for t in fit)))
    with pytest.raises(ValueError, match="one image or one pool"):
        normalizer.fit(fit)


def test_normalizer_compiles_without_a_graph_break():
    images = stained(2, 24).float() / 255
    normalizer = MacenkoNormalizer()
    compiled = torch.compile(normalizer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images), normalizer(images))
