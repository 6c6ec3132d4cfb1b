"""Time spent on a piece of work over all its restarts."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from histodd_bench.errors import HistoddError
from histodd_bench.files import write_text


@contextmanager
def stopwatch(workdir: Path, apart: Callable[[], float]) -> Iterator[list[float]]:
    """Seconds of a piece of work over all its restarts, in a one-element list that is final when the block ends.

    Args:
        workdir: where they are kept for the next restart.
        apart: seconds within the block that are counted elsewhere.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    path = workdir / "seconds"
    try:
        before = float(path.read_text())
    except (OSError, ValueError):
        before = 0.0
    total, start, first = [before], time.perf_counter(), apart()
    stop = threading.Event()

    def elapsed() -> float:
        return before + time.perf_counter() - start - (apart() - first)

    def beat() -> None:
        while not stop.wait(2.0):  # what a kill can lose
            with suppress(HistoddError):
                write_text(path, repr(elapsed()))

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield total
    finally:
        stop.set()
        thread.join()
        total[0] = elapsed()
