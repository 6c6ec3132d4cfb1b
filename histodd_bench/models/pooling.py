"""2x2 average pooling, as fast on a CPU as elsewhere."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _Halve(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        channels = x.shape[1]
        return F.conv2d(x, x.new_full((channels, 1, 2, 2), 0.25), stride=2, groups=channels)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        (x,) = inputs
        ctx.odd = (x.shape[2] % 2, x.shape[3] % 2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _Spread.apply(grad, ctx.odd)


class _Spread(torch.autograd.Function):  # the transposed map
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, odd: tuple[int, int]) -> Tensor:
        n, c, h, w = x.shape
        wide = (0.25 * x)[:, :, :, None, :, None].expand(n, c, h, 2, w, 2).reshape(n, c, 2 * h, 2 * w)
        return F.pad(wide, (0, odd[1], 0, odd[0])) if any(odd) else wide

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, tuple[int, int]], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _Halve.apply(grad), None


class HalvingPool(nn.Module):
    """2x2 average pool of stride 2; an odd last row or column is dropped.

    ``avg_pool2d`` of a contiguous tensor is not vectorised on a CPU. A depthwise convolution by quarters gives the same
    bits, forward, backward and twice backward, about twice as fast (``benchmarks/bench_pooling.py``).
    """

    def forward(self, x: Tensor) -> Tensor:
        """``[N,C,H,W]`` float -> ``[N,C,H // 2,W // 2]``."""
        contiguous = x.device.type == "cpu" and x.is_contiguous()
        return _Halve.apply(x) if contiguous else F.avg_pool2d(x, 2)
