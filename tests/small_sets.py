"""Small made-up patch sets for tests: H&E-coloured noise whose texture depends on the class, and its colour on the slide."""

import torch
from torch import Generator, Tensor

from histodd_bench.data.patchset import PatchSet
from histodd_bench.stain import REFERENCE_STAIN


def render(haematoxylin: Tensor, eosin: Tensor, stain: Tensor | None = None, io: float = 240.0) -> Tensor:
    """Beer-Lambert: concentrations ``[N,H,W]`` -> uint8 ``[N,3,H,W]`` (+1 so that the definition's od is met)."""
    stain = torch.tensor(REFERENCE_STAIN) if stain is None else stain
    od = torch.einsum("cs,snhw->nchw", stain, torch.stack([haematoxylin, eosin]))
    return (io * torch.exp(-od) - 1).round().clamp(0, 255).to(torch.uint8)


def stained(n: int, size: int = 16, seed: int = 0) -> Tensor:
    """``n`` patches of two well-spread stains, uint8."""
    g = Generator().manual_seed(seed)
    return render(2 * torch.rand(n, size, size, generator=g), 1.2 * torch.rand(n, size, size, generator=g))


def two_classes(per_class: int = 24, size: int = 16, slides: int = 6, seed: int = 0, classes: int = 2) -> PatchSet:
    """Classes differ in nuclear density; every slide holds all classes."""
    g = Generator().manual_seed(seed)
    images, labels, groups = [], [], []
    for label in range(classes):
        noise = torch.rand(per_class, size, size, generator=g)
        nuclei = (noise > 0.9 - 0.5 * label / max(classes - 1, 1)).float() * 1.8 + 0.1
        images.append(render(nuclei, 0.2 + 0.6 * torch.rand(per_class, size, size, generator=g)))
        labels.append(torch.full((per_class,), label))
        groups.append(torch.arange(per_class) % slides)
    names = tuple(f"slide-{i}" for i in range(slides))
    return PatchSet(torch.cat(images), torch.cat(labels), torch.cat(groups), names, tuple(f"class-{i}" for i in range(classes)))
