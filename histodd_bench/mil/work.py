"""What Tables 4 and 5 share in running: where jobs run, per-slide sets, the plan of a table, and the cells without a record."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from histodd_bench import results
from histodd_bench.engines import Engine
from histodd_bench.errors import HistoddError
from histodd_bench.experiment import Experiment
from histodd_bench.methods import method_entry
from histodd_bench.progress import Progress
from histodd_bench.request import Request
from histodd_bench.slides_cli import engine_device, workers_of
from histodd_bench.slides_distill import SlideDistiller, SlideJob
from histodd_bench.slides_run import distill_slides
from histodd_bench.tables.slide_level import SlideTable

Opener = Callable[[str], Callable[[Any], None]]


def engines(request: Request, experiment: Experiment) -> tuple[Engine, Engine]:
    """The engine of this machine, which trains, and the one that distils slides."""
    options, workers, device = request.slides, workers_of(request), engine_device(experiment)
    folder = request.out / "work"
    return (
        Engine("local", workers, device, folder),
        Engine(options.engine, workers, device, folder, options.engine_options),
    )


def budgeted(request: Request) -> list[str]:
    """The methods that make sets, in the order they were named: all but the whole training set."""
    return [m for m in request.methods if not method_entry(m).whole]


def check(failures: Mapping[Any, str], describe: Callable[[Any], str]) -> None:
    """Raise what went wrong with the first of several jobs: a table of what is left would not say what it claims."""
    if failures:
        job, why = next(iter(failures.items()))
        more = f" ({len(failures)} in all)" if len(failures) > 1 else ""
        raise HistoddError(f"{describe(job)}{more}: {why}")


def make_sets(
    distiller: SlideDistiller, ipcs: Sequence[int], seeds: Sequence[int], engine: Engine, progress: Progress
) -> None:
    """Every per-slide set that is missing.

    Raises:
        HistoddError: a slide failed twice.
    """
    if distiller.name == "histodd":
        failures = distill_slides(distiller, ipcs, seeds, engine, progress)
        check(failures, lambda job: f"slide {job.slide} could not be distilled")
        return
    jobs = [SlideJob(name, ipc, seed) for seed in seeds for ipc in ipcs for name in distiller.slides]
    missing = [job for job in jobs if not distiller.finished(job)]
    distiller.prepare(missing)
    for job in missing:  # selecting takes milliseconds: not worth a worker
        distiller.make(job)


def plan_cells(current: Any, todo: Sequence[Any], table: SlideTable, request: Request) -> None:
    """Remember what was asked of the table: budgets and methods, its records, and where they stand in it."""
    places = {results.key_of(current.cell_config(cell)): [list(current.place(cell))] for cell in todo}
    asked = {"ipc": request.ipc, "methods": request.methods, "cells": places}
    results.write_plan(request.out, table.name, {request.dataset: asked})


def run_cells(
    current: Any, todo: Sequence[Any], engine: Engine, opener: Opener, request: Request, progress: Progress
) -> None:
    """Compute the cells without a record on an engine of this machine.

    Raises:
        HistoddError: cells that failed; all others are done.
    """
    finished = results.finished_keys(request.out, progress.log)
    missing = [cell for cell in todo if results.key_of(current.cell_config(cell)) not in finished]
    if not missing:
        progress.log(f"{request.dataset}: all {len(todo)} cells are finished already")
        return
    current.prepare(missing)  # features, before workers would each extract them
    with progress.task(f"{request.dataset}: cells", len(todo), done=len(todo) - len(missing)) as task:
        failures = engine.run(opener, missing, task.advance)
    check(failures, lambda cell: f"{cell.arch} on {cell.method}")
