"""Batched Macenko fit: stain matrix, maximum concentrations and a status for every patch, never NaN.

Macenko et al., "A method for normalizing histology slides for quantitative analysis", ISBI 2009.
"""

import torch
from torch import Tensor

from histodd_bench.ops.stain_augment import IO

OK, LITTLE_TISSUE, DEGENERATE, WEAK_STAIN, OUT_OF_RANGE = range(5)
STATUS_NAMES = ("ok", "too little tissue", "degenerate", "weak stain", "out_of_range")


def _nearest_rank(values: Tensor, count: Tensor, q: float) -> Tensor:
    """q-th percentile of the first ``count`` values of each ascending row: element round-half-even(q (count-1) / 100)."""
    rank = torch.round(q * (count.double() - 1) / 100).long().clamp(min=0)
    return values.gather(1, rank[:, None]).squeeze(1)


def macenko_fit_reference(
    image: Tensor,
    *,
    io: float = IO,
    beta: float = 0.15,
    alpha: float = 1.0,
    min_tissue: float = 0.01,
    min_concentration: float = 0.1,
) -> tuple[Tensor, Tensor, Tensor]:
    """Fit Macenko stain vectors to every patch of a batch, detached from autograd, in plain torch.

    Args:
        image: ``[N,3,H,W]`` uint8 in 0..255 or floating point in [0, 1].
        io: transmitted light intensity in grey levels.
        beta: pixels count as tissue where all three optical densities reach this.
        alpha: robust extremes of the stain angle at the alpha-th and (100 - alpha)-th percentile (nearest rank).
        min_tissue: smaller fractions of tissue pixels give status 1.
        min_concentration: a 99th percentile below this gives status 3.

    Returns:
        ``stain_matrix [N,3,2]`` (haematoxylin, eosin; unit columns), ``max_concentration [N,2]`` (99th percentiles)
        and ``status [N]`` uint8 (0 ok, 1 too little tissue, 2 degenerate, 3 weak stain, 4 out_of_range). Where the
        status is not 0 the other two hold finite numbers without meaning and the patch should be left alone.
    """
    if image.ndim != 4 or image.shape[1] != 3:
        raise ValueError(f"image must be [N,3,H,W], got {tuple(image.shape)}")
    compute = torch.float64 if image.dtype == torch.float64 else torch.float32
    n, pixels = image.shape[0], image.shape[2] * image.shape[3]
    if n == 0 or pixels == 0:
        empty = torch.full((n,), LITTLE_TISSUE, dtype=torch.uint8, device=image.device)
        return image.new_zeros((n, 3, 2), dtype=compute), image.new_zeros((n, 2), dtype=compute), empty
    x = image.detach().to(compute).reshape(n, 3, pixels)
    out_of_range = torch.zeros(n, dtype=torch.bool, device=image.device)
    if image.is_floating_point():
        out_of_range = ~((x >= 0) & (x <= 1 + 1e-3)).flatten(1).all(1)
        x = torch.where(out_of_range[:, None, None], torch.ones_like(x), x) * 255.0
    od = -torch.log((x + 1.0) / io)
    tissue = (od >= beta).all(1)
    count = tissue.sum(1)
    little = count < max(min_tissue * pixels, 3)
    weight = tissue.to(compute)[:, None]
    total = count.clamp(min=2).to(compute)[:, None, None]
    mean = (od * weight).sum(2, keepdim=True) / total
    centred = (od - mean) * weight
    covariance = centred @ centred.mT / (total - 1)
    eigenvalues, eigenvectors = torch.linalg.eigh(covariance)
    flat = eigenvalues[:, 1] <= 1e-7 * eigenvalues[:, 2].clamp(min=1e-12)
    plane = eigenvectors[:, :, [2, 1]]
    sign = torch.where((plane.mT @ mean).squeeze(2) < 0, -1.0, 1.0).to(compute)
    plane = plane * sign[:, None, :]
    projected = plane.mT @ od
    angle = torch.atan2(projected[:, 1], projected[:, 0]).masked_fill(~tissue, torch.inf).sort(1).values
    extremes = torch.stack([_nearest_rank(angle, count, alpha), _nearest_rank(angle, count, 100 - alpha)], 1)
    extremes = extremes.nan_to_num(0.0, 0.0, 0.0)
    vectors = plane @ torch.stack([extremes.cos(), extremes.sin()], 1)
    swap = vectors[:, 0, 0] < vectors[:, 0, 1]
    stain = torch.where(swap[:, None, None], vectors.flip(2), vectors)
    gram = stain.mT @ stain
    determinant = gram[:, 0, 0] * gram[:, 1, 1] - gram[:, 0, 1] ** 2
    degenerate = flat | (determinant < 1e-6)
    safe = torch.where(degenerate[:, None, None], torch.eye(3, 2, dtype=compute, device=image.device), stain)
    concentration = pinv(safe) @ od
    everything = torch.full((n,), pixels, device=image.device)
    top = torch.stack([_nearest_rank(concentration[:, i].sort(1).values, everything, 99.0) for i in (0, 1)], 1)
    status = torch.zeros(n, dtype=torch.uint8, device=image.device)
    for condition, code in (
        ((top < min_concentration).any(1), WEAK_STAIN),
        (degenerate, DEGENERATE),
        (little, LITTLE_TISSUE),
        (out_of_range, OUT_OF_RANGE),
    ):
        status = torch.where(condition, torch.full_like(status, code), status)
    return safe, top, status


def pinv(stain_matrix: Tensor) -> Tensor:
    """Left inverse ``[N,2,3]`` of stain matrices ``[N,3,2]`` with independent columns (closed form, least squares)."""
    gram = stain_matrix.mT @ stain_matrix
    a, b, d = gram[..., 0, 0], gram[..., 0, 1], gram[..., 1, 1]
    inverse = torch.stack([torch.stack([d, -b], -1), torch.stack([-b, a], -1)], -2) / (a * d - b * b)[..., None, None]
    return inverse @ stain_matrix.mT


macenko_fit = macenko_fit_reference
