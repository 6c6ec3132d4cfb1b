"""Presets, and ``--set section.field=value`` on top of them: typed by the dataclasses that own the fields."""

import dataclasses
import difflib
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from histodd_bench.errors import UsageError, unknown_name
from histodd_bench.methods import all_methods, method_entry

STAIN = ("auto", "off", "half", "on")  # chosen on training data; never; half of the training draws; always and at test

Fields = Mapping[str, Any]


@dataclass(frozen=True)
class Preset:
    """A consistent choice of everything; every part can be overridden on the command line.

    Attributes:
        name, description: as listed.
        image_size: side of the patches in pixels.
        ipc: images per class.
        distill_arch: network of the pool that distillation matches.
        archs: networks that are trained on the sets and scored.
        widths: width by network, for both roles; networks not named have their own default.
        seeds, eval_seeds: how many distillation (selection) seeds, and evaluation seeds for each.
        threads: CPU threads; part of the configuration, since gradients differ in the last bits between thread counts.
        stain: see :data:`STAIN`.
        pool: fields of PoolRecipe that differ from its defaults.
        eval: fields of EvalRecipe that differ from its defaults.
        methods: fields of methods that differ from their defaults.
        by_ipc: the same, for one number of images per class.
        by_dataset: the same, for one data set.
    """

    name: str
    description: str
    image_size: int
    ipc: tuple[int, ...]
    distill_arch: str
    archs: tuple[str, ...]
    widths: Mapping[str, int] = field(default_factory=dict)
    seeds: int = 3
    eval_seeds: int = 3
    threads: int = 2
    stain: str = "auto"
    pool: Fields = field(default_factory=dict)
    eval: Fields = field(default_factory=dict)
    methods: Mapping[str, Fields] = field(default_factory=dict)
    by_ipc: Mapping[int, Mapping[str, Fields]] = field(default_factory=dict)
    by_dataset: Mapping[str, Mapping[str, Fields]] = field(default_factory=dict)

    def method_fields(self, method: str, ipc: int | None, dataset: str) -> dict[str, Any]:
        """Fields of one method as this preset sets them."""
        fields = dict(self.methods.get(method, {}))
        fields.update(self.by_ipc.get(ipc or 0, {}).get(method, {}))
        fields.update(self.by_dataset.get(dataset, {}).get(method, {}))
        return fields


PRESETS: dict[str, Preset] = {
    p.name: p
    for p in (
        Preset(
            "quick",
            "default: minutes on a 2-core CPU; a 32-wide ConvNet-D3 at 32 px distils and evaluates",
            image_size=32,
            ipc=(10, 20, 50),
            distill_arch="convnet-d3",
            archs=("convnet-d3",),
            widths={"convnet-d3": 32},
            eval_seeds=2,
            threads=1,
            pool={"epochs": 1, "balanced": True},
            # The paper selects with ResNet18; its features cost more than all the rest here. Printed below the table.
            methods={m: {"arch": "convnet-d3", "width": 32, "epochs": 10} for m in ("herding", "forgetting")}
            | {"histodd": {"outer_steps": 10}},  # the class's 20 gain little in twice the time
        ),
        Preset(
            "standard",
            "minutes on one GPU; ConvNet-D3 at 64 px distils, ConvNet-D3 and ResNet18 evaluate",
            image_size=64,
            ipc=(10, 20, 50),
            distill_arch="convnet-d3",
            archs=("convnet-d3", "resnet18"),
            seeds=5,
            threads=4,
            pool={"epochs": 1, "balanced": True},
            methods={"histodd": {"outer_steps": 50}},
        ),
        Preset(
            "paper",
            "the paper's setting: ResNetAP-10 distils at 256 px, ResNet18 evaluates; K 200/500/1000, U 100, 5 seeds",
            image_size=256,
            ipc=(10, 20, 50),
            distill_arch="resnetap10",
            archs=("resnet18",),
            seeds=5,
            eval_seeds=1,
            threads=4,
            stain="on",
            pool={"epochs": 10, "networks": 5},
            eval={"epochs": 50},
            methods={
                "histodd": {
                    "inner_steps": 100,
                    "step": "plain",
                    "image_lr": 0.5,
                    "image_decay": False,
                    "networks": "pool",
                    "alpha": 1.0,
                    "balanced": False,
                    "initial": "real",
                }
            },
            by_ipc={
                10: {"histodd": {"outer_steps": 200}},
                20: {"histodd": {"outer_steps": 500}},
                50: {"histodd": {"outer_steps": 1000}},
                100: {"histodd": {"outer_steps": 2000}},
            },
            by_dataset={"tcga-idh": {"histodd": {"image_lr": 5e-3}}},
        ),
    )
}


