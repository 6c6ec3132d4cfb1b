"""Running Table 5: a model trained on the target centre's slides is fine-tuned with what the source centre shares.

Where the paper's text and the caption of its table disagree on what is trained first, the text is followed: the target centre has
a model of its own, fine-tunes it on the source centre's data (distilled patches, a coreset, or everything), and scores it on its own
test slides. The source distils with its own pool, stain policy and slides; it sees nothing of the target's.
"""

import copy
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import permutations
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from histodd_bench import presets, results
from histodd_bench.data.centres import centres_of, open_experiment
from histodd_bench.engines import Engine
from histodd_bench.environment import own_random
from histodd_bench.evaluate import compute_metrics
from histodd_bench.experiment import Experiment
from histodd_bench.files import digest, plain, read_state, save_state
from histodd_bench.methods import method_entry
from histodd_bench.mil import MIL_MODELS, build_mil
from histodd_bench.mil.experiment import SlideExperiment
from histodd_bench.mil.joint import JointTrainer, joint_bags
from histodd_bench.mil.training import MILTraining, TransferRecipe, score_mil, train_mil
from histodd_bench.mil.work import Opener, budgeted, check, engines, make_sets, plan_cells, run_cells
from histodd_bench.models import build
from histodd_bench.progress import Progress
from histodd_bench.request import Request, SlideOptions
from histodd_bench.tables.slide_level import SlideTable
from histodd_bench.training import Trainer, predict, require_finite

VERSION = 2  # raised when the same configuration would give other results
PATCH, SLIDE = "patch", "slide"
NOTHING: dict[str, Any] = {"count": 0, "raw_uint8_bytes": 0, "disk_bytes": 0, "estimated": False}


class TransferCell(NamedTuple):
    """One fine-tuning: the unit of work, and of a record. ``none``: no transfer, the target's own model."""

    level: str
    source: str
    target: str
    method: str
    ipc: int | None
    distill_seed: int | None
    eval_seed: int
    arch: str


class SetJob(NamedTuple):
    """One set of patches that a centre shares at patch level."""

    centre: str
    method: str
    ipc: int
    seed: int


@dataclass(frozen=True)
class Trained:
    """The target centre's own model at the end of its training."""

    model: Any
    epoch_seconds: list[float]


