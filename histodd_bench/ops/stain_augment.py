"""Fused affine warp + optical-density affine (Macenko normalisation, stain jitter) + channel normalisation.

Everything Macenko normalisation does to a pixel is one affine map of its optical density, ``od' = A od + b``, so a
whole augmentation is a bilinear gather, that map, and a channel mean and standard deviation.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

IO = 240.0  # transmitted light, the Macenko convention
WHITE = 255.0  # what lies outside the patch: glass


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
    """Warp patches, move their stains and normalise their channels, in plain torch.

    Args:
        image: ``[N,3,H,W]`` uint8 in 0..255 or floating point in [0, 1].
        stain: ``[N,3,4]`` floating point, ``[A|b]`` in optical density, or None to leave the stains alone.
        warp: ``[N,2,3]`` output-to-input map in normalised coordinates (``affine_grid``, align_corners=False), or None.
        mean, std: ``[3]`` channel statistics on the [0, 1] scale, both or neither.
        valid: ``[N]`` bool; where false the stain step is skipped exactly.
        io: transmitted light intensity in grey levels.
        dtype: of the result; float images keep theirs by default, uint8 gives float32.
        channels_last: memory format of the result.

    Returns:
        ``[N,3,H,W]``: bilinear intensities (outside = white) -> optical density -> ``A od + b`` ->
        ``clamp(io exp(-od'), 0, 255) / 255`` -> ``(x - mean) / std``. Differentiable in ``image`` and ``stain``.
    """
    if image.ndim != 4 or image.shape[1] != 3:
        raise ValueError(f"image must be [N,3,H,W], got {tuple(image.shape)}")
    if (mean is None) != (std is None):
        raise ValueError("mean and std go together")
    out_dtype = dtype or (image.dtype if image.is_floating_point() else torch.float32)
    compute = torch.float64 if image.dtype == torch.float64 or out_dtype == torch.float64 else torch.float32
    x = image.to(compute)
    if image.is_floating_point():
        x = x * 255.0
    if warp is not None and len(image):
        grid = F.affine_grid(warp.to(compute), list(x.shape), align_corners=False)
        x = WHITE - F.grid_sample(WHITE - x, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    if stain is not None:
        od = -torch.log((x + 1.0) / io)
        stain = stain.to(compute)
        od = torch.einsum("nij,njhw->nihw", stain[:, :, :3], od) + stain[:, :, 3, None, None]
        moved = (io * torch.exp(-od)).clamp(0.0, 255.0)
        x = moved if valid is None else torch.where(valid[:, None, None, None], moved, x)
    x = x / 255.0
    if mean is not None and std is not None:
        x = (x - mean.to(x)[:, None, None]) / std.to(x)[:, None, None]
    return x.to(out_dtype).contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


stain_augment = stain_augment_reference
