"""Running a table: data set -> sets (made once) -> evaluations -> one record per cell. A killed run continues where it was."""

import dataclasses
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from histodd_bench import environment, presets, results, sets, tuning
from histodd_bench.contact_sheet import contact_sheet
from histodd_bench.data import PatchSet, load_dataset
from histodd_bench.environment import configure, own_random
from histodd_bench.errors import HistoddError
from histodd_bench.evaluate import evaluate, storage
from histodd_bench.files import digest
from histodd_bench.methods import MethodEntry, method_entry
from histodd_bench.models import ModelPool, PoolRecipe
from histodd_bench.parallel import pieces, run_parallel
from histodd_bench.progress import Progress
from histodd_bench.request import Cell, Request, cells
from histodd_bench.stain import Preprocessing, describe
from histodd_bench.stopwatch import stopwatch
from histodd_bench.training import TrainRecipe

__all__ = ["Cell", "Experiment", "Made", "Request", "StainPolicy", "cells", "resolve_stain", "run"]

SETS, WORK, SHEETS = "sets", "work", "sheets"


@dataclass(frozen=True)
class StainPolicy:
    """How stains are handled, by every method alike.

    Attributes:
        train: probability that a training patch (and a draw of the Siamese augmentation) is normalised to the template.
        test: whether patches are normalised when a network is scored.
        chosen: how this was decided, in words.
        scores: what decided it, by policy; empty when the user did.
    """

    train: float
    test: bool
    chosen: str = "set on the command line"
    scores: dict[str, float] = field(default_factory=dict)

    def describe(self) -> dict[str, Any]:
        """As it stands in records."""
        return dataclasses.asdict(self)


STAIN_POLICIES = {"off": (0.0, False), "half": (0.5, False), "on": (1.0, True)}


def resolve_stain(experiment: "Experiment") -> StainPolicy:
    """The stain policy that ``--stain``, ``--set`` or the preset names; ``auto`` is decided on training slides only.

    The decision uses the preset's first network and number of images per class, not those asked for: a part of a table
    has the policy of the whole table.
    """
    request = experiment.request
    fields = request.overrides.get("eval", {})
    if {"stain_train", "stain_test"} <= fields.keys():
        return StainPolicy(
            fields["stain_train"], fields["stain_test"], chosen="--set eval.stain_train, eval.stain_test"
        )
    if request.stain != "auto":
        policy = StainPolicy(*STAIN_POLICIES[request.stain], chosen=f"--stain {request.stain}")
    else:
        arch, width = presets.parse_arch(request.preset.archs[0], request.preset.widths)
        choice = tuning.choose_stain(
            experiment.dataset.train,
            STAIN_POLICIES,
            ipc=request.preset.ipc[0],
            arch=arch,
            width=width,
            recipe=presets.build(TrainRecipe, request.preset.eval, fields),
            preprocessing=experiment.preprocessing,
            device=experiment.device,
            cache=request.cache / "choices",
            progress=experiment.progress,
        )
        chosen = f"auto: chosen on training slides only, {choice.n} splits, balanced accuracy of {arch}"
        policy = StainPolicy(*STAIN_POLICIES[choice.name], chosen=chosen, scores=choice.scores)
    named = {name.removeprefix("stain_"): fields[name] for name in ("stain_train", "stain_test") if name in fields}
    return dataclasses.replace(policy, **named)


@dataclass(frozen=True)
class Made:
    """A set ready to be evaluated: its patches, its folder's name (None for the whole training set), seconds it took."""

    patches: PatchSet
    name: str | None
    seconds: dict[str, float]


