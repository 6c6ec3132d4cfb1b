"""The compiled macenko_fit against the float64 reference and against sorting; layouts, threads, instruction sets."""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_sets import render, stained

from histodd_bench.ops import macenko_affine_reference, macenko_fit, macenko_fit_reference
from histodd_bench.ops.macenko_fit import DEGENERATE, LITTLE_TISSUE, OK, OUT_OF_RANGE, pinv
from histodd_bench.stain import MacenkoNormalizer
from histodd_bench.stain_definitions import DEFINITIONS

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
FUNCTIONS = pytest.mark.parametrize("fit", [macenko_fit, macenko_fit_reference], ids=["op", "reference"])


def patches(n, height, width, seed=0):
    """Two stains and some glass, so that tissue is not everything."""
    g = torch.Generator().manual_seed(seed)
    h, e = 2 * torch.rand(n, height, width, generator=g), 1.2 * torch.rand(n, height, width, generator=g)
    glass = (torch.rand(n, height, width, generator=g) > 0.2).float()
    return render(h * glass, e * glass)


def assert_fits_agree(got, expected, atol):
    assert torch.equal(got[2], expected[2])
    ok = expected[2] == OK
    torch.testing.assert_close(got[0][ok].double(), expected[0][ok], rtol=0, atol=atol)
    torch.testing.assert_close(got[1][ok].double(), expected[1][ok], rtol=atol, atol=atol)


@pytest.mark.parametrize("dtype", [torch.uint8, *FLOATS])
@pytest.mark.parametrize("interpolation", ["nearest", "linear"])
@pytest.mark.parametrize(("plus_one", "sign", "io"), [(True, "mean", 240.0), (False, "first", 255.0)])
def test_agrees_with_the_float64_reference(compiled, dtype, interpolation, plus_one, sign, io):
    options = {"interpolation": interpolation, "plus_one": plus_one, "sign": sign, "io": io}
    for size, atol in (((40, 31), 1e-5), ((150, 131), 1e-5)):  # below and beyond the size where tails are guessed
        x = patches(3, *size)
        x = x if dtype == torch.uint8 else (x.double() / 255).to(dtype)
        got = macenko_fit(x, **options)
        assert got[0].dtype == got[1].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        exact = macenko_fit_reference(x.double() / 255 if dtype == torch.uint8 else x.double(), **options)
        assert (exact[2] == OK).all()
        assert_fits_agree(got, exact, 1e-11 if dtype == torch.float64 else atol)


def sorted_top(image, stain, linear):
    """99th percentiles of the concentrations of one [3,H,W] float64 image by sorting."""
    od = -torch.log((image.flatten(1) * 255 + 1) / 240)
    values = (pinv(stain[None])[0] @ od).sort(1).values
    position = 0.99 * (values.shape[1] - 1)
    if not linear:
        return values[:, round(99 * (values.shape[1] - 1) / 100)]
    low = int(position)
    return torch.lerp(values[:, low], values[:, min(low + 1, values.shape[1] - 1)], position - low)


