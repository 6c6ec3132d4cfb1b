"""One data set under one request: data -> sets (made once) -> evaluations -> one record per cell."""

import dataclasses
import shutil
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from histodd_bench import environment, presets, results, sets
from histodd_bench.contact_sheet import contact_sheet
from histodd_bench.data import PatchSet, load_dataset
from histodd_bench.data.parts import part_of, split_name
from histodd_bench.environment import configure, own_random
from histodd_bench.errors import HistoddError
from histodd_bench.evaluate import evaluate, storage
from histodd_bench.files import digest, plain
from histodd_bench.memory import peak_memory
from histodd_bench.methods import MethodEntry, method_entry
from histodd_bench.models import ModelPool, PoolRecipe
from histodd_bench.progress import Progress
from histodd_bench.request import Cell, Changes, Request
from histodd_bench.stain import Preprocessing, describe
from histodd_bench.stain_policy import StainPolicy, resolve_stain
from histodd_bench.stain_pre import normalised
from histodd_bench.stopwatch import stopwatch
from histodd_bench.tables.declaration import Times
from histodd_bench.training import EvalRecipe, TrainRecipe
from histodd_bench.wording import counted

SETS, WORK, SHEETS = "sets", "work", "sheets"


@dataclass(frozen=True)
class Made:
    """A set ready to be evaluated: its patches, its folder's name (None for the whole training set), what it took."""

    patches: PatchSet
    name: str | None
    seconds: dict[str, float]
    peak_bytes: int | None = None


