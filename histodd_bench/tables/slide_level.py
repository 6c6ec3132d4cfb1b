"""What a slide-level table is: the declaration of a table whose rows are sets of patches and whose columns are models."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from histodd_bench.paper import Printed
from histodd_bench.tables.declaration import Fields, Kind, Table

Key = tuple[str, int | None, str]  # data set (or source centre), images per class or None for all, model


# By preset. One thread for each worker, since slides are many; every slide is distilled once per seed and budget.
OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "quick": {"seeds": 1, "eval_seeds": 2, "threads": 1},
    "standard": {"threads": 1},
    "paper": {"threads": 1},
}


@dataclass(frozen=True)
class SlideTable(Table):
    """A table run and laid out by a module of its own; ``columns`` are the sets compared, which stand below each other.

    Attributes:
        runner: module with ``run(request, table, progress)``.
        layout: function ``module:name(table, records, plan)`` that makes the grids; importing it needs no torch.
        fields: by preset, fields that the table sets instead of it, by section of ``--set``, which wins.
        models: columns, keys of MIL_MODELS (or ``patch`` for the patch-level network).
        paper_accuracy, paper_seconds, paper_storage, paper_epochs: what the paper prints, marked as the paper's wherever it is shown.
    """

    kind: Kind = "slides"
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: OPTIONS)
    fields: Mapping[str, Fields] = field(default_factory=dict)
    runner: str = ""
    layout: str = ""
    models: tuple[str, ...] = ()
    paper_accuracy: Mapping[Key, Printed] = field(default_factory=dict)
    paper_seconds: Mapping[Key, str] = field(default_factory=dict)
    paper_storage: Mapping[Key, str] = field(default_factory=dict)
    paper_epochs: Mapping[Key, str] = field(default_factory=dict)
