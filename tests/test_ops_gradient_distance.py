import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from histodd_bench.ops import gradient_distance, gradient_distance_reference

KINDS = ("l1", "l2", "cosine")
SHAPES = [(16, 3, 3, 3), (16,), (8, 16, 3, 3), (2, 40), (), (1,), (0,), (0, 5), (5, 0), (70000,), (3, 33001)]


def lists(shapes, dtype=torch.float32, seed=0, requires_grad=True, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        [torch.randn(s, generator=generator).to(device, dtype).requires_grad_(requires_grad) for s in shapes]
        for _ in range(2)
    )


def gradients(value, inputs, weight):
    return torch.autograd.grad((value * weight).sum(), inputs)


@pytest.fixture(params=[gradient_distance, gradient_distance_reference], ids=["op", "reference"])
def distance(request):
    return request.param


def test_known_answers(distance):
    real = [torch.tensor([[1.0, 0.0], [3.0, 4.0]]), torch.tensor([2.0, 2.0])]
    synthetic = [torch.tensor([[0.0, 2.0], [3.0, 4.0]]), torch.tensor([-1.0, -1.0])]
    assert distance(real, synthetic).item() == 3.0 + 6.0
    assert distance(real, synthetic, "l2").item() == 5.0 + 18.0
    # Filters: orthogonal (1), equal (0); the vector is opposite (2).
    assert distance(real, synthetic, "cosine").item() == pytest.approx(3.0, abs=1e-5)
    assert distance(real, synthetic, "l1", per_layer=True).tolist() == [3.0, 6.0]
    assert distance(real, synthetic, "cosine", per_layer=True).tolist() == pytest.approx([1.0, 2.0], abs=1e-5)


