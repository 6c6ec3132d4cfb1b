"""What the operators refuse: compiled, in their references, and where only shapes are computed."""

import subprocess
import sys

import pytest
import torch

from histodd_bench.ops import (
    gradient_distance,
    macenko_affine,
    macenko_affine_reference,
    macenko_fit,
    macenko_fit_reference,
    stain_augment,
    stain_augment_reference,
)


def meta(value):
    return value.to("meta") if isinstance(value, torch.Tensor) else value


def ways(op, reference):
    """The operator, the reference, and the operator on tensors without data."""
    return (op, reference, lambda **arguments: op(**{name: meta(value) for name, value in arguments.items()}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": torch.zeros(2, 3, 4, 4, dtype=torch.int32)}, "image must be uint8"),
        ({"image": torch.zeros(2, 4, 4, 3)}, r"image must be \[N,3,H,W\], got \[2, 4, 4, 3\]"),
        ({"stain": torch.zeros(3, 3, 4)}, r"stain must be \[2, 3, 4\], got \[3, 3, 4\]"),
        ({"stain": torch.zeros(2, 3, 3)}, r"stain must be \[2, 3, 4\], got \[2, 3, 3\]"),
        ({"stain": torch.zeros(2, 3, 4, dtype=torch.int64)}, "stain must be float64, float32, float16 or bfloat16, got"),
        ({"warp": torch.zeros(2, 3, 3)}, "warp must be"),
        ({"mean": torch.zeros(1), "std": torch.zeros(3)}, "mean must be"),
        ({"mean": torch.zeros(1, 3, 1, 1), "std": torch.ones(1, 3, 1, 1)}, "mean must be"),
        ({"mean": torch.zeros(3)}, "mean and std go together"),
        ({"valid": torch.zeros(2)}, "valid must be bool, got"),
        ({"valid": torch.zeros(3, dtype=torch.bool)}, r"valid must be \[2\]"),
        ({"dtype": torch.int32}, "dtype must be"),
        ({"io": 0.0}, "io must be positive"),
        ({"io": 1e39}, "io must be positive and of the order of grey levels"),
        ({"warp": torch.zeros(2, 2, 3, requires_grad=True)}, "not in warp: detach it"),
    ],
)
def test_stain_augment(compiled, change, message):
    for augment in ways(stain_augment, stain_augment_reference):
        with pytest.raises(ValueError, match=message):
            augment(**({"image": torch.zeros(2, 3, 4, 4)} | change))


def test_two_devices(compiled):
    image, valid = torch.zeros(2, 3, 4, 4), torch.ones(2, dtype=torch.bool, device="meta")
    for augment in (stain_augment, stain_augment_reference):
        with pytest.raises(ValueError, match="valid lies on meta, image on cpu"):
            augment(image, valid=valid)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": torch.zeros(2)}, r"image must be \[N,3,H,W\], got \[2\]"),
        ({"image": torch.zeros(2, 3, 4, 4, dtype=torch.int64)}, "image must be uint8"),
        ({"io": -1.0}, "io must be positive"),
        ({"beta": float("nan")}, "beta must be finite"),
        ({"alpha": 51.0}, "alpha must be a percentage"),
        ({"min_tissue": 1.5}, "min_tissue must be a fraction"),
        ({"min_concentration": float("inf")}, "min_concentration must be finite"),
        ({"interpolation": "cubic"}, "interpolation must be one of .* got 'cubic'"),
        ({"sign": "last"}, "sign must be one of .* got 'last'"),
    ],
)
def test_macenko_fit(compiled, change, message):
    for fit in ways(macenko_fit, macenko_fit_reference):
        with pytest.raises(ValueError, match=message):
            fit(**({"image": torch.zeros(2, 3, 4, 4)} | change))


def test_macenko_affine_is_the_same_with_and_without_a_gradient(compiled):
    """Nearly parallel stains: float32 arithmetic would lose four digits of what the operator gives."""
    first = torch.tensor([0.56, 0.72, 0.41])
    stain = torch.nn.functional.normalize(torch.stack([first, first + torch.tensor([0.0, 0.008, -0.004])], 1), dim=0)[None]
    arguments = stain, torch.ones(1, 2), torch.rand(3, 2).double(), torch.ones(2).double()
    exact = macenko_affine_reference(*(t.double() for t in arguments)).float()
    wanted = macenko_affine(stain.clone().requires_grad_(), *arguments[1:])
    assert wanted.requires_grad and wanted.dtype == torch.float32
    for found in (wanted, macenko_affine(*arguments)):
        torch.testing.assert_close(found, exact, rtol=1e-6, atol=0)


def test_gradient_distance_without_data(compiled):
    for arguments, message in (
        (([torch.zeros(2)], [torch.zeros(3)]), r"layer 0: synthetic must be \[2\], got \[3\]"),
        (([torch.zeros(2)], [torch.zeros(2).half()]), "layer 0: pairs share their dtype"),
        (([torch.zeros(2)], [torch.zeros(2)], "L3"), "kind must be one of"),
        (([torch.zeros(2)], []), "equal lengths"),
    ):
        real, synthetic, *kind = arguments
        with pytest.raises(ValueError, match=message):
            gradient_distance([meta(r) for r in real], [meta(s) for s in synthetic], *kind)


def test_nothing_is_refused_for_a_gradient_that_nobody_records():
    image, warp = torch.rand(1, 3, 4, 4), torch.eye(2, 3)[None].requires_grad_()
    for augment in (stain_augment, stain_augment_reference):
        with torch.no_grad():
            assert not augment(image, warp=warp).requires_grad


@pytest.mark.parametrize("op", [stain_augment, macenko_fit])
def test_arrays_and_lists_are_refused_by_name(op):
    with pytest.raises(TypeError, match=r"image must be a torch tensor, got ndarray.*permute\(0, 3, 1, 2\)"):
        op(torch.zeros(1, 4, 4, 3).numpy())
    with pytest.raises(TypeError, match="mean must be a torch tensor, got list"):
        stain_augment(torch.zeros(1, 3, 4, 4), mean=[0.5] * 3, std=torch.ones(3))


def test_the_first_call_may_be_a_compiled_one(monkeypatch):
    """Without the extension the warning that says so is no reason for a graph break."""
    monkeypatch.setenv("HISTODD_EXTENSION", "0")
    program = """
import warnings, torch
from histodd_bench.stain import MacenkoNormalizer
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    torch.compile(MacenkoNormalizer(), fullgraph=True, backend="eager")(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
print(sum("slower torch references" in str(w.message) for w in seen))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout == "1\n", done.stderr[-2000:]
