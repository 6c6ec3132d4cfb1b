"""The operators on CUDA against the float64 references: on a device, or emulated (see test_cuda_emulated.py)."""

import math
import os

import pytest
import torch
from stain_inputs import MEAN, STD, images, relative_error, stains, value_and_gradients, warps
from test_ops_gradient_distance import KINDS, SHAPES, gradients, lists
from test_ops_macenko_fit_compiled import assert_fits_agree, patches

from histodd_bench.ops import (
    gradient_distance,
    gradient_distance_reference,
    macenko_fit,
    macenko_fit_reference,
    stain_augment,
    stain_augment_reference,
)

pytestmark = pytest.mark.cuda
needs_device = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(scope="module")
def device(compiled) -> str:
    if os.environ.get("HISTODD_EMULATED"):
        return "cpu"
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if not compiled["cuda"]:
        pytest.skip("extension built for the CPU only")
    return "cuda"


# ---- stain_augment ----


@pytest.mark.parametrize("shape", [(3, 64, 64), (2, 37, 259), (2, 1, 9), (2, 9, 1), (0, 4, 4), (1, 150, 150)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("warped", [False, True])
def test_stain_augment(device, shape, dtype, warped):
    n, h, w = shape
    x = images(n, h, w)
    x = (255 * x).to(dtype) if dtype == torch.uint8 else x.to(dtype)
    warp, upstream, valid = warps(n) if warped else None, images(n, h, w, seed=3).float(), torch.arange(n) % 3 != 1
    tolerance = {torch.float16: 2e-3, torch.float64: 1e-9}.get(dtype, 1e-5)
    exact = x if dtype == torch.uint8 else x.double()
    expected = value_and_gradients(
        stain_augment_reference, exact, stains(n), warp, upstream, valid=valid, mean=MEAN, std=STD, dtype=torch.float64
    )
    for last in (False, True):
        image = x.contiguous(memory_format=torch.channels_last) if last else x
        options = {"channels_last": last, "mean": MEAN, "std": STD, "valid": valid.to(device)}
        arguments = [t if t is None else t.to(device) for t in (image, stains(n), warp, upstream)]
        runs = [value_and_gradients(stain_augment, *arguments, **options) for _ in range(2)]
        for a, b, c in zip(*[[out, *grads] for out, grads in (*runs, expected)], strict=True):
            assert relative_error(a.cpu(), c) < tolerance
            assert torch.equal(a, b)


@pytest.mark.parametrize(
    "matrix",
    [
        [[0.1, 0, 0], [0, 0.1, 0]],  # every pixel of the image seen many times, in several parts
        [[9.0, 2, 0.3], [-1, 8, 0]],  # few pixels seen
        [[0, 1.3, 0.2], [-0.7, 0, 0]],
        [[1, 1, 0], [1, 1, 0]],  # a line: no inverse
        [[0, 0, 0.2], [0, 0, 0.3]],  # one point
        [[1, 0, 5], [0, 1, 0]],  # nothing seen
        [[math.nan, 0, 0], [0, 1, 0]],
    ],
)
@pytest.mark.parametrize("size", [(70, 45), (131, 96)])
def test_the_gradient_of_any_warp(device, matrix, size):
    x, upstream, warp = images(2, *size), images(2, *size, seed=3), torch.tensor([matrix, matrix], dtype=torch.float64)
    expected = value_and_gradients(stain_augment_reference, x, stains(2), warp, upstream)[1]
    got = value_and_gradients(stain_augment, *[t.to(device) for t in (x, stains(2), warp, upstream)])[1]
    for g, e in zip(got, expected, strict=True):
        assert relative_error(g.cpu(), e) < 1e-9


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_absurd_warps_lead_outside(device, dtype):
    x = torch.full((1, 3, 64, 64), 0.5, dtype=dtype)
    x[..., -1, -1] = torch.nan
    away = torch.tensor([[[1.0, 0, 10], [0, 1, 10]]])
    assert stain_augment(x.to(device), warp=away.to(device)).eq(1).all()
    x = torch.zeros_like(x).to(device).requires_grad_()
    wild = torch.randn(20, 2, 3, generator=torch.Generator().manual_seed(1))
    for scale in (1e4, 1e5, 1e6, 1e9, 1e20):
        out = stain_augment(x.expand(20, 3, 64, 64), warp=(scale * wild).to(device))
        assert (out >= 0).all() and torch.autograd.grad(out.sum(), x)[0].isfinite().all()


@needs_device
def test_tensors_on_two_devices_are_refused(compiled):
    with pytest.raises(ValueError, match="stain lies on cpu"):
        stain_augment(images().cuda(), stains())


# ---- macenko_fit ----


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64])
@pytest.mark.parametrize("size", [24, 64, 256, 700])  # shared memory for the small ones, tiles for the large
@pytest.mark.parametrize("interpolation", ["nearest", "linear"])
def test_macenko_fit(device, dtype, size, interpolation):
    x = torch.cat([patches(3, size, size), torch.full((1, 3, size, size), 250, dtype=torch.uint8)])
    x = x if dtype == torch.uint8 else x.to(dtype) / 255
    if dtype != torch.uint8:
        x[1, 0, 2, 2] = torch.nan
    exact = x.double() / 255 if dtype == torch.uint8 else x.double()
    expected = macenko_fit_reference(exact, interpolation=interpolation)
    x = x.to(device)
    for image in (x, x.contiguous(memory_format=torch.channels_last)):
        got = macenko_fit(image, interpolation=interpolation)
        assert_fits_agree([t.cpu() for t in got], expected, 1e-5)
        assert all(torch.equal(a, b) for a, b in zip(got, macenko_fit(image, interpolation=interpolation), strict=True))


