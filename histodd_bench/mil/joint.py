"""Training on what a centre has and on what another shares, as if they were one set; no pixel is copied."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from histodd_bench.data.patchset import PatchSet
from histodd_bench.mil.bags import Bags
from histodd_bench.stain import Preprocessing, fit_set
from histodd_bench.training import Trainer, TrainRecipe


class JointTrainer(Trainer):
    """:class:`Trainer` on several sets of the same classes and patch size; real (uint8) and synthetic (float32) may mix.

    Args:
        parts: the sets; an epoch is one pass over all of them.
        model, recipe, preprocessing, seed, device: see :class:`Trainer`.
    """

    def __init__(
        self, model: nn.Module, parts: Sequence[PatchSet], recipe: TrainRecipe, preprocessing: Preprocessing, seed: int,
        device: torch.device | str = "cpu",
    ) -> None:  # fmt: skip
        self.parts = [part for part in parts if len(part)]
        labels = torch.cat([part.labels for part in parts])
        first = self.parts[0]
        # Trainer reads labels here and pixels in `batch`: one patch stands for all.
        whole = PatchSet(
            first.images[:1].expand(len(labels), -1, -1, -1), labels, torch.zeros_like(labels), ("all",), first.classes
        )
        fits = None
        if recipe.augmentation.stains:
            found = [fit_set(part, preprocessing.template) for part in self.parts]
            fits = torch.cat([f[0] for f in found]), torch.cat([f[1] for f in found])
        super().__init__(model, whole, recipe, preprocessing, seed, device, fits=fits)

    def _images(self, indices: Tensor) -> Tensor:
        height, width = self.train.image_size
        images, start = torch.empty(len(indices), 3, height, width, device=self.device), 0
        for part in self.parts:
            own = (indices >= start) & (indices < start + len(part))
            images[own.to(self.device)] = part.float_batch(indices[own] - start, self.device)
            start += len(part)
        return images


def joint_bags(parts: Sequence[Bags]) -> Bags:
    """The bags of all parts, which have the same classes and encoder."""
    return Bags(
        tuple(bag for part in parts for bag in part.features),
        torch.cat([part.labels for part in parts]),
        tuple(name for part in parts for name in part.names),
        parts[0].classes,
    )
