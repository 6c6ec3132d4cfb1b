"""Running a table of any kind: what ``run`` does for one table, after its options have become requests."""

import dataclasses
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from histodd_bench import placement, results, stain_plot
from histodd_bench.continual import TaskSequence, run_sequence
from histodd_bench.data import Dataset, load_dataset
from histodd_bench.errors import HistoddError
from histodd_bench.experiment import Experiment
from histodd_bench.grid import network
from histodd_bench.mil.requirements import obstacle
from histodd_bench.parallel import pieces, run_parallel
from histodd_bench.progress import Progress
from histodd_bench.projection import project
from histodd_bench.request import Cell, Request, cells
from histodd_bench.tables import SlideTable, Table
from histodd_bench.wording import counted

PARTS = 2  # stages that a single data set is cut into for a table of kind "sequence"


def run_table(table: Table, requests: Sequence[Request], out: Path, progress: Progress) -> None:
    """Compute what is missing of a table; finished cells, of this table or another one in ``out``, are not computed again."""
    if table.kind == "statistics":
        for request in requests:
            facts = statistics(_load(request, progress))
            results.write_plan(out, table.name, {request.dataset: {"facts": facts}})
    elif table.kind == "sequence":
        stages = sequence_requests(requests)
        sequence = TaskSequence([Experiment(r, progress) for r in stages])
        _announce(stages[0], progress, len(sequence.cells()), sequence.name)
        first = sequence.experiments[0]
        alone = placement.places(first)  # of the first data set's cells: their columns are those of the sequence
        places = {
            results.key_of(sequence.config(c, k)): [
                [sequence.row(k), alone[results.key_of(first.cell_config(c))][0][1]]
            ]
            for c, k in sequence.cells()
        }
        rows = [sequence.row(k + 1) for k in range(len(stages))]
        results.write_plan(out, table.name, {sequence.name: {**_asked(stages[0]), "rows": rows, "cells": places}})
        run_sequence(sequence)
    elif isinstance(table, SlideTable):
        runner = import_module(table.runner)
        for request in requests:
            found = obstacle(table, request, _load(request, progress))
            if found:
                raise HistoddError(f"{table.name}: {found}")
            runner.run(request, table, progress)
    else:
        for request in requests:
            current = Experiment(request, progress)  # refuses what the data cannot give: not planned then
            todo = cells(request)
            _announce(request, progress, len(todo), request.dataset)
            progress.log(current.budget())
            results.write_plan(
                out,
                table.name,
                {
                    request.dataset: {
                        **_asked(request),
                        "rows": placement.rows(current),
                        "cells": placement.places(current),
                    }
                },
            )
            stain_plot.write_fits(current)
            run_cells(current, todo)


def run_cells(experiment: Experiment, todo: Sequence[Cell]) -> int:
    """Compute every cell of ``todo`` that has no record yet, so that a killed run continues; returns how many were computed now.

    Records that another version wrote, or that are damaged, are named and computed again.
    """
    out, progress = experiment.request.out, experiment.progress
    finished = results.finished_keys(out, progress.log)
    by_key: dict[str, Cell] = {}  # two columns may ask for the same cell
    for cell in todo:
        by_key.setdefault(results.key_of(experiment.cell_config(cell)), cell)
    todo = list(by_key.values())
    missing = [cell for key, cell in by_key.items() if key not in finished]
    if len(missing) < len(todo):
        progress.log(
            f"{experiment.request.dataset}: {len(todo) - len(missing)} of {len(todo)} cells are finished already"
        )
    request = experiment.request
    with progress.task(f"{request.dataset}: cells", len(todo), done=len(todo) - len(missing)) as task:
        if request.workers > 1 and len(missing) > 1 and experiment.device.type == "cpu":
            work = pieces(missing, experiment.pool_recipe.networks, experiment.set_key)
            run_parallel(request, work, request.workers, task.advance)
        else:
            experiment.processes = 1
            for cell in missing:
                results.write_record(out, experiment.cell(cell))
                task.advance()
    return len(missing)


def possible(table: Table, requests: Sequence[Request], progress: Progress) -> list[Request]:
    """The requests that ``run all`` can compute of a table; one line says why a slide-level one is left out."""
    if not isinstance(table, SlideTable):
        return list(requests)
    kept = []
    for request in requests:
        found = obstacle(table, request, _load(request, progress))
        if found:
            progress.log(f"{table.name} is left out: {found}")
        else:
            kept.append(request)
    return kept


def project_table(table: Table, requests: Sequence[Request], progress: Progress) -> str:
    """What ``--dry-run`` prints: the projected time of every data set of the table."""
    if table.kind == "statistics":
        return f"{table.name}: nothing is computed but counts; reading the data set is all the time it takes.\n"
    if table.kind == "slides":
        return f"{table.name}: slides differ too much for a projection; 'distill-slides --slides NAME' shows what one takes.\n"
    if table.kind == "sequence":
        requests = sequence_requests(requests)
    return "".join(project(Experiment(request, progress)) for request in requests)


def sequence_requests(requests: Sequence[Request]) -> list[Request]:
    """One request for each stage: the data sets in the order they were named, or two parts of the only one."""
    if len(requests) > 1:
        return list(requests)
    only = requests[0]
    return [dataclasses.replace(only, dataset=f"{only.dataset}@{k}of{PARTS}") for k in range(1, PARTS + 1)]


def _asked(request: Request) -> dict[str, Any]:
    return {"ipc": request.ipc, "methods": request.methods, "archs": [network(*a) for a in request.archs]}


def _announce(request: Request, progress: Progress, count: int, name: str) -> None:
    def text(arch: tuple[str, int | None]) -> str:
        return network(*arch)

    progress.log(
        f"{name}, preset {request.preset.name}: {request.image_size} px, distils on {text(request.distill_arch)}, "
        f"evaluates on {', '.join(map(text, request.archs))}; ipc {', '.join(map(str, request.ipc))}; "
        f"{request.seeds} x {request.eval_seeds} seeds; {count} cells; {counted(request.threads, 'thread')}; results in {request.out}"
    )


def _load(request: Request, progress: Progress) -> Dataset:
    return load_dataset(
        request.dataset,
        root=request.data_root,
        image_size=request.image_size,
        seed=request.split_seed,
        cache=request.cache / "data",
        workers=request.workers,
        progress=progress,
    )


def statistics(dataset: Dataset) -> dict[str, Any]:
    """Patches and slides (training patches, test patches, training slides, test slides), of all and of every class."""

    def count(label: int | None) -> list[int]:
        sides = [dataset.train, dataset.test]
        masks = [s.labels >= 0 if label is None else s.labels == label for s in sides]
        patches = [int(m.sum()) for m in masks]
        return [*patches, *(len(s.groups[m].unique()) for s, m in zip(sides, masks, strict=True))]

    counts = {"all": count(None), **{name: count(i) for i, name in enumerate(dataset.train.classes)}}
    return {"counts": counts, "procedural": dataset.procedural, "notes": list(dataset.notes)}
