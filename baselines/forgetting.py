"""Forgetting (Toneva et al. 2019): the real patches that a network most often forgets while it is trained."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Generator, Tensor

from histodd_bench.data.patchset import PatchSet
from histodd_bench.errors import at_least
from histodd_bench.models import ModelPool, model_entry
from histodd_bench.models.pool import ForgettingCounts
from histodd_bench.progress import Progress


@dataclass(frozen=True)
class Forgetting:
    """Selection by forgetting events: transitions from correct to incorrect between presentations of a patch.

    Patches that were never classified correctly count as most forgettable; ties are broken at random from the
    seed. The network is number ``seed`` of a pool that differs from the distiller's in the fields below, and
    in that classes are drawn in their natural proportions: every patch is presented once an epoch, as in the
    definition.

    Attributes:
        arch: network, a key of MODELS (paper 5.1: ResNet18).
        width: None for the published width.
        epochs: of its training (paper 4: 50; Toneva et al. use 200 on CIFAR-10, and find the ranking stable
            after 75).
    """

    arch: str = "resnet18"
    width: int | None = None
    epochs: int = 50

    def __post_init__(self) -> None:
        model_entry(self.arch)  # refuses what it does not know
        at_least(1, "forgetting", width=self.width)
        at_least(1, "forgetting", epochs=self.epochs)

    def __call__(
        self,
        train: PatchSet,
        ipc: int,
        pool: ModelPool,
        seed: int,
        *,
        device: torch.device | str = "cpu",
        workdir: Path,
        progress: Progress,
    ) -> PatchSet:
        """``ipc`` patches per class, class by class, the most forgettable first.

        Training is cached by ``pool`` epoch by epoch, so an interrupted call goes on; ``device`` (the pool's
        is used), ``workdir`` and ``progress`` are not used.

        Raises:
            HistoddError: a class has fewer than ``ipc`` patches; training diverged.
        """
        train.require(ipc)
        own = pool.with_recipe(arch=self.arch, width=self.width, epochs=self.epochs, networks=seed + 1, balanced=False)
        generator = Generator().manual_seed(seed)
        order = most_forgettable(own.forgetting(seed), generator)
        labels = train.labels[order]
        return train.subset(torch.cat([order[labels == label][:ipc] for label in range(train.num_classes)]))


def most_forgettable(counts: ForgettingCounts, generator: Generator) -> Tensor:
    """Patch indices ``[N]``: never learned first, then by falling number of forgetting events, ties in random order."""
    events = counts.forgotten.to("cpu", torch.int64)
    events[~counts.learned.cpu()] = torch.iinfo(torch.int64).max
    shuffled = torch.randperm(len(events), generator=generator)
    return shuffled[events[shuffled].argsort(descending=True, stable=True)]
