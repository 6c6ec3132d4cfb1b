import math
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from histodd_bench.ops import stain_augment as stain_augment_op
from histodd_bench.ops import stain_augment_reference

stain_augment = stain_augment_op
ANY_FIXTURE = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
IDENTITY = torch.eye(3, 4, dtype=torch.float64)


@pytest.fixture(params=["op", "reference"])
def implementation(request, monkeypatch):
    """``stain_augment`` is the op, then the reference. Tests that compare the two name ``stain_augment_op``."""
    chosen = stain_augment_op if request.param == "op" else stain_augment_reference
    monkeypatch.setitem(globals(), "stain_augment", chosen)
    return request.param


both = pytest.mark.usefixtures("implementation")


def images(n=2, h=9, w=7, seed=0, dtype=torch.float64):
    return torch.rand(n, 3, h, w, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def warps(n=2, seed=0):
    """Flips, rotations and scales within the augmentation's range, with a small shift."""
    generator = torch.Generator().manual_seed(seed)
    angle = (torch.rand(n, generator=generator, dtype=torch.float64) - 0.5) * math.radians(30)
    scale = 0.8 + 0.4 * torch.rand(n, 2, generator=generator, dtype=torch.float64)
    flip = torch.where(torch.rand(n, generator=generator) < 0.5, -1.0, 1.0).double()
    rotation = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1).view(n, 2, 2)
    linear = rotation * scale[:, None, :] * torch.stack([flip, torch.ones_like(flip)], 1)[:, None, :]
    shift = 0.1 * torch.rand(n, 2, 1, generator=generator, dtype=torch.float64)
    return torch.cat([linear, shift], 2)


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


# Compiled against the reference in float64.

MEAN, STD = torch.tensor([0.7, 0.5, 0.6]), torch.tensor([0.2, 0.3, 0.1])


