"""Slide-level experiments: the slides of a data set, their sets, bags and features, and one record per trained model."""

import dataclasses
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

from histodd_bench import presets, results
from histodd_bench.data.patchset import PatchSet
from histodd_bench.environment import own_random
from histodd_bench.evaluate import storage
from histodd_bench.experiment import Experiment
from histodd_bench.methods import method_entry
from histodd_bench.mil import MIL_MODELS
from histodd_bench.mil.bags import Bags, make_bags, slide_labels
from histodd_bench.mil.features import Encoder, extract, make_encoder
from histodd_bench.mil.training import MILRecipe, MILTraining, score_mil, train_mil
from histodd_bench.request import Cell, SlideOptions
from histodd_bench.slides_distill import SlideDistiller

VERSION = 1  # raised when the same configuration would give other results

# Fields of MILRecipe by preset, then by model; what the command line sets with --set mil.field=value wins.
RECIPES: dict[str, dict[str, Any]] = {"quick": {"width": 128}, "standard": {}, "paper": {}}
MODEL_FIELDS: dict[str, dict[str, dict[str, Any]]] = {"quick": {"transmil": {"width": 64}}}


class SlideExperiment:
    """One data set at slide level.

    Args:
        experiment: data set (possibly of one centre), pool, stain policy.
        options: models and encoder.
        centre: see :class:`SlideDistiller`.
        encoder: instead of the one that the options name: a centre's slides are seen through the encoder of another.
    """

    def __init__(
        self, experiment: Experiment, options: SlideOptions, centre: str | None = None, encoder: Encoder | None = None
    ) -> None:
        self.experiment, self.options, self.centre = experiment, options, centre
        self.request, self.dataset, self.progress = experiment.request, experiment.dataset, experiment.progress
        self._encoder = encoder
        self._distillers: dict[str, SlideDistiller] = {}

    # ---- what follows from the request -----------------------------------------------------------------------------

    def recipe(self, model: str) -> MILRecipe:
        """How a model is trained: preset, then model, then command line."""
        name = self.request.preset.name
        layers = (
            RECIPES.get(name, {}),
            MODEL_FIELDS.get(name, {}).get(model, {}),
            self.request.overrides.get("mil", {}),
        )
        return presets.build(MILRecipe, *layers)

    @cached_property
    def encoder(self) -> Encoder:
        """The network behind all features; trained on first use where it is one that is trained here."""
        return self._encoder or make_encoder(
            self.options.encoder,
            self.options.weights,
            self.experiment.pool(),
            stain=self.experiment.stain.test,
            cache=self.request.cache / "pools",
            device=self.experiment.device,
            progress=self.progress,
        )

    def distiller(self, method: str) -> SlideDistiller:
        """Per-slide sets of a method."""
        if method not in self._distillers:
            self._distillers[method] = SlideDistiller(self.experiment, method, self.centre)
        return self._distillers[method]

    # ---- bags --------------------------------------------------------------------------------------------------------

    def _bags(self, patches: PatchSet, labels: dict[str, int], what: str) -> Bags:
        features = extract(
            self.encoder, patches, cache=self.request.cache / "features",
            device=self.experiment.device, progress=self.progress, what=what,
        )  # fmt: skip
        bags = make_bags(features, patches, labels)
        for name in bags.skipped:
            self.progress.log(f"slide {name} has no patches in {what}: left out")
        return bags

    @cached_property
    def train(self) -> Bags:
        """Every training slide with all its patches."""
        return self._bags(self.dataset.train, slide_labels(self.dataset.train), "the training slides")

    @cached_property
    def test(self) -> Bags:
        """Every test slide with all its patches."""
        return self._bags(self.dataset.test, slide_labels(self.dataset.test), "the test slides")

    def bags(self, method: str, ipc: int | None, seed: int | None) -> Bags:
        """Training bags of a method's sets; slide labels are those of the whole slides."""
        if method_entry(method).whole:
            return self.train
        assert ipc is not None and seed is not None
        patches, _ = self.distiller(method).load_all(ipc, seed)
        return self._bags(patches, slide_labels(self.dataset.train), f"{method} {ipc} per class, seed {seed}")

    def weight(self, method: str, ipc: int | None, seed: int | None) -> tuple[dict[str, Any], dict[str, Any]]:
        """What a method's sets weigh in all, and the seconds they took; measured once per set."""
        if (method, ipc, seed) not in self._weights:
            if method_entry(method).whole:
                self._weights[method, ipc, seed] = storage(self.dataset.train), {}
            else:
                assert ipc is not None and seed is not None
                patches, sets = self.distiller(method).load_all(ipc, seed)
                total, capped = sum(s.seconds for s in sets), sum(bool(s.capped) for s in sets)
                weight = {**storage(patches), "capped_slides": capped, "slides": len(sets)}
                self._weights[method, ipc, seed] = weight, {"method": total, "per_slide": total / len(sets)}
        return self._weights[method, ipc, seed]

    @cached_property
    def _weights(self) -> dict[tuple[str, int | None, int | None], tuple[dict[str, Any], dict[str, Any]]]:
        return {}

    def prepare(self, cells: Sequence[Cell]) -> None:
        """Extract, in this process, every feature that the cells need."""
        _ = self.train, self.test
        for method, ipc, seed in dict.fromkeys((c.method, c.ipc, c.distill_seed) for c in cells):
            self.bags(method, ipc, seed)

    # ---- records -----------------------------------------------------------------------------------------------------

    def base_config(self) -> dict[str, Any]:
        """Data, threads and device, as in every record."""
        shared = self.experiment.set_config("full", None, None)
        shared["data"]["test"] = self.dataset.test.fingerprint()
        shared["level"] = "slide"
        return shared

    def set_config(self, method: str, ipc: int | None, seed: int | None) -> dict[str, Any]:
        """What the bags of a method depend on."""
        if method_entry(method).whole:
            return self.experiment.set_config(method, None, None)["set"]
        assert ipc is not None and seed is not None
        return self.distiller(method).config(ipc, seed)["set"]

    def eval_config(self, model: str, seed: int) -> dict[str, Any]:
        """What the training of a model on given bags depends on."""
        entry, recipe = MIL_MODELS[model], self.recipe(model)
        common = {k: v for k, v in dataclasses.asdict(recipe).items() if k in ("epochs", "balanced", "cosine")}
        return {
            "arch": model,
            "width": recipe.width,
            "seed": seed,
            "version": VERSION,
            "encoder": {"title": self.encoder.title, "key": self.encoder.key},
            "model": {
                "optimizer": entry.optimizer,
                "lr": entry.lr if recipe.lr is None else recipe.lr,
                "weight_decay": entry.weight_decay if recipe.weight_decay is None else recipe.weight_decay,
                "betas": list(entry.betas),
                "dropout": recipe.dropout,
            },
            **common,
        }

    def cell_config(self, cell: Cell) -> dict[str, Any]:
        """What the record of a cell depends on."""
        config = self.base_config()
        config["set"] = self.set_config(cell.method, cell.ipc, cell.distill_seed)
        config["eval"] = self.eval_config(cell.arch, cell.eval_seed)
        return config

    def place(self, cell: Cell) -> tuple[str, str]:
        """Where a cell stands in the table: its row has no name of its own beyond method and images per class."""
        return "", MIL_MODELS[cell.arch].title

    def cell(self, cell: Cell) -> results.Record:
        """Train a model on a method's bags and score it on all patches of the test slides."""
        config = self.cell_config(cell)
        bags = self.bags(cell.method, cell.ipc, cell.distill_seed)
        with own_random(results.key_of(config)):
            training = train_mil(cell.arch, bags, self.recipe(cell.arch), cell.eval_seed, device=self.experiment.device)
        return self.record(cell, config, training, *self.weight(cell.method, cell.ipc, cell.distill_seed))

    def record(
        self, cell: Cell, config: dict[str, Any], training: MILTraining, weight: dict[str, Any], seconds: dict[str, Any]
    ) -> results.Record:
        """Score a trained model on the test slides and describe it."""
        probabilities, metrics = score_mil(training, self.test, self.experiment.device)
        record = results.make_record(
            cell,
            self.request.dataset,
            config,
            metrics=metrics,
            storage=weight,
            seconds=seconds,
            stain=self.experiment.stain.describe(),
            set=None,
            data={**self.experiment.data_facts, **self.slide_facts},
            environment=self.experiment.environment,
            probabilities=probabilities.numpy().astype(np.float32),
            labels=self.test.labels.numpy(),
            groups=np.arange(len(self.test)),
        )
        record["predictions"]["slides"] = list(self.test.names)
        return record

    @cached_property
    def slide_facts(self) -> dict[str, Any]:
        """What a reader must know about the slides behind a record."""
        sizes = [len(bag) for bag in self.train.features]
        return {
            "train_slides": self.train.class_counts(),
            "test_slides": self.test.class_counts(),
            "bag_sizes": [min(sizes), int(np.median(sizes)), max(sizes)] if sizes else [],
        }
