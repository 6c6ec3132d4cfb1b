"""Running Table 4: slides distilled one by one, their features, then one slide-level model per cell."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from histodd_bench import results
from histodd_bench.data.centres import open_experiment
from histodd_bench.engines import Engine
from histodd_bench.errors import HistoddError
from histodd_bench.methods import method_entry
from histodd_bench.mil.experiment import SlideExperiment, SlideOptions, model_names
from histodd_bench.progress import Progress
from histodd_bench.request import Cell, Request
from histodd_bench.slides_cli import engine_device, workers_of
from histodd_bench.slides_distill import SlideDistiller, SlideJob, distill_slides
from histodd_bench.tables.slide_level import SlideTable

# Seeds where the command line names none: a slide-level table distils every slide once per seed and budget.
SEEDS: dict[str, tuple[int, int]] = {"quick": (1, 2)}


def run(args: argparse.Namespace, table: SlideTable, requests: Sequence[Request], progress: Progress) -> None:
    """Compute the table, or what is missing of it."""
    options = SlideOptions(
        model_names(args.mil, table.models), args.encoder, args.encoder_weights, args.engine, dict(args.engine_options)
    )
    for request in requests:
        run_one(slide_request(request, args), options, table, progress)


def slide_request(request: Request, args: argparse.Namespace) -> Request:
    """The request with the seeds and threads of slide-level work: one thread per worker."""
    seeds, eval_seeds = SEEDS.get(request.preset.name, (request.seeds, request.eval_seeds))
    return replace(
        request,
        seeds=args.seeds or seeds,
        eval_seeds=args.eval_seeds or eval_seeds,
        threads=args.threads or 1,
        archs=request.archs,
    )


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


def run_one(request: Request, options: SlideOptions, table: SlideTable, progress: Progress) -> int:
    """One data set; returns how many cells were computed now."""
    experiment = open_experiment(request, progress)
    current = SlideExperiment(experiment, options)
    progress.log(experiment.budget())
    engine = Engine(
        options.engine, workers_of(request), engine_device(experiment), request.out / "work", options.engine_options
    )
    for method in (m for m in request.methods if not method_entry(m).whole):
        make_sets(current.distiller(method), request.ipc, range(request.seeds), engine, progress)
    todo = table_cells(request, options.models)
    local = Engine("local", workers_of(request), engine_device(experiment), request.out / "work")
    return run_cells(current, todo, local, partial(_open, request, options), request, progress)


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
) -> int:
    """Compute the cells without a record on an engine of this machine; returns how many there were."""
    records, ignored = results.read_records(request.out)
    for line in ignored:
        progress.log(line)
    for path in results.leftovers(request.out):
        path.unlink(missing_ok=True)
    finished = {r["key"] for r in records}
    missing = [cell for cell in todo if results.key_of(current.cell_config(cell)) not in finished]
    if not missing:
        progress.log(f"{request.dataset}: all {len(todo)} cells are finished already")
        return 0
    current.prepare(missing)  # features, before workers would each extract them
    with progress.task(f"{request.dataset}: cells", len(todo), done=len(todo) - len(missing)) as task:
        failures = engine.run(opener, missing, task.advance)
    if failures:
        cell, why = next(iter(failures.items()))
        raise HistoddError(f"{cell.arch} on {cell.method} ({len(failures)} cells in all): {why}")
    return len(missing)


def _open(request: Request, options: SlideOptions, device: str) -> Callable[[Cell], None]:
    """What a worker does first."""
    current = SlideExperiment(open_experiment(replace(request, device=device), Progress.silent()), options)

    def compute(cell: Cell) -> None:
        results.write_record(request.out, current.cell(cell))

    return compute
