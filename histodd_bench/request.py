"""What is asked of one data set, and the cells that follow from it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from histodd_bench.errors import UsageError
from histodd_bench.methods import all_methods, method_entry
from histodd_bench.models import PRETRAINED, model_entry
from histodd_bench.presets import Preset
from histodd_bench.tables.declaration import Column

Changes = tuple[tuple[str, str, Any], ...]  # (section, field, value): what a column of a table fixes


@dataclass(frozen=True)
class SlideOptions:
    """What is asked at slide level.

    Attributes:
        models: keys of MIL_MODELS.
        encoder, weights: see :func:`histodd_bench.mil.features.make_encoder`.
        engine, engine_options: where slides are distilled.
        workers: how many processes, where the command line says; None: one per GPU or core.
    """

    models: tuple[str, ...] = ()
    encoder: str = "auto"
    weights: str | None = None
    engine: str = "local"
    engine_options: Mapping[str, str] = field(default_factory=dict)
    workers: int | None = None


@dataclass(frozen=True)
class Request:
    """What is asked of one data set; every name in it has been checked.

    Attributes:
        methods, ipc, archs: what to compare; networks as (name, width or None).
        seeds, eval_seeds: counts; seeds run from 0.
        overrides: fields set on the command line, by section.
        columns: the columns of a table that are asked for; by default one for each method.
        slides: what a slide-level table asks beyond that.
        out: folder of results; cache: folder of data and networks shared between runs.
    """

    dataset: str
    preset: Preset
    methods: tuple[str, ...]
    ipc: tuple[int, ...]
    archs: tuple[tuple[str, int | None], ...]
    distill_arch: tuple[str, int | None]
    seeds: int
    eval_seeds: int
    image_size: int
    stain: str
    threads: int
    device: str
    out: Path
    cache: Path
    data_root: Path | None = None
    split_seed: int = 0
    workers: int = 1
    overrides: dict[str, dict[str, Any]] = field(default_factory=dict)
    columns: tuple[Column, ...] = ()
    slides: SlideOptions = field(default_factory=SlideOptions)

    def __post_init__(self) -> None:
        for name, width in (*self.archs, self.distill_arch):
            least = model_entry(name).min_size
            if self.image_size < least:
                raise UsageError(
                    f"patches of {self.image_size} px are too small for {name}: it needs at least {least} px; raise --image-size"
                )
            if name in PRETRAINED:  # said before anything is computed
                from histodd_bench.models.imagenet import weights_file

                weights_file(name)
            if width is not None and width < 1:
                raise UsageError(f"the width of {name} must be at least 1, got {width}")


@dataclass(frozen=True)
class Cell:
    """One training on one set: the unit of work, and of a record."""

    method: str
    ipc: int | None
    arch: str
    width: int | None
    distill_seed: int | None
    eval_seed: int
    changes: Changes = ()


@dataclass(frozen=True)
class MakeSet:
    """A set to be made, without training on it."""

    method: str
    ipc: int | None
    seed: int | None
    changes: Changes = ()


def changes_of(column: Column) -> Changes:
    """What a column fixes, in a form that can be part of a cell."""
    return tuple(
        (s, name, value) for s, fields in sorted(column.fields.items()) for name, value in sorted(fields.items())
    )


def columns_of(request: Request) -> list[Column]:
    """The columns asked for: the table's of these methods, then one for every other method."""
    known = all_methods()
    declared = [c for c in request.columns if c.method in request.methods]
    named = {c.method for c in declared}
    return declared + [Column(known[m].title, m) for m in request.methods if m not in named]


def cells(request: Request) -> list[Cell]:
    """Every cell, ordered so that the table fills evenly: all methods with the first seed, then the next seed.

    The whole training set has neither images per class nor distillation seeds; it is trained once per evaluation seed.
    """
    ordered: dict[Cell, None] = {}
    budgeted: list[tuple[str, Changes]] = []
    whole: list[tuple[str, Changes]] = []
    for column in columns_of(request):
        kind = whole if method_entry(column.method).whole else budgeted
        kind.append((column.method, changes_of(column)))
    for seed in range(max(request.seeds, request.eval_seeds)):
        for ipc in request.ipc if seed < request.seeds else ():
            for method, changes in budgeted:
                for arch, width in request.archs:
                    for e in range(request.eval_seeds):
                        ordered[Cell(method, ipc, arch, width, seed, e, changes)] = None
        for method, changes in whole if seed < request.eval_seeds else ():
            for arch, width in request.archs:
                ordered[Cell(method, None, arch, width, None, seed, changes)] = None
    return list(ordered)
