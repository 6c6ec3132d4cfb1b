"""Why the fit is detached: where its exact derivative lies. The fit is written once more here, so that autograd sees it."""

import pytest
import torch
from small_sets import stained
from torch import Tensor

from histodd_bench.ops.macenko_fit import pinv, principal_plane, stain_vectors
from histodd_bench.stain import MacenkoNormalizer, StainTemplate

DOUBLE = torch.float64


def normalise_through_the_fit(x: Tensor) -> Tensor:
    """The default definition for one ``[1,3,H,W]`` float64, differentiable through everything."""
    pixels = x.shape[2] * x.shape[3]
    od = -torch.log((255 * x + 1) / 240).reshape(1, 3, pixels)
    tissue = (od >= 0.15).all(1)
    inside = od[:, :, tissue[0]]
    mean = inside.mean(2, keepdim=True)
    plane, _ = principal_plane((inside - mean) @ (inside - mean).mT / (inside.shape[2] - 1), mean, "mean")
    along, across = (plane.mT @ inside)[0]
    angles = torch.atan2(across, along).sort().values
    extremes = angles[[round(q * (len(angles) - 1) / 100) for q in (1, 99)]]
    stain, _ = stain_vectors(plane, extremes[None])
    top = (pinv(stain) @ od)[0].sort(1).values[:, round(0.99 * (pixels - 1))]
    target, target_top = StainTemplate().tensors(x.device)
    moved = (target * (target_top / top)) @ pinv(stain)[0] @ od
    return ((240 / 255) * torch.exp(-moved)).clamp(max=1).view(x.shape)


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("loss", ["brightness", "distance"])
def test_most_of_the_exact_derivative_lies_on_four_pixels(seed: int, loss: str) -> None:
    x = (stained(1, 64, seed=seed).to(DOUBLE) / 255).requires_grad_()

    def per_pixel(out: Tensor) -> Tensor:
        value = out.sum() if loss == "brightness" else (out - x.detach()).square().sum()
        return torch.autograd.grad(value, x)[0].abs().sum(1).flatten().sort(descending=True).values

    out = normalise_through_the_fit(x)
    torch.testing.assert_close(out, MacenkoNormalizer().normalize(x), rtol=0, atol=1e-9)
    exact, detached = per_pixel(out), per_pixel(MacenkoNormalizer().normalize(x))
    assert exact[:4].sum() > 0.5 * exact.sum() and exact[0] > 1000 * exact.median()
    assert detached[:4].sum() < 0.05 * detached.sum()
