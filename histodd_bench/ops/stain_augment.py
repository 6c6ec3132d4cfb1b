"""Fused affine warp + optical-density affine (Macenko normalisation, stain jitter) + channel normalisation.

Everything Macenko normalisation does to a pixel is one affine map of its optical density, ``od' = A od + b``, so a
whole augmentation is a bilinear gather, that map, and a channel mean and standard deviation.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from histodd_bench.ops._extension import (
    FLOATING,
    build_info,
    require_image,
    require_one_device,
    require_shape,
    require_tensor,
    use_compiled,
    without_autocast,
)

IO = 240.0  # transmitted light, the Macenko convention
WHITE = 255.0  # what lies outside the patch: glass
_OUTSIDE = 1e6  # where a warp that is not finite samples


def _result_dtype(image: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    return dtype or (image.dtype if image.is_floating_point() else torch.float32)


def _constant(**tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        require_tensor(name, tensor)
        if tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"stain_augment is differentiable in image and stain, not in {name}: detach it")


def check_io(io: float) -> None:
    """Refuse an ``io`` with which densities would not be finite in float32."""
    if not 1e-6 < io < 1e9:
        raise ValueError(f"io must be positive and of the order of grey levels, got {io}")


def _check(
    image: Tensor,
    stain: Tensor | None,
    warp: Tensor | None,
    mean: Tensor | None,
    std: Tensor | None,
    valid: Tensor | None,
    io: float,
    dtype: torch.dtype,
) -> None:
    """What ``csrc/checks.h`` refuses, for the reference and for fake tensors."""
    require_image(image)
    if dtype not in FLOATING:
        raise ValueError(f"dtype must be float64, float32, float16 or bfloat16, got {dtype}")
    check_io(io)
    if (mean is None) != (std is None):
        raise ValueError("mean and std go together")
    require_one_device(image=image, stain=stain, warp=warp, mean=mean, std=std, valid=valid)
    n = image.shape[0]
    for name, tensor, shape in (("stain", stain, (n, 3, 4)), ("warp", warp, (n, 2, 3)), ("mean", mean, (3,)), ("std", std, (3,))):
        if tensor is not None:
            require_shape(name, tensor, shape)
            if tensor.dtype not in FLOATING:
                raise ValueError(f"{name} must be float64, float32, float16 or bfloat16, got {tensor.dtype}")
    if valid is not None:
        require_shape("valid", valid, (n,))
        if valid.dtype != torch.bool:
            raise ValueError(f"valid must be bool, got {valid.dtype}")


def stain_augment_reference(
    image: Tensor,
    stain: Tensor | None = None,
    warp: Tensor | None = None,
    mean: Tensor | None = None,
    std: Tensor | None = None,
    *,
    valid: Tensor | None = None,
    io: float = IO,
    dtype: torch.dtype | None = None,
    channels_last: bool = False,
) -> Tensor:
    """The same as :func:`stain_augment`, in plain torch: its oracle, and what runs where it is not compiled."""
    _constant(warp=warp, mean=mean, std=std)
    if mean is not None and std is not None:
        mean, std = mean.to(image.device), std.to(image.device)
    out_dtype = _result_dtype(image, dtype)
    _check(image, stain, warp, mean, std, valid, io, out_dtype)
    compute = torch.float64 if image.dtype == torch.float64 or out_dtype == torch.float64 else torch.float32
    with without_autocast(image.device):
        x = image.to(compute)
        if image.is_floating_point():
            x = x * 255.0
        if warp is not None and image.numel():
            grid = F.affine_grid(warp.to(compute), list(x.shape), align_corners=False)
            grid = grid.nan_to_num(_OUTSIDE, _OUTSIDE, -_OUTSIDE)
            x = WHITE - F.grid_sample(WHITE - x, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        if stain is not None:
            od = -torch.log((x + 1.0) / io)
            stain = stain.to(compute)
            od = torch.einsum("nij,njhw->nihw", stain[:, :, :3], od) + stain[:, :, 3, None, None]
            moved = (io * torch.exp(-od)).clamp(0.0, 255.0)
            x = moved if valid is None else torch.where(valid[:, None, None, None], moved, x)
        x = x / 255.0
        if mean is not None and std is not None:
            x = (x - mean.to(compute)[:, None, None]) / std.to(compute)[:, None, None]
        return x.to(out_dtype).contiguous(
            memory_format=torch.channels_last if channels_last else torch.contiguous_format
        )


def stain_augment(
    image: Tensor,
    stain: Tensor | None = None,
    warp: Tensor | None = None,
    mean: Tensor | None = None,
    std: Tensor | None = None,
    *,
    valid: Tensor | None = None,
    io: float = IO,
    dtype: torch.dtype | None = None,
    channels_last: bool = False,
) -> Tensor:
    """Warp patches, move their stains and normalise their channels, in one pass over the pixels.

    Args:
        image: ``[N,3,H,W]`` uint8 in 0..255 or float64, float32, float16 or bfloat16 in [0, 1]; contiguous or
            channels_last (other strides are copied first). NaN stays NaN, in its pixel (with a warp: and may spread to
            pixels beside it); outside [0, 1] the result means nothing.
        stain: ``[N,3,4]`` floating point, ``[A|b]`` in optical density, or None to leave the stains alone.
        warp: ``[N,2,3]`` output-to-input map in normalised coordinates (``affine_grid``, align_corners=False), or None. Where
            it is not finite it leads outside.
        mean, std: ``[3]`` channel statistics on the [0, 1] scale, both or neither.
        valid: ``[N]`` bool; where false the stain step is skipped exactly.
        io: transmitted light intensity in grey levels.
        dtype: of the result; float images keep theirs by default, uint8 gives float32. Computed in float64 if the
            image or the result is float64, in float32 otherwise, under autocast too.
        channels_last: memory format of the result.

    Returns:
        ``[N,3,H,W]``: bilinear intensities (outside = white) -> optical density -> ``A od + b`` ->
        ``clamp(io exp(-od'), 0, 255) / 255`` -> ``(x - mean) / std``. Differentiable once in ``image`` and ``stain``:
        differentiating the derivative raises. Nothing but the inputs is kept for the backward pass, and everything
        is added up in a fixed order: the same call gives the same bits.

    Raises:
        ValueError: wrong shapes, dtypes or devices; ``mean`` without ``std``; a ``warp``, ``mean`` or ``std`` that
            requires a gradient while gradients are recorded.
        TypeError: what should be a tensor is none.
    """
    require_tensor("image", image)
    if not use_compiled(image.device):
        return stain_augment_reference(
            image, stain, warp, mean, std, valid=valid, io=io, dtype=dtype, channels_last=channels_last
        )
    _constant(warp=warp, mean=mean, std=std)
    if mean is not None and std is not None:
        mean, std = mean.to(image.device), std.to(image.device)
    return torch.ops.histodd.stain_augment(
        image, stain, warp, mean, std, valid, io, _result_dtype(image, dtype), channels_last
    )


def _fake(
    image: Tensor,
    stain: Tensor | None,
    warp: Tensor | None,
    mean: Tensor | None,
    std: Tensor | None,
    valid: Tensor | None,
    io: float,
    dtype: torch.dtype,
    channels_last: bool,
) -> Tensor:
    _check(image, stain, warp, mean, std, valid, io, dtype)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(image.shape, dtype=dtype, device=image.device, memory_format=layout)


def _fake_backward(
    grad: Tensor,
    image: Tensor,
    stain: Tensor | None,
    warp: Tensor | None,
    mean: Tensor | None,
    std: Tensor | None,
    valid: Tensor | None,
    io: float,
    need_image: bool,
    need_stain: bool,
) -> tuple[Tensor, Tensor]:
    last = not image.is_contiguous() and image.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if last else torch.contiguous_format
    grad_image = torch.empty_like(image, memory_format=layout) if need_image else image.new_empty(0)
    grad_stain = stain.new_empty(stain.shape) if need_stain and stain is not None else image.new_empty(0)
    return grad_image, grad_stain


if build_info():
    torch.library.register_fake("histodd::stain_augment", _fake)
    torch.library.register_fake("histodd::stain_augment_backward", _fake_backward)
