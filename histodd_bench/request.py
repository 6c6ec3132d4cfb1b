"""What is asked of one data set, and the cells that follow from it."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from histodd_bench.errors import UsageError
from histodd_bench.methods import method_entry
from histodd_bench.models import MODELS
from histodd_bench.presets import Preset


@dataclass(frozen=True)
class Request:
    """What is asked of one data set; every name in it has been checked.

    Attributes:
        methods, ipc, archs: what to compare; networks as (name, width or None).
        seeds, eval_seeds: counts; seeds run from 0.
        overrides: fields set on the command line, by section.
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

    def __post_init__(self) -> None:
        for name, width in (*self.archs, self.distill_arch):
            least = MODELS[name].min_size
            if self.image_size < least:
                raise UsageError(
                    f"patches of {self.image_size} px are too small for {name}: it needs at least {least} px; raise --image-size"
                )
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


def cells(request: Request) -> list[Cell]:
    """Every cell, ordered so that the table fills evenly: all methods with the first seed, then the next seed.

    The whole training set has neither images per class nor distillation seeds; it is trained once per evaluation seed.
    """
    ordered: list[Cell] = []
    budgeted = [m for m in request.methods if not method_entry(m).whole]
    whole = [m for m in request.methods if method_entry(m).whole]
    for seed in range(max(request.seeds, request.eval_seeds)):
        for ipc in request.ipc if seed < request.seeds else ():
            for method in budgeted:
                for arch, width in request.archs:
                    ordered += [Cell(method, ipc, arch, width, seed, e) for e in range(request.eval_seeds)]
        for method in whole if seed < request.eval_seeds else ():
            ordered += [Cell(method, None, arch, width, None, seed) for arch, width in request.archs]
    return ordered
