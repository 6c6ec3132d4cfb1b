"""Layer-wise distance between two lists of gradients (paper eq. 1)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from histodd_bench.ops._extension import FLOATING, build_info, require_shape, use_compiled

KINDS = ("l1", "l2", "cosine")
COSINE_EPS = 1e-6


def gradient_distance_reference(
    real: Sequence[Tensor], synthetic: Sequence[Tensor], kind: str = "l1", per_layer: bool = False
) -> Tensor:
    """Distance between gradients, in plain torch.

    Args:
        real, synthetic: equally long lists of floating-point tensors; pairs share shape, dtype and device.
        kind: ``l1`` = sum |r - s|; ``l2`` = sum (r - s)^2; ``cosine`` = sum over output filters of 1 - cos (eps 1e-6).
        per_layer: return one value per layer ``[L]`` instead of their sum (a scalar).

    Returns:
        Sums, never means, accumulated in float32 or better. Differentiable once in both lists.
    """
    _require_lists(real, synthetic)
    _refuse_none(real, synthetic)
    _check(real, synthetic, kind)
    values = []
    for r, s in zip(real, synthetic, strict=True):
        if r.dtype != torch.float64:
            r, s = r.float(), s.float()
        if kind == "l1":
            values.append((r - s).abs().sum())
        elif kind == "l2":
            values.append((r - s).square().sum())
        else:
            rows, columns = (r.shape[0] if r.ndim > 1 else 1, -1) if r.numel() else (0, 1)
            r, s = r.reshape(rows, columns), s.reshape(rows, columns)
            cosine = (r * s).sum(1) / (r.norm(dim=1) * s.norm(dim=1) + COSINE_EPS)
            values.append((1 - cosine).sum())
    if not values:
        return torch.zeros(0 if per_layer else (), dtype=torch.float32, device="cpu")
    layers = torch.stack(values)
    return layers if per_layer else layers.sum()


def gradient_distance(
    real: Sequence[Tensor], synthetic: Sequence[Tensor], kind: str = "l1", per_layer: bool = False
) -> Tensor:
    """Layer-wise distance between two lists of gradients, all layers in one pass.

    Args:
        real, synthetic: equally long lists of float64, float32, float16 or bfloat16 tensors of any shape and layout.
            Pairs share shape, dtype and device; layers may differ in shape and dtype but lie on one device.
        kind: ``l1`` = sum |r - s| with derivative 0 at 0; ``l2`` = sum (r - s)^2; ``cosine`` = sum over output filters
            (first dimension; tensors of fewer than two dimensions are one vector) of
            ``1 - <r, s> / (|r| |s| + 1e-6)``. Empty tensors count 0.
        per_layer: return one value per layer ``[L]`` instead of their sum (a scalar).

    Returns:
        Sums, never means: float64 if any layer is, else float32; the same bits for any number of threads.
        Differentiable once in both lists: a list that needs no gradient gets none, and differentiating the derivative
        raises. It composes with double backward through the network that made the gradients
        (``torch.autograd.grad(..., create_graph=True)``), which is what gradient matching needs.

    Raises:
        ValueError: unknown ``kind``, or lists or pairs that do not match.
        TypeError: a tensor instead of a list of them.
    """
    _require_lists(real, synthetic)
    if len(real) and len(synthetic) and real[0] is not None and use_compiled(real[0].device):
        try:
            return torch.ops.histodd.gradient_distance(list(real), list(synthetic), kind, per_layer)
        except RuntimeError:  # None is no tensor to the operator
            _refuse_none(real, synthetic)
            raise
    return gradient_distance_reference(real, synthetic, kind, per_layer)


def _require_lists(real: Sequence[Tensor], synthetic: Sequence[Tensor]) -> None:
    for name, tensors in (("real", real), ("synthetic", synthetic)):
        if isinstance(tensors, Tensor):
            raise TypeError(f"{name} must be a list of tensors, one per layer, got one tensor: [{name}] is a list")


def _check(real: Sequence[Tensor], synthetic: Sequence[Tensor], kind: str) -> None:
    """What ``csrc/checks.h`` refuses, for the reference and for fake tensors."""
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {KINDS}, got {kind!r}")
    if len(real) != len(synthetic):
        raise ValueError(f"lists must have equal lengths, got {len(real)} and {len(synthetic)}")
    for i, (r, s) in enumerate(zip(real, synthetic, strict=True)):
        require_shape(f"layer {i}: synthetic", s, r.shape)
        if r.dtype != s.dtype:
            raise ValueError(f"layer {i}: pairs share their dtype, got {r.dtype} and {s.dtype}")
        if r.dtype not in FLOATING:
            raise ValueError(f"layer {i}: gradients are float64, float32, float16 or bfloat16, got {r.dtype}")
        if r.device != real[0].device or s.device != real[0].device:
            raise ValueError(
                f"layer {i}: all gradients lie on one device, got {r.device} and {s.device} after layer 0 on "
                f"{real[0].device}"
            )


def _refuse_none(real: Sequence[Tensor | None], synthetic: Sequence[Tensor | None]) -> None:
    for name, tensors in (("real", real), ("synthetic", synthetic)):
        for i, tensor in enumerate(tensors):
            if tensor is None:
                raise ValueError(f"layer {i}: {name} has no gradient (None): leave unused parameters out of both lists")


def _fake(real: list[Tensor], synthetic: list[Tensor], kind: str, per_layer: bool) -> Tensor:
    _check(real, synthetic, kind)
    wide = any(r.dtype == torch.float64 for r in real)
    return real[0].new_empty([len(real)] if per_layer else [], dtype=torch.float64 if wide else torch.float32)


def _fake_backward(
    grad: Tensor,
    real: list[Tensor],
    synthetic: list[Tensor],
    kind: str,
    per_layer: bool,
    need_real: bool,
    need_synthetic: bool,
) -> tuple[list[Tensor], list[Tensor]]:
    def like(tensors: list[Tensor]) -> list[Tensor]:
        return [torch.empty_like(t, memory_format=torch.contiguous_format) for t in tensors]

    return like(real) if need_real else [], like(synthetic) if need_synthetic else []


def _fake_signs(real: list[Tensor], synthetic: list[Tensor], per_layer: bool) -> tuple[Tensor, list[Tensor]]:
    return _fake(real, synthetic, "l1", per_layer), [r.new_empty(r.shape, dtype=torch.int8) for r in real]


def _fake_signs_backward(
    grad: Tensor,
    real: list[Tensor],
    synthetic: list[Tensor],
    signs: list[Tensor],
    per_layer: bool,
    need_real: bool,
    need_synthetic: bool,
) -> tuple[list[Tensor], list[Tensor]]:
    return _fake_backward(grad, real, synthetic, "l1", per_layer, need_real, need_synthetic)


if build_info():
    torch.library.register_fake("histodd::gradient_distance", _fake)
    torch.library.register_fake("histodd::gradient_distance_backward", _fake_backward)
    torch.library.register_fake("histodd::gradient_distance_signs", _fake_signs)
    torch.library.register_fake("histodd::gradient_distance_signs_backward", _fake_signs_backward)
