"""Inputs of the tests of stain_augment, and how results are compared."""

import math

import torch

IDENTITY = torch.eye(3, 4, dtype=torch.float64)
MEAN, STD = torch.tensor([0.7, 0.5, 0.6]), torch.tensor([0.2, 0.3, 0.1])


def images(n=2, h=9, w=7, seed=0, dtype=torch.float64):
    return torch.rand(n, 3, h, w, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def warps(n=2, seed=0):
    """Flips, rotations and scales within the augmentation's range, with a small shift."""
    generator = torch.Generator().manual_seed(seed)
    angle = (torch.rand(n, generator=generator, dtype=torch.float64) - 0.5) * math.radians(30)
    scale = 0.8 + 0.4 * torch.rand(n, 2, generator=generator, dtype=torch.float64)
    flip = torch.where(torch.rand(n, generator=generator) < 0.5, -1.0, 1.0).double()
    rotation = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1).view(n, 2, 2)
    linear = rotation * scale[:, None, :] * torch.stack([flip, torch.ones_like(flip)], 1)[:, None, :]
    shift = 0.1 * torch.rand(n, 2, 1, generator=generator, dtype=torch.float64)
    return torch.cat([linear, shift], 2)


def stains(n=2, seed=0, spread=0.1):
    noise = torch.randn(n, 3, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return IDENTITY + spread * noise


def relative_error(value, exact):
    scale = exact.abs().max().clamp(min=1e-30) if exact.numel() else 1.0
    return ((value.double() - exact) / scale).abs().max().item() if exact.numel() else 0.0


def value_and_gradients(function, image, stain, warp, upstream, **options):
    image = image.detach().clone(memory_format=torch.preserve_format)
    image.requires_grad_(image.is_floating_point())
    leaves = [image] if image.is_floating_point() else []
    if stain is not None:
        stain = stain.detach().clone().requires_grad_()
        leaves.append(stain)
    out = function(image, stain, warp, **options)
    return out, torch.autograd.grad((out * upstream.to(out.dtype)).sum(), leaves) if leaves else []
