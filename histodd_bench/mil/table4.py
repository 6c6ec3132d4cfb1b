"""Running Table 4: slides distilled one by one, their features, then one slide-level model per cell."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from histodd_bench import results
from histodd_bench.data.centres import open_experiment
from histodd_bench.methods import method_entry
from histodd_bench.mil.experiment import SlideExperiment
from histodd_bench.mil.work import budgeted, engines, make_sets, plan_cells, run_cells
from histodd_bench.progress import Progress
from histodd_bench.request import Cell, Request
from histodd_bench.tables.slide_level import SlideTable


def table_cells(request: Request, models: Sequence[str]) -> list[Cell]:
    """Every cell, seed by seed, so that the table fills evenly."""
    cells = []
    for seed in range(request.seeds):
        for ipc in request.ipc:
            for method in budgeted(request):
                for e in range(request.eval_seeds):
                    cells += [Cell(method, ipc, model, None, seed, e) for model in models]
    for method in (m for m in request.methods if method_entry(m).whole):
        cells += [Cell(method, None, model, None, None, e) for e in range(request.eval_seeds) for model in models]
    return cells


def run(request: Request, table: SlideTable, progress: Progress) -> None:
    """Compute the table for one data set, or what is missing of it."""
    experiment = open_experiment(request, progress)
    current = SlideExperiment(experiment, request.slides)
    progress.log(experiment.budget())
    local, engine = engines(request, experiment)
    for method in budgeted(request):
        make_sets(current.distiller(method), request.ipc, range(request.seeds), engine, progress)
    todo = table_cells(request, request.slides.models)
    plan_cells(current, todo, table, request)
    run_cells(current, todo, local, partial(_open, request), request, progress)


def _open(request: Request, device: str) -> Callable[[Cell], None]:
    """What a worker does first."""
    current = SlideExperiment(open_experiment(replace(request, device=device), Progress.silent()), request.slides)

    def compute(cell: Cell) -> None:
        results.write_record(request.out, current.cell(cell))

    return compute
