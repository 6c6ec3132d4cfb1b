"""What a call of an operator costs whatever its size: patches of 4 x 4 pixels, layers of a few numbers, ``clamp`` beside them."""

from collections.abc import Callable

import pytest
import torch
from timing import repeat
from torch import Tensor

from histodd_bench.ops import gradient_distance, stain_augment

IMAGE, STAIN = torch.full((1, 3, 4, 4), 0.5), torch.eye(3, 4)[None]
LAYERS = [torch.zeros(4, 3) for _ in range(14)]  # as many as ConvNet-D3 has

CALLS: dict[str, tuple[Callable[[list[Tensor]], Tensor], list[Tensor]]] = {
    "clamp": (lambda x: x[0].clamp(0, 1).sum(), [IMAGE]),
    "stain_augment": (lambda x: stain_augment(x[0], STAIN).sum(), [IMAGE]),
    "gradient_distance": (lambda x: gradient_distance(LAYERS, x), [torch.ones(4, 3) for _ in range(14)]),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("what", ["without gradient", "forward", "forward and backward"])
def test_call(benchmark, name, what) -> None:
    call, inputs = CALLS[name]
    inputs = [t.clone().requires_grad_(what != "without gradient") for t in inputs]
    benchmark.group = f"a call, {what}"
    if what == "forward and backward":
        repeat(benchmark, lambda: torch.autograd.grad(call(inputs), inputs))
    else:
        repeat(benchmark, lambda: call(inputs))
