"""Herding (Welling 2009; Rebuffi et al. 2017): real patches whose mean feature follows that of their class."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from histodd_bench.data.patchset import PatchSet
from histodd_bench.errors import at_least
from histodd_bench.models import ModelPool, model_entry
from histodd_bench.progress import Progress
from histodd_bench.training import predict

_READ = 1024  # patches in memory at once
_CHUNK = 16384  # features summed in double precision at once


@dataclass(frozen=True)
class Herding:
    """Greedy selection in the feature space of a network trained on the whole training set.

    The network is number ``seed`` of a pool that differs from the distiller's in the fields below alone, so
    each seed has a network of its own and shares it with
    :class:`~histodd_bench.baselines.forgetting.Forgetting` where fields agree. Features are the input of its
    last linear layer, not normalised, of patches without augmentation; stains are normalised where the recipe
    does so at test.

    Attributes:
        arch: network, a key of MODELS (paper 5.1: ResNet18).
        width: None for the published width.
        epochs: of its training (paper 4: 50).
    """

    arch: str = "resnet18"
    width: int | None = None
    epochs: int = 50

    def __post_init__(self) -> None:
        model_entry(self.arch)  # refuses what it does not know
        at_least(1, "herding", width=self.width)
        at_least(0, "herding", epochs=self.epochs)

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
        """``ipc`` patches per class, class by class, in the order of selection.

        The network is trained and cached by ``pool``, so an interrupted call goes on; ``workdir`` is not
        used. Patches are read class by class in chunks: at no time more than the features of one class are
        held.

        Raises:
            HistoddError: a class has fewer than ``ipc`` patches; training diverged.
        """
        train.require(ipc)
        own = pool.with_recipe(arch=self.arch, width=self.width, epochs=self.epochs, networks=seed + 1)
        network, stain = own.load(seed), own.recipe.stain_test
        chosen = []
        with progress.task(f"Herding {ipc} per class, seed {seed}", len(train)) as task:
            for label in range(train.num_classes):
                members, parts = train.class_indices(label), []
                for chunk in members.split(_READ):
                    patches = train.subset(chunk)
                    parts.append(
                        predict(network, patches, own.preprocessing, stain=stain, features=True, device=device)
                    )
                    task.advance(len(chunk))
                chosen.append(members[herd(torch.cat(parts), ipc)])
        return train.subset(torch.cat(chosen))


def herd(features: Tensor, k: int) -> Tensor:
    """Rows ``[k]`` of ``features [n,D]``, in the order of selection: at each step the row, not chosen yet, that brings
    the mean of the chosen closest to the mean of all (Euclidean; the lowest index where several do).

    ``features`` is centred in place. Inner products are taken in its own precision, their sums in double.
    """
    mean = torch.stack([c.double().sum(0) for c in features.split(_CHUNK)]).sum(0) / len(features)
    features -= mean.to(features.dtype)
    # With centred features f and their chosen sum s, |(s + f) / t|^2 is smallest where |f|^2 + 2 f.s is.
    score = torch.cat([c.double().square().sum(1) for c in features.split(_CHUNK)])
    chosen: list[int] = []
    for _ in range(k):
        best = int(score.numpy().argmin())
        chosen.append(best)
        score += 2 * (features @ features[best]).double()
        score[best] = torch.inf
    return torch.tensor(chosen, dtype=torch.int64)