class Experiment:
    """One data set under one request: data, pool of networks, stain policy, and the cells computed from them."""

    def __init__(self, request: Request, progress: Progress) -> None:
        self.request, self.progress = request, progress
        self.device = configure(request.device, request.threads)
        self.dataset = load_dataset(
            request.dataset,
            root=request.data_root,
            image_size=request.image_size,
            seed=request.split_seed,
            cache=request.cache / "data",
            workers=request.workers,
            progress=progress,
        )
        for note in self.dataset.notes:
            progress.log(f"{request.dataset}: {note}")
        train = self.dataset.train
        budgeted = [m for m in request.methods if not method_entry(m).whole]
        train.require(max(request.ipc, default=1) if budgeted else 1)
        if len(self.dataset.test) == 0:
            raise HistoddError(f"{request.dataset} has no test patches")
        self._methods: dict[tuple[str, int | None], Any] = {}

    # ---- what follows from the request -----------------------------------------------------------------------------

    @cached_property
    def stain(self) -> StainPolicy:
        """Whether stains are normalised in training and at test: the same for every method, from training data only."""
        return resolve_stain(self)

    @cached_property
    def recipe(self) -> TrainRecipe:
        """The evaluation recipe, stain policy included; a field set on the command line wins over the policy."""
        policy = {"stain_train": self.stain.train, "stain_test": self.stain.test}
        return presets.build(TrainRecipe, self.request.preset.eval, policy, self.request.overrides.get("eval", {}))

    @cached_property
    def pool_recipe(self) -> PoolRecipe:
        """Which networks distillation matches, and how they are pre-trained."""
        arch, width = self.request.distill_arch
        fixed = {"arch": arch, "width": width, "image_size": self.request.image_size}
        policy = {"stain_train": self.stain.train, "stain_test": self.stain.test}
        return presets.build(
            PoolRecipe, fixed, policy, self.request.preset.pool, self.request.overrides.get("pool", {})
        )

    @cached_property
    def preprocessing(self) -> Preprocessing:
        """Channel statistics and stain template of the training set, for every network; stored with sets made from slides."""
        return self.dataset.preprocessing or describe(self.dataset.train)

    def pool(self) -> ModelPool:
        """The pre-trained networks; trained on first use, cached. A new one counts the seconds behind its networks anew."""
        return ModelPool(
            self.dataset.train,
            self.pool_recipe,
            cache=self.request.cache / "pools",
            device=self.device,
            progress=self.progress,
            preprocessing=self.preprocessing,
        )

    def method(self, name: str, ipc: int | None) -> Any:
        """A method with the fields of preset, stain policy and command line."""
        if (name, ipc) not in self._methods:
            entry, request = method_entry(name), self.request
            policy = {"stain_probability": self.stain.train} if _has(entry.cls, "stain_probability") else {}
            layers = (policy, request.preset.method_fields(name, ipc, request.dataset), request.overrides.get(name, {}))
            self._methods[name, ipc] = presets.build(entry.cls, *layers)
        return self._methods[name, ipc]

    def budget(self) -> str:
        """One line: what is trained for how long."""

        def length(recipe: TrainRecipe) -> str:
            return f"{recipe.epochs} epochs" if recipe.epochs is not None else f"{recipe.steps} steps"

        networks = f"pool of {self.pool_recipe.networks} networks, {length(self.pool_recipe)} each"
        stain = f"stain normalisation {self.stain.train:g} in training, {'on' if self.stain.test else 'off'} at test"
        return f"{networks}; evaluation {length(self.recipe)}; {stain} ({self.stain.chosen})"

    # ---- configurations: everything a result depends on --------------------------------------------------------------

    def _shared(self) -> dict[str, Any]:
        data = {
            "name": self.request.dataset,
            "train": self.dataset.train.fingerprint(),
            "image_size": self.request.image_size,
            "split_seed": self.request.split_seed,
        }
        return {"data": data, "threads": self.request.threads, "device": self.device.type}

    def set_config(self, name: str, ipc: int | None, seed: int | None) -> dict[str, Any]:
        """What the set of a method depends on."""
        entry = method_entry(name)
        made = {
            "method": name,
            "version": getattr(sys.modules[entry.cls.__module__], "VERSION", 1),
            "fields": _json(dataclasses.asdict(self.method(name, ipc))),
            "ipc": ipc,
            "seed": seed,
            "pool": _json(dataclasses.asdict(self.pool_recipe)) if entry.pooled else None,
        }
        return {**self._shared(), "set": made}

    def evaluation_config(self, cell: Cell, made: dict[str, Any]) -> dict[str, Any]:
        """What a record of a set depends on, given what the set depends on."""
        config = self._shared()
        config["data"]["test"] = self.dataset.test.fingerprint()
        config["set"] = made
        recipe = _json(dataclasses.asdict(self.recipe))
        config["eval"] = {"arch": cell.arch, "width": cell.width, "seed": cell.eval_seed, **recipe}
        return config

    def cell_config(self, cell: Cell) -> dict[str, Any]:
        """What the record of a cell depends on."""
        return self.evaluation_config(cell, self.set_config(cell.method, cell.ipc, cell.distill_seed)["set"])

    # ---- work --------------------------------------------------------------------------------------------------------

    def make(self, name: str, ipc: int | None, seed: int | None) -> Made:
        """The set of a method, made now or read from where an earlier run saved it."""
        entry = method_entry(name)
        if entry.whole:
            return Made(self.dataset.train, None, {})
        assert ipc is not None and seed is not None
        key = digest(self.set_config(name, ipc, seed))
        title = f"{self.request.dataset}-{name}-ipc{ipc}-s{seed}-{key[:12]}"
        folder, workdir = self.request.out / SETS / title, self.request.out / WORK / title
        saved = self._saved(folder, key)
        if saved is None:
            saved = self._make(entry, name, ipc, seed, key, folder, workdir)
        shutil.rmtree(workdir, ignore_errors=True)
        sheet = self.request.out / SHEETS / f"{title}.png"
        if not sheet.exists():
            contact_sheet(saved.patches, sheet, before=saved.initial if entry.synthetic else None)
        return Made(saved.patches, title, saved.seconds)

    def _saved(self, folder: Path, key: str) -> sets.SavedSet | None:
        if not folder.exists():
            return None
        try:
            saved = sets.load(folder)
        except HistoddError as error:
            self.progress.log(f"{error}: making it again")
            return None
        return saved if saved.card.get("key") == key else None

    def _make(
        self, entry: MethodEntry, name: str, ipc: int, seed: int, key: str, folder: Path, workdir: Path
    ) -> sets.SavedSet:
        method, train = self.method(name, ipc), self.dataset.train
        pool = self.pool()
        if entry.synthetic:  # a pool shared by all sets: trained before the clock starts
            pool.prepare()
        with stopwatch(workdir, lambda: pool.spent.here) as seconds, own_random(key):
            made = method(train, ipc, pool, seed, device=self.device, workdir=workdir, progress=self.progress)
        if made.classes != train.classes or made.class_counts() != [ipc] * train.num_classes:
            raise HistoddError(
                f"method {name!r} returned {made.class_counts()} patches per class instead of {ipc} each"
            )
        made = dataclasses.replace(made, images=made.images.cpu(), labels=made.labels.cpu(), groups=made.groups.cpu())
        card = {
            "dataset": self.request.dataset,
            "procedural": self.dataset.procedural,
            "method": name,
            "ipc": ipc,
            "seed": seed,
            "key": key,
            "config": self.set_config(name, ipc, seed),
            "stain": self.stain.describe(),
            "preprocessing": _json(dataclasses.asdict(self.preprocessing)),
            "seconds": {"method": seconds[0], "networks": pool.spent.total, "total": seconds[0] + pool.spent.total},
        }
        return sets.save(made, folder, results.finite(card), workdir=workdir)

    def cell(self, cell: Cell) -> results.Record:
        """Compute one cell."""
        return self.score(cell, self.cell_config(cell), self.make(cell.method, cell.ipc, cell.distill_seed))

    def score(self, cell: Cell, config: dict[str, Any], made: Made) -> results.Record:
        """Train on a set, score it on the test patches, and describe both in a record."""
        key = results.key_of(config)
        name = cell.method if cell.ipc is None else f"{cell.method} {cell.ipc} per class"
        seeds = [f"seed {s}" for s in (cell.distill_seed, cell.eval_seed) if s is not None]
        title = f"training {cell.arch} on {name}, {' / '.join(seeds)}"
        with self.progress.task(title, 1) as task, own_random(key):

            def on_epoch(done: int, total: int, loss: float) -> None:
                task.total = total
                task.advance(done - task.done, loss=loss)

            score = evaluate(
                made.patches,
                self.dataset.test,
                arch=cell.arch,
                width=cell.width,
                recipe=self.recipe,
                preprocessing=self.preprocessing,
                seed=cell.eval_seed,
                device=self.device,
                on_epoch=on_epoch,
                checkpoint=self.request.out / WORK / f"evaluation-{key[:32]}.pt",
            )
        return {
            "key": key,
            "dataset": self.request.dataset,
            "method": cell.method,
            "ipc": cell.ipc,
            "arch": cell.arch,
            "distill_seed": cell.distill_seed,
            "eval_seed": cell.eval_seed,
            "config": config,
            "metrics": dict(score.metrics),
            "storage": self.storage(made),
            "seconds": made.seconds,
            "stain": self.stain.describe(),
            "set": made.name,
            "data": self.data_facts,
            "environment": self.environment,
            "predictions": {
                "probabilities": results.pack(score.probabilities.numpy().astype(np.float16)),
                "labels": results.pack(self.dataset.test.labels.numpy().astype(np.int16)),
                "groups": results.pack(self.dataset.test.groups.numpy().astype(np.int32)),
            },
        }

    def storage(self, made: Made) -> dict[str, object]:
        """What a set weighs; measured once per set."""
        name = made.name or "full"
        if name not in self._storage:
            self._storage[name] = storage(made.patches)
        return self._storage[name]

    @cached_property
    def _storage(self) -> dict[str, dict[str, object]]:
        return {}

    @cached_property
    def data_facts(self) -> dict[str, Any]:
        """What a reader must know about the data behind a record."""
        train, test = self.dataset.train, self.dataset.test
        return {
            "classes": list(train.classes),
            "train_patches": len(train),
            "test_patches": len(test),
            "train_groups": len(train.groups.unique()),
            "test_groups": len(test.groups.unique()),
            "procedural": self.dataset.procedural,
            "notes": list(self.dataset.notes),
        }

    @cached_property
    def environment(self) -> dict[str, Any]:
        """Where a record was computed."""
        return environment.describe(self.device)


