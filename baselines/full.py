"""Full: the whole training set, the upper bound of the comparison."""

from dataclasses import dataclass
from pathlib import Path

import torch

from histodd_bench.data.patchset import PatchSet
from histodd_bench.models import ModelPool
from histodd_bench.progress import Progress


@dataclass(frozen=True)
class Full:
    """Every training patch."""

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
        """``train`` itself; no other argument is used.

        Raises:
            HistoddError: a class is empty, or there is only one.
        """
        train.require(1)
        return train