def stains(n=2, seed=0, spread=0.1):
    noise = torch.randn(n, 3, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return IDENTITY + spread * noise


def relative_error(value, exact):
    scale = exact.abs().max().clamp(min=1e-30) if exact.numel() else 1.0
    return ((value.double() - exact) / scale).abs().max().item() if exact.numel() else 0.0


def value_and_gradients(function, image, stain, warp, upstream, **options):
    image = image.detach().clone(memory_format=torch.preserve_format)
    image.requires_grad_(image.is_floating_point())
    leaves = [image] if image.is_floating_point() else []
    if stain is not None:
        stain = stain.detach().clone().requires_grad_()
        leaves.append(stain)
    out = function(image, stain, warp, **options)
    return out, torch.autograd.grad((out * upstream.to(out.dtype)).sum(), leaves) if leaves else []


@pytest.mark.parametrize("shape", [(3, 64, 64), (2, 37, 259), (1, 300, 5), (2, 1, 9), (2, 9, 1), (5, 2, 2)])
@pytest.mark.parametrize("parts", ["", "stain", "warp", "stain warp", "stain warp mean valid"])
def test_float32_is_close_to_the_float64_reference(compiled, shape, parts):
    n, h, w = shape
    x = images(n, h, w, dtype=torch.float32)
    options = {"mean": MEAN, "std": STD} if "mean" in parts else {}
    if "valid" in parts:
        options["valid"] = torch.arange(n) % 3 != 1
    stain = stains(n).float() if "stain" in parts else None
    warp = warps(n).float() if "warp" in parts else None
    upstream = images(n, h, w, seed=8)
    out, grads = value_and_gradients(stain_augment_op, x, stain, warp, upstream, **options)
    wide = [t.double() if t is not None else None for t in (x, stain, warp)]
    exact, exact_grads = value_and_gradients(stain_augment_reference, *wide, upstream, **options)
    assert out.dtype == torch.float32 and relative_error(out, exact) < 1e-5
    for g, e in zip(grads, exact_grads, strict=True):
        assert g.dtype == torch.float32 and relative_error(g, e) < 1e-5


@pytest.mark.parametrize("io", [240.0, 255.0])
@pytest.mark.parametrize("factor", [1.0, 3.0, -0.5, 40.0])  # the last one leaves the range of the table of factors
def test_all_grey_levels_of_bytes(compiled, io, factor):
    """64 x 64 makes a table worth while, 16 x 16 does not."""
    generator = torch.Generator().manual_seed(4)
    stain = factor * stains(1, spread=0.2 / abs(factor))
    for side in (64, 16):
        grey = torch.randint(0, 256, (1, 3, side, side), generator=generator, dtype=torch.uint8)
        grey.view(-1)[:256] = torch.arange(256)
        exact = stain_augment_reference(grey, stain, io=io, dtype=torch.float64)
        for image in (grey, grey.contiguous(memory_format=torch.channels_last)):
            out = stain_augment_op(image, stain.float(), io=io)
            assert (out - exact).abs().max() < 1e-5
            assert out.max() <= 1 and out.min() >= 0


@st.composite
def calls(draw):
    """An image of any type, layout and size, and any of the stages."""
    n, h, w = draw(st.integers(0, 3)), draw(st.integers(0, 70)), draw(st.integers(0, 70))
    dtype = draw(st.sampled_from([torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64]))
    seed = draw(st.integers(0, 999))
    x = images(n, h, w, seed)
    x = (255 * x).round().to(dtype) if dtype == torch.uint8 else x.to(dtype)
    layout = draw(st.sampled_from(["contiguous", "channels_last", "sliced", "flipped", "expanded"]))
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    elif layout == "sliced":
        x = x.new_zeros(n, 3, h, 2 * w + 1)[..., 1 : 1 + 2 * w : 2].copy_(x)
    elif layout == "flipped":
        x = x.transpose(2, 3).contiguous().transpose(2, 3)
    elif layout == "expanded" and h:
        x = x[:, :, :1].expand(n, 3, h, w)
    small = st.sampled_from([torch.float32, torch.float64, torch.float16])
    stain = stains(n, seed).to(draw(small)) if draw(st.booleans()) else None
    warp = warps(n, seed).to(draw(small)) if draw(st.booleans()) else None
    options = {"channels_last": draw(st.booleans())}
    options["dtype"] = draw(st.sampled_from([None, torch.float64, torch.float32, torch.float16, torch.bfloat16]))
    if draw(st.booleans()):
        options |= {"mean": MEAN, "std": STD}
    if draw(st.booleans()):
        options["valid"] = torch.rand(n, generator=torch.Generator().manual_seed(seed)) < 0.5
    return x, stain, warp, options


@given(calls())
@settings(max_examples=150)
def test_any_input(call):
    x, stain, warp, options = call
    # Exact in every type.
    upstream = torch.randint(-16, 17, x.shape, generator=torch.Generator().manual_seed(1)).float() / 8
    out, grads = value_and_gradients(stain_augment_op, x, stain, warp, upstream, **options)
    expected, expected_grads = value_and_gradients(stain_augment_reference, x, stain, warp, upstream, **options)
    assert out.dtype == expected.dtype and out.shape == expected.shape
    assert out.is_contiguous(memory_format=torch.channels_last if options["channels_last"] else torch.contiguous_format)
    wide = [t.double() if t is not None and t.is_floating_point() else t for t in (x, stain, warp)]
    exact, exact_grads = value_and_gradients(
        stain_augment_reference, *wide, upstream, **(options | {"dtype": torch.float64})
    )
    rounding = {torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float64: 1e-9}
    # a float64 image or result is computed in float64; then only the result is rounded
    assert relative_error(out, exact) <= rounding.get(out.dtype, 1e-5)
    for g, e, like in zip(grads, exact_grads, expected_grads, strict=True):
        assert g.dtype == like.dtype and g.shape == like.shape
        # Sums over pixels and neighbours cancel in part.
        assert relative_error(g, e) <= 3 * rounding.get(g.dtype, 1e-5)


@pytest.mark.parametrize("parts", ["valid", "stain warp mean valid"])
@pytest.mark.parametrize("size", [(4, 5), (1, 6), (6, 1), (9, 70)])
def test_gradcheck_of_the_op_with_invalid_patches(compiled, parts, size):
    x = (0.2 + 0.6 * images(3, *size)).requires_grad_()
    stain = stains(3, spread=0.05).requires_grad_()
    warp = warps(3) if "warp" in parts else None
    mean, std = (MEAN, STD) if "mean" in parts else (None, None)
    valid = torch.tensor([True, False, True])

    def run(image, matrix):
        return stain_augment_op(image, matrix, warp, mean, std, valid=valid)

    assert torch.autograd.gradcheck(run, (x, stain), fast_mode=size == (9, 70))


def test_gradient_of_the_stain_from_bytes(compiled):
    grey = torch.randint(0, 256, (2, 3, 40, 50), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
    for warp in (None, warps()):
        grads = []
        for function in (stain_augment_op, stain_augment_reference):
            stain = stains().requires_grad_()
            grads += torch.autograd.grad(function(grey, stain, warp, dtype=torch.float64).square().sum(), stain)
        torch.testing.assert_close(grads[0], grads[1])


@pytest.mark.parametrize("kind", ["uint8", "plain", "warp", "half", "channels_last"])
def test_opcheck(compiled, kind):
    x, stain = images(2, 6, 5, dtype=torch.float32), stains().float()
    if kind == "uint8":
        x = (255 * x).to(torch.uint8)
    if kind == "half":
        x = x.half()
    if kind == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    warp = warps().float() if kind == "warp" else None
    valid = torch.tensor([True, False])
    leaf = x.clone(memory_format=torch.preserve_format).requires_grad_(x.is_floating_point())
    forward = torch.ops.histodd.stain_augment.default
    arguments = (stain.clone().requires_grad_(), warp, MEAN, STD, valid, 240.0)
    torch.library.opcheck(forward, (leaf, *arguments, torch.float32, kind == "channels_last"))
    grad = torch.ones(x.shape)
    backward = torch.ops.histodd.stain_augment_backward.default
    for need in ((True, True), (False, True), (True, False), (False, False)):
        if not need[0] or x.is_floating_point():
            torch.library.opcheck(backward, (grad, x, stain, warp, MEAN, STD, valid, 240.0, *need))


@pytest.mark.parametrize("warped", [False, True])
def test_double_backward_is_refused(compiled, warped):
    x, stain = images().requires_grad_(), stains().requires_grad_()
    out = stain_augment_op(x, stain, warps() if warped else None)
    grads = torch.autograd.grad(out.square().sum(), [x, stain], create_graph=True)
    for g in grads:
        with pytest.raises(RuntimeError, match=r"derivative for histodd::stain_augment_backward is not implemented"):
            torch.autograd.grad(g.square().sum(), x, retain_graph=True)


@pytest.mark.parametrize("warped", [False, True])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64])
def test_result_does_not_depend_on_threads(compiled, dtype, warped):
    x, upstream = images(5, 70, 150), images(5, 70, 150, seed=3).float()
    x = (255 * x).to(dtype) if dtype == torch.uint8 else x.to(dtype)
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(value_and_gradients(stain_augment_op, x, stains(5), warps(5) if warped else None, upstream))
    finally:
        torch.set_num_threads(1)
    for out, grads in results[1:]:
        assert torch.equal(out, results[0][0])
        assert all(torch.equal(a, b) for a, b in zip(grads, results[0][1], strict=True))


