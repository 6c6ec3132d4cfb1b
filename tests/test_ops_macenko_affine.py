"""macenko_affine against its definition in float64, and what it does to densities of known stains."""

import pytest
import torch

from histodd_bench.ops import macenko_affine, macenko_affine_reference
from histodd_bench.stain import REFERENCE_MAX_CONCENTRATION, REFERENCE_STAIN

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.cuda,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
        ],
    ),
]


def example_fits(n: int, dtype: torch.dtype, device: str = "cpu"):
    g = torch.Generator().manual_seed(n)
    stain = torch.nn.functional.normalize(torch.rand(n, 3, 2, generator=g, dtype=torch.float64) + 0.05, dim=1)
    top = 0.5 + torch.rand(n, 2, generator=g, dtype=torch.float64)
    target, target_top = (torch.tensor(t, dtype=torch.float64) for t in (REFERENCE_STAIN, REFERENCE_MAX_CONCENTRATION))
    return stain.to(device, dtype), top.to(device, dtype), target.to(device), target_top.to(device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("n", [0, 1, 3, 130])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_affine_map_takes_every_fit_onto_the_target(device, n, dtype) -> None:
    stain, top, target, target_top = example_fits(n, dtype, device)
    ab = macenko_affine(stain, top, target, target_top)
    assert ab.dtype == dtype
    assert ab.shape == (n, 3, 4)
    assert not ab[..., 3].any()
    wide = [t.double().cpu() for t in (stain, top, target, target_top)]
    tolerance = 1e-5 if dtype == torch.float32 else 1e-11
    torch.testing.assert_close(ab.double().cpu(), macenko_affine_reference(*wide), rtol=tolerance, atol=tolerance)
    # Densities of one stain at its maximum concentration become the target's.
    moved = ab[..., :3].double().cpu() @ (wide[0] * wide[1][:, None, :])
    torch.testing.assert_close(moved, (wide[2] * wide[3]).expand(n, 3, 2), rtol=100 * tolerance, atol=100 * tolerance)


@pytest.mark.parametrize("device", DEVICES)
def test_the_affine_map_of_strided_fits_and_of_concentrations_near_zero(device) -> None:
    stain, top, target, target_top = example_fits(4, torch.float32, device)
    expected = macenko_affine(stain, top, target, target_top)
    strided = macenko_affine(stain.mT.contiguous().mT, top.T.contiguous().T, target.T.contiguous().T, target_top)
    assert torch.equal(strided, expected)
    assert torch.equal(macenko_affine(stain, top, target.cpu(), target_top.cpu()), expected)  # moved
    single = target.float()  # converted
    assert torch.equal(
        macenko_affine(stain, top, single.double(), target_top), macenko_affine(stain, top, single, target_top)
    )
    top[1] = 0
    torch.testing.assert_close(
        macenko_affine(stain, top, target, target_top).cpu(),
        macenko_affine_reference(stain, top, target, target_top).cpu(),
        rtol=1e-4,
        atol=1e-4,
    )


def test_the_affine_map_is_differentiable_where_asked() -> None:
    stain, top, target, target_top = example_fits(2, torch.float64)
    inputs = [t.requires_grad_() for t in (stain, top, target, target_top)]
    assert torch.autograd.gradcheck(macenko_affine, inputs)
    assert not macenko_affine(*(t.detach() for t in inputs)).requires_grad


def test_the_affine_map_opcheck_and_bad_input(compiled) -> None:
    inputs = example_fits(3, torch.float32)
    torch.library.opcheck(torch.ops.histodd.macenko_affine.default, inputs)
    stain, top, target, target_top = inputs
    for wrong, words in (
        ((stain[:, :2], top, target, target_top), "stain_matrix must be"),
        ((stain, top[:2], target, target_top), "max_concentration must be"),
        ((stain, top.double(), target, target_top), "max_concentration must be"),
        ((stain.half(), top.half(), target, target_top), "stain_matrix must be float32 or float64"),
        ((stain, top, target[None], target_top), "target must be"),
        ((stain, top, target, target_top[:1]), "target_top must be"),
    ):
        for affine in (macenko_affine, macenko_affine_reference):
            with pytest.raises(ValueError, match=words):
                affine(*wrong)
