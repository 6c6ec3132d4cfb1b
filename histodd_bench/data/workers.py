"""One job after another on several processes: a slide that kills its process is that slide's fault and nobody else's."""

import ctypes
import multiprocessing
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

from histodd_bench.data.images import UnreadableImage
from histodd_bench.data.wsi import SlideError
from histodd_bench.errors import HistoddError

_PR_SET_PDEATHSIG = 1
_SECONDS = 0.5  # between two reports of a worker

Work = Callable[[Any, Callable[[int], object]], Any]


class Failed:
    """What became of a job that could not be done: ``reason`` is one line."""

    def __init__(self, reason: str):
        self.reason = reason


def run_jobs(
    work: Work, jobs: Sequence[Any], workers: int, advance: Callable[[int], object]
) -> Iterator[tuple[int, Any]]:
    """Call ``work(job, report)`` for every job; yield (index, result or :class:`Failed`) as they are done.

    Args:
        work: a function of a module; a job that raises SlideError (or anything else but HistoddError) has failed, the
            others go on.
        workers: processes; 1 works in this one. Results do not depend on it.
        advance: called with numbers reported by the jobs, every half second or so.

    Raises:
        HistoddError: a job raised one: something that concerns all jobs, such as a full disk.
    """
    if min(workers, len(jobs)) <= 1:
        for index, job in enumerate(jobs):
            yield index, _outcome(work, job, advance)
        return
    # Not forked from here: this process may run threads of torch and of the progress display. The server that workers are
    # forked from imports everything once, for all of them.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([work.__module__])
    queue, busy, processes = deque(range(len(jobs))), dict[Connection, int](), dict[Connection, Any]()

    def start() -> None:
        ours, theirs = context.Pipe()
        process = context.Process(target=_live, args=(work, theirs), daemon=True)
        process.start()
        theirs.close()
        processes[ours] = process

    try:
        for _ in range(min(workers, len(jobs))):
            start()
        while processes:
            for connection in wait(list(processes)):
                assert isinstance(connection, Connection)
                try:
                    kind, value = connection.recv()
                except (EOFError, ConnectionResetError):
                    process = processes.pop(connection)
                    process.join(5)
                    if connection not in busy:
                        raise HistoddError(
                            f"a worker process ended before it did anything (exit code {process.exitcode}): the machine may "
                            "be short of memory, try a lower --workers"
                        ) from None
                    yield busy.pop(connection), Failed(f"the process reading it died (exit code {process.exitcode})")
                    if queue:
                        start()
                    continue
                if kind == "advance":
                    advance(value)
                    continue
                if kind == "fatal":
                    raise HistoddError(value)
                if kind == "done":
                    yield busy.pop(connection), value
                if queue:
                    busy[connection] = queue.popleft()
                    connection.send(jobs[busy[connection]])
                else:
                    connection.send(None)
                    processes.pop(connection).join()
    finally:
        for process in processes.values():
            process.kill()
        for process in processes.values():
            process.join()


def _outcome(work: Work, job: Any, report: Callable[[int], object]) -> Any:
    try:
        return work(job, report)
    except (SlideError, UnreadableImage) as error:
        return Failed(error.reason)
    except HistoddError:
        raise
    except Exception as error:  # a slide is untrusted: whatever it provokes is its own failure
        text = str(error).splitlines()[0] if str(error) else "no details"
        return Failed(f"{type(error).__name__}: {text}")


def _live(work: Work, connection: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears Ctrl-C and ends its workers
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    pending, last = 0, time.monotonic()

    def report(n: int) -> None:
        nonlocal pending, last
        pending += n
        if time.monotonic() - last >= _SECONDS:
            connection.send(("advance", pending))
            pending, last = 0, time.monotonic()

    try:
        connection.send(("ready", None))
        while (job := connection.recv()) is not None:
            try:
                result = _outcome(work, job, report)
            except HistoddError as error:
                connection.send(("fatal", str(error)))
                return
            connection.send(("advance", pending))
            pending = 0
            connection.send(("done", result))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass  # the parent is gone
