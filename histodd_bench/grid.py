"""What a table is made of once it is laid out: numbers, rows and grids. No format, no computing, no torch."""

from dataclasses import dataclass, field

import pandas as pd

from histodd_bench import paper, results
from histodd_bench.tables.declaration import Metric


@dataclass(frozen=True)
class Value:
    """One number of a table: mean, sd and n over seeds.

    Attributes:
        metric: how it is printed.
        best: the best of those it competes with.
        times: how many times smaller than the whole training set's; None where that says nothing.
        printed: the paper's text, where the number is the paper's.
    """

    mean: float
    sd: float
    n: int
    metric: Metric
    best: bool = False
    times: float | None = None
    printed: paper.Printed | None = None


@dataclass(frozen=True)
class Interval:
    """A difference with its 95 % interval (NaN: none), in the metric's unit, and the column it is the difference to."""

    value: float
    low: float
    high: float
    against: str


Cell = Value | Interval | str | None  # None: nothing there yet


@dataclass
class Row:
    """One row: the block it belongs to, its label, images per class, Ratio%, and a cell for each column."""

    block: str
    ipc: str
    ratio: str
    cells: list[Cell]
    source: str = "ours"
    label: str = ""


Points = dict[int | None, dict[str, Value]]  # images per class -> key of a metric -> number


@dataclass
class Grid:
    """One table of one data set and protocol, and of one network unless networks stand side by side.

    Attributes:
        procedural: whether the data are computer-made.
        configuration: what sets it apart from tables that would have the same title; empty where there is none.
        head: of the column of labels; empty where rows have none.
        budgets: whether rows are about images per class.
        series: the numbers for plots, by panel (network or row, where there are several) and name of the line.
    """

    title: str
    dataset: str
    arch: str
    columns: list[str]
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    head: str = ""
    budgets: bool = True
    procedural: bool = False
    configuration: str = ""
    series: dict[str, dict[str, Points]] = field(default_factory=dict)


def labelled(dataset: str, procedural: bool) -> str:
    """A data set's name as tables show it."""
    return f"{dataset} (procedural data)" if procedural else dataset


def network(arch: str, width: int | None) -> str:
    """A network's name as tables show it."""
    return arch if width is None else f"{arch} (width {width})"


def value(frame: pd.DataFrame, metric: Metric) -> Value | None:
    """Mean, standard deviation and n of a metric over the rows of a frame; None where there is none."""
    if metric.key not in frame.columns:
        return None
    mean, sd, n = results.aggregate(frame[metric.key].tolist())
    return Value(mean * metric.scale, sd * metric.scale, n, metric) if n else None


def shown(mean: float, metric: Metric) -> str:
    """As printed: two methods that print the same number are equally good."""
    return f"{mean:.{metric.digits}f}"