class Transfer:
    """Both centres of one data set, and what passes between them."""

    def __init__(self, request: Request, options: SlideOptions, progress: Progress) -> None:
        self.request, self.options, self.progress = request, options, progress
        self._experiments: dict[str, Experiment] = {}
        self._slides: dict[tuple[str, str], SlideExperiment] = {}
        self._weights: dict[tuple[Any, ...], tuple[dict[str, Any], dict[str, Any]]] = {}

    @cached_property
    def recipe(self) -> TransferRecipe:
        """How models are fine-tuned."""
        return presets.build(TransferRecipe, self.request.overrides.get("transfer", {}))

    def experiment(self, centre: str) -> Experiment:
        """The part of the data set that a centre holds."""
        if centre not in self._experiments:
            self._experiments[centre] = open_experiment(self.request, self.progress, centre)
        return self._experiments[centre]

    def slides(self, centre: str, seen_by: str) -> SlideExperiment:
        """A centre's slides, through the encoder of the centre ``seen_by``."""
        if (centre, seen_by) not in self._slides:
            encoder = None if centre == seen_by else self.slides(seen_by, seen_by).encoder
            self._slides[centre, seen_by] = SlideExperiment(self.experiment(centre), self.options, centre, encoder)
        return self._slides[centre, seen_by]

    # ---- configurations ------------------------------------------------------------------------------------------------

    def _trained_config(self, cell: TransferCell) -> dict[str, Any]:
        """What the target's own model depends on."""
        target = self.slides(cell.target, cell.target)
        config = target.base_config()
        config["level"], config["table"], config["target"] = "transfer", "table5", cell.target
        if cell.level == SLIDE:
            config["eval"] = target.eval_config(cell.arch, cell.eval_seed)
        else:
            width = self.request.archs[0][1]
            recipe = dataclasses.asdict(self.experiment(cell.target).recipe)
            config["eval"] = {"arch": cell.arch, "width": width, "seed": cell.eval_seed, "version": VERSION, **recipe}
        config["eval"]["at"] = cell.level
        return config

    def cell_config(self, cell: TransferCell) -> dict[str, Any]:
        """What the record of a cell depends on."""
        config: dict[str, Any] = self._trained_config(cell)
        config["source"] = cell.source
        config["set"] = {"method": "none"}
        config["transfer"] = {"version": VERSION, "epochs": self.recipe.epochs, "rehearsal": self.recipe.rehearsal}
        config["eval"]["fine_lr"] = self._rate(cell)
        source = self.experiment(cell.source)
        config["data"]["source"] = source.dataset.train.fingerprint()
        if cell.method != "none":
            if cell.level == SLIDE:
                made = self.slides(cell.source, cell.target).set_config(cell.method, cell.ipc, cell.distill_seed)
            else:
                made = source.set_config(cell.method, cell.ipc, cell.distill_seed)["set"]
            config["set"] = made
        config = plain(config)
        return config

    def _rate(self, cell: TransferCell) -> float:
        """The learning rate of fine-tuning."""
        if cell.level == PATCH:
            return self.recipe.rate(self.recipe.lr, self.experiment(cell.target).recipe.lr)
        trained = self.slides(cell.target, cell.target).recipe(cell.arch).lr
        return self.recipe.rate(self.recipe.slide_lr, MIL_MODELS[cell.arch].lr if trained is None else trained)

    # ---- work ------------------------------------------------------------------------------------------------------------

    def make_set(self, job: SetJob) -> None:
        """Make one set that a centre shares at patch level."""
        self.experiment(job.centre).make(job.method, job.ipc, job.seed)

    def prepare(self, cells: Sequence[TransferCell]) -> None:
        """Extract, in this process, every feature that the cells need."""
        for cell in cells:
            if cell.level == SLIDE:
                own = self.slides(cell.target, cell.target)
                _ = own.train, own.test
                if cell.method != "none":
                    self.slides(cell.source, cell.target).bags(cell.method, cell.ipc, cell.distill_seed)

    def trained(self, cell: TransferCell) -> Trained:
        """The target's own model, trained on first use and kept in the cache."""
        key = digest(plain({**self._trained_config(cell), "torch": torch.__version__}))
        path = self.request.cache / "transfer" / f"{key[:32]}.pt"
        experiment = self.experiment(cell.target)
        if cell.level == SLIDE:
            own = self.slides(cell.target, cell.target)
            recipe = own.recipe(cell.arch)
            model = build_mil(cell.arch, in_features=own.train.in_features, num_classes=len(own.train.classes),
                              seed=cell.eval_seed, width=recipe.width, dropout=recipe.dropout)  # fmt: skip
        else:
            size, width = self.request.image_size, self.request.archs[0][1]
            model = build(cell.arch, num_classes=experiment.dataset.train.num_classes, image_size=size, width=width,
                          generator_seed=cell.eval_seed)  # fmt: skip
        if not path.exists():
            with own_random(key):
                seconds = self._train(cell, model, experiment)
            save_state(path, {"model": model.state_dict(), "epoch_seconds": seconds})
        state = read_state(path)
        model.load_state_dict(state["model"])
        return Trained(model.to(experiment.device), state["epoch_seconds"])

    def _train(self, cell: TransferCell, model: nn.Module, experiment: Experiment) -> list[float]:
        if cell.level == SLIDE:
            own = self.slides(cell.target, cell.target)
            recipe = own.recipe(cell.arch)
            done = train_mil(cell.arch, own.train, recipe, cell.eval_seed, device=experiment.device, start=model)
            return done.epoch_seconds
        trainer = Trainer(model.to(experiment.device), experiment.dataset.train, experiment.recipe,
                          experiment.preprocessing, seed=cell.eval_seed, device=experiment.device)  # fmt: skip
        loss = 0.0
        while not trainer.done:
            loss = trainer.run_epoch()
        require_finite(torch.tensor(loss), cell.arch, experiment.recipe.lr)  # before it is kept
        return trainer.epoch_seconds

    def place(self, cell: TransferCell) -> tuple[str, str]:
        """Where a cell stands in the table: its direction and level."""
        return f"{cell.source} => {cell.target}", "Slides" if cell.level == SLIDE else "Patches"

    def cell(self, cell: TransferCell) -> results.Record:
        """Fine-tune the target's model with what the source shares, and score it on the target's test slides."""
        config = self.cell_config(cell)
        key = results.key_of(config)
        trained = self.trained(cell)
        with own_random(key):
            if cell.level == SLIDE:
                probabilities, labels, metrics = self._fine_tune_slides(cell, trained)
            else:
                probabilities, labels, metrics = self._fine_tune_patches(cell, trained)
        experiment = self.experiment(cell.target)
        groups = experiment.dataset.test.groups.numpy() if cell.level == PATCH else np.arange(len(labels))
        weight, seconds = self._weight(cell)
        return results.make_record(
            cell,
            self.request.dataset,
            config,
            metrics=metrics,
            storage=weight,
            seconds=seconds,
            stain=experiment.stain.describe(),
            set=None,
            data={**experiment.data_facts, **self.slides(cell.target, cell.target).slide_facts,
                  "source_patches": len(self.experiment(cell.source).dataset.train)},
            environment=experiment.environment,
            probabilities=probabilities.numpy().astype(np.float32),
            labels=labels.numpy(),
            groups=groups,
        )  # fmt: skip

    def _fine_tune_slides(self, cell: TransferCell, trained: Trained) -> tuple[Any, Any, dict[str, float]]:
        own = self.slides(cell.target, cell.target)
        parts = [own.train] if self.recipe.rehearsal else []
        if cell.method != "none":
            parts.append(self.slides(cell.source, cell.target).bags(cell.method, cell.ipc, cell.distill_seed))
        if not parts:
            done = MILTraining(trained.model.eval(), [], float("nan"))
        else:
            recipe = replace(own.recipe(cell.arch), lr=self._rate(cell))
            done = train_mil(cell.arch, joint_bags(parts), recipe, cell.eval_seed, device=self.experiment(cell.target).device,
                             start=trained.model, epochs=self.recipe.epochs)  # fmt: skip
        probabilities, metrics = score_mil(done, own.test, self.experiment(cell.target).device)
        return probabilities, own.test.labels, metrics | {"pretrain_seconds": sum(trained.epoch_seconds)}

    def _fine_tune_patches(self, cell: TransferCell, trained: Trained) -> tuple[Any, Any, dict[str, float]]:
        target = self.experiment(cell.target)
        model, seconds, loss = copy.deepcopy(trained.model), [], float("nan")
        parts = [target.dataset.train] if self.recipe.rehearsal else []
        if cell.method != "none":
            parts.append(self.experiment(cell.source).make(cell.method, cell.ipc, cell.distill_seed).patches)
        if parts:
            recipe = replace(target.recipe, epochs=self.recipe.epochs, steps=None, min_steps=0, lr=self._rate(cell))
            trainer = JointTrainer(
                model, parts, recipe, target.preprocessing, seed=cell.eval_seed, device=target.device
            )
            while not trainer.done:
                loss = trainer.run_epoch()
            seconds = trainer.epoch_seconds
        test = target.dataset.test
        logits = predict(model, test, target.preprocessing, stain=target.recipe.stain_test, device=target.device)
        rate = (self._rate(cell), "transfer.lr") if parts else (target.recipe.lr, "eval.lr")
        require_finite(logits, cell.arch, *rate)
        probabilities = logits.softmax(1)
        kept = seconds[1:] or seconds
        return (
            probabilities,
            test.labels,
            compute_metrics(probabilities, test.labels)
            | {
                "epoch_seconds": median(kept) if kept else float("nan"),
                "train_seconds": sum(seconds),
                "epochs": len(seconds),
                "final_loss": loss,
                "pretrain_seconds": sum(trained.epoch_seconds),
            },
        )

    def _weight(self, cell: TransferCell) -> tuple[dict[str, Any], dict[str, Any]]:
        """What the source shares weighs, and the seconds that making it took."""
        if cell.method == "none":
            return NOTHING, {}
        if cell.level == SLIDE:
            return self.slides(cell.source, cell.target).weight(cell.method, cell.ipc, cell.distill_seed)
        source = self.experiment(cell.source)
        made = source.make(cell.method, cell.ipc, cell.distill_seed)
        return dict(source.storage(made)), made.seconds