def get_preset(name: str) -> Preset:
    """A preset by name; an unknown one is refused with the nearest match."""
    if name not in PRESETS:
        raise unknown_name("preset", name, PRESETS)
    return PRESETS[name]


def parse_value(text: str, kind: Any, where: str) -> Any:
    """A command-line value as the type its field declares.

    Understands int, float, bool, str, Literal, ``X | None`` (``none``) and tuples (comma-separated; ``none`` or an empty
    text for the empty tuple).

    Raises:
        UsageError: not a value of that type.
    """
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        if text.lower() == "none" and type(None) in args:
            return None
        errors = []
        for option in (a for a in args if a is not type(None)):
            try:
                return parse_value(text, option, where)
            except UsageError as error:
                errors.append(error)
        raise errors[0]
    if origin is tuple:
        parts = [] if text.strip().lower() in ("", "none", "()") else [p.strip() for p in text.split(",")]
        kinds = [args[0]] * len(parts) if args[-1:] == (Ellipsis,) else list(args)
        if len(kinds) != len(parts):
            raise UsageError(f"{where} needs {len(kinds)} values separated by commas, got {text!r}")
        return tuple(parse_value(p, k, where) for p, k in zip(parts, kinds, strict=True))
    if origin is Literal:
        for option in args:
            if str(option) == text:
                return option
        raise UsageError(f"{where} must be one of {', '.join(map(str, args))}, got {text!r}")
    if kind is bool:
        words = {
            "true": True,
            "yes": True,
            "on": True,
            "1": True,
            "false": False,
            "no": False,
            "off": False,
            "0": False,
        }
        if text.lower() not in words:
            raise UsageError(f"{where} must be true or false, got {text!r}")
        return words[text.lower()]
    if kind in (int, float):
        try:
            value = kind(text)
        except ValueError:
            raise UsageError(
                f"{where} must be {'a whole number' if kind is int else 'a number'}, got {text!r}"
            ) from None
        if value != value or value in (float("inf"), float("-inf")):
            raise UsageError(f"{where} must be a finite number, got {text!r}")
        return value
    if kind is str:
        return text
    raise UsageError(f"{where} cannot be set on the command line")


def section_classes() -> dict[str, type[Any]]:
    """The dataclass behind each section of ``--set``: ``pool``, ``eval`` and every method."""
    from histodd_bench.mil.training import MILRecipe, TransferRecipe
    from histodd_bench.models import PoolRecipe
    from histodd_bench.training import EvalRecipe

    classes = {"pool": PoolRecipe, "eval": EvalRecipe, "mil": MILRecipe, "transfer": TransferRecipe}
    return {**classes, **{n: e.cls for n, e in all_methods().items()}}


# Fields that have an option of their own, or follow from one.
ELSEWHERE = {
    "pool": {"arch": "--distill-arch", "width": "--distill-arch NAME:WIDTH", "image_size": "--image-size"},
    "eval": {},
}


