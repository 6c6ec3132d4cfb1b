"""The one training loop: pool networks, forgetting statistics and evaluation all train through it."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from histodd_bench.augment import SiameseAugment, require_operations
from histodd_bench.data.patchset import PatchSet
from histodd_bench.errors import HistoddError, UsageError, above_zero, at_least, below_one, probability
from histodd_bench.stain import Preprocessing, fit_affine, fit_set


@dataclass(frozen=True)
class TrainRecipe:
    """How a network is trained. Exactly one of ``epochs`` and ``steps`` is set.

    Attributes:
        epochs: passes over the set.
        steps: optimiser steps (the converged setting: the same number for small and large sets).
        batch_size, lr, momentum, weight_decay: of SGD.
        augment: operations of :class:`SiameseAugment`, drawn per patch; ``stain`` is governed by ``stain_train``.
        stain_train: probability that a training patch is stain-normalised to the template.
        stain_test: whether patches are stain-normalised when the network is scored.
        balanced: draw classes equally often instead of in their natural proportions.
    """

    section: ClassVar[str] = "recipe"  # of --set, which errors name

    epochs: int | None = 50
    steps: int | None = None
    batch_size: int = 64
    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 5e-4
    augment: tuple[str, ...] = ("flip", "rotate", "scale")
    stain_train: float = 0.0
    stain_test: bool = False
    balanced: bool = False

    def __post_init__(self) -> None:
        if (self.epochs is None) == (self.steps is None):
            raise UsageError(f"{self.section} needs either epochs or steps")
        at_least(0, self.section, epochs=self.epochs, steps=self.steps, weight_decay=self.weight_decay)
        at_least(1, self.section, batch_size=self.batch_size)
        above_zero(self.section, lr=self.lr)
        below_one(self.section, momentum=self.momentum)
        probability(self.section, stain_train=self.stain_train)
        require_operations(self.augment, f"augmentation in {self.section}.augment")

    def steps_on(self, patches: int) -> int:
        """Optimiser steps in all on a set of so many patches; an epoch has one for every started batch."""
        return self.steps if self.steps is not None else (self.epochs or 0) * -(-patches // self.batch_size)

    @property
    def augmentation(self) -> SiameseAugment:
        operations = tuple(op for op in self.augment if op != "stain") + (("stain",) if self.stain_train > 0 else ())
        return SiameseAugment(operations, stain_probability=self.stain_train)


@dataclass(frozen=True)
class EvalRecipe(TrainRecipe):
    """How a network is trained on a set that is scored, the same for every method.

    Fifty epochs (paper 4.1) of a set smaller than a batch are fifty steps, which leave most networks half trained and scores at
    the mercy of the seed. So small sets are gone through more often.

    Attributes:
        min_steps: train for as many more epochs as it takes to make this number of steps; 0 for ``epochs`` alone, as in the
            ``paper`` preset and wherever ``eval.epochs`` is given.
    """

    section: ClassVar[str] = "eval"

    min_steps: int = 300

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(0, self.section, min_steps=self.min_steps)

    def steps_on(self, patches: int) -> int:
        """As :meth:`TrainRecipe.steps_on`; where epochs count, whole epochs until ``min_steps`` are reached."""
        steps = super().steps_on(patches)
        if self.steps is not None or steps >= self.min_steps:
            return steps
        per_epoch = -(-patches // self.batch_size)
        return -(-self.min_steps // per_epoch) * per_epoch


class Trainer:
    """Trains one network on one set, an epoch at a time; its state can be saved between epochs.

    Args:
        model: on ``device`` already.
        train: real or synthetic patches.
        recipe: the settings.
        preprocessing: of the *full* training set, whatever ``train`` is.
        seed: of the shuffling and augmentation.
        device: where to compute.
        on_batch: called with (indices, logits, labels) of every batch, after the forward pass.
        fits: stain fits of ``train`` (:func:`histodd_bench.stain.fit_set`), where they are known already.
    """

    def __init__(
        self,
        model: nn.Module,
        train: PatchSet,
        recipe: TrainRecipe,
        preprocessing: Preprocessing,
        seed: int,
        device: torch.device | str = "cpu",
        on_batch: Callable[[Tensor, Tensor, Tensor], None] | None = None,
        fits: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        if len(train) == 0:
            raise HistoddError("the training set is empty")
        self.model, self.train, self.recipe, self.preprocessing = model, train, recipe, preprocessing
        self.device, self.on_batch = torch.device(device), on_batch
        self.generator = Generator().manual_seed(seed)
        self.augmentation = recipe.augmentation
        self.optimizer = torch.optim.SGD(
            model.parameters(), lr=recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay
        )
        self.fits = (fits or fit_set(train, preprocessing.template)) if self.augmentation.stains else None
        self.epoch, self.step = 0, 0
        self.epoch_seconds: list[float] = []

    @property
    def total_steps(self) -> int:
        return self.recipe.steps_on(len(self.train))

    @property
    def done(self) -> bool:
        return self.step >= self.total_steps

    def _order(self) -> Tensor:
        """Patch indices of one epoch: a permutation, or draws that make classes equally frequent."""
        if not self.recipe.balanced:
            return torch.randperm(len(self.train), generator=self.generator)
        counts = torch.bincount(self.train.labels, minlength=self.train.num_classes)
        weights = 1.0 / counts.clamp(min=1)[self.train.labels]
        return torch.multinomial(weights.double(), len(self.train), replacement=True, generator=self.generator)

    def batch(self, indices: Tensor) -> Tensor:
        """Augmented, preprocessed patches ``[n,3,H,W]`` float32 on the device."""
        draw = self.augmentation.draw(self.generator, len(indices))
        images = self._images(indices)
        warp = None if draw.warp is None else draw.warp.to(self.device)
        if self.fits is None:
            return self.preprocessing(images, warp=warp)
        stain, valid = self.fits[0][indices], self.fits[1][indices]
        return self.preprocessing(images, warp=warp, stain=stain, valid=valid & draw.stain)

    def _images(self, indices: Tensor) -> Tensor:
        return self.train.images[indices].to(self.device)

    def run_epoch(self) -> float:
        """One pass over the set (cut short by the last step); returns the mean loss."""
        self.model.train()
        self._synchronise()
        start, losses = time.perf_counter(), []
        for indices in self._order().split(self.recipe.batch_size):
            if self.done:
                break
            x, y = self.batch(indices), self.train.labels[indices].to(self.device)
            logits = self.model(x)
            if self.on_batch:
                self.on_batch(indices, logits.detach(), y)
            loss = F.cross_entropy(logits, y)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.optimizer.step()
            losses.append(loss.detach())
            self.step += 1
        self._synchronise()
        self.epoch += 1
        self.epoch_seconds.append(time.perf_counter() - start)
        return float(torch.stack(losses).mean()) if losses else float("nan")

    def _synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on after the last finished epoch (tensors, numbers and lists only)."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "epoch": self.epoch,
            "step": self.step,
            "epoch_seconds": list(self.epoch_seconds),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"].cpu())
        self.epoch, self.step, self.epoch_seconds = state["epoch"], state["step"], list(state["epoch_seconds"])


@torch.no_grad()
def predict(
    model: nn.Module,
    patches: PatchSet,
    preprocessing: Preprocessing,
    *,
    stain: bool = False,
    features: bool = False,
    batch_size: int = 256,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Logits ``[N,C]`` (or features ``[N,D]``) of a whole set, float32 on the CPU, streamed batch by batch.

    Args:
        stain: normalise the stains of every patch first (refitted batch by batch).
        features: return the input of the last linear layer instead of logits.
    """
    model.eval()
    outputs = []
    for start in range(0, len(patches), batch_size):
        images = patches.images[start : start + batch_size].to(device)
        affine, valid = fit_affine(images, preprocessing.template) if stain else (None, None)
        x = preprocessing(images, stain=affine, valid=valid)
        outputs.append((model.features(x) if features else model(x)).float().cpu())  # type: ignore[operator]
    return torch.cat(outputs) if outputs else torch.zeros(0)


def require_finite(logits: Tensor, network: str, lr: float, option: str = "eval.lr") -> None:
    """Refuse to score a network that answers no numbers; ``option`` sets the learning rate that was too high.

    Args:
        logits: of a network, or the loss of its training.

    Raises:
        HistoddError: some logit is NaN or infinite.
    """
    if not bool(torch.isfinite(logits).all()):
        raise HistoddError(f"training {network} diverged, nothing can be scored: lower its learning rate ({option}={lr:g})")
