"""One job after another on several processes: a slide that kills its process is that slide's fault and nobody else's."""

import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from typing import Any

from histodd_bench.data.images import UnreadableImage
from histodd_bench.data.wsi import SlideError
from histodd_bench.errors import HistoddError
from histodd_bench.workers import Report, run_workers

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
    events = run_workers(_opened, jobs, workers, context=context, arguments=lambda number: (work,))
    with closing(events):
        for kind, index, value in events:
            if kind == "report":
                advance(value)
            else:
                yield index, Failed(f"the process reading it died (exit code {value})") if kind == "died" else value


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


def _opened(work: Work, report: Report) -> Callable[[Any], Any]:
    """What a worker does with a job: reports of the work are added up and passed on now and then."""
    pending, last = 0, time.monotonic()

    def pass_on() -> None:
        nonlocal pending, last
        report(pending)
        pending, last = 0, time.monotonic()

    def advance(n: int) -> None:
        nonlocal pending
        pending += n
        if time.monotonic() - last >= _SECONDS:
            pass_on()

    def do(job: Any) -> Any:
        result = _outcome(work, job, advance)
        pass_on()
        return result

    return do
