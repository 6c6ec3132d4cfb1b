"""Average pooling and a training step of ConvNet-D3 on a CPU: ``HalvingPool`` beside ``avg_pool2d``, layout beside layout."""

import pytest
import torch
import torch.nn.functional as F
from timing import repeat
from torch import nn

from histodd_bench.models import build
from histodd_bench.models.pooling import HalvingPool

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pool", [HalvingPool(), nn.AvgPool2d(2)], ids=lambda p: type(p).__name__)
def test_pooling(benchmark, pool, layout) -> None:
    x = torch.rand(20, 32, 64, 64).contiguous(memory_format=LAYOUTS[layout]).requires_grad_()
    benchmark.group = "2x2 average pooling, forward and backward, 20 x 32 x 64 x 64"
    grad = torch.ones_like(pool(x))
    repeat(benchmark, lambda: torch.autograd.grad(pool(x), x, grad))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("batch", [20, 64])
def test_training_step(benchmark, batch, layout) -> None:
    network = build("convnet-d3", num_classes=2, image_size=32, width=32, generator_seed=0)
    network = network.to(memory_format=LAYOUTS[layout])
    x, labels = torch.rand(batch, 3, 32, 32).contiguous(memory_format=LAYOUTS[layout]), torch.arange(batch) % 2
    benchmark.group = f"training step of ConvNet-D3, 32 px, batch {batch}"

    def step() -> None:
        network.zero_grad()
        F.cross_entropy(network(x), labels).backward()

    repeat(benchmark, step)
