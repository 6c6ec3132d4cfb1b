"""Progress of long work: a rich display with ETA on a terminal, plain rate-limited log lines anywhere else."""

import sys
import time
from types import TracebackType
from typing import IO, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

LOG_SECONDS = 10.0  # a plain log shows a task's state no more often than this


def clock(seconds: float) -> str:
    """Seconds as ``m:ss`` or ``h:mm:ss``."""
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def number(value: float) -> str:
    """A number as shown beside a bar: four significant digits at most."""
    return f"{value:.4g}"


class Task:
    """One countable piece of work; made by :meth:`Progress.task` and used as a context manager."""

    def __init__(self, progress: "Progress", description: str, total: int, done: int = 0) -> None:
        self.progress, self.description, self.total = progress, description, total
        self.done = self._first = done
        self.info: dict[str, float] = {}
        self._start = time.monotonic()
        self._shown: float | None = None
        self._bar = None
        if progress._rich is not None:
            self._bar = progress._rich.add_task(description, total=total, completed=done, info="")

    def advance(self, n: int = 1, **info: float) -> None:
        """``n`` more units are done; ``info`` are numbers worth seeing, such as ``loss=1.2``."""
        self.done += n
        self.info.update(info)
        if self.progress._rich is not None and self._bar is not None:
            self.progress._rich.update(self._bar, completed=self.done, info=self._numbers())
        elif self.progress._stream is not None:
            # Short tasks stay silent: the first line comes after LOG_SECONDS, the last only if there was one before.
            since = self._start if self._shown is None else self._shown
            if time.monotonic() - since >= LOG_SECONDS or (self._shown is not None and self.done == self.total):
                self._line()

    def _numbers(self) -> str:
        return " ".join(f"{k}={number(v)}" for k, v in self.info.items())

    def _line(self) -> None:
        self._shown = time.monotonic()
        elapsed, moved = self._shown - self._start, self.done - self._first
        left = (
            f", {clock(elapsed / moved * (self.total - self.done))} left"
            if 0 < moved and self.done < self.total
            else ""
        )
        parts = [f"{self.description}: {self.done}/{self.total}", self._numbers(), f"({clock(elapsed)}{left})"]
        self.progress.log(" ".join(p for p in parts if p))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.progress._rich is not None and self._bar is not None:
            self.progress._rich.remove_task(self._bar)


class Progress:
    """Where long work reports to; a context manager.

    Args:
        stream: where to write; standard error by default.
        quiet: show nothing at all.
    """

    def __init__(self, stream: IO[str] | None = None, *, quiet: bool = False) -> None:
        self._stream = None if quiet else (stream or sys.stderr)
        self._rich: RichProgress | None = None
        if self._stream is not None and self._stream.isatty():
            self._rich = RichProgress(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[info]}", markup=False),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=Console(file=self._stream),
                transient=True,
            )

    @classmethod
    def silent(cls) -> "Progress":
        """For library use and tests: shows nothing."""
        return cls(quiet=True)

    def task(self, description: str, total: int, done: int = 0) -> Task:
        """Start a piece of work of ``total`` units, ``done`` of which an earlier, interrupted run has finished."""
        return Task(self, description, total, done)

    def log(self, text: str) -> None:
        """One line that stays."""
        if self._rich is not None:
            self._rich.console.print(text, markup=False, highlight=False, soft_wrap=True)
        elif self._stream is not None:
            print(text, file=self._stream, flush=True)

    def __enter__(self) -> Self:
        if self._rich is not None:
            self._rich.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._rich is not None:
            self._rich.stop()
