"""Settings chosen on training data alone: how stains are handled, scored on a slide-disjoint validation split."""

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

import torch
from torch import Generator

from histodd_bench.baselines.random import stratified_draw
from histodd_bench.data import split_groups
from histodd_bench.data.patchset import PatchSet
from histodd_bench.evaluate import evaluate
from histodd_bench.files import digest, write_text
from histodd_bench.progress import Progress
from histodd_bench.stain import Preprocessing
from histodd_bench.training import TrainRecipe

VALIDATION = 0.25  # of the training slides
VERSION = 1


@dataclass(frozen=True)
class Choice:
    """What was chosen and why.

    Attributes:
        name: the chosen candidate.
        scores: mean validation balanced accuracy of every candidate.
        margin: the gain over the first candidate, in its paired standard errors; 0 when the first was kept.
        n: trainings per candidate.
    """

    name: str
    scores: dict[str, float]
    margin: float
    n: int


def choose_stain(
    train: PatchSet,
    policies: Mapping[str, tuple[float, bool]],
    *,
    ipc: int,
    arch: str,
    width: int | None,
    recipe: TrainRecipe,
    preprocessing: Preprocessing,
    device: torch.device | str = "cpu",
    repeats: int = 4,
    cache: Path,
    progress: Progress,
) -> Choice:
    """Choose how stains are handled from training data only.

    Small random sets, drawn from one part of the training slides, train the evaluation network under every policy; it is
    scored on the other slides. Every repeat has its own split, draw and initialisation, shared by all policies. The
    first policy is kept unless another is better by more than two standard errors of the paired differences.

    Args:
        policies: name -> (probability of normalising in training, whether to normalise at test); the first is the default.
        ipc: patches per class of the small sets (fewer where the part has fewer).
        repeats: trainings per policy.
        cache: folder that remembers the choice, keyed by all of the above.
    """
    question = {
        "version": VERSION,
        "train": train.fingerprint(),
        "policies": {k: list(v) for k, v in policies.items()},
        "recipe": dataclasses.asdict(recipe),
        "preprocessing": dataclasses.asdict(preprocessing),
        "rest": [ipc, arch, width, repeats, str(device), torch.get_num_threads(), torch.__version__],
    }
    path = cache / f"stain-{digest(question)[:32]}.json"
    if path.exists():
        return Choice(**json.loads(path.read_text()))
    scores: dict[str, list[float]] = {name: [] for name in policies}
    with progress.task("choosing the stain policy on training slides", repeats * len(policies)) as task:
        for repeat in range(repeats):
            fit, validation = split_groups(train, VALIDATION, repeat)
            part, held_out = train.subset(fit), train.subset(validation)
            small = part.subset(
                stratified_draw(part, min(ipc, *part.class_counts()), Generator().manual_seed(repeat))
            )
            for name, (stain_train, stain_test) in policies.items():
                score = evaluate(
                    small,
                    held_out,
                    arch=arch,
                    width=width,
                    recipe=dataclasses.replace(recipe, stain_train=stain_train, stain_test=stain_test),
                    preprocessing=preprocessing,
                    seed=repeat,
                    device=device,
                )
                scores[name].append(score.metrics["balanced_accuracy"])
                task.advance()
    choice = decide(scores)
    write_text(path, json.dumps(dataclasses.asdict(choice), indent=1))
    return choice


def decide(scores: Mapping[str, list[float]]) -> Choice:
    """The best candidate if it beats the first by more than two standard errors of the paired differences, else the first.

    Args:
        scores: candidate -> one score per repeat, repeats in the same order.
    """
    names = list(scores)
    means = {name: mean(values) for name, values in scores.items()}
    n = len(scores[names[0]])
    chosen, best_margin = names[0], 0.0
    for name in names[1:]:
        gains = [a - b for a, b in zip(scores[name], scores[names[0]], strict=True)]
        error = stdev(gains) / math.sqrt(n) if n > 1 else 0.0
        margin = mean(gains) / max(error, 1e-6)
        if margin > 2 and (chosen == names[0] or means[name] > means[chosen]):
            chosen, best_margin = name, margin
    return Choice(chosen, means, best_margin, n)
