import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stain_inputs import IDENTITY, images, relative_error, stains, warps

from histodd_bench.ops import stain_augment as stain_augment_op
from histodd_bench.ops import stain_augment_reference

stain_augment = stain_augment_op
ANY_FIXTURE = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(params=["op", "reference"])
def implementation(request, monkeypatch):
    """``stain_augment`` is the op, then the reference. Tests that compare the two name ``stain_augment_op``."""
    chosen = stain_augment_op if request.param == "op" else stain_augment_reference
    monkeypatch.setitem(globals(), "stain_augment", chosen)
    return request.param


both = pytest.mark.usefixtures("implementation")


@both
def test_nothing_to_do_is_the_image_on_the_unit_scale():
    grey = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    torch.testing.assert_close(stain_augment(grey), grey.float() / 255, rtol=0, atol=1e-7)
    x = images()
    torch.testing.assert_close(stain_augment(x), x)


@both
def test_identity_affine_moves_a_pixel_by_at_most_one_grey_level():
    """The optical density is of I + 1 and the way back has no - 1: I becomes min(I + 1, 255), as in torchstain."""
    grey = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    out = stain_augment(grey, IDENTITY[None], dtype=torch.float64) * 255
    torch.testing.assert_close(out, (grey.double() + 1).clamp(max=255), rtol=0, atol=1e-9)


@both
def test_known_density_change():
    """A = 2 squares the transmittance (I + 1) / Io; b = ln 2 halves it."""
    grey = torch.tensor([0.0, 47.0, 119.0, 239.0], dtype=torch.float64).view(1, 1, 2, 2).expand(1, 3, 2, 2)
    stain = IDENTITY.clone()[None]
    stain[0, 0, 0], stain[0, 1, 3] = 2.0, math.log(2.0)
    out = stain_augment(grey / 255, stain)[0].flatten(1) * 255
    transmittance = (grey[0, 0].flatten() + 1) / 240
    torch.testing.assert_close(out[0], 240 * transmittance**2)
    torch.testing.assert_close(out[1], 240 * transmittance / 2)
    torch.testing.assert_close(out[2], 240 * transmittance)


@both
def test_channels_mix_by_rows_of_the_matrix():
    stain = torch.zeros(1, 3, 4, dtype=torch.float64)
    stain[0, 0, 2] = stain[0, 1, 0] = stain[0, 2, 1] = 1.0  # out = (blue, red, green)
    x = images(1)
    torch.testing.assert_close(stain_augment(x, stain), stain_augment(x, IDENTITY[None])[:, [2, 0, 1]])


@both
def test_invalid_patches_skip_the_stain_step_exactly():
    x, stain = images(3), 1.7 * IDENTITY.expand(3, 3, 4).contiguous()
    out = stain_augment(x, stain, valid=torch.tensor([True, False, True]))
    assert torch.equal(out[1], stain_augment(x)[1])
    assert torch.equal(out[[0, 2]], stain_augment(x, stain)[[0, 2]])


@both
def test_warp_is_grid_sample_on_white():
    x, warp = images(4, 11, 8), warps(4)
    grid = F.affine_grid(warp, [4, 3, 11, 8], align_corners=False)
    expected = 1 - F.grid_sample(1 - x, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    torch.testing.assert_close(stain_augment(x, warp=warp), expected)
    assert stain_augment(x, warp=torch.tensor([[[1.0, 0, 9], [0, 1, 0]]] * 4)).eq(1).all()  # all outside: white


@both
def test_flips_are_exact():
    x = images(1, 6, 5)
    torch.testing.assert_close(stain_augment(x, warp=torch.tensor([[[-1.0, 0, 0], [0, 1, 0]]])), x.flip(3))
    torch.testing.assert_close(stain_augment(x, warp=torch.tensor([[[1.0, 0, 0], [0, -1, 0]]])), x.flip(2))


@both
def test_order_is_warp_stain_normalise():
    x, warp, stain = images(), warps(), 1.3 * IDENTITY.expand(2, 3, 4).contiguous()
    mean, std = torch.tensor([0.7, 0.5, 0.6]), torch.tensor([0.2, 0.3, 0.1])
    stained = stain_augment(stain_augment(x, warp=warp), stain)
    expected = (stained - mean.double()[:, None, None]) / std.double()[:, None, None]
    torch.testing.assert_close(stain_augment(x, stain, warp, mean, std), expected)
    # Interpolating intensities is not interpolating densities: the other order differs.
    assert (stain_augment(stain_augment(x, stain), warp=warp) - stained).abs().max() > 1e-3


@both
def test_uint8_and_float_agree():
    x = torch.randint(0, 256, (2, 3, 8, 8), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    stain, warp = (1.2 * IDENTITY.expand(2, 3, 4)).float(), warps().float()
    torch.testing.assert_close(stain_augment(x, stain, warp), stain_augment(x.float() / 255, stain, warp))


@both
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("channels_last", [False, True])
def test_dtypes_and_memory_formats(dtype, channels_last):
    x = images(dtype=dtype)
    stain = IDENTITY.expand(2, 3, 4) * 1.1
    wanted = torch.channels_last if channels_last else torch.contiguous_format
    for image in (x, x.contiguous(memory_format=torch.channels_last), images(2, 9, 14).to(dtype)[..., ::2]):
        out = stain_augment(image, stain, channels_last=channels_last)
        assert out.dtype == dtype and out.is_contiguous(memory_format=wanted)
        # Half precision is rounded once, at the end.
        exact = stain_augment(image.double(), stain)
        rounding = {torch.float16: 5e-4, torch.bfloat16: 4e-3}.get(dtype, 1e-5)
        assert (out.double() - exact).abs().max() <= rounding
    assert stain_augment((x * 255).to(torch.uint8)).dtype == torch.float32
    assert stain_augment(x, dtype=torch.bfloat16).dtype == torch.bfloat16


@both
@pytest.mark.parametrize("shape", [(0, 3, 8, 8), (2, 3, 0, 8), (1, 3, 1, 1)])
def test_empty_and_tiny(shape):
    n = shape[0]
    x = torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    out = stain_augment(x, IDENTITY.expand(n, 3, 4), valid=torch.ones(n, dtype=torch.bool))
    assert out.shape == shape


@both
@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 1, 8, 8), (1, 4, 8, 8)])
def test_wrong_shapes_are_refused(shape):
    with pytest.raises(ValueError, match=r"image must be \[N,3,H,W\]"):
        stain_augment(torch.zeros(shape))


