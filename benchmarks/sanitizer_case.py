"""Every CUDA kernel of the package once, on small inputs: what compute-sanitizer looks at. ``--cpu`` runs it without a GPU.

Inputs are made on the CPU, so that the sanitizer sees few kernels that are not ours.
"""

import itertools
import sys

import torch

from histodd_bench.ops import gradient_distance, macenko_affine, macenko_fit, stain_augment
from histodd_bench.profile.patches import procedural

DEVICE = torch.device("cpu" if "--cpu" in sys.argv else "cuda")


def stain_augment_kernels() -> None:
    """All input types and layouts, with and without a warp, forward and backward."""
    generator = torch.Generator().manual_seed(0)
    stain = (torch.eye(3, 4) + 0.1 * torch.randn(2, 3, 4, generator=generator)).to(DEVICE).requires_grad_()
    warps = (None, torch.tensor([[[0.9, -0.2, 0.1], [0.2, 1.1, 0]], [[-1, 0, 0], [0, 1, 0]]]).to(DEVICE))
    valid = torch.tensor([True, False]).to(DEVICE)
    mean, std = torch.tensor([0.7, 0.5, 0.6]).to(DEVICE), torch.tensor([0.2, 0.3, 0.1]).to(DEVICE)
    dtypes = (torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64)
    for size, dtype, warp, last in itertools.product(((37, 53), (64, 64)), dtypes, warps, (False, True)):
        image = (255 * torch.rand(2, 3, *size, generator=generator)).to(torch.uint8)
        image = image.to(dtype) if dtype == torch.uint8 else (image.double() / 255).to(dtype)
        image = image.contiguous(memory_format=torch.channels_last) if last else image
        image = image.to(DEVICE).requires_grad_(dtype != torch.uint8)
        upstream = torch.ones(2, 3, *size).to(DEVICE)
        out = stain_augment(image, stain, warp, mean, std, valid=valid, channels_last=last)
        torch.autograd.grad(out, [stain, image] if image.requires_grad else [stain], upstream.to(out.dtype))


def macenko_fit_kernels() -> None:
    """A patch that fits into shared memory, one that does not, an odd size, a blank one, every type."""
    for n, side in ((2, 64), (1, 256), (1, 320), (3, 37)):
        pixels = procedural(n, side)
        pixels[-1] = 255
        for dtype in (torch.uint8, torch.float16, torch.float32, torch.float64):
            x = pixels if dtype == torch.uint8 else (pixels.double() / 255).to(dtype)
            for image in (x, x.contiguous(memory_format=torch.channels_last)):
                for interpolation in ("nearest", "linear"):
                    stain, top, _ = macenko_fit(image.to(DEVICE), interpolation=interpolation)
                    macenko_affine(stain, top, stain[0].double(), top[0].double())


def gradient_distance_kernels() -> None:
    """All kinds and types, layers of unequal size, unaligned and empty ones."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(8, 3, 3, 3), (1,), (0,), (7, 5), (1000,), (33, 65)]
    for dtype, kind, per_layer in itertools.product(
        (torch.float16, torch.bfloat16, torch.float32, torch.float64), ("l1", "l2", "cosine"), (False, True)
    ):
        lists = []
        for _ in range(2):
            made = [torch.randn(s, generator=generator).to(dtype).to(DEVICE) for s in shapes]
            made[4] = torch.randn(1001, generator=generator).to(dtype).to(DEVICE)[1:]  # not aligned to 16 bytes
            lists.append([t.requires_grad_() for t in made])
        gradient_distance(*lists, kind=kind, per_layer=per_layer).sum().backward()


if __name__ == "__main__":
    stain_augment_kernels()
    macenko_fit_kernels()
    gradient_distance_kernels()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    print("every kernel ran")
