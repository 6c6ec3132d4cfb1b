"""Worker processes: a death costs the job in hand, wherever it comes; an error of one is one line and ends all."""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import closing
from typing import Any

import pytest

from histodd_bench.errors import HistoddError
from histodd_bench.workers import Report, run_workers


def opener(report: Report) -> Callable[[Any], Any]:
    """Jobs are numbers; the result says who did it."""

    def do(job: int) -> tuple[int, int]:
        report(job)
        if job == 66:
            os.kill(os.getpid(), signal.SIGKILL)
        if job == 77:
            raise KeyError("no\nsuch thing")
        return os.getpid(), job * job

    return do


def broken(report: Report) -> Callable[[Any], Any]:
    raise ValueError("cannot be opened")


def bury(pid: int) -> None:
    """Kill a worker and wait until its end of the pipe is closed."""
    (process,) = (child for child in multiprocessing.active_children() if child.pid == pid)
    os.kill(pid, signal.SIGKILL)
    process.join()


def test_a_worker_that_dies_between_two_jobs_is_found_when_it_is_handed_the_next() -> None:
    events = run_workers(opener, [1, 2, 3], 1)
    with closing(events):
        assert next(events) == ("report", 0, 1)
        kind, job, (pid, square) = next(events)
        assert (kind, job, square) == ("done", 0, 1)
        bury(pid)
        assert next(events) == ("died", 1, -signal.SIGKILL)
        assert next(events) == ("report", 2, 3)
        kind, job, (other, square) = next(events)
        assert (kind, job, square) == ("done", 2, 9) and other != pid
        bury(other)
        assert list(events) == [], "nothing was left to do: its death costs nothing"


def test_a_death_at_work_costs_that_job_and_another_worker_goes_on() -> None:
    events = [(kind, job) for kind, job, _ in run_workers(opener, [1, 66, 2], 1) if kind != "report"]
    assert events == [("done", 0), ("died", 1), ("done", 2)]


@pytest.mark.parametrize(
    ("open_with", "jobs", "message"),
    [
        (opener, [1, 77], "KeyError in a worker process: 'no"),
        (broken, [1], "ValueError in a worker process: cannot be opened"),
    ],
)
def test_an_unexpected_error_is_one_line_that_says_where(
    open_with: Any, jobs: list[int], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(HistoddError) as error:
        list(run_workers(open_with, jobs, 1))
    assert str(error.value).startswith(message) and "test_workers.py, line" in str(error.value)
    assert "\n" not in str(error.value) and "Traceback" not in capfd.readouterr().err
    assert not multiprocessing.active_children()


def test_a_worker_does_not_hear_ctrl_c_while_it_starts(capfd: pytest.CaptureFixture[str]) -> None:
    """It starts with loading its opener's module, torch and all: far from where it could say what Ctrl-C means to it."""

    def press() -> None:
        for _ in range(200):
            for child in multiprocessing.active_children():
                if child.pid is not None:
                    os.kill(child.pid, signal.SIGINT)
            time.sleep(0.005)

    pressing = threading.Thread(target=press)
    pressing.start()
    events = [(kind, job) for kind, job, _ in run_workers(opener, [1, 2], 1) if kind != "report"]
    pressing.join()
    assert events == [("done", 0), ("done", 1)]
    assert "Traceback" not in capfd.readouterr().err
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ()), "here Ctrl-C counts again"


def test_closing_ends_the_workers() -> None:
    events = run_workers(opener, list(range(50)), 2)
    next(events)
    assert len(multiprocessing.active_children()) == 2
    events.close()
    assert not multiprocessing.active_children()