def parse_overrides(settings: Sequence[str]) -> dict[str, dict[str, Any]]:
    """``["histodd.alpha=1", "pool.epochs=3"]`` -> ``{"histodd": {"alpha": 1.0}, "pool": {"epochs": 3}}``.

    The section may be left out where only one has that field.

    Raises:
        UsageError: no such section or field (with the nearest match), or a value of the wrong type.
    """
    classes = section_classes()
    known = {f"{s}.{f.name}": (s, f.name) for s, c in classes.items() for f in dataclasses.fields(c) if f.init}
    overrides: dict[str, dict[str, Any]] = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        name = name.strip()
        if not equals or not name:
            raise UsageError(f"--set {setting!r}: write it as section.field=value, e.g. --set histodd.alpha=0.1")
        if "." not in name:
            matches = [full for full, (_, f) in known.items() if f == name]
            if len(matches) > 1:
                raise UsageError(f"--set {name}: several parts have that field, say which: {', '.join(matches)}")
            name = matches[0] if matches else _refuse(name, known)
        elif name not in known:
            section, _, leaf = name.partition(".")
            if section not in classes:
                raise unknown_name("section of --set", section, classes)
            _refuse(leaf, {f: v for v in known.values() if v[0] == section for f in [v[1]]}, f" of {section}")
        section, leaf = known[name]
        if leaf in ELSEWHERE.get(section, {}):
            raise UsageError(f"--set {name}: use {ELSEWHERE[section][leaf]}")
        kind = get_type_hints(classes[section])[leaf]
        overrides.setdefault(section, {})[leaf] = parse_value(text.strip(), kind, f"--set {name}")
    return overrides


def _refuse(name: str, known: Mapping[str, tuple[str, str]], of: str = "") -> str:
    """Refuse an unknown field; near matches are sought among field names, with and without their section."""
    leaves = sorted({leaf for _, leaf in known.values()})
    near = difflib.get_close_matches(name, leaves, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise UsageError(f"unknown field{of} {name!r} in --set: {hint}known: {', '.join(leaves)}")


def build(cls: type[Any], *layers: Fields) -> Any:
    """An instance of a dataclass from layers of fields, later ones winning; ``epochs`` and ``steps`` replace each other.

    Who names a number of epochs means that number: ``min_steps`` of earlier layers and of the class is off then. Fields that
    the class does not have are refused.
    """
    merged: dict[str, Any] = {}
    names = [f.name for f in dataclasses.fields(cls)]
    for layer in layers:
        for name in layer:
            if name not in names:
                raise unknown_name(f"field of {cls.__name__}", name, names)
        merged.update(layer)
        if {"epochs", "steps"} <= set(names):
            if layer.get("steps") is not None and "epochs" not in layer:
                merged["epochs"] = None
            elif layer.get("epochs") is not None and "steps" not in layer:
                merged["steps"] = None
        if "min_steps" in names and "epochs" in layer and "min_steps" not in layer:
            merged["min_steps"] = 0
    return cls(**merged)


def with_defaults(fields: Mapping[str, Fields], overrides: Mapping[str, Fields]) -> dict[str, dict[str, Any]]:
    """Overrides on top of the fields that a table sets; ``epochs`` and ``steps`` replace each other."""
    merged = {s: {**fields.get(s, {}), **overrides.get(s, {})} for s in dict.fromkeys([*fields, *overrides])}
    for section, own in overrides.items():
        for name, other in (("steps", "epochs"), ("epochs", "steps")):
            if own.get(name) is not None and other not in own:
                merged[section].pop(other, None)
    return merged


def check_recipes(overrides: Mapping[str, Fields], arch: str) -> None:
    """Refuse values that no recipe or method takes, such as a learning rate of 0, before anything is loaded.

    Args:
        overrides: of :func:`parse_overrides`.
        arch: the pool's network.
    """
    classes = section_classes()
    for section, fields in overrides.items():
        build(classes[section], {"arch": arch} if section == "pool" else {}, fields)


def parse_arch(text: str, widths: Mapping[str, int]) -> tuple[str, int | None]:
    """``resnet18`` or ``convnet-d3:64`` -> (name, width or None); an unknown network is refused with the nearest match."""
    from histodd_bench.models import model_entry

    name, colon, width = text.strip().partition(":")
    model_entry(name)
    if not colon:
        return name, widths.get(name)
    if not width.isdigit() or int(width) < 1:
        raise UsageError(f"model {text!r}: the width after the colon must be a whole number above 0")
    return name, int(width)


def check_methods(names: Sequence[str]) -> tuple[str, ...]:
    """Refuse unknown and repeated method names."""
    for name in names:
        method_entry(name)
    return tuple(dict.fromkeys(names))
