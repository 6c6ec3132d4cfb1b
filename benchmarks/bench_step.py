"""A whole inner step of the distillation (64 px, two classes), with the compiled operators and with the references."""

import pytest
from timing import DEVICE, repeat

from histodd_bench.profile.step import COMPILED, REFERENCE, InnerStep, step_width


@pytest.mark.parametrize("operators", [COMPILED, REFERENCE], ids=lambda o: o.name)
def test_inner_step(benchmark, operators) -> None:
    benchmark.group = "distillation step"
    repeat(benchmark, InnerStep(operators, DEVICE, step_width(DEVICE, quick=False)), seconds=2.0)
