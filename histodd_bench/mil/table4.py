"""Running Table 4: slides distilled one by one, their features, then one slide-level model per cell."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from histodd_bench import results
from histodd_bench.data.centres import open_experiment
from histodd_bench.engines import Engine
from histodd_bench.errors import HistoddError
from histodd_bench.methods import method_entry
from histodd_bench.mil.experiment import SlideExperiment
from histodd_bench.progress import Progress
from histodd_bench.request import Cell, Request
from histodd_bench.slides_cli import engine_device, workers_of
from histodd_bench.slides_distill import SlideDistiller, SlideJob, distill_slides
from histodd_bench.tables.slide_level import SlideTable


def table_cells(request: Request, models: Sequence[str]) -> list[Cell]:
    """Every cell, seed by seed, so that the table fills evenly."""
    cells = []
    for seed in range(request.seeds):
        for ipc in request.ipc:
            for method in (m for m in request.methods if not method_entry(m).whole):
                for e in range(request.eval_seeds):
                    cells += [Cell(method, ipc, model, None, seed, e) for model in models]
    for method in (m for m in request.methods if method_entry(m).whole):
        cells += [Cell(method, None, model, None, None, e) for e in range(request.eval_seeds) for model in models]
    return cells


def run(request: Request, table: SlideTable, progress: Progress) -> None:
    """Compute the table for one data set, or what is missing of it."""
    options = request.slides
    experiment = open_experiment(request, progress)
    current = SlideExperiment(experiment, options)
    progress.log(experiment.budget())
    engine = Engine(
        options.engine, workers_of(request), engine_device(experiment), request.out / "work", options.engine_options
    )
    for method in (m for m in request.methods if not method_entry(m).whole):
        make_sets(current.distiller(method), request.ipc, range(request.seeds), engine, progress)
    todo = table_cells(request, options.models)
    plan_cells(current, todo, table, request)
    local = Engine("local", workers_of(request), engine_device(experiment), request.out / "work")
    run_cells(current, todo, local, partial(_open, request), request, progress)


def plan_cells(current: Any, todo: Sequence[Any], table: SlideTable, request: Request) -> None:
    """Remember which records the table asked for, and where they stand in it."""
    places = {results.key_of(current.cell_config(cell)): [list(current.place(cell))] for cell in todo}
    results.write_plan(request.out, table.name, {request.dataset: {"cells": places}})


def make_sets(
    distiller: SlideDistiller, ipcs: Sequence[int], seeds: Sequence[int], engine: Engine, progress: Progress
) -> None:
    """Every per-slide set that is missing.

    Raises:
        HistoddError: a slide failed twice: a table of incomplete bags would not say what it claims.
    """
    if distiller.name != "histodd":  # selecting takes milliseconds: not worth a worker
        jobs = [SlideJob(name, ipc, seed) for seed in seeds for ipc in ipcs for name in distiller.slides]
        distiller.prepare(jobs)
        for job in jobs:
            distiller.make(job)
        return
    failures = distill_slides(distiller, ipcs, seeds, engine, progress)
    if failures:
        job, why = next(iter(failures.items()))
        raise HistoddError(f"{len(failures)} slides could not be distilled, {job.slide} among them: {why}")


def run_cells(
    current: Any,
    todo: Sequence[Any],
    engine: Engine,
    opener: Callable[[str], Callable[[Any], None]],
    request: Request,
    progress: Progress,
) -> None:
    """Compute the cells without a record on an engine of this machine."""
    records, ignored = results.read_records(request.out)
    for line in ignored:
        progress.log(line)
    for path in results.leftovers(request.out):
        path.unlink(missing_ok=True)
    finished = {r["key"] for r in records}
    missing = [cell for cell in todo if results.key_of(current.cell_config(cell)) not in finished]
    if not missing:
        progress.log(f"{request.dataset}: all {len(todo)} cells are finished already")
        return
    current.prepare(missing)  # features, before workers would each extract them
    with progress.task(f"{request.dataset}: cells", len(todo), done=len(todo) - len(missing)) as task:
        failures = engine.run(opener, missing, task.advance)
    if failures:
        cell, why = next(iter(failures.items()))
        raise HistoddError(f"{cell.arch} on {cell.method} ({len(failures)} cells in all): {why}")


def _open(request: Request, device: str) -> Callable[[Cell], None]:
    """What a worker does first."""
    current = SlideExperiment(open_experiment(replace(request, device=device), Progress.silent()), request.slides)

    def compute(cell: Cell) -> None:
        results.write_record(request.out, current.cell(cell))

    return compute