def tail_cases():
    """Images whose sample of pixels misleads: constant where sampled, ordered, full of ties, strong only off the sample."""
    random = (patches(1, 96, 96, 7)[0].double() / 255).flatten(1)
    dark = random.sum(0).argsort()
    step = 17  # of the sample, at this size
    misled = random[:, dark.flip(0)]
    strong, weak = random[:, dark], random[:, dark.flip(0)]
    sampled = torch.arange(random.shape[1]) % step == 0
    yield "random", random
    yield "ordered", random[:, dark]
    yield "sample is all strong", torch.where(sampled, strong[:, torch.arange(random.shape[1]) // step], weak)
    yield "sample is all weak", torch.where(sampled, weak[:, torch.arange(random.shape[1]) // step], strong)
    yield (
        "twelve colours",
        random[:, torch.randint(0, 12, (random.shape[1],), generator=torch.Generator().manual_seed(1))],
    )
    yield "ties around the percentile", torch.cat([misled[:, :9000], misled[:, -1:].expand(3, 216)], 1)


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("name", [name for name, _ in tail_cases()])
def test_selection_is_exact(name, linear):
    image = dict(tail_cases())[name].reshape(3, 96, 96)
    interpolation = "linear" if linear else "nearest"
    stain, top, status = macenko_fit(image[None], interpolation=interpolation)
    assert status.tolist() == [OK]
    torch.testing.assert_close(top[0], sorted_top(image, stain[0], linear), rtol=1e-13, atol=1e-14)
    assert_fits_agree((stain, top, status), macenko_fit_reference(image[None], interpolation=interpolation), 1e-11)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 5.0, 25.0, 50.0])
def test_any_percentile(alpha):
    x = patches(2, 70, 70, 3).double() / 255
    for interpolation in ("nearest", "linear"):
        options = {"alpha": alpha, "interpolation": interpolation}
        got, expected = macenko_fit(x, **options), macenko_fit_reference(x, **options)
        assert_fits_agree(got, expected, 1e-10)
        assert (got[2] == (DEGENERATE if alpha == 50 else OK)).all()


@given(
    st.integers(0, 3),
    st.integers(0, 40),
    st.integers(0, 40),
    st.sampled_from([torch.uint8, *FLOATS]),
    st.sampled_from(["nearest", "linear"]),
    st.integers(0, 99),
)
def test_any_shape_agrees_with_the_reference(n, height, width, dtype, interpolation, seed):
    x = patches(n, height, width, seed)
    x = x if dtype == torch.uint8 else (x.double() / 255).to(dtype)
    got = macenko_fit(x, interpolation=interpolation)
    assert all(t.isfinite().all() for t in got)
    exact = macenko_fit_reference(x.double() / 255 if dtype == torch.uint8 else x.double(), interpolation=interpolation)
    assert torch.equal(got[2], exact[2])
    # Few pixels can have nearly equal eigenvalues, and then the plane itself is ill-conditioned.
    if height * width >= 200:
        assert_fits_agree(got, exact, 1e-9 if dtype == torch.float64 else 1e-4)


@FUNCTIONS
def test_few_tissue_pixels(fit):
    tissue = (stained(1, 4).double() / 255).flatten(2)
    for count, expected in ((0, LITTLE_TISSUE), (1, LITTLE_TISSUE), (2, LITTLE_TISSUE), (3, OK), (4, OK)):
        x = torch.ones(1, 3, 100, dtype=torch.float64)
        x[:, :, 10 : 10 + count] = tissue[:, :, 3 : 3 + count]
        stain, top, status = fit(x.view(1, 3, 10, 10), min_tissue=0.0, min_concentration=-10.0)
        assert status.tolist() == [expected] and stain.isfinite().all() and top.isfinite().all()
        assert fit(x.view(1, 3, 10, 10), min_tissue=0.05)[2].tolist() == [LITTLE_TISSUE]


@FUNCTIONS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_points_and_lines_are_degenerate(fit, dtype):
    t = torch.linspace(0, 1, 64, dtype=torch.float64)[None, :]
    base, along = torch.tensor([[0.5], [0.9], [0.4]]).double(), torch.tensor([[0.3], [0.2], [0.5]]).double()
    for od in (base.expand(3, 64), base + along * t):
        x = ((240 * torch.exp(-od) - 1) / 255).to(dtype).reshape(1, 3, 8, 8)
        stain, top, status = fit(x)
        assert status.tolist() == [DEGENERATE] and stain.isfinite().all() and top.isfinite().all()


@FUNCTIONS
def test_check_names_the_images_that_are_out_of_range(fit):
    x = stained(4, 12).float() / 255
    assert fit(x, check=True)[2].tolist() == [OK] * 4
    x[1, 2, 3, 4], x[3] = torch.nan, x[3] * 255
    assert fit(x)[2].tolist() == [OK, OUT_OF_RANGE, OK, OUT_OF_RANGE]
    with pytest.raises(ValueError, match=r"out of range: \[1, 3\] of 4"):
        fit(x, check=True)


@FUNCTIONS
@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"io": 0.0}, "io must be positive"),
        ({"alpha": 51.0}, "alpha must be a percentage from 0 to 50"),
        ({"alpha": -1.0}, "alpha must be a percentage from 0 to 50"),
        ({"min_tissue": -1.0}, "min_tissue must be a fraction from 0 to 1"),
        ({"min_concentration": float("nan")}, "min_concentration must be finite"),
        ({"io": 1e39}, "io must be positive and of the order of grey levels"),
        ({"interpolation": "cubic"}, r"interpolation must be one of .*got 'cubic'"),
        ({"sign": "last"}, r"sign must be one of .*got 'last'"),
    ],
)
def test_bad_options_are_refused(fit, options, match):
    with pytest.raises(ValueError, match=match):
        fit(stained(1), **options)


@FUNCTIONS
def test_integer_images_other_than_uint8_are_refused(fit):
    with pytest.raises(ValueError, match="image must be uint8"):
        fit(stained(1).int())


