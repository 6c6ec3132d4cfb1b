"""Batched Macenko fit: stain matrix, maximum concentrations and a status for every patch, never NaN.

Macenko et al., "A method for normalizing histology slides for quantitative analysis", ISBI 2009.

The fit is detached from autograd on purpose: its exact derivative lies on the one to four pixels that happen to be at
the percentiles, and smooth stand-ins for it are derivatives of some other function. The per-pixel map that uses a fit,
``stain_augment``, has exact gradients.
"""

import math

import torch
from torch import Tensor

from histodd_bench.ops._extension import (
    build_info,
    require_image,
    require_one_device,
    require_shape,
    require_tensor,
    use_compiled,
    without_autocast,
)
from histodd_bench.ops.stain_augment import IO, check_io

OK, LITTLE_TISSUE, DEGENERATE, WEAK_STAIN, OUT_OF_RANGE = range(5)
STATUS_NAMES = ("ok", "too little tissue", "degenerate", "weak stain", "out_of_range")
INTERPOLATIONS = ("nearest", "linear")
SIGNS = ("mean", "first")


def _percentile(values: Tensor, count: Tensor, q: float, linear: bool) -> Tensor:
    """q-th percentile of the first ``count`` values of each ascending row, at the position q (count-1) / 100 from 0."""
    position = (q * (count.double() - 1) / 100).clamp(min=0)
    if not linear:
        return values.gather(1, torch.round(position).long()[:, None]).squeeze(1)  # half to even
    low = position.floor()
    ends = torch.stack([low, torch.minimum(low + 1, (count - 1).clamp(min=0))], 1).long()
    first, second = values.gather(1, ends).unbind(1)
    second = torch.where(second.isfinite(), second, first)
    return first + (second - first) * (position - low).to(values)


def check_options(
    io: float,
    beta: float,
    alpha: float,
    min_tissue: float = 0.0,
    min_concentration: float = 0.0,
    interpolation: str = "nearest",
    sign: str = "mean",
) -> None:
    """Refuse options of :func:`macenko_fit` that mean nothing.

    Raises:
        ValueError: naming the option.
    """
    check_io(io)
    if not -math.inf < beta < math.inf:
        raise ValueError(f"beta must be finite, got {beta}")
    if not 0 <= alpha <= 50:
        raise ValueError(f"alpha must be a percentage from 0 to 50, got {alpha}")
    if not 0 <= min_tissue <= 1:
        raise ValueError(f"min_tissue must be a fraction from 0 to 1, got {min_tissue}")
    if not -math.inf < min_concentration < math.inf:
        raise ValueError(f"min_concentration must be finite, got {min_concentration}")
    if interpolation not in INTERPOLATIONS:
        raise ValueError(f"interpolation must be one of {INTERPOLATIONS}, got {interpolation!r}")
    if sign not in SIGNS:
        raise ValueError(f"sign must be one of {SIGNS}, got {sign!r}")


def in_range(images: Tensor) -> Tensor:
    """``[N]`` bool: which of ``[N,3,H,W]`` are on the right scale. uint8 always is; floats from 0 to 1 + 1e-3, without NaN."""
    if not images.is_floating_point():
        return torch.ones(images.shape[0], dtype=torch.bool, device=images.device)
    return ((images >= 0) & (images <= 1 + 1e-3)).flatten(1).all(1)


