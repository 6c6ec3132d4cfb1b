"""macenko_fit against the definition (torchstain 1.4.1's torch backend, its formula transcribed in float64)."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from histodd_bench.ops import macenko_fit, stain_augment
from histodd_bench.ops.macenko_fit import DEGENERATE, LITTLE_TISSUE, OK, OUT_OF_RANGE, STATUS_NAMES, WEAK_STAIN, pinv

STAIN_REF = torch.tensor([[0.5626, 0.2159], [0.7201, 0.8012], [0.4062, 0.5581]], dtype=torch.float64)
MAX_REF = torch.tensor([1.9705, 1.0308], dtype=torch.float64)


def torchstain_fit(image, io=240.0, alpha=1.0, beta=0.15):
    """Stain matrix [3,2], concentrations [2,P] and maximum concentrations [2] of one [3,H,W] image in 0..255."""

    def percentile(t, q):
        return t.reshape(-1).kthvalue(1 + round(0.01 * q * (t.numel() - 1))).values

    od = -torch.log((image.double().flatten(1).T + 1) / io)
    tissue = od[~(od < beta).any(1)]
    centred = tissue.T - tissue.T.mean(1, keepdim=True)
    vectors = torch.linalg.eigh(centred @ centred.T / (tissue.shape[0] - 1)).eigenvectors[:, [1, 2]]
    projected = tissue @ vectors
    phi = torch.atan2(projected[:, 1], projected[:, 0])
    low, high = percentile(phi, alpha), percentile(phi, 100 - alpha)
    v_min = vectors @ torch.stack([low.cos(), low.sin()])
    v_max = vectors @ torch.stack([high.cos(), high.sin()])
    stain = torch.stack([v_min, v_max] if v_min[0] > v_max[0] else [v_max, v_min], 1)
    concentration = torch.linalg.lstsq(stain, od.T).solution
    return stain, concentration, torch.stack([percentile(concentration[i], 99.0) for i in (0, 1)])


def torchstain_normalize(image, stain_ref=STAIN_REF, max_ref=MAX_REF, io=240.0):
    _, concentration, top = torchstain_fit(image, io)
    out = io * torch.exp(-stain_ref @ (concentration * (max_ref / top)[:, None]))
    return out.clamp(max=255).view(image.shape)


def affine(stain, top, stain_ref=STAIN_REF, max_ref=MAX_REF):
    """[A|b] = H_ref diag(maxC_ref / maxC) pinv(H), in float64."""
    matrix = (stain_ref * (max_ref / top.double())[:, None, :]) @ pinv(stain.double())
    return torch.cat([matrix, matrix.new_zeros(len(matrix), 3, 1)], 2)


def stained(seed=0, size=32, h=(0.62, 0.70, 0.35), e=(0.18, 0.92, 0.34)):
    """A Beer-Lambert patch of known stains, a tenth of it pure each: uint8 [3,size,size], and its unit stain matrix."""
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.tensor([h, e], dtype=torch.float64).T
    matrix = matrix / matrix.norm(dim=0)
    concentration = 0.9 + torch.rand(2, size * size, generator=generator, dtype=torch.float64)
    kind = torch.rand(size * size, generator=generator)
    concentration[0, kind < 0.1], concentration[1, kind > 0.9] = 0.0, 0.0
    image = (240 * torch.exp(-matrix @ concentration) - 1).clamp(0, 255).round()
    return image.to(torch.uint8).view(3, size, size), matrix


def blocks(image, size=128):
    """Whole square tiles of an image."""
    height, width = (d // size * size for d in image.shape[1:])
    tiles = image[:, :height, :width].unfold(1, size, size).unfold(2, size, size)
    return tiles.permute(1, 2, 0, 3, 4).reshape(-1, 3, size, size)


@pytest.mark.parametrize("name", ["source", "target"])
def test_conformance_with_torchstain(shared_data, read_rgb, name):
    image = read_rgb(shared_data / "stain" / "torchstain" / f"{name}.png")
    whole = image[None]
    for batch in (whole, blocks(image, 144)):
        stain, top, status = macenko_fit(batch.double() / 255)
        assert (status == OK).all()
        for i, one in enumerate(batch):
            expected_stain, _, expected_top = torchstain_fit(one)
            torch.testing.assert_close(stain[i], expected_stain, rtol=0, atol=1e-4)
            torch.testing.assert_close(top[i], expected_top, rtol=1e-4, atol=0)
        normal = stain_augment(batch.double() / 255, affine(stain, top)) * 255
        for i, one in enumerate(batch):
            assert (normal[i] - torchstain_normalize(one)).abs().max() <= 0.01


def test_float32_and_uint8_stay_within_a_grey_level_of_torchstain(shared_data, read_rgb):
    image = read_rgb(shared_data / "stain" / "torchstain" / "source.png")
    expected = torchstain_normalize(image)
    stain, top, status = macenko_fit(image[None])
    assert status.tolist() == [OK]
    torch.testing.assert_close(stain[0].double(), torchstain_fit(image)[0], rtol=0, atol=1e-4)
    normal = stain_augment(image[None], affine(stain, top).float())[0].double() * 255
    assert (normal - expected).abs().max() <= 0.05


def test_conformance_on_real_patches(shared_data, read_rgb):
    files = sorted((shared_data / "idc").glob("*/*/*.png"))[::450]
    patches = torch.stack([p for p in map(read_rgb, files) if p.shape == (3, 50, 50)])
    stain, top, status = macenko_fit(patches.double() / 255)
    assert len(patches) > 10 and (status == OK).float().mean() > 0.7
    for i in (status == OK).nonzero().flatten().tolist():
        expected_stain, _, expected_top = torchstain_fit(patches[i])
        torch.testing.assert_close(stain[i], expected_stain, rtol=0, atol=1e-4)
        torch.testing.assert_close(top[i], expected_top, rtol=1e-4, atol=1e-6)


def test_tiatoolbox_expected_image(shared_data, read_rgb):
    """TIAToolbox's own expectation for its Macenko, at its own tolerance; Io = 255 there."""
    folder = shared_data / "stain" / "tiatoolbox"
    source, target = read_rgb(folder / "source_image.png")[None], read_rgb(folder / "target_image.png")[None]
    expected = read_rgb(folder / "norm_macenko.png")
    stain, top, _ = macenko_fit(source.double() / 255, io=255.0)
    stain_ref, max_ref, _ = macenko_fit(target.double() / 255, io=255.0)
    normal = stain_augment(source.double() / 255, affine(stain, top, stain_ref[0], max_ref[0]), io=255.0)
    assert (normal[0] - expected.double() / 255).abs().mean() < 1e-2