def test_a_mask_restricts_the_tissue():
    x = patches(2, 32, 32, 1)
    mask = torch.zeros(2, 32, 32, dtype=torch.bool)
    mask[0, :16], mask[1, :, :16] = True, True
    stain, _, status = macenko_fit(x, tissue_mask=mask)
    for i, part in enumerate((x[:1, :, :16], x[1:, :, :, :16])):
        torch.testing.assert_close(stain[i], macenko_fit(part)[0][0])
    assert status.tolist() == [OK, OK]
    assert macenko_fit(x, tissue_mask=torch.zeros_like(mask))[2].tolist() == [LITTLE_TISSUE] * 2
    with pytest.raises(ValueError, match=r"tissue_mask must be \[N,H,W\] bool"):
        macenko_fit(x, tissue_mask=mask[:, :8])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.bfloat16])
def test_layouts_give_the_same_bits(dtype):
    x = patches(2, 33, 47, 2)
    x = x if dtype == torch.uint8 else (x.float() / 255).to(dtype)
    expected = macenko_fit(x)
    wide = torch.zeros(2, 3, 33, 94, dtype=dtype)
    wide[..., ::2] = x
    for other in (x.contiguous(memory_format=torch.channels_last), wide[..., ::2], x.mT.contiguous().mT):
        assert all(torch.equal(a, b) for a, b in zip(macenko_fit(other), expected, strict=True))


def test_bits_do_not_depend_on_threads_or_on_the_batch(compiled):
    x = torch.cat([patches(4, 150, 150, 5), torch.full((1, 3, 150, 150), 255, dtype=torch.uint8)]).float() / 255
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(macenko_fit(x))
            results.append(tuple(torch.cat(t) for t in zip(*[macenko_fit(one[None]) for one in x], strict=True)))
    finally:
        torch.set_num_threads(1)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_every_instruction_set_gives_the_same_fit(compiled, capability, tmp_path):
    x = patches(3, 120, 90, 8)
    code = """
import sys, torch
from histodd_bench.ops import macenko_fit
x = torch.load(sys.argv[1], weights_only=True)
torch.save([macenko_fit(x), macenko_fit(x.float() / 255)], sys.argv[2])
"""
    torch.save(x, tmp_path / "x.pt")
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "x.pt"), str(tmp_path / "fit.pt")],
        env={**os.environ, "ATEN_CPU_CAPABILITY": capability},
        check=True,
        timeout=120,
    )
    for got, here in zip(torch.load(tmp_path / "fit.pt"), (macenko_fit(x), macenko_fit(x.float() / 255)), strict=True):
        assert_fits_agree(got, (here[0].double(), here[1].double(), here[2]), 2e-6)


def arguments(image):
    return (image, 240.0, 0.15, 1.0, 0.01, 0.1, "nearest", True, "mean")


@pytest.mark.parametrize("shape", [(2, 16, 16), (0, 4, 4), (2, 0, 3)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64])
def test_opcheck(compiled, shape, dtype):
    x = patches(shape[0], *shape[1:])
    torch.library.opcheck(
        torch.ops.histodd.macenko_fit.default, arguments(x if dtype == torch.uint8 else x.to(dtype) / 255)
    )


def test_meta_device_gives_shapes(compiled):
    stain, top, status = macenko_fit(torch.empty(5, 3, 8, 8, device="meta", dtype=torch.float64))
    assert stain.shape == (5, 3, 2) and top.shape == (5, 2) and status.shape == (5,)
    assert stain.dtype == torch.float64 and status.dtype == torch.uint8


def test_the_bare_operator_refuses_a_derivative(compiled):
    x = (stained(1).float() / 255).requires_grad_()
    stain, _, _ = torch.ops.histodd.macenko_fit(*arguments(x))
    with pytest.raises(RuntimeError, match="derivative for histodd::macenko_fit is not implemented"):
        stain.sum().backward()


def test_torch_compile_has_no_graph_break(compiled):
    x = stained(3, 24).float() / 255

    def run(image):
        stain, top, status = macenko_fit(image * 1.0)
        return stain * 2, top, status

    compiled_run = torch.compile(run, fullgraph=True, backend="aot_eager")
    for got, expected in zip(compiled_run(x), run(x), strict=True):
        torch.testing.assert_close(got, expected)


def test_autocast_computes_in_float32(compiled):
    x = (stained(2, 24).float() / 255).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        stain, top, _ = macenko_fit(x)
        reference = macenko_fit_reference(x)
        affine = macenko_affine_reference(stain, top, stain[0], top[0])
        for name in DEFINITIONS:
            assert MacenkoNormalizer(definition=name).normalize(x.float()).dtype == torch.float32
    assert stain.dtype == top.dtype == torch.float32
    assert torch.equal(stain, macenko_fit(x)[0])
    assert torch.equal(reference[0], macenko_fit_reference(x)[0])
    assert torch.equal(affine, macenko_affine_reference(stain, top, stain[0], top[0]))