def test_nan_stays_in_its_pixel_and_nothing_crashes(compiled):
    x = images(2, 20, 40, dtype=torch.float32)
    bad = x.clone()
    bad[0, 1, 3, 4] = torch.nan
    clean, out = stain_augment_op(x, stains().float()), stain_augment_op(bad, stains().float())
    assert out[0, :, 3, 4].isnan().all()
    out[0, :, 3, 4] = clean[0, :, 3, 4]
    assert torch.equal(out, clean)
    wild = torch.tensor([-1e30, -0.5, 2.0, 1e30, torch.inf, -torch.inf, torch.nan, 0.0]).view(1, 1, 2, 4)
    wild = wild.repeat(1, 3, 10, 20).requires_grad_()
    for warp in (torch.eye(2, 3), torch.full((2, 3), torch.nan), torch.full((2, 3), 1e38), torch.zeros(2, 3)):
        for image in (wild, wild.double()):
            result = stain_augment_op(image, stains(1), warp[None])
            assert torch.autograd.grad(result.sum(), wild)[0].shape == wild.shape
    assert stain_augment_op(x, warp=torch.full((2, 2, 3), torch.nan)).eq(1).all()  # nowhere: white


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_lesser_instruction_sets(compiled, capability):
    """The comparisons with the float64 reference again, with the kernels for older machines."""
    names = "test_float32_is_close or test_all_grey_levels or test_nan_stays or test_opcheck"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__, "-k", names]
    environment = os.environ | {"ATEN_CPU_CAPABILITY": capability}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0 and " passed" in result.stdout, result.stdout[-3000:]


