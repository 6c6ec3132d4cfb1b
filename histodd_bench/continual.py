"""Task-incremental continual learning from memory (GDumb, Prabhu et al. 2020), as in Figure 3 of the supplement.

Data sets arrive one after the other, each with its own classes. What is kept of each is a small set: a coreset or a distilled
one. After every stage a new network is trained from scratch on all that was kept, and scored on all data sets seen so far.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

import numpy as np
import torch
from torch import Tensor

from histodd_bench import results
from histodd_bench.data.patchset import PatchSet
from histodd_bench.environment import own_random
from histodd_bench.evaluate import compute_metrics, loading_seconds
from histodd_bench.experiment import Experiment
from histodd_bench.layout import SEQUENCE, stage_row
from histodd_bench.memory import peak_memory
from histodd_bench.models import build
from histodd_bench.parallel import run_parallel
from histodd_bench.request import Cell, MakeSet, cells
from histodd_bench.stain import Preprocessing
from histodd_bench.training import Trainer, TrainRecipe, predict, require_finite

VERSION = 1


@dataclass(frozen=True)
class Scores:
    """After one stage: ``probabilities [N, all classes]`` of the test patches of the tasks seen, and metrics as fractions."""

    probabilities: Tensor
    labels: Tensor
    groups: Tensor
    metrics: dict[str, float]
    seconds: dict[str, float]
    peak_bytes: int | None


def joint_set(memories: Sequence[PatchSet], names: Sequence[str]) -> PatchSet:
    """The sets of several data sets as one: classes of the second follow those of the first, and so on.

    Args:
        memories: of one patch size and one kind of image.
        names: of the data sets; they stand before the names of classes and slides.
    """
    labels, groups, group_names, classes = [], [], [], []  # type: ignore[var-annotated]
    for name, memory in zip(names, memories, strict=True):
        labels.append(memory.labels + len(classes))
        groups.append(memory.groups + len(group_names))
        classes += [f"{name}: {c}" for c in memory.classes]
        group_names += [f"{name}: {g}" for g in memory.group_names]
    images = torch.cat([memory.images for memory in memories])
    return PatchSet(images, torch.cat(labels), torch.cat(groups), tuple(group_names), tuple(classes))


def joint_preprocessing(parts: Sequence[Preprocessing]) -> Preprocessing:
    """Channel statistics of all data sets seen, each counting the same; the stain template of the first."""
    mean = np.mean([p.mean for p in parts], axis=0)
    second = np.mean([np.square(p.std) + np.square(p.mean) for p in parts], axis=0)
    std = np.sqrt(np.maximum(second - np.square(mean), 1e-6))
    return dataclasses.replace(parts[0], mean=tuple(mean.tolist()), std=tuple(std.tolist()))


def train_and_score(
    memories: Sequence[PatchSet],
    tests: Sequence[PatchSet],
    names: Sequence[str],
    *,
    arch: str,
    width: int | None,
    recipe: TrainRecipe,
    preprocessing: Preprocessing,
    seed: int,
    device: torch.device | str = "cpu",
) -> Scores:
    """Train a network from scratch on the memory of all tasks and score it on the test patches of each.

    Metrics: ``accuracy`` and ``balanced_accuracy`` among the classes of all tasks; ``masked_accuracy`` and
    ``masked_balanced_accuracy`` among those of the patch's own task, which is then known; all are means over the tasks.
    ``task_<i>_accuracy`` and ``task_<i>_masked_accuracy`` are those of task ``i``, from 1.
    """
    memory = joint_set(memories, names)
    size = memory.image_size[0]
    model = build(arch, num_classes=memory.num_classes, image_size=size, width=width, generator_seed=seed).to(device)
    trainer = Trainer(model, memory, recipe, preprocessing, seed=seed, device=device)
    loss = math.nan
    with peak_memory(trainer.device) as peak:
        while not trainer.done:
            loss = trainer.run_epoch()
    metrics: dict[str, float] = {}
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    first_class, first_group = 0, 0
    for i, test in enumerate(tests, start=1):
        logits = predict(model, test, preprocessing, stain=recipe.stain_test, device=device)
        require_finite(logits, arch, recipe.lr)
        own = slice(first_class, first_class + test.num_classes)
        free = compute_metrics(logits.softmax(1), test.labels + first_class)
        masked = compute_metrics(logits[:, own].softmax(1), test.labels)
        for name in ("accuracy", "balanced_accuracy"):
            metrics[f"task_{i}_{name}"], metrics[f"task_{i}_masked_{name}"] = free[name], masked[name]
        parts.append((logits.softmax(1), test.labels + first_class, test.groups + first_group))
        first_class, first_group = own.stop, first_group + len(test.group_names)
    for name in ("accuracy", "balanced_accuracy", "masked_accuracy", "masked_balanced_accuracy"):
        metrics[name] = fmean(metrics[f"task_{i}_{name}"] for i in range(1, len(tests) + 1))
    seconds = trainer.epoch_seconds[1:] or trainer.epoch_seconds
    epoch, loading = median(seconds) if seconds else math.nan, loading_seconds(trainer)
    metrics |= {"epoch_seconds": epoch, "train_seconds": sum(trainer.epoch_seconds), "final_loss": loss}
    probabilities, labels, groups = (torch.cat(columns) for columns in zip(*parts, strict=True))
    return Scores(
        probabilities, labels, groups, metrics, {"loading": loading, "computing": max(epoch - loading, 0.0)}, peak[0]
    )


class TaskSequence:
    """A sequence of data sets under one request each, and the cells that follow."""

    def __init__(self, experiments: Sequence[Experiment]) -> None:
        self.experiments = list(experiments)
        self.names = [e.request.dataset for e in experiments]
        self.name = SEQUENCE.join(self.names)

    def cells(self) -> list[tuple[Cell, int]]:
        """Every training: a cell of the first request, and after how many stages."""
        return [(c, k) for c in cells(self.experiments[0].request) for k in range(1, len(self.experiments) + 1)]

    def row(self, stages: int) -> str:
        """Label of a stage's row."""
        return stage_row(stages, self.names)

    def config(self, cell: Cell, stages: int) -> dict[str, Any]:
        """What a record depends on. The test data are those of the whole sequence, which all its records share."""
        first = self.experiments[0]
        own = first.cell_config(cell)
        sets = [e.set_config(cell.method, cell.ipc, cell.distill_seed, cell.changes) for e in self.experiments[:stages]]
        data = {
            **own["data"],
            "name": self.name,
            "train": [e.dataset.train.fingerprint() for e in self.experiments],
            "test": [e.dataset.test.fingerprint() for e in self.experiments],
        }
        made = {**own["set"], "stages": stages, "memory": [s["set"] for s in sets], "continual": VERSION}
        return {**own, "data": data, "set": made}

    def record(self, cell: Cell, stages: int) -> results.Record:
        """Compute one training."""
        seen = self.experiments[:stages]
        first, config = seen[0], self.config(cell, stages)
        made = [e.make(cell.method, cell.ipc, cell.distill_seed, cell.changes) for e in seen]
        with own_random(results.key_of(config)):
            scores = train_and_score(
                [m.patches for m in made],
                [e.dataset.test for e in seen],
                self.names[:stages],
                arch=cell.arch,
                width=cell.width,
                recipe=first.recipe_of(cell.changes),
                preprocessing=joint_preprocessing([e.training_data(cell.changes)[1] for e in seen]),
                seed=cell.eval_seed,
                device=first.device,
            )
        facts = [e.data_facts for e in self.experiments]
        spent = {n: sum(m.seconds.get(n, 0.0) for m in made) for n in ("method", "networks", "total")}
        storage = [e.storage(m) for e, m in zip(seen, made, strict=True)]
        summed = {n: sum(int(s[n]) for s in storage) for n in ("count", "raw_uint8_bytes", "disk_bytes")}  # type: ignore[call-overload]
        names = ("train_patches", "test_patches", "train_groups", "test_groups")
        return results.make_record(
            cell,
            self.name,
            config,
            metrics=scores.metrics,
            storage={**summed, "shape": storage[0]["shape"], "estimated": False},
            seconds={**spent, **scores.seconds},
            memory={"making": None, "training": scores.peak_bytes},
            stain=first.stain.describe(),
            set=None,
            data={
                "classes": [f"{n}: {c}" for n, f in zip(self.names, facts, strict=True) for c in f["classes"]],
                **{n: sum(f[n] for f in facts) for n in names},
                "procedural": any(f["procedural"] for f in facts),
                "notes": list(
                    dict.fromkeys(f"{n}: {t}" for n, f in zip(self.names, facts, strict=True) for t in f["notes"])
                ),
            },
            environment=first.environment,
            probabilities=scores.probabilities.numpy().astype(np.float16),
            labels=scores.labels.numpy(),
            groups=scores.groups.numpy(),
        )


def run_sequence(sequence: TaskSequence) -> int:
    """Make the sets of every data set, then train on every memory that has no record yet; returns how many."""
    request = sequence.experiments[0].request
    out, progress = request.out, sequence.experiments[0].progress
    finished = results.finished_keys(out, progress.log)
    todo = [c for c in sequence.cells() if results.key_of(sequence.config(*c)) not in finished]
    wanted = list(dict.fromkeys(MakeSet(c.method, c.ipc, c.distill_seed, c.changes) for c, _ in todo))
    if request.workers > 1 and sequence.experiments[0].device.type == "cpu":
        for experiment in sequence.experiments:
            with progress.task(f"{experiment.request.dataset}: sets", len(wanted)) as task:
                networks = range(experiment.pool_recipe.networks) if todo else ()
                run_parallel(experiment.request, [*networks, *wanted], request.workers, task.advance)
    for experiment in sequence.experiments:
        experiment.processes = 1  # from here on
    with progress.task("trainings on memories", len(sequence.cells()), len(sequence.cells()) - len(todo)) as task:
        for cell, stages in todo:
            results.write_record(out, sequence.record(cell, stages))
            task.advance()
    return len(todo)
