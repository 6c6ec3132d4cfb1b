"""``--dry-run``: time a sample of each phase of a run and project the total."""

import dataclasses
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from histodd_bench import results
from histodd_bench.baselines.gradmatch import GradMatch
from histodd_bench.data.patchset import PatchSet
from histodd_bench.distill.histodd import HistoDD
from histodd_bench.experiment import Experiment
from histodd_bench.methods import method_entry
from histodd_bench.models import ModelPool, PoolRecipe, build
from histodd_bench.progress import Progress, clock
from histodd_bench.request import Cell, cells
from histodd_bench.stain import fit_set
from histodd_bench.training import Trainer, TrainRecipe, predict
from histodd_bench.wording import counted
from histodd_bench.workers import cores

_BATCHES = 2  # training steps timed, after as many to warm up
_SLOW = 10.0  # seconds: what takes longer is timed once, since a warm-up would cost as much again and show little


@dataclass(frozen=True)
class Phase:
    """One phase: seconds for one unit as measured, and how many units the run has."""

    name: str
    unit: str
    seconds: float
    count: float

    @property
    def total(self) -> float:
        return self.seconds * self.count


def project(experiment: Experiment) -> str:
    """Time samples of everything the request needs and print what the whole run would take, from nothing."""
    with experiment.progress.task("timing samples", 1) as task:
        phases = _phases(experiment, lambda name: task.progress.log(f"timing {name}"))
        task.advance()
    total = sum(p.total for p in phases)
    width = max(len(p.name) for p in phases)
    lines = [f"{experiment.request.dataset}, preset {experiment.request.preset.name}, on {experiment.environment['device']}, "
             f"{counted(experiment.request.threads, 'thread')}:"]  # fmt: skip
    for p in phases:
        lines.append(
            f"  {p.name:<{width}}  {p.seconds:10.4g} s per {p.unit:<12} x {p.count:>14,.0f} = {duration(p.total):>12}"
        )
    lines.append(f"  {'projected total':<{width}}  {duration(total)}")
    request = experiment.request
    beside = min(request.workers, cores() // request.threads, len(cells(request)))  # more would share the same cores
    if beside > 1 and experiment.device.type == "cpu":
        lines.append(f"  {f'on {beside} processes':<{width}}  {duration(total / beside)} or a little more")
    lines.append(
        "Projected from short samples of each phase, for a run from nothing; reading the data set is not counted."
    )
    unknown = [m for m in experiment.request.methods if not _known(m)]
    if unknown:
        lines.append(f"Not counted, since their cost cannot be sampled: {', '.join(unknown)}.")
    return "\n".join(lines) + "\n"


def duration(seconds: float) -> str:
    """Seconds as a person would say them."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    if seconds < 86400 * 2:
        return clock(seconds) + (" h" if seconds >= 3600 else " min")
    return f"{seconds / 86400:.1f} days"


def _known(name: str) -> bool:
    fields = {f.name for f in dataclasses.fields(method_entry(name).cls)}
    return name in ("random", "full", "gradmatch") or {"arch", "epochs"} <= fields or {"outer_steps", "inner_steps"} <= fields


def _warm(device: torch.device, work: Callable[[], Any]) -> float:
    """Seconds of the second call; of the first, where that is slow."""
    first = _timed(device, work)
    return first if first > _SLOW else _timed(device, work)


def _timed(device: torch.device, work: Callable[[], Any]) -> float:
    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    wait()
    start = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - start


def _sample(train: PatchSet, per_class: int) -> PatchSet:
    return train.subset(torch.cat([train.class_indices(c)[:per_class] for c in range(train.num_classes)]))


def _steps(recipe: TrainRecipe, patches: int) -> float:
    """Optimiser steps, in full batches: a set smaller than a batch makes cheaper steps."""
    return recipe.steps_on(patches) * patches / (recipe.batch_size * -(-patches // recipe.batch_size))


def _training_step(experiment: Experiment, arch: str, width: int | None, recipe: TrainRecipe, known: dict[Any, float]) -> float:
    """Seconds of one step on a full batch, looked up in ``known`` or added to it."""
    short = TrainRecipe(
        **{f.name: getattr(recipe, f.name) for f in dataclasses.fields(TrainRecipe)} | {"epochs": 2, "steps": None}
    )
    if (arch, width, short) not in known:
        train = experiment.dataset.train
        indices = torch.arange(_BATCHES * short.batch_size) % len(train)
        patches, size = train.subset(indices), train.image_size[0]
        model = build(arch, num_classes=train.num_classes, image_size=size, width=width, generator_seed=0)
        model = model.to(experiment.device)
        trainer = Trainer(model, patches, short, experiment.preprocessing, seed=0, device=experiment.device)
        known[arch, width, short] = _warm(experiment.device, trainer.run_epoch) / _BATCHES
    return known[arch, width, short]


def _phases(experiment: Experiment, report: Callable[[str], None]) -> list[Phase]:
    request, train, test = experiment.request, experiment.dataset.train, experiment.dataset.test
    n, todo = len(train), cells(experiment.request)
    phases: list[Phase] = []
    known: dict[Any, float] = {}
    fields = {m: {f.name for f in dataclasses.fields(method_entry(m).cls)} for m in request.methods}
    distilled = {experiment.set_key(c): c for c in todo if {"outer_steps", "inner_steps"} <= fields[c.method]}
    pools: dict[PoolRecipe, Cell] = {}
    for cell in distilled.values():
        pools.setdefault(experiment.pool_recipe_of(cell.changes), cell)
    if pools:
        report("pool training")
        arch, width = request.distill_arch
        step = _training_step(experiment, arch, width, experiment.pool_recipe, known)
        count = sum(p.networks * _steps(p, n) for p in pools)
        networks = sum(p.networks for p in pools)
        phases.append(Phase(f"pool of {networks} x {arch}", "step", step, count))
    seen: set[PoolRecipe] = set()  # methods whose recipes agree share their networks
    for name in request.methods:
        if {"arch", "epochs"} <= fields[name]:
            method = experiment.method(name, request.ipc[0])
            own = dataclasses.replace(
                experiment.pool_recipe, arch=method.arch, width=method.width, epochs=method.epochs, steps=None
            )
            if name == "forgetting":
                own = dataclasses.replace(own, balanced=False)
            if own in seen:
                continue
            seen.add(own)
            report(f"{name}: training of {method.arch}")
            step = _training_step(experiment, method.arch, method.width, own, known)
            phases.append(Phase(f"{name}: networks, {method.arch}", "step", step, request.seeds * _steps(own, n)))
    if distilled or any(experiment.recipe_of(c.changes).stain_train > 0 for c in todo):
        some = _sample(train, 64)
        seconds = _timed(experiment.device, lambda: fit_set(some, experiment.preprocessing.template))
        phases.append(Phase("stain fits of real patches", "patch", seconds / len(some), n))
    steps: dict[
        tuple[str, int | None, tuple[str, ...]], tuple[Cell, int]
    ] = {}  # what an inner step costs depends on these
    for cell in distilled.values():
        method = experiment.method(cell.method, cell.ipc, cell.changes)
        kind = cell.method, cell.ipc, tuple(getattr(method, "augment", ()))
        first, inner_steps = steps.get(kind, (cell, 0))
        steps[kind] = first, inner_steps + method.outer_steps * method.inner_steps
    several = len({k[2] for k in steps}) > 1
    for (name, ipc, augment), (cell, inner_steps) in steps.items():
        assert ipc is not None
        report(f"{name}: inner steps at {ipc} per class")
        inner = _inner_step(experiment, experiment.method(name, ipc, cell.changes), ipc)
        told = f", {'+'.join(augment) or 'no augmentation'}" if several else ""
        phases.append(Phase(f"{name}: {ipc} per class{told}", "inner step", inner, inner_steps))
    matched = _matched(experiment, todo)
    if matched:
        report("gradients of candidates")
        method = next(iter(matched.values()))[0]
        patches = sum(candidates * recipe.networks for (recipe, *_), (_, candidates) in matched.items())
        phases.append(Phase("gradients of candidates", "patch, 2 nets", _patch_of_a_start(experiment, method), patches))
    for arch, width in request.archs:
        report(f"evaluation on {arch}")
        own_cells = [c for c in todo if (c.arch, c.width) == (arch, width)]
        own_cells = list({results.key_of(experiment.cell_config(c)): c for c in own_cells}.values())
        step = _training_step(experiment, arch, width, experiment.recipe, known)
        small = [c for c in own_cells if c.ipc is not None]
        count = sum(_steps(experiment.recipe_of(c.changes), c.ipc * train.num_classes) for c in small if c.ipc)
        if small:
            phases.append(Phase(f"training on sets, {arch}", "step", step, count))
        whole = [c for c in own_cells if c.ipc is None]
        if whole:
            count = sum(_steps(experiment.recipe_of(c.changes), n) for c in whole)
            phases.append(Phase(f"training on all patches, {arch}", "step", step, count))
        some = test.subset(torch.arange(min(len(test), 256)))
        model = build(
            arch, num_classes=train.num_classes, image_size=train.image_size[0], width=width, generator_seed=0
        )
        model = model.to(experiment.device)
        stain = any(experiment.recipe_of(c.changes).stain_test for c in own_cells)

        def score(model: torch.nn.Module = model, some: PatchSet = some, stain: bool = stain) -> None:
            predict(model, some, experiment.preprocessing, stain=stain, device=experiment.device)

        seconds = _warm(experiment.device, score) / len(some)
        phases.append(Phase(f"scoring, {arch}", "patch", seconds, len(own_cells) * len(test)))
    return phases


def _matched(experiment: Experiment, todo: Sequence[Cell]) -> dict[tuple[Any, ...], tuple[GradMatch, int]]:
    """Choices by gradient, those that share the candidates' gradients once: a method that makes it, and candidates per class."""
    train, found = experiment.dataset.train, {}
    largest = max(len(train.class_indices(label)) for label in range(train.num_classes))
    for cell in todo:
        method = None if cell.ipc is None else experiment.method(cell.method, cell.ipc, cell.changes)
        if isinstance(method, HistoDD) and method.initial == "matched":
            method = GradMatch(method.start_patches, method.alpha, method.match)
        if isinstance(method, GradMatch) and cell.ipc is not None:
            candidates = min(max(method.candidates, cell.ipc), largest)
            depends = experiment.pool_recipe_of(cell.changes), cell.distill_seed, candidates, method.alpha, method.match
            found[depends] = method, candidates
    return found


def _inner_step(experiment: Experiment, method: Any, ipc: int) -> float:
    """Seconds of one inner step: a run of three on a sample of the data, less a run of one."""
    plain = {"initial": "real"} if hasattr(method, "initial") else {}
    return _per_unit(experiment, ipc, lambda n: dataclasses.replace(method, outer_steps=1, inner_steps=n, **plain))


def _patch_of_a_start(experiment: Experiment, method: GradMatch) -> float:
    """Seconds of the gradients of one patch of every class in two networks."""
    few = 8
    return _per_unit(experiment, 1, lambda n: dataclasses.replace(method, candidates=few * n)) / few


def _per_unit(experiment: Experiment, ipc: int, method: Callable[[int], Any]) -> float:
    """Seconds per unit of a method that can be made with any number of them, on a sample of the data and a pool of one
    network: three less one, or one as it is where that is slow."""
    sample = _sample(experiment.dataset.train, max(ipc, getattr(method(1), "real_batch", 64)))
    recipe = dataclasses.replace(experiment.pool_recipe, networks=1, epochs=None, steps=1)
    with tempfile.TemporaryDirectory() as folder:
        pool = ModelPool(
            sample, recipe, cache=Path(folder), device=experiment.device, preprocessing=experiment.preprocessing
        )
        pool.prepare()

        def run(units: int, place: str, seed: int) -> float:
            short = method(units)
            workdir = Path(folder) / place
            workdir.mkdir()
            quiet = Progress.silent()
            return _timed(
                experiment.device,
                lambda: short(sample, ipc, pool, seed, device=experiment.device, workdir=workdir, progress=quiet),
            )

        first = run(1, "warm-up", 0)
        if first > _SLOW:
            return first
        one = run(1, "one", 1)  # another seed: what the pool keeps for one must not speed up the next
        return max(run(3, "three", 2) - one, 0.0) / 2
