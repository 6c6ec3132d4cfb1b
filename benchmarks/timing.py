"""What the suites share: the problems and backends of ``python -m histodd_bench profile``, timed by pytest-benchmark.

HISTODD_BENCH_THREADS sets the number of threads (default 2), HISTODD_BENCH_DEVICE the device (default cpu).
"""

import os
from collections.abc import Callable
from functools import lru_cache

import pytest
import torch

from histodd_bench.profile.measure import synchronise
from histodd_bench.profile.problems import QUICK_SHAPES as SHAPES
from histodd_bench.profile.problems import Problem, problems
from histodd_bench.profile.run import difference, run_once

DEVICE = torch.device(os.environ.get("HISTODD_BENCH_DEVICE", "cpu"))
THREADS = int(os.environ.get("HISTODD_BENCH_THREADS", "2"))
COMPARED = ("compiled", "reference", "torch.compile", "plain", "torch.compile of plain")


@lru_cache(maxsize=2)  # consecutive tests share their inputs, and what torch.compile made
def problems_of(operator: str, n: int = 1, side: int = 64, dtype: str = "float32") -> list[Problem]:
    """The problems of one operator on one kind of input."""
    torch.set_num_threads(THREADS)
    return list(problems([operator], [(n, side)], [dtype], DEVICE))


def time_backend(benchmark, problem: Problem, name: str, part: str) -> None:
    """Compare a backend with the float64 reference, then time it; ``part`` is ``forward`` or ``both``.

    Skips what this problem does not have: a package that is not installed, a backward pass of bytes.
    """
    torch.set_num_threads(THREADS)
    backend = next((b for b in problem.backends if b.name == name), None)
    if backend is None:
        pytest.skip(f"{name} is not installed, or does not take this input")
    if part == "both" and not problem.leaves:
        pytest.skip("nothing to differentiate")
    found = difference(problem, backend)
    assert found <= backend.limit, f"{name} computes something else: differs by {found:.2g} {backend.unit}"

    def forward() -> None:
        with torch.no_grad():
            backend.function(*problem.inputs)

    run = (lambda: run_once(problem, backend)) if part == "both" else forward
    benchmark.group = f"{problem.operator}: {problem.title}, {part}"
    repeat(benchmark, run)


def repeat(benchmark, run: Callable[[], object], seconds: float = 0.5) -> None:
    """At least five rounds, and about ``seconds`` of them."""

    def synchronised() -> None:
        run()
        synchronise(DEVICE)

    synchronised()
    start = benchmark._timer()
    synchronised()
    rounds = min(max(int(seconds / max(benchmark._timer() - start, 1e-6)), 5), 500)
    benchmark.pedantic(synchronised, rounds=rounds, warmup_rounds=2)


__all__ = ["COMPARED", "DEVICE", "SHAPES", "problems_of", "repeat", "time_backend"]
