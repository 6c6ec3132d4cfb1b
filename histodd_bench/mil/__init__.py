"""Slide-level models: multiple instance learning on bags of patch features. One architecture per file."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any

from histodd_bench.errors import UsageError, unknown_name

if TYPE_CHECKING:
    from torch import nn

__all__ = ["MIL_MODELS", "MILEntry", "build_mil", "check_models"]


@dataclass(frozen=True)
class MILEntry:
    """How a slide-level model is found, shown and, by default, trained.

    Attributes:
        location: ``module:class``, imported on first use.
        title: column heading.
        description: one line for ``list``.
        optimizer: ``adam`` or ``lookahead-radam``.
        lr, weight_decay, betas: of it, as the authors have them.
        fields: arguments that single this model out among those of its class.
    """

    location: str
    title: str
    description: str
    optimizer: str
    lr: float
    weight_decay: float
    betas: tuple[float, float] = (0.9, 0.999)
    fields: Mapping[str, Any] = field(default_factory=dict)

    @property
    def cls(self) -> "Callable[..., nn.Module]":
        """The class: ``cls(in_features, num_classes, width=..., dropout=...)`` with ``forward`` and ``loss``."""
        module, _, name = self.location.partition(":")
        found: Callable[..., nn.Module] = getattr(import_module(module), name)
        return found


MIL_MODELS: dict[str, MILEntry] = {
    "clam-sb": MILEntry(
        "histodd_bench.mil.clam:CLAM", "CLAM-SB", "gated attention, one branch, instance clustering (Lu et al. 2021)",
        "adam", 2e-4, 1e-5,
    ),
    "clam-mb": MILEntry(
        "histodd_bench.mil.clam:CLAM", "CLAM-MB", "the same with an attention branch per class (Lu et al. 2021)",
        "adam", 2e-4, 1e-5, fields={"multi": True},
    ),
    "dsmil": MILEntry(
        "histodd_bench.mil.dsmil:DSMIL", "DSMIL", "max pooling and attention to the critical instance (Li et al. 2021)",
        "adam", 1e-4, 5e-3, betas=(0.5, 0.9),
    ),
    "transmil": MILEntry(
        "histodd_bench.mil.transmil:TransMIL", "TransMIL", "Nystrom attention with position encoding (Shao et al. 2021)",
        "lookahead-radam", 2e-4, 1e-5,
    ),
    "abmil": MILEntry(
        "histodd_bench.mil.abmil:ABMIL", "ABMIL", "gated attention pooling, the plain baseline (Ilse et al. 2018)",
        "adam", 1e-4, 5e-4,
    ),
}  # fmt: skip


def check_models(names: Sequence[str]) -> tuple[str, ...]:
    """Refuse unknown names of slide-level models, with the nearest match."""
    for name in names:
        if name not in MIL_MODELS:
            raise unknown_name("slide-level model", name, MIL_MODELS)
    return tuple(names)


def build_mil(
    name: str, *, in_features: int, num_classes: int, seed: int, width: int | None = None, dropout: float | None = None
) -> "nn.Module":
    """A slide-level model, initialised from ``seed`` and nothing else; torch's global generator is left as it was.

    Args:
        name: a key of :data:`MIL_MODELS`.
        in_features: dimensions of a feature vector.
        num_classes: outputs, at least 2.
        width, dropout: None for the published ones.

    Raises:
        UsageError: unknown name (with the nearest match), fewer than two classes, an impossible width.
        HistoddError: a package it needs is not installed.
    """
    check_models([name])
    if num_classes < 2:
        raise UsageError(f"{name} needs at least two classes, got {num_classes}")
    import torch

    entry = MIL_MODELS[name]
    options = dict(entry.fields) | {k: v for k, v in (("width", width), ("dropout", dropout)) if v is not None}
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return entry.cls(in_features, num_classes, **options)