def transfer_cells(request: Request, options: SlideOptions, centres: Sequence[str]) -> list[TransferCell]:
    """Every cell: both levels, every ordered pair of centres; first those without transfer, which train the targets' models."""
    cells = []
    models = [(PATCH, arch) for arch, _ in request.archs[:1]] + [(SLIDE, m) for m in options.models]
    pairs = list(permutations(centres, 2))
    for e in range(request.eval_seeds):
        cells += [TransferCell(lv, s, t, "none", None, None, e, arch) for s, t in pairs for lv, arch in models]
    for e in range(request.eval_seeds):
        for method in request.methods:
            budgets: list[tuple[int | None, int | None]] = [(None, None)]
            if not method_entry(method).whole:
                budgets = [(ipc, seed) for seed in range(request.seeds) for ipc in request.ipc]
            for ipc, seed in budgets:
                cells += [TransferCell(lv, s, t, method, ipc, seed, e, arch) for s, t in pairs for lv, arch in models]
    return cells


def run(request: Request, table: SlideTable, progress: Progress) -> None:
    """Compute the table for one data set, or what is missing of it."""
    centres = centres_of(open_experiment(request, progress).dataset)
    current = Transfer(request, request.slides, progress)
    for centre in centres:
        progress.log(f"{centre}: {current.experiment(centre).budget()}")
    local, engine = engines(request, current.experiment(centres[0]))
    opener = partial(_open, request)
    _make_patch_sets(current, centres, local, opener)
    for centre in centres:
        for method in budgeted(request):
            distiller = current.slides(centre, centre).distiller(method)
            make_sets(distiller, request.ipc, range(request.seeds), engine, progress)
    todo = transfer_cells(request, request.slides, centres)
    plan_cells(current, todo, table, request)
    run_cells(current, [c for c in todo if c.method == "none"], local, opener, request, progress)
    run_cells(current, [c for c in todo if c.method != "none"], local, opener, request, progress)


