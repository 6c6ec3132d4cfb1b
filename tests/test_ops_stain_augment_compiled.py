"""The compiled stain_augment against the reference in float64, and what only a compiled operator has to prove."""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from stain_inputs import MEAN, STD, images, relative_error, stains, value_and_gradients, warps

from histodd_bench.ops import stain_augment as stain_augment_op
from histodd_bench.ops import stain_augment_reference


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
    """64 x 64 makes a table worth while, 16 x 16 does not; 57 x 57 leaves 49 pixels beside whole vectors."""
    generator = torch.Generator().manual_seed(4)
    stain = factor * stains(1, spread=0.2 / abs(factor))
    for side in (64, 57, 16):
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
@example(
    (
        torch.tensor([[247, 180], [117, 235]], dtype=torch.uint8).expand(1, 3, 2, 2),
        stains(1),
        None,
        {"channels_last": False},
    )
)
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
        # Sums over pixels and neighbours cancel in part. A float64 stain alone does not make it a float64 computation.
        tolerance = rounding.get(g.dtype, 1e-5)
        if torch.float64 not in (x.dtype, out.dtype):
            tolerance = max(tolerance, 1e-5)
        assert relative_error(g, e) <= 3 * tolerance


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


def test_function_transforms_are_refused_and_the_reference_takes_them(compiled):
    """Derivatives in C++ do not know torch.func; what matters is that they say so."""
    image, stain = torch.full((1, 3, 2, 2), 0.4), torch.eye(3, 4)[None] * 0.9
    with pytest.raises(RuntimeError, match="functorch transforms"):
        torch.func.grad(lambda x: stain_augment_op(x, stain).sum())(image)
    leaf = image.clone().requires_grad_()
    stain_augment_op(leaf, stain).sum().backward()
    torch.testing.assert_close(torch.func.grad(lambda x: stain_augment_reference(x, stain).sum())(image), leaf.grad)


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


def test_bytes_do_not_depend_on_threads_or_neighbours(compiled):
    """Of 130 rows of 64 pixels the last two are a unit of their own, too small for a table by itself."""
    x = torch.randint(0, 256, (3, 3, 130, 64), generator=torch.Generator().manual_seed(6), dtype=torch.uint8)
    try:
        torch.set_num_threads(1)
        whole = stain_augment_op(x, stains(3))
        assert torch.equal(stain_augment_op(x[1:2], stains(3)[1:2]), whole[1:2])
        torch.set_num_threads(2)
        assert torch.equal(stain_augment_op(x, stains(3)), whole)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("row", [0, 1, 2])
def test_a_stain_that_is_not_finite_gives_nan_for_bytes_too(compiled, row):
    x, stain = torch.full((1, 3, 40, 40), 100, dtype=torch.uint8), stains(1)
    stain[0, row, 1] = torch.nan
    out = stain_augment_op(x, stain)
    assert out[0, row].isnan().all() and out.isfinite().flatten(2).all(2).sum() == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nan_at_the_border_does_not_spread_outside(compiled, dtype):
    x = torch.full((1, 3, 8, 8), 0.5, dtype=dtype)
    x[..., -1, -1] = torch.nan
    away = torch.tensor([[[1.0, 0, 10], [0, 1, 10]]])
    assert stain_augment_op(x, warp=away).eq(1).all() and stain_augment_reference(x, warp=away).eq(1).all()


def test_absurd_warps_lead_outside(compiled):
    x = torch.zeros(1, 3, 64, 64)
    for entry in (1e5, 1e8, 1e20, torch.inf, torch.nan):
        warp = torch.tensor([[[0, 0, entry], [0, 0, -entry]]])
        assert stain_augment_op(x, warp=warp).eq(1).all() and stain_augment_reference(x, warp=warp).eq(1).all()
    for warp in (torch.randn(40, 2, 3, generator=torch.Generator().manual_seed(1)) * 1e6).split(1):
        assert (stain_augment_op(x, warp=warp) >= 0).all()


def test_forward_mode_is_refused(compiled):
    x, stain = images(1, 8, 8), stains(1)
    with pytest.raises(NotImplementedError, match="stain_augment has no forward-mode derivative"):
        torch.func.jvp(lambda x: stain_augment_op(x, stain), (x,), (torch.ones_like(x),))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="no forward-mode"):
        stain_augment_op(x, torch.autograd.forward_ad.make_dual(stain, stain))


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
    names = "test_float32 or test_all_grey_levels or test_nan or test_opcheck or threads or not_finite or absurd"
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