def run(experiment: Experiment, todo: Sequence[Cell]) -> int:
    """Compute every cell of ``todo`` that has no record yet; returns how many were computed now.

    Records that another version wrote, or that are damaged, are named and computed again.
    """
    out, progress = experiment.request.out, experiment.progress
    records, ignored = results.read_records(out)
    for line in ignored:
        progress.log(line)
    for path in results.leftovers(out):
        path.unlink(missing_ok=True)
    finished = {r["key"] for r in records}
    keys = {cell: results.key_of(experiment.cell_config(cell)) for cell in todo}
    missing = [cell for cell in todo if keys[cell] not in finished]
    if len(missing) < len(todo):
        progress.log(
            f"{experiment.request.dataset}: {len(todo) - len(missing)} of {len(todo)} cells are finished already"
        )
    request = experiment.request
    with progress.task(f"{request.dataset}: cells", len(todo), done=len(todo) - len(missing)) as task:
        if request.workers > 1 and len(missing) > 1 and experiment.device.type == "cpu":
            work = pieces(missing, experiment.pool_recipe.networks)
            run_parallel(request, work, request.workers, progress, lambda: task.advance())
        else:
            for cell in missing:
                results.write_record(out, experiment.cell(cell))
                task.advance()
    return len(missing)


def _has(cls: type[Any], name: str) -> bool:
    return name in {f.name for f in dataclasses.fields(cls)}


def _json(value: Any) -> Any:
    """A value as JSON would give it back: tuples as lists."""
    if isinstance(value, dict):
        return {k: _json(v) for k, v in value.items()}
    return [_json(v) for v in value] if isinstance(value, list | tuple) else value
