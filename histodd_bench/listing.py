"""What ``list`` prints: names and one line each."""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from histodd_bench.presets import Preset

Rows = list[tuple[str, str]]


def _tables() -> Rows:
    from histodd_bench.tables import TABLES

    return [(name, table.title) for name, table in TABLES.items()]


def _datasets() -> Rows:
    from histodd_bench.data import DATASETS

    return [(n, e.description + (" (needs --data-root)" if e.needs_root else "")) for n, e in DATASETS.items()]


def _methods() -> Rows:
    from histodd_bench.methods import all_methods

    return [(name, entry.description) for name, entry in all_methods().items()]


def _models() -> Rows:
    from histodd_bench.mil import MIL_MODELS
    from histodd_bench.models import MODELS, PRETRAINED

    known = {**MODELS, **PRETRAINED}
    rows = [(name, f"{entry.description}; patches of {entry.min_size} px or more") for name, entry in known.items()]
    return rows + [(name, f"slides (--mil): {entry.description}") for name, entry in MIL_MODELS.items()]


def _presets() -> Rows:
    from histodd_bench.presets import PRESETS

    return [(name, preset.description) for name, preset in PRESETS.items()]


def fields(preset: "Preset") -> Rows:
    """What ``--set`` takes, with the values that a preset gives; a table can set others for its columns."""
    from histodd_bench.presets import ELSEWHERE, section_classes

    rows = []
    for section, cls in section_classes().items():
        values = {ipc: _values(preset, section, cls, ipc) for ipc in preset.ipc}
        for f in dataclasses.fields(cls):
            if f.name in ELSEWHERE.get(section, {}):
                continue
            if f.name in _BY_STAIN:
                shown = "(as --stain says)"
            else:
                texts = {ipc: _text(of.get(f.name, "(required)")) for ipc, of in values.items()}
                shown = next(iter(texts.values()))
                if len(set(texts.values())) > 1:
                    shown = ", ".join(f"{text} at {ipc} per class" for ipc, text in texts.items())
            rows.append((f"{section}.{f.name}", shown))
    return rows


_BY_STAIN = ("stain_train", "stain_test", "stain_probability")  # follow the policy, see Experiment.recipe_of and method


def _values(preset: "Preset", section: str, cls: type[Any], ipc: int) -> dict[str, Any]:
    """Fields of a section as a run without ``--set`` has them; those without a value are missing."""
    from histodd_bench.mil.experiment import RECIPES
    from histodd_bench.presets import build

    layers: dict[str, Any] = {
        "pool": {"arch": preset.distill_arch, **preset.pool},
        "eval": preset.eval,
        "mil": RECIPES[preset.name],
        "transfer": {},
    }
    given = layers.get(section, preset.method_fields(section, ipc, ""))
    known = dataclasses.fields(cls)
    if any(_required(f) and f.name not in given for f in known):  # of another package: no preset names them
        return {f.name: f.default for f in known if f.default is not dataclasses.MISSING}
    made = build(cls, given)
    return {f.name: getattr(made, f.name) for f in known}


def _required(field: "dataclasses.Field[Any]") -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _text(value: Any) -> str:
    return ",".join(map(str, value)) or "none" if isinstance(value, tuple) else str(value)


SECTIONS: dict[str, Callable[[], Rows]] = {
    "tables": _tables,
    "datasets": _datasets,
    "methods": _methods,
    "models": _models,
    "presets": _presets,
}
