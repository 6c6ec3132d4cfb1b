"""Train a network on a set of patches from scratch, score it on the test set, and weigh the set."""

import io
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from histodd_bench.data.patchset import PatchSet
from histodd_bench.files import read_state, save_state
from histodd_bench.memory import peak_memory
from histodd_bench.models import build
from histodd_bench.models.convnet import ConvNetD3
from histodd_bench.sets import to_uint8
from histodd_bench.stain import Preprocessing
from histodd_bench.training import Trainer, TrainRecipe, predict, require_finite

_CHECKPOINT_SECONDS = 20.0  # a training shorter than this is simply done again
_STORAGE_SAMPLE = 2000  # patches encoded to estimate the size of a larger set
_LOADING_PASSES = 3  # over the set, to time loading alone


@dataclass(frozen=True)
class Evaluation:
    """What one training on a set gave on the test set.

    Attributes:
        probabilities: ``[N,C]`` float32, of every test patch, after the last epoch.
        metrics: ``accuracy``, ``balanced_accuracy``, ``auc`` (macro, one against rest) as fractions (NaN where the test
            set cannot define them), ``epoch_seconds`` (median after the first epoch, which warms up; device synchronised,
            loading included), ``train_seconds``, ``epochs``, ``steps``, ``final_loss``.
        seconds: ``loading``: reading an epoch's patches and moving them to the device, measured alone after the training
            (median of three passes); ``computing``: ``epoch_seconds`` less that.
        peak_bytes: memory at the peak of the training, see :func:`histodd_bench.memory.peak_memory`.
    """

    probabilities: Tensor
    metrics: dict[str, float]
    seconds: dict[str, float]
    peak_bytes: int | None


def evaluate(
    patches: PatchSet,
    test: PatchSet,
    *,
    arch: str,
    width: int | None,
    recipe: TrainRecipe,
    preprocessing: Preprocessing,
    seed: int,
    device: torch.device | str = "cpu",
    on_epoch: Callable[[int, int, float], None] | None = None,
    checkpoint: Path | None = None,
) -> Evaluation:
    """Train ``arch`` on ``patches`` from the initialisation of ``seed`` and score the last epoch on ``test``.

    Args:
        patches: real or synthetic; the same classes and patch size as ``test``.
        preprocessing: of the full training set, the same for every method.
        on_epoch: called after every epoch with (steps done, steps in all, mean loss).
        checkpoint: a file that keeps the state of a long training; an interrupted one continues from it to the same
            result. Removed at the end.

    Raises:
        HistoddError: the training diverged.
    """
    model = build(
        arch, num_classes=test.num_classes, image_size=test.image_size[0], width=width, generator_seed=seed
    ).to(device)
    if torch.device(device).type == "cpu" and not isinstance(model, ConvNetD3):
        model = model.to(memory_format=torch.channels_last)  # faster there; ConvNet-D3 is slower, see bench_pooling.py
    trainer = Trainer(model, patches, recipe, preprocessing, seed=seed, device=device)
    loss, saved = float("nan"), time.monotonic()
    if checkpoint is not None and checkpoint.exists():
        trainer.load_state_dict(read_state(checkpoint))
    with peak_memory(trainer.device) as peak:
        while not trainer.done:
            loss = trainer.run_epoch()
            if on_epoch:
                on_epoch(trainer.step, trainer.total_steps, loss)
            if checkpoint is not None and time.monotonic() - saved > _CHECKPOINT_SECONDS and not trainer.done:
                save_state(checkpoint, trainer.state_dict())
                saved = time.monotonic()
    logits = predict(model, test, preprocessing, stain=recipe.stain_test, device=device)
    require_finite(logits, arch, recipe.lr)
    probabilities = logits.softmax(1)
    seconds = trainer.epoch_seconds[1:] or trainer.epoch_seconds
    epoch, loading = median(seconds) if seconds else float("nan"), loading_seconds(trainer)
    if checkpoint is not None:
        checkpoint.unlink(missing_ok=True)
    return Evaluation(
        probabilities,
        compute_metrics(probabilities, test.labels)
        | {
            "epoch_seconds": epoch,
            "train_seconds": sum(trainer.epoch_seconds),
            "epochs": trainer.epoch,
            "steps": trainer.step,
            "final_loss": loss,
        },
        {"loading": loading, "computing": max(epoch - loading, 0.0)},
        peak[0],
    )


def loading_seconds(trainer: Trainer) -> float:
    """Seconds of one epoch's loading alone: every patch read once, in shuffled batches, and moved to the device."""

    def once() -> float:
        if trainer.device.type == "cuda":
            torch.cuda.synchronize(trainer.device)
        start = time.perf_counter()
        for indices in torch.randperm(len(trainer.train), generator=order).split(trainer.recipe.batch_size):
            trainer.train.images[indices].to(trainer.device)
        if trainer.device.type == "cuda":
            torch.cuda.synchronize(trainer.device)
        return time.perf_counter() - start

    order = torch.Generator().manual_seed(0)
    return median(once() for _ in range(_LOADING_PASSES))


def compute_metrics(probabilities: Tensor, labels: Tensor) -> dict[str, float]:
    """Accuracy, balanced accuracy and macro AUC (one against rest), as fractions.

    Args:
        probabilities: ``[N,C]``, rows sum to 1.
        labels: ``[N]`` int64.

    Classes without test patches are left out of balanced accuracy; classes without positives or negatives out of AUC.
    """
    truth, predicted = labels.numpy(), probabilities.argmax(1).numpy()
    nan = float("nan")
    if len(truth) == 0:
        return {"accuracy": nan, "balanced_accuracy": nan, "auc": nan}
    present = np.unique(truth)
    recalls = [float((predicted[truth == c] == c).mean()) for c in present]
    areas = []
    for c in present:
        positive = truth == c
        if positive.all():
            continue
        ranks = _average_ranks(probabilities[:, c].double().numpy())
        n_positive, n_negative = int(positive.sum()), int((~positive).sum())
        areas.append((ranks[positive].sum() - n_positive * (n_positive + 1) / 2) / (n_positive * n_negative))
    return {
        "accuracy": float((predicted == truth).mean()),
        "balanced_accuracy": float(np.mean(recalls)),
        "auc": float(np.mean(areas)) if areas else nan,
    }


def _average_ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1, ties averaged."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = counts.cumsum()
    return (ends - (counts - 1) / 2)[inverse]


def storage(patches: PatchSet) -> dict[str, object]:
    """What a set weighs: count, shape, raw uint8 bytes, and bytes on disk with one lossless codec (PNG) incl. labels.

    Labels count one int64 each. Sets above 2,000 patches are estimated from 2,000 evenly spaced ones (``estimated``).
    """
    n = len(patches)
    sample = torch.arange(n) if n <= _STORAGE_SAMPLE else torch.linspace(0, n - 1, _STORAGE_SAMPLE).long()
    encoded = 0
    for index in sample.split(256):
        for image in to_uint8(patches.images[index]):
            buffer = io.BytesIO()
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(buffer, format="PNG")
            encoded += buffer.tell()
    disk = round(encoded * n / max(len(sample), 1)) + 8 * n
    return {
        "count": n,
        "shape": list(patches.images.shape[1:]),
        "raw_uint8_bytes": patches.images[:1].numel() * n,
        "disk_bytes": disk,
        "estimated": n > _STORAGE_SAMPLE,
    }
