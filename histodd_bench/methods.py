"""The methods by name: an explicit dict, and third-party ones from the entry-point group ``histodd_bench.methods``."""

from dataclasses import dataclass, is_dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from histodd_bench.errors import HistoddError, unknown_name

GROUP = "histodd_bench.methods"


@dataclass(frozen=True)
class MethodEntry:
    """How a method is found and shown.

    Attributes:
        location: ``module:class`` of a frozen dataclass whose fields are the method's hyperparameters.
        title: column heading.
        description: one line for ``list``.
        makes: its patches are made, not selected; None: the class says so, see :attr:`synthetic`.
        pooled: it uses the pool of pre-trained networks (or its recipe), so its sets depend on it.
        whole: it is the whole training set: neither images per class nor a seed mean anything to it.
    """

    location: str
    title: str
    description: str
    makes: bool | None = False
    pooled: bool = True
    whole: bool = False

    @property
    def cls(self) -> type[Any]:
        """The dataclass, imported on first use."""
        return _import(self.location)

    @property
    def synthetic(self) -> bool:
        """Whether its patches are made, not selected. A method of another package says so with the class attribute
        ``synthetic``; it makes them by default."""
        return bool(getattr(self.cls, "synthetic", True)) if self.makes is None else self.makes


@cache
def _import(location: str) -> type[Any]:
    module, _, name = location.partition(":")
    try:
        found: type[Any] = getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise HistoddError(
            f"method {location} cannot be loaded: {error}: reinstall the package that brings it"
        ) from error
    if not is_dataclass(found):
        raise HistoddError(f"method {location} is not a dataclass: its fields are its hyperparameters")
    return found


METHODS: dict[str, MethodEntry] = {
    "random": MethodEntry(
        "histodd_bench.baselines.random:Random",
        "Random",
        "real patches at random, stratified over slides",
        pooled=False,
    ),
    "herding": MethodEntry(
        "histodd_bench.baselines.herding:Herding",
        "Herding",
        "real patches whose running feature mean follows the class mean",
    ),
    "forgetting": MethodEntry(
        "histodd_bench.baselines.forgetting:Forgetting",
        "Forgetting",
        "real patches most often forgotten while a network trains",
    ),
    "gradmatch": MethodEntry(
        "histodd_bench.baselines.gradmatch:GradMatch",
        "Gradient match",
        "real patches whose mean gradient is that of their class: what Histo-DD starts from",
    ),
    "histodd": MethodEntry(
        "histodd_bench.distill.histodd:HistoDD",
        "Histo-DD",
        "distilled patches: gradient matching with Siamese augmentation and stain normalisation",
        makes=True,
    ),
    "full": MethodEntry(
        "histodd_bench.baselines.full:Full", "Full", "the whole training set: the upper bound", pooled=False, whole=True
    ),
}


@cache
def all_methods() -> dict[str, MethodEntry]:
    """The built-in methods and those that installed packages add; a built-in name cannot be taken over."""
    found = dict(METHODS)
    for point in sorted(entry_points(group=GROUP), key=lambda p: p.name):
        where = point.dist.name if point.dist is not None else point.module
        found.setdefault(point.name, MethodEntry(point.value, point.name, f"from {where}", makes=None))
    return found


def method_entry(name: str) -> MethodEntry:
    """The entry of a method; an unknown name is refused with the nearest match."""
    known = all_methods()
    if name not in known:
        raise unknown_name("method", name, known)
    return known[name]