class Experiment:
    """One data set under one request: data, pool of networks, stain policy, and the cells computed from them."""

    def __init__(self, request: Request, progress: Progress) -> None:
        self.request, self.progress = request, progress
        self.processes = request.workers  # that compute at once, as records say; who computes alone sets 1
        self.device = configure(request.device, request.threads)
        name, part = split_name(request.dataset)
        self.dataset = load_dataset(
            name,
            root=request.data_root,
            image_size=request.image_size,
            seed=request.split_seed,
            cache=request.cache / "data",
            workers=request.workers,
            progress=progress,
        )
        if part is not None:
            self.dataset = part_of(self.dataset, part)
        for note in self.dataset.notes:
            progress.log(f"{request.dataset}: {note}")
        train = self.dataset.train
        budgeted = [m for m in request.methods if not method_entry(m).whole]
        train.require(max(request.ipc, default=1) if budgeted else 1)
        if len(self.dataset.test) == 0:
            raise HistoddError(f"{request.dataset} has no test patches: add some to score on, or change the split")
        self._methods: dict[tuple[Any, ...], Any] = {}
        self._normalised: tuple[PatchSet, Preprocessing] | None = None

    # ---- what follows from the request -----------------------------------------------------------------------------

    @cached_property
    def stain(self) -> StainPolicy:
        """Whether stains are normalised in training and at test: the same for every method, from training data only."""
        return resolve_stain(self)

    @cached_property
    def recipe(self) -> EvalRecipe:
        """The evaluation recipe, stain policy included; a field set on the command line wins over the policy."""
        return self.recipe_of(())

    def recipe_of(self, changes: Changes) -> EvalRecipe:
        """:attr:`recipe` with what a column fixes."""
        policy = {"stain_train": self.stain.train, "stain_test": self.stain.test}
        layers = (self.request.preset.eval, policy, self.request.overrides.get("eval", {}))
        return _changed(presets.build(EvalRecipe, *layers), "eval", changes)

    @cached_property
    def pool_recipe(self) -> PoolRecipe:
        """Which networks distillation matches, and how they are pre-trained."""
        return self.pool_recipe_of(())

    def pool_recipe_of(self, changes: Changes) -> PoolRecipe:
        """:attr:`pool_recipe` with what a column fixes."""
        arch, width = self.request.distill_arch
        fixed = {"arch": arch, "width": width, "image_size": self.request.image_size}
        policy = {"stain_train": self.stain.train, "stain_test": self.stain.test}
        layers = (fixed, policy, self.request.preset.pool, self.request.overrides.get("pool", {}))
        return _changed(presets.build(PoolRecipe, *layers), "pool", changes)

    @cached_property
    def preprocessing(self) -> Preprocessing:
        """Channel statistics and stain template of the training set, for every network; stored with sets made from slides."""
        return self.dataset.preprocessing or describe(self.dataset.train)

    def training_data(self, changes: Changes = ()) -> tuple[PatchSet, Preprocessing]:
        """Training patches and their description: as loaded, or stain-normalised beforehand where a column asks for it."""
        if ("data", "stain_pre", True) not in changes:
            return self.dataset.train, self.preprocessing
        if self._normalised is None:
            train = normalised(
                self.dataset.train,
                self.preprocessing.template,
                cache=self.request.cache / "data",
                progress=self.progress,
            )
            now = describe(train)
            template = {"template": self.preprocessing.template, "template_index": self.preprocessing.template_index}
            self._normalised = train, dataclasses.replace(now, **template)  # type: ignore[arg-type]
        return self._normalised

    def pool(self, changes: Changes = ()) -> ModelPool:
        """The pre-trained networks; trained on first use, cached. A new one counts the seconds behind its networks anew."""
        train, preprocessing = self.training_data(changes)
        return ModelPool(
            train,
            self.pool_recipe_of(changes),
            cache=self.request.cache / "pools",
            device=self.device,
            progress=self.progress,
            preprocessing=preprocessing,
        )

    def method(self, name: str, ipc: int | None, changes: Changes = ()) -> Any:
        """A method with the fields of preset, stain policy, command line and column."""
        own = tuple(c for c in changes if c[0] == name)
        if (name, ipc, *own) not in self._methods:
            entry, request = method_entry(name), self.request
            policy = {"stain_probability": self.stain.train} if _has(entry.cls, "stain_probability") else {}
            layers = (
                policy,
                request.preset.method_fields(name, ipc, split_name(request.dataset)[0]),
                request.overrides.get(name, {}),
            )
            self._methods[name, ipc, *own] = _changed(presets.build(entry.cls, *layers), name, own)
        return self._methods[name, ipc, *own]

    def budget(self) -> str:
        """One line: what is trained for how long."""

        def length(recipe: TrainRecipe) -> str:
            return counted(recipe.epochs, "epoch") if recipe.epochs is not None else counted(recipe.steps or 0, "step")

        networks = f"pool of {counted(self.pool_recipe.networks, 'network')}, {length(self.pool_recipe)} each"
        stain = f"stain normalisation {self.stain.train:g} in training, {'on' if self.stain.test else 'off'} at test"
        least = f", at least {self.recipe.min_steps} steps" if self.recipe.min_steps and self.recipe.epochs else ""
        return f"{networks}; evaluation {length(self.recipe)}{least}; {stain} ({self.stain.chosen})"

    # ---- configurations: everything a result depends on --------------------------------------------------------------

    def _shared(self, changes: Changes = ()) -> dict[str, Any]:
        data = {
            "name": self.request.dataset,
            "train": self.training_data(changes)[0].fingerprint(),
            "image_size": self.request.image_size,
            "split_seed": self.request.split_seed,
            **{name: value for section, name, value in changes if section == "data"},
        }
        return {"data": data, "threads": self.request.threads, "device": self.device.type}

    def set_config(self, name: str, ipc: int | None, seed: int | None, changes: Changes = ()) -> dict[str, Any]:
        """What the set of a method depends on."""
        entry = method_entry(name)
        made = {
            "method": name,
            "version": getattr(sys.modules[entry.cls.__module__], "VERSION", 1),
            "fields": plain(dataclasses.asdict(self.method(name, ipc, changes))),
            "ipc": ipc,
            "seed": seed,
            "pool": plain(dataclasses.asdict(self.pool_recipe_of(changes))) if entry.pooled else None,
        }
        return {**self._shared(changes), "set": made}

    def set_key(self, cell: Cell) -> str:
        """The same for cells that share a set: they are computed by one process."""
        return digest(self.set_config(cell.method, cell.ipc, cell.distill_seed, cell.changes))

    def evaluation_config(self, cell: Cell, made: dict[str, Any]) -> dict[str, Any]:
        """What a record of a set depends on, given what the set depends on."""
        config = self._shared(cell.changes)
        config["data"]["test"] = self.dataset.test.fingerprint()
        config["set"] = made
        recipe = plain(dataclasses.asdict(self.recipe_of(cell.changes)))
        config["eval"] = {"arch": cell.arch, "width": cell.width, "seed": cell.eval_seed, **recipe}
        return config

    def cell_config(self, cell: Cell) -> dict[str, Any]:
        """What the record of a cell depends on."""
        made = self.set_config(cell.method, cell.ipc, cell.distill_seed, cell.changes)
        return self.evaluation_config(cell, made["set"])

    # ---- work --------------------------------------------------------------------------------------------------------

    def make(self, name: str, ipc: int | None, seed: int | None, changes: Changes = ()) -> Made:
        """The set of a method, made now or read from where an earlier run saved it."""
        entry = method_entry(name)
        if entry.whole:
            return Made(self.training_data(changes)[0], None, {})
        assert ipc is not None and seed is not None
        config = self.set_config(name, ipc, seed, changes)
        title, folder = self._folder(config)
        workdir = self.request.out / WORK / title
        saved = self._saved(folder, digest(config))
        if saved is None:
            saved = self._make(entry, config, changes, folder, workdir)
        shutil.rmtree(workdir, ignore_errors=True)
        sheet = self.request.out / SHEETS / f"{title}.png"
        if not sheet.exists():
            contact_sheet(saved.patches, sheet, before=saved.initial if entry.synthetic else None)
        return Made(saved.patches, title, saved.seconds, saved.card.get("peak_memory_bytes"))

    def finished(self, name: str, ipc: int, seed: int) -> bool:
        """Whether the set of a method is saved already, whole and made from this configuration."""
        config = self.set_config(name, ipc, seed)
        return self._saved(self._folder(config)[1], digest(config)) is not None

    def _folder(self, config: dict[str, Any]) -> tuple[str, Path]:
        """Name and folder of a set."""
        made = config["set"]
        title = f"{self.request.dataset}-{made['method']}-ipc{made['ipc']}-s{made['seed']}-{digest(config)[:12]}"
        return title, self.request.out / SETS / title

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
        self, entry: MethodEntry, config: dict[str, Any], changes: Changes, folder: Path, workdir: Path
    ) -> sets.SavedSet:
        name, ipc, seed = (config["set"][part] for part in ("method", "ipc", "seed"))
        key = digest(config)
        method, (train, preprocessing) = self.method(name, ipc, changes), self.training_data(changes)
        pool = self.pool(changes)
        if entry.synthetic:  # a pool shared by all sets: trained before the clock starts
            pool.prepare()
        with (
            peak_memory(self.device) as peak,
            stopwatch(workdir, lambda: pool.spent.here) as seconds,
            own_random(key),
        ):
            made = method(train, ipc, pool, seed, device=self.device, workdir=workdir, progress=self.progress)
        if made.classes != train.classes or made.class_counts() != [ipc] * train.num_classes:
            raise HistoddError(
                f"method {name!r} returned {made.class_counts()} patches per class instead of {ipc} each"
            )
        made = dataclasses.replace(made, images=made.images.cpu(), labels=made.labels.cpu(), groups=made.groups.cpu())
        card = {
            "dataset": self.request.dataset,
            "procedural": self.dataset.procedural,
            "source": {"patches": len(train), "slides": len(train.groups.unique())},
            "method": name,
            "ipc": ipc,
            "seed": seed,
            "key": key,
            "config": config,
            "stain": self.stain.describe(),
            "preprocessing": plain(dataclasses.asdict(preprocessing)),
            "seconds": {"method": seconds[0], "networks": pool.spent.total, "total": seconds[0] + pool.spent.total},
            "peak_memory_bytes": peak[0],
        }
        return sets.save(made, folder, results.finite(card), workdir=workdir)

    def cell(self, cell: Cell) -> results.Record:
        """Compute one cell."""
        made = self.make(cell.method, cell.ipc, cell.distill_seed, cell.changes)
        return self.score(cell, self.cell_config(cell), made)

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
                recipe=self.recipe_of(cell.changes),
                preprocessing=self.training_data(cell.changes)[1],
                seed=cell.eval_seed,
                device=self.device,
                on_epoch=on_epoch,
                checkpoint=self.request.out / WORK / f"evaluation-{key[:32]}.pt",
            )
        return results.make_record(
            cell,
            self.request.dataset,
            config,
            metrics=dict(score.metrics),
            storage=self.storage(made),
            seconds={**made.seconds, **score.seconds},
            memory={"making": made.peak_bytes, "training": score.peak_bytes},
            stain=self.stain.describe(),
            set=made.name,
            data=self.data_facts,
            environment=self.environment,
            probabilities=score.probabilities.numpy().astype(np.float16),
            labels=self.dataset.test.labels.numpy(),
            groups=self.dataset.test.groups.numpy(),
        )

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
            "folder": None if self.request.data_root is None else self.request.data_root.resolve().name,
            "notes": list(self.dataset.notes),
        }

    @cached_property
    def environment(self) -> dict[str, Any]:
        """Where a record was computed."""
        return {**environment.describe(self.device), "workers": self.processes}


def _changed(built: Any, section: str, changes: Changes) -> Any:
    """A dataclass with what a column fixes in its section; relative values follow from those it has."""
    fields = {name: value for where, name, value in changes if where == section}
    now = {name: v.of(getattr(built, name)) if isinstance(v, Times) else v for name, v in fields.items()}
    return dataclasses.replace(built, **now) if now else built


def _has(cls: type[Any], name: str) -> bool:
    return name in {f.name for f in dataclasses.fields(cls)}
