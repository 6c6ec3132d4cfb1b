"""What a table is: a declaration of columns, rows and reference numbers; running and rendering are elsewhere."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from histodd_bench.paper import Printed


@dataclass(frozen=True)
class Column:
    """One column of methods: a title, a method and the fields that single it out among its variants."""

    title: str
    method: str
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Metric:
    """One block of rows.

    Attributes:
        title: heading, with unit.
        key: dotted path in a record, e.g. ``metrics.accuracy``.
        scale: multiplies what records hold: 100 turns fractions into percent.
        digits: after the decimal point.
        best: mark the best method with a budget.
        times: print how many times smaller than Full it is.
        spread: print a standard deviation over the seeds.
    """

    title: str
    key: str
    scale: float = 1.0
    digits: int = 1
    best: bool = False
    times: bool = False
    spread: bool = True


@dataclass(frozen=True)
class Table:
    """Columns x images per class x architectures x seeds, for any data set.

    Attributes:
        name, title: as on the command line, as printed.
        columns: the methods compared.
        metrics: the blocks of rows; the first is the table's headline.
        ipc: images per class; None where the preset decides.
        paper: numbers printed in the paper by (dataset, ipc or None, column title); shown marked as the paper's.
        paper_ratio: the paper's Ratio% by (dataset, ipc).
        paper_arch: the network behind the paper's numbers.
    """

    name: str
    title: str
    columns: tuple[Column, ...]
    metrics: tuple[Metric, ...]
    ipc: tuple[int, ...] | None = None
    paper: Mapping[tuple[str, int | None, str], Printed] = field(default_factory=dict)
    paper_ratio: Mapping[tuple[str, int], str] = field(default_factory=dict)
    paper_arch: str = ""
