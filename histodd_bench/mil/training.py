"""Training a slide-level model, one bag per step, and scoring it. The last epoch counts; nothing is selected on test slides."""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Generator, Tensor, nn

from histodd_bench.errors import HistoddError, above_zero, at_least, below_one
from histodd_bench.evaluate import compute_metrics
from histodd_bench.mil import MIL_MODELS, build_mil
from histodd_bench.mil.bags import Bags


@dataclass(frozen=True)
class MILRecipe:
    """How slide-level models are trained; None leaves to each model what its authors chose.

    Attributes:
        epochs: passes over the slides (paper 4.2: 60).
        lr, weight_decay: of the model's optimiser.
        width, dropout: of the model.
        balanced: slides are drawn with a probability inverse to the frequency of their class (Lu et al. 2021, Methods),
            as many per epoch as there are, for every model; otherwise every slide once per epoch.
        cosine: the learning rate falls along a half cosine to 0 (as DSMIL's public code does) instead of staying.
    """

    epochs: int = 60
    lr: float | None = None
    weight_decay: float | None = None
    width: int | None = None
    dropout: float | None = None
    balanced: bool = True
    cosine: bool = False

    def __post_init__(self) -> None:
        at_least(0, "mil", epochs=self.epochs, weight_decay=self.weight_decay)
        above_zero("mil", lr=self.lr, width=self.width)
        below_one("mil", dropout=self.dropout)


FINE = 0.1  # of a training's learning rate, in fine-tuning


@dataclass(frozen=True)
class TransferRecipe:
    """How a trained model is fine-tuned with another centre's data (Table 5), the same for every kind of data.

    Attributes:
        epochs: passes over what was shared (paper, Table 5: 5; its slide-level model has 10 on the full data).
        lr: of the patch-level network; None for a tenth of its training's.
        slide_lr: of the slide-level model; None for a tenth of its training's.
        rehearsal: the target's own training data are in every epoch beside what was shared, and alone where nothing is; otherwise
            what was shared is all there is (as the paper has it), and without it nothing is trained.
    """

    epochs: int = 5
    lr: float | None = None
    slide_lr: float | None = None
    rehearsal: bool = False

    def __post_init__(self) -> None:
        at_least(1, "transfer", epochs=self.epochs)
        above_zero("transfer", lr=self.lr, slide_lr=self.slide_lr)

    @staticmethod
    def rate(named: float | None, trained: float) -> float:
        """The learning rate of fine-tuning: the one that is named, or else what follows from that of the training."""
        return FINE * trained if named is None else named


class Lookahead:
    """Lookahead (Zhang et al. 2019): after every ``steps`` steps of the inner optimiser, slow weights move ``alpha`` of the way."""

    def __init__(self, inner: torch.optim.Optimizer, steps: int = 5, alpha: float = 0.5) -> None:
        self.inner, self.steps, self.alpha, self.taken = inner, steps, alpha, 0
        self.param_groups = inner.param_groups
        self._slow = [p.detach().clone() for group in inner.param_groups for p in group["params"]]

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.inner.zero_grad(set_to_none)

    @torch.no_grad()
    def step(self) -> None:
        """One step of the inner optimiser, and of the slow weights where it is their turn."""
        self.inner.step()
        self.taken += 1
        if self.taken % self.steps == 0:
            fast = [p for group in self.inner.param_groups for p in group["params"]]
            for slow, p in zip(self._slow, fast, strict=True):
                slow.lerp_(p, self.alpha)
                p.copy_(slow)


def make_optimizer(
    name: str, parameters: Iterable[nn.Parameter], recipe: MILRecipe
) -> torch.optim.Optimizer | Lookahead:
    """The optimiser of a slide-level model: its authors', with what the recipe sets."""
    entry = MIL_MODELS[name]
    options: dict[str, Any] = {
        "lr": recipe.lr if recipe.lr is not None else entry.lr,
        "weight_decay": recipe.weight_decay if recipe.weight_decay is not None else entry.weight_decay,
        "betas": entry.betas,
    }
    if entry.optimizer == "adam":
        return torch.optim.Adam(parameters, fused=True, **options)
    return Lookahead(torch.optim.RAdam(parameters, **options))