def test_all_pixels_are_selected_from_where_the_guess_fails(device):
    x = patches(1, 700, 700).float() / 255
    order = x[0].flatten(1).sum(0).argsort()
    x = x.flatten(2)[:, :, order].view_as(x)
    x = torch.cat([x, x[..., :1, :1].expand_as(x)])  # ordered; and constant
    assert_fits_agree([t.cpu() for t in macenko_fit(x.to(device))], macenko_fit_reference(x.double()), 1e-5)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16])
@pytest.mark.parametrize("size", [(64, 64), (131, 133), (256, 256)])
def test_a_fit_does_not_depend_on_its_batch(device, dtype, size):
    x = patches(2, *size)
    x = (x if dtype == torch.uint8 else (x.double() / 255).to(dtype)).to(device)
    for image in (x, x.contiguous(memory_format=torch.channels_last)):
        many = macenko_fit(image.repeat(20, 1, 1, 1).contiguous(memory_format=torch.preserve_format))
        for alone, among in zip(macenko_fit(image), many, strict=True):
            assert torch.equal(alone, among[-2:])


# ---- gradient_distance ----


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("copies", [1, 8, 60])  # small and large tables, and more layers than one table holds
def test_gradient_distance(device, kind, copies):
    real, synthetic = lists(SHAPES * copies)
    wide = [[t.detach().double().requires_grad_() for t in side] for side in (real, synthetic)]
    on_device = [[t.detach().to(device).requires_grad_() for t in side] for side in (real, synthetic)]
    for per_layer in (False, True):
        value = gradient_distance(*on_device, kind, per_layer)
        expected = gradient_distance_reference(*wide, kind, per_layer)
        torch.testing.assert_close(value.double().cpu(), expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(value, gradient_distance(*on_device, kind, per_layer))
        weight = torch.linspace(0.5, 2, expected.numel(), dtype=torch.float64).view(expected.shape)
        got = gradients(value, on_device[0] + on_device[1], weight.float().to(device))
        for g, e in zip(got, gradients(expected, wide[0] + wide[1], weight), strict=True):
            torch.testing.assert_close(g.double().cpu(), e, rtol=1e-4, atol=5e-5)


@needs_device
@pytest.mark.parametrize("distance", [gradient_distance, gradient_distance_reference], ids=["op", "reference"])
def test_layers_on_two_devices_are_refused(distance):
    mixed = [torch.zeros(2), torch.zeros(2, device="cuda")]
    with pytest.raises(ValueError, match="one device"):
        distance(mixed, mixed)
    with pytest.raises(ValueError, match="layer 0"):
        distance([torch.zeros(2)], [torch.zeros(2, device="cuda")])