def _make_patch_sets(current: Transfer, centres: Sequence[str], local: Engine, opener: Opener) -> None:
    """Every set that a centre shares at patch level and that is missing, the largest first."""
    request = current.request
    jobs = [
        SetJob(centre, method, ipc, seed)
        for seed in range(request.seeds) for ipc in sorted(request.ipc, reverse=True)
        for method in budgeted(request) for centre in centres
    ]  # fmt: skip
    missing = [job for job in jobs if not current.experiment(job.centre).finished(job.method, job.ipc, job.seed)]
    for centre in {job.centre: None for job in missing if method_entry(job.method).synthetic}:
        current.experiment(centre).pool().prepare()
    with current.progress.task(f"{request.dataset}: sets of patches", len(jobs), len(jobs) - len(missing)) as task:
        failures = local.run(opener, missing, task.advance)
    check(failures, lambda job: f"{job.method} {job.ipc} per class of {job.centre}")


def _open(request: Request, device: str) -> Callable[[Any], None]:
    """What a worker does first."""
    current = Transfer(replace(request, device=device), request.slides, Progress.silent())

    def work(job: TransferCell | SetJob) -> None:
        if isinstance(job, SetJob):
            current.make_set(job)
        else:
            results.write_record(request.out, current.cell(job))

    return work
