"""stain_augment beside the reference, a plain batched PyTorch rewrite, and torch.compile of both.

python -m pytest benchmarks/bench_stain_augment.py -k "warp and not torch.compile"
"""

import pytest
from timing import COMPARED, SHAPES, problems_of, time_backend


@pytest.mark.parametrize("backend", COMPARED)
@pytest.mark.parametrize("part", ["forward", "both"])
@pytest.mark.parametrize("variant", [0, 1], ids=["stain", "warp"])
@pytest.mark.parametrize(("n", "side", "dtype"), [(*shape, d) for shape in SHAPES for d in ("uint8", "float32")])
def test_stain_augment(benchmark, n: int, side: int, dtype: str, variant: int, part: str, backend: str) -> None:
    time_backend(benchmark, problems_of("stain_augment", n, side, dtype)[variant], backend, part)