def macenko_fit_reference(
    image: Tensor,
    *,
    io: float = IO,
    beta: float = 0.15,
    alpha: float = 1.0,
    min_tissue: float = 0.01,
    min_concentration: float = 0.1,
    interpolation: str = "nearest",
    plus_one: bool = True,
    sign: str = "mean",
    tissue_mask: Tensor | None = None,
    check: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Fit Macenko stain vectors to every patch of a batch, detached from autograd, in plain torch.

    Arguments, results and errors are those of :func:`macenko_fit`.
    """
    require_image(image)
    check_options(io, beta, alpha, min_tissue, min_concentration, interpolation, sign)
    if tissue_mask is not None and (
        tissue_mask.dtype != torch.bool or tissue_mask.shape != (image.shape[0], *image.shape[2:])
    ):
        raise ValueError(f"tissue_mask must be [N,H,W] bool, got {list(tissue_mask.shape)} {tissue_mask.dtype}")
    compute = torch.float64 if image.dtype == torch.float64 else torch.float32
    n, pixels = image.shape[0], image.shape[2] * image.shape[3]
    if n == 0 or pixels == 0:
        empty = torch.full((n,), LITTLE_TISSUE, dtype=torch.uint8, device=image.device)
        return image.new_zeros((n, 3, 2), dtype=compute), image.new_zeros((n, 2), dtype=compute), empty
    linear = interpolation == "linear"
    x = image.detach().to(compute).reshape(n, 3, pixels)
    out_of_range = ~in_range(x if image.is_floating_point() else image)
    if image.is_floating_point():
        x = torch.where(out_of_range[:, None, None], torch.ones_like(x), x) * 255.0
    od = -torch.log((x + 1.0) / io) if plus_one else -torch.log(x.clamp(1.0, io) / io)
    tissue = (od >= beta).all(1)
    if tissue_mask is not None:
        tissue = tissue & tissue_mask.reshape(n, pixels)
    count = tissue.sum(1)
    little = (count < min_tissue * pixels) | (count < 3)
    weight = tissue.double()[:, None]
    total = count.clamp(min=2).double()[:, None, None]
    mean = (od * weight).sum(2, keepdim=True) / total
    centred = (od - mean) * weight
    plane, flat = principal_plane(centred @ centred.mT / (total - 1), mean, sign)
    with without_autocast(image.device):
        projected = plane.to(compute).mT @ od
    angle = torch.atan2(projected[:, 1], projected[:, 0]).masked_fill(~tissue, torch.inf).sort(1).values
    extremes = torch.stack([_percentile(angle, count, q, linear) for q in (alpha, 100 - alpha)], 1)
    stain, alike = stain_vectors(plane, extremes.nan_to_num(0.0, 0.0, 0.0).double())
    degenerate = flat | alike
    failed = out_of_range | little | degenerate
    stain = torch.where(failed[:, None, None], torch.eye(3, 2, dtype=torch.float64, device=image.device), stain)
    with without_autocast(image.device):
        concentration = pinv(stain).to(compute) @ od
    everything = torch.full((n,), pixels, device=image.device)
    top = torch.stack([_percentile(concentration[:, i].sort(1).values, everything, 99.0, linear) for i in (0, 1)], 1)
    top = top.masked_fill(failed[:, None], 0.0)
    status = torch.zeros(n, dtype=torch.uint8, device=image.device)
    for condition, code in (
        ((top < min_concentration).any(1), WEAK_STAIN),
        (degenerate, DEGENERATE),
        (little, LITTLE_TISSUE),
        (out_of_range, OUT_OF_RANGE),
    ):
        status = torch.where(condition, torch.full_like(status, code), status)
    return _checked((stain.to(compute), top, status), check)


def principal_plane(covariance: Tensor, mean: Tensor, sign: str) -> tuple[Tensor, Tensor]:
    """The two leading axes ``[N,3,2]`` of covariances ``[N,3,3]``, signed, and whether there is no plane (``[N]`` bool).

    ``mean [N,3,1]`` is what the axes are signed by; all float64. Densities on a line or a point have no plane.
    """
    values, vectors = torch.linalg.eigh(covariance)
    plane = vectors[:, :, [2, 1]]
    along = (plane.mT @ mean).squeeze(2) if sign == "mean" else plane[:, 0]
    # 1e-12: float32 densities that are equal up to rounding have variances near 1e-14.
    flat = values[:, 1] <= (1e-7 * values[:, 2]).clamp(min=1e-12)
    return plane * torch.where(along < 0, -1.0, 1.0)[:, None, :], flat


def stain_vectors(plane: Tensor, angles: Tensor) -> tuple[Tensor, Tensor]:
    """Stain matrices ``[N,3,2]`` at the extreme angles ``[N,2]`` in planes ``[N,3,2]``, the one with more red first.

    The second result says where the two are too close to each other to tell stains apart (``[N]`` bool).
    """
    vectors = plane @ torch.stack([angles.cos(), angles.sin()], 1)
    swap = vectors[:, 0, 0] < vectors[:, 0, 1]
    stain = torch.where(swap[:, None, None], vectors.flip(2), vectors)
    gram = stain.mT @ stain
    return stain, gram[:, 0, 0] * gram[:, 1, 1] - gram[:, 0, 1] ** 2 < 1e-6


def pinv(stain_matrix: Tensor) -> Tensor:
    """Left inverse ``[N,2,3]`` of stain matrices ``[N,3,2]`` with independent columns (closed form, least squares)."""
    gram = stain_matrix.mT @ stain_matrix
    a, b, d = gram[..., 0, 0], gram[..., 0, 1], gram[..., 1, 1]
    inverse = torch.stack([torch.stack([d, -b], -1), torch.stack([-b, a], -1)], -2) / (a * d - b * b)[..., None, None]
    return inverse @ stain_matrix.mT


def macenko_affine_reference(
    stain_matrix: Tensor, max_concentration: Tensor, target: Tensor, target_top: Tensor
) -> Tensor:
    """:func:`macenko_affine` in plain torch; differentiable in all four."""
    n, dtype = stain_matrix.shape[0], stain_matrix.dtype
    for name, tensor, shape in (
        ("stain_matrix", stain_matrix, (n, 3, 2)),
        ("max_concentration", max_concentration, (n, 2)),
        ("target", target, (3, 2)),
        ("target_top", target_top, (2,)),
    ):
        require_shape(name, tensor, shape)
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"stain_matrix must be float32 or float64, got {dtype}")
    if max_concentration.dtype != dtype:
        raise ValueError(f"max_concentration must be {dtype} like stain_matrix, got {max_concentration.dtype}")
    stain_matrix, max_concentration, target, target_top = (
        t.to(stain_matrix.device, torch.float64) for t in (stain_matrix, max_concentration, target, target_top)
    )
    ratio = target_top / max_concentration.clamp(min=1e-6)
    with without_autocast(stain_matrix.device):
        matrix = (target * ratio[:, None, :]) @ pinv(stain_matrix)
    return torch.cat([matrix, matrix.new_zeros(n, 3, 1)], 2).to(dtype)


def macenko_affine(stain_matrix: Tensor, max_concentration: Tensor, target: Tensor, target_top: Tensor) -> Tensor:
    """The map that gives patches with these fits the target's stains: ``[A|b]`` for :func:`stain_augment`.

    A = target diag(target_top / max_concentration) pinv(stain_matrix), b = 0 (paper 3.1). Where a fit's status is not 0
    the result has no meaning, and need not be finite.

    Args:
        stain_matrix: ``[N,3,2]`` float32 or float64, from :func:`macenko_fit`.
        max_concentration: ``[N,2]``, of the same dtype.
        target: ``[3,2]`` stain matrix of the target, columns haematoxylin and eosin; of any device and dtype.
        target_top: ``[2]`` maximum concentrations of the target.

    Returns:
        ``[N,3,4]`` of the dtype of ``stain_matrix``. Where a gradient is wanted it is computed by the torch reference.

    Raises:
        ValueError: wrong shape or dtype.
    """
    tensors = (stain_matrix, max_concentration, target, target_top)
    wants_gradient = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    if wants_gradient or not use_compiled(stain_matrix.device):
        return macenko_affine_reference(*tensors)
    target, target_top = (t.to(stain_matrix.device, torch.float64) for t in (target, target_top))
    return torch.ops.histodd.macenko_affine(stain_matrix, max_concentration, target, target_top)


def refuse_out_of_range(out_of_range: Tensor) -> None:
    """Raise ValueError, naming them, if any of ``[N]`` bool images is out of range."""
    wrong = out_of_range.nonzero().flatten().tolist()
    if wrong:
        raise ValueError(
            f"images must lie in [0, 1] (uint8: 0..255) and hold no NaN; out of range: {wrong[:10]}"
            f"{' and more' if len(wrong) > 10 else ''} of {len(out_of_range)}"
        )


def _checked(fit: tuple[Tensor, Tensor, Tensor], check: bool) -> tuple[Tensor, Tensor, Tensor]:
    if check:
        refuse_out_of_range(fit[2] == OUT_OF_RANGE)
    return fit


def macenko_fit(
    image: Tensor,
    *,
    io: float = IO,
    beta: float = 0.15,
    alpha: float = 1.0,
    min_tissue: float = 0.01,
    min_concentration: float = 0.1,
    interpolation: str = "nearest",
    plus_one: bool = True,
    sign: str = "mean",
    tissue_mask: Tensor | None = None,
    check: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Fit Macenko stain vectors to every patch of a batch, detached from autograd, without host synchronisation.

    Args:
        image: ``[N,3,H,W]`` uint8 in 0..255 or floating point in [0, 1]; contiguous and channels_last are read as they
            are. float16 and bfloat16 are computed in float32.
        io: transmitted light intensity in grey levels.
        beta: pixels count as tissue where all three optical densities reach this.
        alpha: robust extremes of the stain angle at the alpha-th and (100 - alpha)-th percentile of the tissue, 0 to 50.
        min_tissue: smaller fractions of tissue pixels, 0 to 1, give status 1, and so do fewer than three pixels.
        min_concentration: a maximum concentration below this gives status 3.
        interpolation: of percentiles q of n values. ``nearest`` takes the element of rank round-half-even(q (n-1) / 100),
            counted from 0; ``linear`` goes between the two elements around that position, as numpy does.
        plus_one: optical density is ``-ln((I + 1) / io)``; if false ``-ln(clamp(I, 1, io) / io)``.
        sign: eigenvectors point to where the mean density projects positively (``mean``) or to a positive red component
            (``first``, which wraps the angle around pi where the first axis runs across the stains).
        tissue_mask: ``[N,H,W]`` bool, pixels that may count as tissue; computed by the slower torch reference.
        check: synchronise and raise if an image is out of range.

    Returns:
        ``stain_matrix [N,3,2]`` (haematoxylin, the one with the larger red component, then eosin; unit columns),
        ``max_concentration [N,2]`` (99th percentiles over all pixels) and ``status [N]`` uint8: 0 ok, 1 too little
        tissue, 2 degenerate (no plane or no two stains), 3 weak stain, 4 out_of_range (a value below 0 or beyond
        1 + 1e-3, NaN or Inf). Where the status is not 0 the other two hold finite numbers without meaning, and the
        patch should be left alone. float64 for float64 images, else float32; the same bits for any number of threads.

    Raises:
        ValueError: wrong shape, dtype or option; with ``check``, images out of range.
        TypeError: ``image`` is no tensor.
    """
    require_tensor("image", image)
    if tissue_mask is None and use_compiled(image.device):
        return _checked(
            torch.ops.histodd.macenko_fit(
                image.detach(), io, beta, alpha, min_tissue, min_concentration, interpolation, plus_one, sign
            ),
            check,
        )
    return macenko_fit_reference(
        image,
        io=io,
        beta=beta,
        alpha=alpha,
        min_tissue=min_tissue,
        min_concentration=min_concentration,
        interpolation=interpolation,
        plus_one=plus_one,
        sign=sign,
        tissue_mask=tissue_mask,
        check=check,
    )


def _fake(
    image: Tensor,
    io: float,
    beta: float,
    alpha: float,
    min_tissue: float,
    min_concentration: float,
    interpolation: str,
    plus_one: bool,
    sign: str,
) -> tuple[Tensor, Tensor, Tensor]:
    require_image(image)
    check_options(io, beta, alpha, min_tissue, min_concentration, interpolation, sign)
    n, dtype = image.shape[0], torch.float64 if image.dtype == torch.float64 else torch.float32
    return (
        image.new_empty((n, 3, 2), dtype=dtype),
        image.new_empty((n, 2), dtype=dtype),
        image.new_empty((n,), dtype=torch.uint8),
    )


def _fake_affine(stain_matrix: Tensor, max_concentration: Tensor, target: Tensor, target_top: Tensor) -> Tensor:
    require_one_device(stain_matrix=stain_matrix, max_concentration=max_concentration)
    return stain_matrix.new_empty((stain_matrix.shape[0], 3, 4))


if build_info():
    torch.library.register_fake("histodd::macenko_fit", _fake)
    torch.library.register_fake("histodd::macenko_affine", _fake_affine)
