"""The networks by name: an explicit dict, and the one function that builds them."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

import torch
from torch import nn

from histodd_bench.errors import UsageError, unknown_name


@dataclass(frozen=True)
class ModelEntry:
    """How a network is found and shown.

    Attributes:
        location: ``module:class``, imported on first use: torchvision takes seconds.
        description: one line for ``list``.
        min_size: smallest side of a patch in pixels; smaller maps would leave the last normalisation layer one value.
    """

    location: str
    description: str
    min_size: int

    @property
    def build(self) -> Callable[..., nn.Module]:
        """Called with ``num_classes``, ``image_size`` and, where it is not the default, ``width``.

        What it returns has ``features(x) -> [N, D]``, a last ``nn.Linear`` named ``classifier``, and
        ``forward(x) = classifier(features(x))``.
        """
        module, _, name = self.location.partition(":")
        found: Callable[..., nn.Module] = getattr(import_module(module), name)
        return found


MODELS: dict[str, ModelEntry] = {
    "convnet-d3": ModelEntry(
        "histodd_bench.models.convnet:ConvNetD3", "three convolutions with instance norm; width = channels (128)", 8
    ),
    "resnetap10": ModelEntry(
        "histodd_bench.models.resnetap:ResNetAP10",
        "ResNet-10 with average pooling for strides, instance norm; width = first stage (64)",
        16,
    ),
    "resnet18": ModelEntry(
        "histodd_bench.models.resnet:ResNet18", "ResNet18 with batch norm; width = first stage (64)", 16
    ),
    "densenet121": ModelEntry(
        "histodd_bench.models.densenet:DenseNet121", "DenseNet121 with batch norm; width = growth rate (32)", 16
    ),
    "vit": ModelEntry(
        "histodd_bench.models.vit:ViT", "vision transformer of 12 layers; width = hidden dimensions (768: ViT-B)", 16
    ),
}


PRETRAINED: dict[str, ModelEntry] = {  # refused where the weights are not on the machine
    f"{name}-imagenet": ModelEntry(
        f"histodd_bench.models.imagenet:{cls}ImageNet",
        f"{MODELS[name].description.split(';')[0]}, ImageNet weights",
        32,
    )
    for name, cls in (("resnet18", "ResNet18"), ("densenet121", "DenseNet121"), ("vit", "ViT"))
}


def model_entry(name: str) -> ModelEntry:
    """The entry of a network; an unknown name is refused with the nearest match.

    Raises:
        UsageError: no such network.
    """
    known = {**MODELS, **PRETRAINED}
    if name not in known:
        raise unknown_name("model", name, known)
    return known[name]


def build(name: str, *, num_classes: int, image_size: int, width: int | None = None, generator_seed: int) -> nn.Module:
    """A network, initialised from ``generator_seed`` and nothing else; torch's global generator is left as it was.

    Args:
        name: a key of :data:`MODELS` or :data:`PRETRAINED`.
        num_classes: outputs, at least 2.
        image_size: side of the square patches in pixels.
        width: see :data:`MODELS`; None for the published width.
        generator_seed: the same seed, the same parameters.

    Raises:
        UsageError: unknown name (with the nearest match), patches too small for the network, fewer than two
            classes, or a width below 1.
        HistoddError: ImageNet weights are asked for and not on this machine.
    """
    entry = model_entry(name)
    if image_size < entry.min_size:
        raise UsageError(
            f"patches of {image_size} px are too small for {name}: it needs at least {entry.min_size} px; "
            "raise --image-size"
        )
    if num_classes < 2:
        raise UsageError(f"{name} needs at least two classes, got {num_classes}")
    if width is not None and width < 1:
        raise UsageError(f"the width of {name} must be at least 1, got {width}")
    if width is not None and name in PRETRAINED:
        raise UsageError(f"{name} has the width of its weights: leave the width away")
    options = {} if width is None else {"width": width}
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(generator_seed)
        return entry.build(num_classes=num_classes, image_size=image_size, **options)


def paramcount(model: nn.Module) -> int:
    """Number of trainable parameters."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
