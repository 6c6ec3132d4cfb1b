"""What ``list`` prints: names and one line each."""

import dataclasses
from collections.abc import Callable
from typing import Any

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


def _fields() -> Rows:
    from histodd_bench.presets import ELSEWHERE, section_classes

    rows = []
    for section, cls in section_classes().items():
        for f in dataclasses.fields(cls):
            if f.name not in ELSEWHERE.get(section, {}):
                rows.append((f"{section}.{f.name}", _default(f)))
    return rows


def _default(field: "dataclasses.Field[Any]") -> str:
    if field.default is dataclasses.MISSING:
        return "(required)"
    value = field.default
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


SECTIONS: dict[str, Callable[[], Rows]] = {
    "tables": _tables,
    "datasets": _datasets,
    "methods": _methods,
    "models": _models,
    "presets": _presets,
    "fields": _fields,
}
