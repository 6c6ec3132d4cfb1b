"""gradient_distance beside the reference, the loop of public distillation code, and torch.compile of that loop.

On gradients shaped like those of ResNet18 (62 tensors, 11.2 M floats) and of ConvNet-D3, and on CUDA of eight ResNet18.
"""

import pytest
from timing import DEVICE, problems_of, time_backend


@pytest.mark.parametrize("backend", ["compiled", "reference", "loop", "torch.compile of loop"])
@pytest.mark.parametrize("part", ["forward", "both"])
@pytest.mark.parametrize("network", ["ResNet18", "ConvNet-D3", "8 x ResNet18"])
def test_gradient_distance(benchmark, network: str, part: str, backend: str) -> None:
    found = [p for p in problems_of("gradient_distance") if p.title.startswith(f"L1, {network}:")]
    if not found:
        pytest.skip(f"{network} is for CUDA: it does not fit the cache there; this is {DEVICE}")
    time_backend(benchmark, found[0], backend, part)
