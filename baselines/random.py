"""Random: real patches drawn at random, spread over slides as evenly as the class allows."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Generator, Tensor

from histodd_bench.data.patchset import PatchSet
from histodd_bench.models import ModelPool
from histodd_bench.progress import Progress


@dataclass(frozen=True)
class Random:
    """Slide-stratified random draw; see :func:`stratified_draw`."""

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
        """``ipc`` patches per class, class by class. ``pool``, ``device``, ``workdir`` and ``progress`` are not used.

        Raises:
            HistoddError: a class has fewer than ``ipc`` patches.
        """
        return train.subset(stratified_draw(train, ipc, Generator().manual_seed(seed)))


def stratified_draw(train: PatchSet, ipc: int | Sequence[int], generator: Generator) -> Tensor:
    """Indices ``[C * ipc]`` of random patches: ``ipc`` of class 0, then of class 1, and so on; none twice.

    ``ipc`` may be a number for each class, 0 for none.

    Within a class every slide gives one patch before any gives a second, and so on, so the counts of two
    slides differ by at most one unless the smaller has no more patches. Which slides give, and which of their
    patches, is uniform.

    Raises:
        HistoddError: a class has fewer than ``ipc`` patches.
    """
    train.require(ipc)
    budgets = [ipc] * train.num_classes if isinstance(ipc, int) else ipc
    chosen = []
    for label, budget in enumerate(budgets):
        members = train.class_indices(label)
        members = members[torch.randperm(len(members), generator=generator)]
        slides = train.groups[members].numpy()
        by_slide = slides.argsort(kind="stable")
        starts = np.unique(slides[by_slide], return_index=True)[1]
        turn = np.empty(len(slides), dtype=np.int64)  # how many patches of the same slide come before
        turn[by_slide] = np.arange(len(slides)) - np.repeat(starts, np.diff(np.append(starts, len(slides))))
        # A patch's place in the shuffled order depends on its slide's size, so ties within a turn are broken
        # afresh.
        tie = torch.rand(len(members), generator=generator, dtype=torch.float64).numpy()
        chosen.append(members[torch.from_numpy(np.lexsort((tie, turn))[:budget].copy())])
    return torch.cat(chosen)
