"""Siamese augmentation (Zhao & Bilen 2021; paper 3.1): parameters are drawn once and applied to real and synthetic alike."""

import math
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn

from histodd_bench.errors import UsageError, unknown_name
from histodd_bench.ops import stain_augment
from histodd_bench.stain import MacenkoNormalizer
from histodd_bench.stain_definitions import StainFit

OPERATIONS = ("stain", "flip", "rotate", "scale")


def require_operations(names: tuple[str, ...], kind: str) -> None:
    """Raise UsageError for a name that is no operation; ``kind`` says where it stands."""
    for name in names:
        if name not in OPERATIONS:
            raise unknown_name(kind, name, OPERATIONS)


@dataclass(frozen=True)
class Draw:
    """One draw of parameters: ``warp [n,2,3]`` output-to-input (or None) and ``stain [n]`` bool: normalise or not.

    ``n`` is 1 when every patch of a batch shares the draw.
    """

    warp: Tensor | None
    stain: Tensor


class SiameseAugment(nn.Module):
    """Draws parameters, and applies a draw to as many batches as should share it::

        augment = SiameseAugment()
        draw = augment.draw(generator)
        real, synthetic = augment(real, draw), augment(synthetic, draw)

    As a layer, ``augment(images)`` draws for every patch of a batch in training and leaves patches alone in evaluation.

    Args:
        operations: any of ``stain``, ``flip``, ``rotate``, ``scale``.
        degrees: rotation is uniform in plus or minus this.
        ratio: each axis is scaled by a factor uniform in [1/ratio, ratio].
        stain_probability: how often a draw normalises the stains.
        normalizer: what stains are moved to, and which Macenko; the reference of the original paper by default.

    Raises:
        UsageError: an unknown operation, or a number that means nothing.
    """

    def __init__(
        self,
        operations: tuple[str, ...] = OPERATIONS,
        degrees: float = 15.0,
        ratio: float = 1.2,
        stain_probability: float = 1.0,
        normalizer: MacenkoNormalizer | None = None,
    ) -> None:
        super().__init__()
        require_operations(operations, "augmentation")
        if not math.isfinite(degrees):
            raise UsageError(f"degrees must be finite, got {degrees}")
        if not 1 <= ratio < math.inf:
            raise UsageError(f"ratio must be at least 1, got {ratio}")
        if not 0 <= stain_probability <= 1:
            raise UsageError(f"stain_probability must lie in [0, 1], got {stain_probability}")
        self.operations, self.degrees, self.ratio = tuple(operations), degrees, ratio
        self.stain_probability = stain_probability
        self.normalizer = normalizer or MacenkoNormalizer()

    @property
    def stains(self) -> bool:
        """Whether any draw can normalise stains."""
        return "stain" in self.operations and self.stain_probability > 0

    def draw(self, generator: Generator | None = None, n: int = 1) -> Draw:
        """Draw parameters for ``n`` patches (1: shared by a batch), on the CPU. Always consumes the same random numbers."""
        cpu, warp = torch.device("cpu"), None
        # With a generator of None torch.compile takes no symbolic sizes.
        u = torch.rand(n, 5, device=cpu) if generator is None else torch.rand(n, 5, generator=generator, device=cpu)
        if "scale" in self.operations:
            factor = 1 / self.ratio + (self.ratio - 1 / self.ratio) * u[:, :2]
            warp = torch.diag_embed(1 / factor)
        if "rotate" in self.operations:
            angle = (2 * u[:, 2] - 1) * math.radians(self.degrees)
            cos, sin = angle.cos(), angle.sin()
            turn = torch.stack([torch.stack([cos, -sin], 1), torch.stack([sin, cos], 1)], 1)
            warp = turn if warp is None else turn * (1 / factor)[:, :, None]
        if "flip" in self.operations:
            mirror = torch.where(u[:, 3] < 0.5, -1.0, 1.0)
            sides = torch.stack([mirror, torch.ones_like(mirror)], 1)
            warp = sides.diag_embed() if warp is None else sides[:, :, None] * warp
        stain = u[:, 4] < (self.stain_probability if "stain" in self.operations else 0.0)
        if warp is not None:
            warp = torch.cat([warp, torch.zeros(n, 2, 1, device=cpu)], 2)
        return Draw(warp, stain)

    def forward(self, images: Tensor, draw: Draw | None = None, fit: StainFit | None = None) -> Tensor:
        """Warp patches, and normalise their stains where the draw says so, in one pass over the pixels.

        Args:
            images: ``[N,3,H,W]`` uint8 or float in [0, 1].
            draw: of one patch, which all share, or of N; drawn per patch if not given (nothing in evaluation).
            fit: stains of the patches, where they are known: one fit each, or one for all.

        Returns:
            ``[N,3,H,W]`` float in [0, 1]. Differentiable in ``images``, with the fit detached.

        Raises:
            ValueError: a draw or fit of another number of patches.
        """
        if draw is None and not self.training:
            return stain_augment(images)
        n = images.shape[0]
        draw = draw or self.draw(n=n)
        if draw.stain.shape[0] not in (1, n):
            raise ValueError(f"one draw for all or one per patch: got {len(draw.stain)} draws for {n} patches")
        warp = None if draw.warp is None else draw.warp.to(images.device).expand(n, 2, 3)
        # Compiled code does not look at values, and fits stains that nobody wants.
        if not self.stains or (not torch.compiler.is_compiling() and not bool(draw.stain.any())):
            return stain_augment(images, warp=warp)
        return self.normalizer.normalize(images, fit, warp=warp, where=draw.stain.to(images.device))
