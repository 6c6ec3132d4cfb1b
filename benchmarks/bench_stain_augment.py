"""stain_augment beside its peers: grid_sample and a plain batched PyTorch apply, and torch.compile of that.

    python -m pytest benchmarks/bench_stain_augment.py --benchmark-columns=median,min,max

HISTODD_BENCH_THREADS sets the number of threads (default 2), HISTODD_BENCH_DEVICE the device (default cpu).
"""

import os

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from histodd_bench.augment import SiameseAugment
from histodd_bench.ops import stain_augment

DEVICE = torch.device(os.environ.get("HISTODD_BENCH_DEVICE", "cpu"))
SHAPES = [(64, 64), (16, 256)]  # patches, side


def plain(image: Tensor, stain: Tensor, warp: Tensor | None, mean: Tensor, std: Tensor) -> Tensor:
    """What one would write without the op: float images in [0, 1], mean and std ``[3,1,1]``."""
    n, _, h, w = image.shape
    if warp is not None:
        grid = F.affine_grid(warp, [n, 3, h, w], align_corners=False)
        image = 1 - F.grid_sample(1 - image, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    density = -torch.log((255 * image + 1) / 240)
    moved = torch.baddbmm(stain[:, :, 3:], stain[:, :, :3], density.reshape(n, 3, -1)).view(n, 3, h, w)
    return ((240 * torch.exp(-moved)).clamp(0, 255) / 255 - mean) / std


class Case:
    def __init__(self, n: int, side: int, warped: bool) -> None:
        generator = torch.Generator().manual_seed(0)
        self.image = torch.rand(n, 3, side, side, generator=generator).to(DEVICE)
        self.bytes = (255 * self.image).to(torch.uint8)
        self.stain = (torch.eye(3, 4) + 0.1 * torch.randn(n, 3, 4, generator=generator)).to(DEVICE)
        draw = SiameseAugment(("flip", "rotate", "scale")).draw(generator, n)
        self.warp = draw.warp.to(DEVICE) if warped and draw.warp is not None else None
        self.mean, self.std = torch.tensor([0.7, 0.5, 0.6]).to(DEVICE), torch.tensor([0.2, 0.3, 0.1]).to(DEVICE)
        self.upstream = torch.randn(n, 3, side, side, generator=generator).to(DEVICE)

    def forward(self, peer: str):
        if peer in ("op", "op_bytes"):
            image = self.bytes if peer == "op_bytes" else self.image
            return lambda x=image: stain_augment(x, self.stain, self.warp, self.mean, self.std)
        function = torch.compile(plain, dynamic=False) if peer == "compiled" else plain
        mean, std = self.mean[:, None, None], self.std[:, None, None]
        return lambda x=self.image: function(x, self.stain, self.warp, mean, std)


def measure(benchmark, run) -> None:
    def synchronised() -> None:
        run()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    torch.set_num_threads(int(os.environ.get("HISTODD_BENCH_THREADS", "2")))
    synchronised()
    benchmark.pedantic(synchronised, rounds=30, warmup_rounds=5)


@pytest.mark.parametrize("peer", ["op", "op_bytes", "plain", "compiled"])
@pytest.mark.parametrize("warped", [False, True], ids=["stain", "warp_stain"])
@pytest.mark.parametrize(("n", "side"), SHAPES)
def test_forward(benchmark, n: int, side: int, warped: bool, peer: str) -> None:
    benchmark.group = f"forward {'warp + ' if warped else ''}stain {n} x {side} x {side}"
    with torch.no_grad():
        measure(benchmark, Case(n, side, warped).forward(peer))


@pytest.mark.parametrize("peer", ["op", "plain", "compiled"])
@pytest.mark.parametrize("warped", [False, True], ids=["stain", "warp_stain"])
@pytest.mark.parametrize(("n", "side"), SHAPES)
def test_forward_and_backward(benchmark, n: int, side: int, warped: bool, peer: str) -> None:
    case = Case(n, side, warped)
    forward = case.forward(peer)
    image = case.image.clone().requires_grad_()
    benchmark.group = f"forward + backward {'warp + ' if warped else ''}stain {n} x {side} x {side}"
    measure(benchmark, lambda: torch.autograd.grad(forward(image), image, case.upstream))
