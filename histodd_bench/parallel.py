"""Cells on several CPU processes: each loads the data set itself, is handed one piece of work after another, and writes records."""

import ctypes
import multiprocessing
import signal
import sys
from collections import deque
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait

from histodd_bench.errors import HistoddError
from histodd_bench.methods import method_entry
from histodd_bench.progress import Progress
from histodd_bench.request import Cell, MakeSet, Request

Piece = int | MakeSet | tuple[Cell, ...]  # a network of the pool to train, a set to make, or cells that belong together
_PR_SET_PDEATHSIG = 1


def pieces(cells: Sequence[Cell], networks: int, set_key: Callable[[Cell], object] | None = None) -> list[Piece]:
    """Work in the order it is handed out: networks of the pool, then cells with the longest first.

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
    longest_first = sorted(groups.values(), key=lambda g: (g[0].distill_seed or 0, -sum(c.ipc or 0 for c in g)))
    return [*range(networks if synthetic else 0), *(tuple(g) for g in longest_first)]


def run_parallel(
    request: Request, todo: Sequence[Piece], workers: int, progress: Progress, on_cell: Callable[[], None]
) -> None:
    """Work through ``todo`` on ``workers`` processes; ``on_cell`` is called after every cell whose record is on disk.

    Raises:
        HistoddError: a worker reported one, or died (out of memory, killed). Finished records stay.
    """
    context = multiprocessing.get_context("spawn")
    queue, processes = deque(todo), {}
    talkative = not sys.stderr.isatty()
    try:
        for _ in range(min(workers, len(todo))):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(request, theirs, talkative), daemon=True)
            process.start()
            theirs.close()
            processes[ours] = process
        while processes:
            for connection in wait(list(processes)):
                assert isinstance(connection, Connection)
                try:
                    kind, text = connection.recv()
                except (EOFError, ConnectionResetError):
                    code = _ended(processes[connection])
                    raise HistoddError(
                        f"a worker process ended unexpectedly (exit code {code}): the machine may be short of memory; "
                        "the same command continues, try it with a lower --workers"
                    ) from None
                if kind == "error":
                    raise HistoddError(text)
                if kind == "cell":
                    on_cell()
                elif queue:
                    connection.send(queue.popleft())
                else:
                    connection.send(None)
                    processes.pop(connection).join()
    finally:
        for process in processes.values():
            process.kill()


def _ended(process: multiprocessing.process.BaseProcess) -> int | None:
    process.join(5)
    return process.exitcode


def _work(request: Request, connection: Connection, talkative: bool) -> None:
    """A worker's life. It ends when told so, when the parent dies, or at its first error."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears Ctrl-C and ends its workers
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    from histodd_bench import results
    from histodd_bench.experiment import Experiment

    try:
        experiment = Experiment(request, Progress() if talkative else Progress.silent())
        connection.send(("ready", ""))
        while (piece := connection.recv()) is not None:
            if isinstance(piece, int):
                experiment.pool().load(piece)
            elif isinstance(piece, MakeSet):
                experiment.make(piece.method, piece.ipc, piece.seed, piece.changes)
                connection.send(("cell", ""))
            else:
                for cell in piece:
                    results.write_record(request.out, experiment.cell(cell))
                    connection.send(("cell", ""))
            connection.send(("ready", ""))
    except HistoddError as error:
        connection.send(("error", str(error)))
    except (EOFError, BrokenPipeError):
        pass  # the parent is gone
