"""Progress: silent, as plain log lines, and on a terminal."""

import io
import re

import pytest

from histodd_bench import progress
from histodd_bench.progress import Progress, clock, number


def test_silent_shows_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress.silent() as shown, shown.task("work", 3) as task:
        task.advance(2, loss=1.0)
        shown.log("a line")
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""
    assert task.done == 2


def test_plain_lines_are_rate_limited_and_the_last_one_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    stream = io.StringIO()
    with Progress(stream) as shown, shown.task("distil", 100) as task:
        for _ in range(100):
            now[0] += 1.0
            task.advance(loss=0.12345678)
    lines = stream.getvalue().splitlines()
    assert lines[0] == "distil: 10/100 loss=0.1235 (0:10, 1:30 left)"
    assert len(lines) == 10
    assert lines[-1] == "distil: 100/100 loss=0.1235 (1:40)"


def test_what_an_earlier_run_did_does_not_count_as_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    stream = io.StringIO()
    task = Progress(stream).task("cells", 100, done=80)
    now[0] = 20.0
    task.advance(10)
    assert stream.getvalue() == "cells: 90/100 (0:20, 0:20 left)\n"


def test_short_tasks_stay_silent_and_logs_come_through() -> None:
    stream = io.StringIO()
    with Progress(stream) as shown, shown.task("short", 1) as task:
        task.advance()
        shown.log("[not markup] stays")
    assert stream.getvalue() == "[not markup] stays\n"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_bar_and_whole_log_lines() -> None:
    stream = Terminal()
    with Progress(stream) as shown:
        with shown.task("distil [x]", 4, done=1) as task:
            task.advance(loss=2.5)
            shown.log("[red]a file called [red].png")
            shown._rich.refresh()
        assert not shown._rich.tasks
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())
    assert "[red]a file called [red].png" in plain
    assert "distil [x]" in plain and "2/4" in plain and "loss=2.5" in plain


def test_numbers_and_clock() -> None:
    assert [number(v) for v in (0.000123456, 12, 1234567.0)] == ["0.0001235", "12", "1.235e+06"]
    assert [clock(s) for s in (0, 59.6, 61, 3661)] == ["0:00", "1:00", "1:01", "1:01:01"]