@pytest.mark.parametrize("warped", [False, True])
def test_torch_compile_has_no_graph_break(compiled, warped):
    x, stain = images(dtype=torch.float32).requires_grad_(), stains().float().requires_grad_()
    warp = warps().float() if warped else None

    def loss(image, matrix):
        return stain_augment_op(2 * image - image, matrix, warp, MEAN, STD).square().sum()

    compiled_loss = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled_loss(x, stain), loss(x, stain))
    expected = torch.autograd.grad(loss(x, stain), [x, stain])
    for g, e in zip(torch.autograd.grad(compiled_loss(x, stain), [x, stain]), expected, strict=True):
        torch.testing.assert_close(g, e)


def test_autocast_computes_in_float32(implementation):
    x, stain, warp = images(dtype=torch.float32), stains().float(), warps().float()
    exact = stain_augment_reference(x.double(), stain, warp)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = stain_augment(x, stain, warp)
        half = stain_augment(x.bfloat16(), stain, warp)
    assert out.dtype == torch.float32 and relative_error(out, exact) < 1e-5
    assert half.dtype == torch.bfloat16
    assert relative_error(half, stain_augment_reference(x.bfloat16().double(), stain, warp)) < 4e-3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": torch.zeros(2, 3, 4, 4, dtype=torch.int32)}, "image must be uint8"),
        ({"stain": torch.zeros(3, 3, 4)}, "stain must be"),
        ({"stain": torch.zeros(2, 3, 4, dtype=torch.int64)}, "stain has the wrong dtype"),
        ({"warp": torch.zeros(2, 3, 3)}, "warp must be"),
        ({"mean": torch.zeros(1), "std": torch.zeros(3)}, "mean must be"),
        ({"valid": torch.zeros(2)}, "valid has the wrong dtype"),
        ({"valid": torch.zeros(3, dtype=torch.bool)}, "valid must be"),
        ({"dtype": torch.int32}, "dtype must be"),
        ({"io": 0.0}, "io must be positive"),
        ({"warp": torch.zeros(2, 2, 3, requires_grad=True)}, "not in warp: detach it"),
    ],
)
def test_unsuitable_arguments_are_refused(compiled, change, message):
    arguments = {"image": torch.zeros(2, 3, 4, 4)} | change
    with pytest.raises(ValueError, match=message):
        stain_augment_op(**arguments)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("shape", [(3, 64, 64), (2, 37, 259), (2, 1, 9), (2, 9, 1), (0, 4, 4)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("warped", [False, True])
@pytest.mark.parametrize("deterministic", [False, True])
def test_cuda_agrees_with_cpu(compiled, shape, dtype, warped, deterministic):
    if not compiled["cuda"]:
        pytest.skip("extension built for the CPU only")
    n, h, w = shape
    x = images(n, h, w)
    x = (255 * x).to(dtype) if dtype == torch.uint8 else x.to(dtype)
    warp, upstream, valid = warps(n) if warped else None, images(n, h, w, seed=3).float(), torch.arange(n) % 3 != 1
    tolerance = {torch.float16: 2e-3, torch.float64: 1e-9}.get(dtype, 1e-5)
    try:
        torch.use_deterministic_algorithms(deterministic)
        for last in (False, True):
            image = x.contiguous(memory_format=torch.channels_last) if last else x
            options = {"channels_last": last, "mean": MEAN, "std": STD}
            cpu = value_and_gradients(stain_augment_op, image, stains(n), warp, upstream, valid=valid, **options)
            arguments = [t if t is None else t.cuda() for t in (image, stains(n), warp, upstream)]
            runs = [value_and_gradients(stain_augment_op, *arguments, valid=valid.cuda(), **options) for _ in range(2)]
            assert torch.equal(runs[0][0], runs[1][0])
            for a, b, c in zip([runs[0][0], *runs[0][1]], [runs[1][0], *runs[1][1]], [cpu[0], *cpu[1]], strict=True):
                assert relative_error(a.cpu(), c.double()) < tolerance
                assert not deterministic or torch.equal(a, b)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_refuses_tensors_on_two_devices(compiled):
    with pytest.raises(ValueError, match="stain lies on cpu"):
        stain_augment_op(images().cuda(), stains())