@dataclass(frozen=True)
class MILTraining:
    """A trained model and what its training took: seconds of every epoch, mean loss of the last."""

    model: nn.Module
    epoch_seconds: list[float]
    final_loss: float


def train_mil(
    name: str,
    bags: Bags,
    recipe: MILRecipe,
    seed: int,
    *,
    device: torch.device | str = "cpu",
    start: nn.Module | None = None,
    epochs: int | None = None,
) -> MILTraining:
    """Train on bags of any size, one per step.

    Args:
        name: a key of MIL_MODELS.
        bags: training slides; at least one.
        seed: of the initialisation and of the order of the slides; dropout follows torch's global generator.
        start: go on training this model (it is changed) instead of a fresh one.
        epochs: instead of the recipe's.

    Raises:
        HistoddError: no bags, or the loss is no longer finite.
    """
    if len(bags) == 0:
        raise HistoddError("there is no slide with patches to train on")
    device = torch.device(device)
    model = start if start is not None else build_mil(
        name, in_features=bags.in_features, num_classes=len(bags.classes), seed=seed,
        width=recipe.width, dropout=recipe.dropout,
    )  # fmt: skip
    model = model.to(device).train()
    epochs = recipe.epochs if epochs is None else epochs
    optimizer = make_optimizer(name, model.parameters(), recipe)
    rates = [group["lr"] for group in optimizer.param_groups]
    features = [bag.to(device) for bag in bags.features]
    labels, generator = bags.labels.to(device), Generator().manual_seed(seed)
    seconds, loss = [], float("nan")
    for epoch in range(epochs):
        if recipe.cosine:
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * epoch / epochs)).item())
        _synchronise(device)
        start_time, losses = time.perf_counter(), []
        for i in _order(bags, recipe.balanced, generator).tolist():
            step = model.loss(features[i][None], labels[i : i + 1])  # type: ignore[operator]
            optimizer.zero_grad(set_to_none=True)
            step.backward()
            optimizer.step()
            losses.append(step.detach())
        _synchronise(device)
        seconds.append(time.perf_counter() - start_time)
        loss = float(torch.stack(losses).mean())
        if loss != loss or loss in (float("inf"), float("-inf")):
            raise HistoddError(f"training {name} diverged in epoch {epoch + 1}: lower mil.lr")
    return MILTraining(model.eval(), seconds, loss)


def _order(bags: Bags, balanced: bool, generator: Generator) -> Tensor:
    if not balanced:
        return torch.randperm(len(bags), generator=generator)
    counts = torch.tensor(bags.class_counts(), dtype=torch.float64)
    return torch.multinomial(1 / counts[bags.labels], len(bags), replacement=True, generator=generator)


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.no_grad()
def predict_mil(model: nn.Module, bags: Bags, device: torch.device | str = "cpu") -> Tensor:
    """Class probabilities ``[S,C]`` float32 on the CPU, one bag at a time."""
    model.eval()
    rows = [model(bag.to(device)[None]).softmax(1).float().cpu() for bag in bags.features]
    return torch.cat(rows) if rows else torch.zeros(0, len(bags.classes))


def score_mil(training: MILTraining, test: Bags, device: torch.device | str = "cpu") -> tuple[Tensor, dict[str, float]]:
    """Probabilities of the test slides and what a record keeps: accuracy, balanced accuracy, macro AUC, times."""
    probabilities = predict_mil(training.model, test, device)
    seconds = training.epoch_seconds[1:] or training.epoch_seconds
    return probabilities, compute_metrics(probabilities, test.labels) | {
        "epoch_seconds": median(seconds) if seconds else float("nan"),
        "train_seconds": sum(training.epoch_seconds),
        "epochs": len(training.epoch_seconds),
        "final_loss": training.final_loss,
    }
