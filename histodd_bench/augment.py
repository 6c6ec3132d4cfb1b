"""Siamese augmentation (Zhao & Bilen 2021; paper 3.1): parameters are drawn once and applied to real and synthetic alike."""

import math
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from histodd_bench.errors import UsageError

OPERATIONS = ("stain", "flip", "rotate", "scale")


@dataclass(frozen=True)
class Draw:
    """One draw of parameters: ``warp [n,2,3]`` output-to-input (or None) and ``stain [n]`` bool: normalise or not.

    ``n`` is 1 when every patch of a batch shares the draw.
    """

    warp: Tensor | None
    stain: Tensor


@dataclass(frozen=True)
class SiameseAugment:
    """Which operations are drawn, and how strongly.

    Attributes:
        operations: any of ``stain``, ``flip``, ``rotate``, ``scale``.
        degrees: rotation is uniform in plus or minus this.
        ratio: each axis is scaled by a factor uniform in [1/ratio, ratio].
        stain_probability: how often a draw normalises the stains.
    """

    operations: tuple[str, ...] = OPERATIONS
    degrees: float = 15.0
    ratio: float = 1.2
    stain_probability: float = 1.0

    def __post_init__(self) -> None:
        for name in self.operations:
            if name not in OPERATIONS:
                raise UsageError(f"unknown augmentation {name!r}: known: {', '.join(OPERATIONS)}")

    @property
    def stains(self) -> bool:
        """Whether any draw can normalise stains."""
        return "stain" in self.operations and self.stain_probability > 0

    def draw(self, generator: Generator, n: int = 1) -> Draw:
        """Draw parameters for ``n`` patches (1: shared by a batch). Always consumes the same random numbers."""
        u = torch.rand(n, 5, generator=generator)
        identity, warp = torch.eye(2).expand(n, 2, 2), None
        if "scale" in self.operations:
            factor = 1 / self.ratio + (self.ratio - 1 / self.ratio) * u[:, :2]
            warp = torch.diag_embed(1 / factor)
        if "rotate" in self.operations:
            angle = (2 * u[:, 2] - 1) * math.radians(self.degrees)
            cos, sin = angle.cos(), angle.sin()
            turn = torch.stack([torch.stack([cos, -sin], 1), torch.stack([sin, cos], 1)], 1)
            warp = turn if warp is None else warp @ turn
        if "flip" in self.operations:
            mirror = torch.where(u[:, 3] < 0.5, -1.0, 1.0)
            flip = torch.stack([mirror, torch.ones(n)], 1).diag_embed()
            warp = flip if warp is None else flip @ warp
        stain = u[:, 4] < self.stain_probability if "stain" in self.operations else torch.zeros(n, dtype=torch.bool)
        if warp is not None:
            warp = torch.cat([warp.expand_as(identity), torch.zeros(n, 2, 1)], 2)
        return Draw(warp, stain)
