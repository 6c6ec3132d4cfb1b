"""macenko_fit beside the reference and torch.compile of it; fit + normalise also beside the public packages."""

import pytest
from timing import COMPARED, SHAPES, problems_of, time_backend

from histodd_bench.profile.peers import PACKAGES

INPUTS = [(*shape, dtype) for shape in SHAPES for dtype in ("uint8", "float32")]


@pytest.mark.parametrize("backend", COMPARED[:3])
@pytest.mark.parametrize(("n", "side", "dtype"), INPUTS)
def test_macenko_fit(benchmark, n: int, side: int, dtype: str, backend: str) -> None:
    time_backend(benchmark, problems_of("macenko_fit", n, side, dtype)[0], backend, "forward")


@pytest.mark.parametrize("backend", [*COMPARED[:3], *PACKAGES])
@pytest.mark.parametrize(("n", "side", "dtype"), INPUTS)
def test_normalise(benchmark, n: int, side: int, dtype: str, backend: str) -> None:
    time_backend(benchmark, problems_of("normalise", n, side, dtype)[0], backend, "forward")
