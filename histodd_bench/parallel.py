"""Cells on several CPU processes: each loads the data set itself, is handed one piece of work after another, and writes records."""

import math
import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace

from histodd_bench.errors import HistoddError
from histodd_bench.methods import method_entry
from histodd_bench.progress import Progress
from histodd_bench.request import Cell, MakeSet, Request
from histodd_bench.workers import Report, run_workers

Piece = int | MakeSet | tuple[Cell, ...]  # a network of the pool to train, a set to make, or cells that belong together


def pieces(cells: Sequence[Cell], networks: int, set_key: Callable[[Cell], object] | None = None) -> list[Piece]:
    """Work in the order it is handed out: networks of the pool, then cells with the longest first, so that no worker is left
    alone with a long piece at the end.

    Cells of one distilled set stay together; so do all coresets of one seed, since they share a trained network.

    Args:
        cells: what is to be computed.
        networks: size of the pool.
        set_key: the same value for cells that share a distilled set; by default method, images per class and seed.
    """
    groups: dict[tuple[object, ...], list[Cell]] = {}
    for cell in cells:
        entry = method_entry(cell.method)
        if entry.whole:
            key: tuple[object, ...] = ("whole", cell.eval_seed, cell.arch, cell.width, cell.changes)
        elif entry.synthetic:
            key = (set_key(cell),) if set_key else (cell.method, cell.ipc, cell.distill_seed)
        else:
            key = ("coresets", cell.distill_seed)
        groups.setdefault(key, []).append(cell)
    synthetic = any(method_entry(c.method).synthetic for c in cells)
    longest_first = sorted(groups.values(), key=lambda g: -sum(math.inf if c.ipc is None else c.ipc for c in g))
    return [*range(networks if synthetic else 0), *(tuple(g) for g in longest_first)]


def run_parallel(
    request: Request, todo: Sequence[Piece], workers: int, on_cell: Callable[[], object]
) -> None:
    """Work through ``todo`` on ``workers`` processes; ``on_cell`` is called after every cell whose record is on disk.

    Raises:
        HistoddError: a worker reported one, or died (out of memory, killed). Finished records stay.
    """
    talkative = not sys.stderr.isatty()
    request = replace(request, workers=min(workers, len(todo)))
    events = run_workers(_opened, todo, workers, arguments=lambda number: (request, talkative))
    with closing(events):
        for kind, _, value in events:
            if kind == "died":
                raise HistoddError(
                    f"a worker process ended unexpectedly (exit code {value}): the machine may be short of memory; "
                    "the same command continues, try it with a lower --workers"
                )
            if kind == "report":
                on_cell()


def _opened(request: Request, talkative: bool, report: Report) -> Callable[[Piece], None]:
    """What a worker does with a piece; it reports every cell whose record is on disk."""
    from histodd_bench import results
    from histodd_bench.experiment import Experiment

    experiment = Experiment(request, Progress() if talkative else Progress.silent())

    def do(piece: Piece) -> None:
        if isinstance(piece, int):
            experiment.pool().load(piece)
        elif isinstance(piece, MakeSet):
            experiment.make(piece.method, piece.ipc, piece.seed, piece.changes)
            report(None)
        else:
            for cell in piece:
                results.write_record(request.out, experiment.cell(cell))
                report(None)

    return do