@both
def test_mean_without_std_is_refused():
    with pytest.raises(ValueError, match="mean and std"):
        stain_augment(images(), mean=torch.zeros(3))


@both
def test_output_stays_in_range_for_extreme_stains():
    x = torch.tensor([0, 255], dtype=torch.uint8).view(1, 1, 1, 2).expand(1, 3, 1, 2)
    for factor in (-50.0, 0.0, 50.0):
        out = stain_augment(x, factor * IDENTITY[None])
        assert out.isfinite().all() and out.min() >= 0 and out.max() <= 1


@both
@pytest.mark.parametrize("parts", ["stain", "warp", "mean", "stain warp", "stain warp mean"])
def test_gradcheck(parts):
    x = (0.2 + 0.6 * images(2, 4, 5)).requires_grad_()
    stain = (IDENTITY + 0.05 * images(2, 1, 4, seed=5)[:, :, 0]).clone().requires_grad_() if "stain" in parts else None
    warp = warps() if "warp" in parts else None
    mean, std = (torch.tensor([0.7, 0.5, 0.6]), torch.tensor([0.2, 0.3, 0.1])) if "mean" in parts else (None, None)
    inputs = (x,) if stain is None else (x, stain)

    def run(image, matrix=None):
        return stain_augment(image, matrix, warp, mean, std)

    assert torch.autograd.gradcheck(run, inputs)


@both
def test_gradient_reaches_neighbours_of_an_invalid_patch_only():
    x = images(2).requires_grad_()
    stain = torch.stack([IDENTITY, torch.full((3, 4), 1e6, dtype=torch.float64)])
    out = stain_augment(x, stain, valid=torch.tensor([True, False]))
    (grad,) = torch.autograd.grad(out.sum(), x)
    assert grad.isfinite().all()
    torch.testing.assert_close(grad[1], torch.ones_like(grad[1]))  # as if there were no stain step


@both
@given(st.integers(1, 3), st.integers(1, 12), st.integers(1, 12), st.integers(0, 50))
@ANY_FIXTURE
def test_patches_do_not_touch_each_other(n, h, w, seed):
    x, warp = images(n, h, w, seed), warps(n, seed)
    stain = IDENTITY + 0.1 * images(n, 1, 4, seed + 1)[:, :, 0]
    whole = stain_augment(x, stain, warp)
    for i in range(n):
        torch.testing.assert_close(whole[i : i + 1], stain_augment(x[i : i + 1], stain[i : i + 1], warp[i : i + 1]))


def test_autocast_computes_in_float32(implementation):
    x, stain, warp = images(dtype=torch.float32), stains().float(), warps().float()
    exact = stain_augment_reference(x.double(), stain, warp)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = stain_augment(x, stain, warp)
        half = stain_augment(x.bfloat16(), stain, warp)
    assert out.dtype == torch.float32 and relative_error(out, exact) < 1e-5
    assert half.dtype == torch.bfloat16
    assert relative_error(half, stain_augment_reference(x.bfloat16().double(), stain, warp)) < 4e-3