def test_cosine_eps_and_zero_filters(distance):
    r = torch.tensor([[3e-4, 4e-4], [0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    s = torch.tensor([[3e-4, 4e-4], [1.0, 0.0]], dtype=torch.float64, requires_grad=True)
    # |r||s| = 25e-8 against eps 1e-6; a zero filter has no direction: 1 - 0.
    value = distance([r], [s], "cosine")
    assert value.item() == pytest.approx((1 - 25e-8 / (25e-8 + 1e-6)) + 1, abs=1e-12)
    grad_r, grad_s = torch.autograd.grad(value, [r, s])
    assert grad_r.isfinite().all() and grad_s.isfinite().all()
    assert grad_s[1].tolist() == [0.0, 0.0]
    assert grad_r[1].tolist() == pytest.approx([-1 / 1e-6, 0.0])


def test_l1_derivative_is_zero_at_zero(distance):
    r = torch.tensor([1.0, 2.0, -3.0], requires_grad=True)
    s = torch.tensor([1.0, 5.0, -9.0], requires_grad=True)
    grad_r, grad_s = torch.autograd.grad(distance([r], [s]), [r, s])
    assert grad_r.tolist() == [0.0, -1.0, 1.0] and grad_s.tolist() == [0.0, 1.0, -1.0]


def test_empty(distance):
    assert distance([], []).item() == 0 and distance([], [], "cosine", per_layer=True).shape == (0,)
    r, s = lists([(0, 5), (5, 0), (0,)])
    for kind in KINDS:
        value = distance(r, s, kind, per_layer=True)
        assert value.tolist() == [0, 0, 0]
        assert all(g.shape == t.shape for g, t in zip(gradients(value, r + s, 1.0), r + s, strict=True))


def test_nan_is_not_hidden(distance):
    r, s = lists([(40,), (5, 3)])
    with torch.no_grad():
        r[0][7] = torch.nan
    for kind in KINDS:
        value = distance(r, s, kind, per_layer=True)
        assert value[0].isnan() and value[1].isfinite()


@pytest.mark.parametrize(
    ("real", "synthetic", "match"),
    [
        ([torch.zeros(2)], [], "equal lengths, got 1 and 0"),
        ([torch.zeros(2)], [torch.zeros(2), torch.zeros(2)], "equal lengths, got 1 and 2"),
        ([torch.zeros(2), torch.zeros(2, 3)], [torch.zeros(2), torch.zeros(3, 2)], r"layer 1: synthetic must be \[2, 3\], got"),
        ([torch.zeros(2)], [torch.zeros(2, dtype=torch.float64)], "layer 0: pairs share their dtype"),
        ([torch.zeros(2, dtype=torch.int64)], [torch.zeros(2, dtype=torch.int64)], "layer 0: .*(float|Long|int)"),
        ([torch.zeros(2, dtype=torch.complex64)], [torch.zeros(2, dtype=torch.complex64)], "layer 0: gradients are"),
    ],
)
def test_mismatched_lists_are_refused(distance, real, synthetic, match):
    with pytest.raises(ValueError, match=match):
        distance(real, synthetic)


def test_a_tensor_in_place_of_a_list_is_refused(distance):
    """Its rows would pass for layers."""
    with pytest.raises(TypeError, match=r"synthetic must be a list of tensors.*\[synthetic\] is a list"):
        distance([torch.zeros(2)], torch.zeros(1, 2))


def test_unknown_kind_is_refused(distance):
    with pytest.raises(ValueError, match=r"kind must be one of .*'l1', 'l2', 'cosine'.* got 'L3'"):
        distance([torch.zeros(2)], [torch.zeros(2)], "L3")


def test_meta_device_gives_shapes(compiled):
    r, s = [torch.empty(4, 3, device="meta")], [torch.empty(4, 3, device="meta")]
    assert gradient_distance(r, s).shape == () and gradient_distance(r, s, "l2", per_layer=True).shape == (1,)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_agrees_with_float64_reference(compiled, kind, dtype):
    real, synthetic = lists(SHAPES, dtype)
    weight = torch.linspace(0.5, 2.0, len(SHAPES), dtype=torch.float64)
    value = gradient_distance(real, synthetic, kind, per_layer=True)
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    exact_in = [[t.detach().double().requires_grad_() for t in side] for side in (real, synthetic)]
    exact = gradient_distance_reference(*exact_in, kind, per_layer=True)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(value.double(), exact, rtol=tolerance, atol=tolerance if kind == "cosine" else 0)
    torch.testing.assert_close(gradient_distance(real, synthetic, kind).double(), exact.sum(), rtol=tolerance, atol=0)
    got = gradients(value.double(), real + synthetic, weight)
    expected = gradients(exact, exact_in[0] + exact_in[1], weight)
    rounding = {torch.float16: 1e-3, torch.bfloat16: 8e-3}.get(dtype, tolerance)  # of the written gradient
    for g, e, t in zip(got, expected, real + synthetic, strict=True):
        assert g.dtype == t.dtype and g.shape == t.shape
        if not t.numel():
            continue
        scale = e.abs().max()
        if kind == "cosine" and t.numel() == 1:  # terms of size 1/|t| that cancel to nearly nothing
            scale = weight.max() / t.detach().double().abs().max()
        assert (g.double() - e).abs().max() <= rounding * scale


def test_layers_of_different_dtypes(compiled):
    shapes = [(3, 4), (5,), (2, 2)]
    types = [torch.float16, torch.float64, torch.float32]
    real, synthetic = (
        [t.detach().to(d).requires_grad_() for t, d in zip(side, types, strict=True)] for side in lists(shapes)
    )
    value = gradient_distance(real, synthetic, per_layer=True)
    assert value.dtype == torch.float64
    torch.testing.assert_close(value, gradient_distance_reference(real, synthetic, per_layer=True))
    assert [g.dtype for g in gradients(value, real, 1.0)] == types


@given(
    shapes=st.lists(st.lists(st.integers(0, 7), max_size=4).map(tuple), min_size=1, max_size=6),
    kind=st.sampled_from(KINDS),
    per_layer=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_shapes(shapes, kind, per_layer, seed):
    real, synthetic = lists(shapes, torch.float64, seed)
    value = gradient_distance(real, synthetic, kind, per_layer)
    expected = gradient_distance_reference(real, synthetic, kind, per_layer)
    assert value.shape == expected.shape
    torch.testing.assert_close(value, expected, rtol=1e-11, atol=1e-11)
    for g, e in zip(gradients(value, real + synthetic, 1.5), gradients(expected, real + synthetic, 1.5), strict=True):
        torch.testing.assert_close(g, e, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_layouts_do_not_matter(compiled, kind):
    (r,), (s,) = lists([(6, 5, 4, 3)], torch.float64, requires_grad=False)
    expected = gradient_distance([r], [s], kind)
    wide = torch.zeros(6, 5, 4, 9, dtype=torch.float64)
    wide[..., 1:7:2] = r
    for real in (
        r.to(memory_format=torch.channels_last),
        wide[..., 1:7:2],
        r.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
    ):
        other = s.clone().requires_grad_()
        value = gradient_distance([real], [other], kind)
        assert value.item() == expected.item()
        reference = s.clone().requires_grad_()
        gradient_distance_reference([r], [reference], kind).backward()
        value.backward()
        torch.testing.assert_close(other.grad, reference.grad)


def test_unaligned_storage(compiled):
    base, other = lists([(1001,)], requires_grad=False)
    real, synthetic = base[0][1:].view(4, 250), other[0][1:].view(4, 250)
    for kind in KINDS:
        torch.testing.assert_close(
            gradient_distance([real], [synthetic], kind), gradient_distance_reference([real], [synthetic], kind)
        )


@pytest.mark.parametrize("kind", KINDS)
def test_result_does_not_depend_on_threads(compiled, kind):
    shapes = [(64, 64, 3, 3), (64,), (300, 700), (100003,)]
    real, synthetic = lists(shapes)
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            value = gradient_distance(real, synthetic, kind, per_layer=True)
            results.append((value, gradients(value, real + synthetic, 0.3)))
    finally:
        torch.set_num_threads(1)
    for value, grads in results[1:]:
        assert torch.equal(value, results[0][0])
        assert all(torch.equal(a, b) for a, b in zip(grads, results[0][1], strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("per_layer", [False, True])
def test_gradcheck(distance, kind, per_layer):
    real, synthetic = lists([(3, 4), (5,), (2, 2, 2, 1)], torch.float64)

    def run(*tensors):
        return distance(list(tensors[:3]), list(tensors[3:]), kind, per_layer)

    assert torch.autograd.gradcheck(run, (*real, *synthetic))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("per_layer", [False, True])
def test_opcheck(compiled, kind, per_layer):
    real, synthetic = lists([(3, 4), (5,), (0, 2)])
    torch.library.opcheck(torch.ops.histodd.gradient_distance.default, (real, synthetic, kind, per_layer))
    detached = [t.detach() for t in real], [t.detach() for t in synthetic]
    grad = torch.ones(3 if per_layer else ())
    for needs in ((True, True), (False, True), (True, False)):
        arguments = (grad, *detached, kind, per_layer, *needs)
        torch.library.opcheck(torch.ops.histodd.gradient_distance_backward.default, arguments)


@pytest.mark.parametrize("per_layer", [False, True])
def test_signs_stand_for_the_lists(compiled, per_layer):
    """What L1 keeps for its backward pass on a CPU: the signs of the differences, in a byte each."""
    real, synthetic = lists([(3, 4), (5,), (0, 2), (40000,)], requires_grad=False)
    real[1][2], real[0][1, 1] = torch.nan, synthetic[0][1, 1]
    value, signs = torch.ops.histodd.gradient_distance_signs(real, synthetic, per_layer)
    torch.testing.assert_close(
        value, gradient_distance(real, synthetic, "l1", per_layer), rtol=0, atol=0, equal_nan=True
    )
    assert signs[0][1, 1] == 0 and signs[1][2] == 2
    for r, s, sign in zip(real, synthetic, signs, strict=True):
        known = ~r.isnan()
        assert sign.dtype == torch.int8 and torch.equal(sign[known], torch.sign(r - s)[known].to(torch.int8))
    grad = torch.linspace(0.5, 2, value.numel()).view(value.shape)
    rest = (per_layer, True, True)
    got = torch.ops.histodd.gradient_distance_signs_backward(grad, real, synthetic, signs, *rest)
    expected = torch.ops.histodd.gradient_distance_backward(grad, real, synthetic, "l1", *rest)
    for g, e in zip(got[0] + got[1], expected[0] + expected[1], strict=True):
        torch.testing.assert_close(g, e, rtol=0, atol=0, equal_nan=True)
    signs[1].clamp_(max=1)  # opcheck compares its results, and NaN equals nothing
    real[1].nan_to_num_()
    torch.library.opcheck(torch.ops.histodd.gradient_distance_signs.default, (real, synthetic, per_layer))
    arguments = (grad, real, synthetic, signs, *rest)
    torch.library.opcheck(torch.ops.histodd.gradient_distance_signs_backward.default, arguments)
    with pytest.raises(ValueError, match="layer 0: signs are those of gradient_distance_signs"):
        torch.ops.histodd.gradient_distance_signs_backward(grad, real, synthetic, real, *rest)
    with pytest.raises(ValueError, match="signs for every layer, got 1 for 4"):
        torch.ops.histodd.gradient_distance_signs_backward(grad, real, synthetic, signs[:1], *rest)


def test_sides_and_layers_that_need_no_gradient_get_none(compiled):
    real, synthetic = lists([(3, 4), (5,)])
    real = [t.detach() for t in real]
    synthetic[1] = synthetic[1].detach()
    gradient_distance(real, synthetic).backward()
    assert all(t.grad is None for t in real) and synthetic[1].grad is None
    assert torch.equal(synthetic[0].grad, torch.sign(synthetic[0] - real[0]))
    lone = torch.ops.histodd.gradient_distance_backward(torch.ones(()), real, real, "l1", False, False, True)
    assert [len(side) for side in lone] == [0, 2]


@pytest.mark.parametrize("kind", KINDS)
def test_double_backward_is_refused(compiled, kind):
    real, synthetic = lists([(3, 4)])
    (grad,) = torch.autograd.grad(gradient_distance(real, synthetic, kind), synthetic, create_graph=True)
    with pytest.raises(RuntimeError, match=r"derivative for histodd::gradient_distance\w*_backward is not implemented"):
        torch.autograd.grad(grad.square().sum(), synthetic)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_matching_through_a_network(distance, kind):
    """The use it is made for: from the distance of gradients, through double backward, to the images."""
    generator = torch.Generator().manual_seed(3)
    weights = [
        torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in [(4, 3, 3, 3), (2, 4)]
    ]
    image = torch.rand(2, 3, 6, 6, generator=generator, dtype=torch.float64).requires_grad_()
    target = [torch.randn(w.shape, generator=generator, dtype=torch.float64) for w in weights]
    labels = torch.tensor([0, 1])

    def matching(x):
        hidden = torch.nn.functional.softplus(torch.nn.functional.conv2d(x, weights[0])).mean((2, 3))
        loss = torch.nn.functional.cross_entropy(hidden @ weights[1].T, labels)
        return distance(target, torch.autograd.grad(loss, weights, create_graph=True), kind)

    assert torch.autograd.gradcheck(matching, (image,))


def test_torch_compile_has_no_graph_break(compiled):
    real, synthetic = lists([(3, 4), (5,)])

    def loss(r, s):
        return gradient_distance([2 * t for t in r], s, "l2") * 3

    compiled_loss = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled_loss(real, synthetic), loss(real, synthetic))
    expected = torch.autograd.grad(loss(real, synthetic), synthetic)
    for g, e in zip(torch.autograd.grad(compiled_loss(real, synthetic), synthetic), expected, strict=True):
        torch.testing.assert_close(g, e)


def test_autocast_computes_in_float32(compiled):
    real, synthetic = lists([(300,)], torch.bfloat16, requires_grad=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = gradient_distance(real, synthetic)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, gradient_distance_reference(real, synthetic))


def test_none_and_other_devices_are_named():
    x = torch.ones(3)
    for function in (gradient_distance, gradient_distance_reference):
        for lists_ in (([x, None], [x, x]), ([None, x], [x, x]), ([x, x], [x, None])):
            with pytest.raises(ValueError, match=r"layer [01]: (real|synthetic) has no gradient \(None\)"):
                function(*lists_)
        with pytest.raises(ValueError, match=r"layer 0: .*meta"):
            function([x], [x.to("meta")])


def test_forward_mode_is_refused(compiled):
    x = torch.ones(3)
    with pytest.raises(NotImplementedError, match="gradient_distance has no forward-mode derivative"):
        torch.func.jvp(lambda s: gradient_distance([x], [s]), (2 * x,), (x,))


def test_reference_takes_over_with_one_warning():
    code = """
import os, warnings
os.environ["HISTODD_EXTENSION"] = "0"
import torch
from histodd_bench.ops import gradient_distance
from histodd_bench.ops._extension import build_info, missing_reason
assert build_info() == {} and missing_reason() == "HISTODD_EXTENSION=0 is set"
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    for _ in range(3):
        s = torch.zeros(3, requires_grad=True)
        gradient_distance([torch.ones(3)], [s]).backward()
        assert s.grad.tolist() == [-1, -1, -1]
assert [str(w.message).count("HISTODD_EXTENSION=0 is set") for w in seen] == [1], seen
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