def test_recovers_known_stains():
    patches, truths = zip(*[stained(seed) for seed in range(3)], strict=True)
    stain, _, status = macenko_fit(torch.stack(patches))
    assert status.tolist() == [OK] * 3
    cosines = (stain.double() * torch.stack(truths)).sum(1)
    assert (cosines > math.cos(math.radians(3))).all()
    torch.testing.assert_close(stain.norm(dim=1), torch.ones(3, 2))
    assert (stain[:, 0, 0] > stain[:, 0, 1]).all()  # haematoxylin absorbs more red


def test_maximum_concentration_scales_with_the_stain():
    """Doubling every density doubles the concentrations and leaves the stains alone."""
    x = 0.4 + 0.5 * torch.rand(1, 3, 24, 24, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    transmittance = x * 0.9
    stain, top, _ = macenko_fit((240 * transmittance - 1) / 255, beta=0.0)
    double_stain, double_top, _ = macenko_fit((240 * transmittance**2 - 1).clamp(min=0) / 255, beta=0.0)
    torch.testing.assert_close(double_top, 2 * top)
    torch.testing.assert_close(double_stain, stain)


@pytest.mark.parametrize("swapped", [False, True])
def test_two_cluster_patch_has_positive_stains(swapped):
    """Two pure stains: the raw eigenvectors point either way, and a wrong sign wraps the angle around pi."""
    h, e = torch.tensor([0.65, 0.70, 0.29]), torch.tensor([0.07, 0.99, 0.11])
    for fraction in (0.1, 0.3, 0.5, 0.7, 0.9):
        n = round(400 * fraction)
        strength = torch.linspace(0.8, 1.6, 400).double()
        od = torch.where(torch.arange(400)[:, None] < n, h, e).double() * strength[:, None] + 0.16
        if swapped:
            od = od.flip(0)
        image = (240 * torch.exp(-od) - 1).clamp(0, 255).T.reshape(1, 3, 20, 20) / 255
        stain, top, status = macenko_fit(image)
        assert status.tolist() == [OK]
        assert (stain > 0).all() and (top > 0).all()
        expected, _, expected_top = torchstain_fit(image[0] * 255)
        torch.testing.assert_close(stain[0], expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(top[0], expected_top, rtol=1e-6, atol=0)


def test_hard_tiles_never_give_nan(shared_data, read_rgb):
    files = sorted((shared_data / "hard_tiles").glob("*.png"))
    assert files
    for file in files:
        image = read_rgb(file)
        for batch in (image[None], (image.float() / 255)[None], blocks(image, min(*image.shape[1:], 64))):
            stain, top, status = macenko_fit(batch)
            assert stain.isfinite().all() and top.isfinite().all(), file.name
            matrix = affine(stain, top.clamp(min=1e-6)).float()
            out = stain_augment(batch, matrix, valid=status == OK)
            assert out.isfinite().all() and out.min() >= 0 and out.max() <= 1, file.name


def bad_patches(size=24):
    def flat(value):
        return torch.full((3, size, size), float(value))

    good = stained(5, size)[0].float() / 255
    nan, low, high = good.clone(), good.clone(), good.clone()
    nan[1, 3, 4], low[0, 0, 0], high[2, 5, 5] = torch.nan, -0.01, 1.01
    pink = flat(0.8)
    pink[1] = 0.4
    speck = flat(1.0)
    speck[:, :1, :1] = good[:, :1, :1]
    return [
        (flat(1.0), LITTLE_TISSUE),
        (speck, LITTLE_TISSUE),
        (flat(0.0), DEGENERATE),
        (pink, DEGENERATE),
        (nan, OUT_OF_RANGE),
        (low, OUT_OF_RANGE),
        (high, OUT_OF_RANGE),
        (good * 255, OUT_OF_RANGE),
        (torch.full_like(good, torch.inf), OUT_OF_RANGE),
    ]


def test_statuses():
    for patch, expected in bad_patches():
        stain, top, status = macenko_fit(patch[None])
        assert STATUS_NAMES[status.item()] == STATUS_NAMES[expected]
        assert stain.isfinite().all() and top.isfinite().all()


def test_weak_stain_is_a_status():
    """Pixels of one stain only: the other's maximum concentration falls below the guard."""
    patch, _ = stained(3)
    _, top, status = macenko_fit(patch[None], min_concentration=100.0)
    assert status.tolist() == [WEAK_STAIN] and (top < 100).all()


def test_float_rounding_just_above_one_is_accepted():
    patch = stained(1)[0].double() / 255
    patch[:, 0, 0] = 1 + 0.9e-3
    assert macenko_fit(patch[None])[2].tolist() == [OK]
    patch[:, 0, 0] = 1 + 1.1e-3
    assert macenko_fit(patch[None])[2].tolist() == [OUT_OF_RANGE]


def test_bad_patches_do_not_touch_their_neighbours():
    good = torch.stack([stained(seed, 24)[0].float() / 255 for seed in (5, 6)])
    bad = torch.stack([patch for patch, _ in bad_patches()])
    mixed = torch.cat([good[:1], bad, good[1:]])
    stain, top, status = macenko_fit(mixed)
    alone = macenko_fit(good)
    assert status[[0, -1]].tolist() == [OK, OK]
    torch.testing.assert_close(stain[[0, -1]], alone[0])
    torch.testing.assert_close(top[[0, -1]], alone[1])


@given(st.integers(0, 1000))
def test_order_of_pixels_and_patches_does_not_matter(seed):
    generator = torch.Generator().manual_seed(seed)
    patches = torch.stack([stained(seed + i, 16)[0] for i in range(3)]).double() / 255
    stain, top, status = macenko_fit(patches)
    shuffled = patches.flatten(2)[:, :, torch.randperm(256, generator=generator)].view_as(patches)
    for other, order in ((shuffled, [0, 1, 2]), (patches[[2, 0, 1]], [2, 0, 1]), (patches.flip(3), [0, 1, 2])):
        other_stain, other_top, other_status = macenko_fit(other)
        assert torch.equal(other_status, status[order])
        torch.testing.assert_close(other_stain, stain[order], rtol=0, atol=1e-9)
        torch.testing.assert_close(other_top, top[order], rtol=1e-9, atol=0)


@given(
    st.integers(0, 3),
    st.integers(0, 9),
    st.integers(0, 9),
    st.sampled_from([torch.uint8, torch.float32]),
    st.integers(0, 9),
)
def test_any_patches_give_finite_fits(n, h, w, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 256, (n, 3, h, w), generator=generator, dtype=torch.uint8)
    x = x if dtype == torch.uint8 else x.float() / 255
    stain, top, status = macenko_fit(x)
    assert stain.shape == (n, 3, 2) and top.shape == (n, 2) and status.shape == (n,) and status.dtype == torch.uint8
    assert stain.isfinite().all() and top.isfinite().all()
    assert status.tolist() == [LITTLE_TISSUE] * n if h * w < 3 else True


def test_fit_is_detached():
    x = (stained(1)[0].double() / 255)[None].requires_grad_()
    stain, top, _ = macenko_fit(x)
    assert not stain.requires_grad and not top.requires_grad


def test_memory_formats_agree():
    x = torch.stack([stained(s)[0] for s in range(2)])
    for other in (x.contiguous(memory_format=torch.channels_last), torch.cat([x, x], 3)[..., :32]):
        for a, b in zip(macenko_fit(other), macenko_fit(x), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 1, 8, 8), (1, 4, 8, 8)])
def test_wrong_shapes_are_refused(shape):
    with pytest.raises(ValueError, match=r"image must be \[N,3,H,W\]"):
        macenko_fit(torch.zeros(shape))


def test_pinv_is_the_left_inverse():
    stain = torch.rand(5, 3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(pinv(stain), torch.linalg.pinv(stain))
