"""Worker processes that are handed one job after another: the only place that starts, feeds, and buries them."""

import ctypes
import multiprocessing
import os
import signal
import sys
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from histodd_bench.errors import HistoddError

MOST_WORKERS = 8  # by default: every process holds torch and its own batches
_PR_SET_PDEATHSIG = 1

Report = Callable[[Any], None]
Opener = Callable[..., Callable[[Any], Any]]  # (*arguments, report) -> function that does one job


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_workers(
    opener: Opener,
    jobs: Sequence[Any],
    workers: int,
    *,
    context: Any = None,
    arguments: Callable[[int], tuple[Any, ...]] = lambda number: (),
) -> Generator[tuple[str, int, Any], None, None]:
    """Do every job once on ``workers`` processes, in the order they are listed.

    A worker calls ``opener(*arguments(number), report)`` once and what that returns for every job it is handed. One that dies
    (killed, out of memory, a crash in a decoder) costs the job in its hands; another takes its place.

    Args:
        opener, jobs, arguments: picklable; results and reports too.
        context: how processes are started; spawned by default.

    Yields:
        ``("report", job, value)`` whenever a worker calls ``report(value)``; ``("done", job, result)``;
        ``("died", job, exit code)``. ``job`` is an index into ``jobs``. Closing the iterator ends all workers.

    Raises:
        HistoddError: a worker could not start, or a job or the opener raised: that concerns all jobs.
    """
    context = context or multiprocessing.get_context("spawn")
    queue = deque(range(len(jobs)))
    processes: dict[Connection, tuple[int, BaseProcess]] = {}
    doing: dict[Connection, int] = {}  # job in hand; absent before a worker is ready

    def start(number: int) -> None:
        ours, theirs = context.Pipe()
        process = context.Process(target=_live, args=(opener, arguments(number), theirs), daemon=True)
        with _deaf_children():
            process.start()
        theirs.close()
        processes[ours] = (number, process)

    def hand(connection: Connection) -> None:
        job = queue.popleft() if queue else None
        if job is not None:
            doing[connection] = job
        try:
            connection.send(None if job is None else (jobs[job],))
        except (BrokenPipeError, ConnectionResetError):
            pass  # it has just died: what is read from it next says so
        if job is None:
            processes.pop(connection)[1].join()

    try:
        for number in range(min(workers, len(jobs))):
            start(number)
        while processes:
            for connection in wait(list(processes)):
                assert isinstance(connection, Connection)
                number, process = processes[connection]
                try:
                    kind, value = connection.recv()
                except (EOFError, ConnectionResetError):
                    process.join(5)
                    del processes[connection]
                    if connection not in doing:
                        raise HistoddError(
                            f"a worker process ended while starting (exit code {process.exitcode}): the machine may be short "
                            "of memory, try a lower --workers"
                        ) from None
                    yield "died", doing.pop(connection), process.exitcode
                    if queue:
                        start(number)
                    continue
                if kind == "error":
                    raise HistoddError(value)
                if kind == "report":
                    yield kind, doing[connection], value
                    continue
                if kind == "done":
                    yield kind, doing.pop(connection), value
                hand(connection)
    finally:
        for _, process in processes.values():
            process.kill()
        for _, process in processes.values():
            process.join()


@contextmanager
def _deaf_children() -> Iterator[None]:
    """Processes started in the block never hear Ctrl-C, not even while they start; here it counts at the end of the block."""
    resource_tracker.ensure_running()  # else the first start would start it, and that ends the blocking
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _live(opener: Opener, arguments: tuple[Any, ...], connection: Connection) -> None:
    """A worker's life. It ends when told so, when the parent dies, or at its first error."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears Ctrl-C and ends its workers
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    try:
        try:
            do = opener(*arguments, lambda value: connection.send(("report", value)))
            connection.send(("ready", None))
            while (message := connection.recv()) is not None:
                connection.send(("done", do(message[0])))
        except HistoddError as error:
            connection.send(("error", str(error)))
        except (EOFError, BrokenPipeError, ConnectionResetError):
            raise
        except Exception as error:
            text = str(error).splitlines()[0] if str(error) else "no details"
            place = traceback.extract_tb(error.__traceback__)[-1]
            connection.send(
                ("error", f"{type(error).__name__} in a worker process: {text} ({place.filename}, line {place.lineno})")
            )
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass  # the parent is gone
