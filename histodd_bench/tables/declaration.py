"""What a table is: a declaration of columns, rows and reference numbers; running and rendering are elsewhere."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from histodd_bench.paper import Printed

OPERATIONS = ("stain", "flip", "rotate", "scale")  # of the Siamese augmentation; its own module needs torch
Kind = Literal["cells", "statistics", "sequence", "slides"]
Fields = Mapping[str, Mapping[str, Any]]  # section (a method, "pool", "eval" or "data") -> field -> value


@dataclass(frozen=True)
class Times:
    """A value relative to the one that preset and command line give: 0.5 is half of it; whole numbers stay whole."""

    factor: float

    def of(self, value: float) -> float:
        """The value that the field takes."""
        return max(1, round(value * self.factor)) if isinstance(value, int) else value * self.factor


@dataclass(frozen=True)
class Column:
    """One place of a table: a column, a method, and what sets it apart from the method's other places.

    Attributes:
        title: heading of the column.
        method: a method's name.
        fields: fields that this place fixes, by section; they win over preset and command line. ``data`` knows
            ``stain_pre``: the training patches are stain-normalised before anything else sees them.
        row: label of the row, where a table has several; ``{name}`` becomes the method's field of that name.
    """

    title: str
    method: str
    fields: Fields = field(default_factory=dict)
    row: str = ""


@dataclass(frozen=True)
class Metric:
    """One block of rows.

    Attributes:
        title: heading, with unit.
        key: dotted path in a record, e.g. ``metrics.accuracy``; ``derived.*`` follows from several records.
        scale: multiplies what records hold: 100 turns fractions into percent.
        digits: after the decimal point.
        best: mark the best method with a budget.
        times: print how many times smaller than Full it is.
        spread: print a standard deviation over the seeds.
        interval: below it, the difference of every distilled set to the best coreset, with its interval.
    """

    title: str
    key: str
    scale: float = 1.0
    digits: int = 1
    best: bool = False
    times: bool = False
    spread: bool = True
    interval: bool = False


@dataclass(frozen=True)
class Plot:
    """One plot of the report: a metric over another, one line for each column.

    Attributes:
        x, y: keys of metrics. ``x`` may also be ``ipc``; ``label``, the number in row labels such as ``K = 10``, with one
            panel for each name; or ``stage``, the number that labels begin with.
        log: a logarithmic x axis.
    """

    title: str
    x: str
    y: str
    log: bool = False


@dataclass(frozen=True)
class Table:
    """Columns x images per class x architectures x seeds, for any data set.

    Attributes:
        name, title: as on the command line, as printed.
        columns: the methods compared.
        metrics: the blocks of rows; the first is the table's headline.
        across: ``methods``: one table for each network, methods side by side; ``archs``: networks side by side, one row
            for each method.
        kind: ``cells``: trainings on sets; ``statistics``: facts about the data, nothing is trained; ``sequence``:
            trainings on memories of several data sets that arrive one after the other; ``slides``: trainings on bags of
            patches, see :class:`histodd_bench.tables.slide_level.SlideTable`.
        ipc: images per class; None where the preset decides.
        options: by preset, what the table asks instead of the preset: ``archs``, ``ipc``, ``seeds``, ``eval_seeds``, ``stain``,
            ``threads``.
        paper: numbers printed in the paper by (dataset, ipc or None, column title); shown marked as the paper's.
        paper_archs: the same where networks stand side by side, by (dataset, ipc or None, network); with seconds an epoch.
        paper_ratio: the paper's Ratio% by (dataset, ipc).
        paper_arch: the network behind the paper's numbers.
        remarks: sentences below the table.
        plots: what the report draws of it.
    """

    name: str
    title: str
    columns: tuple[Column, ...]
    metrics: tuple[Metric, ...]
    across: Literal["methods", "archs"] = "methods"
    kind: Kind = "cells"
    ipc: tuple[int, ...] | None = None
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    paper: Mapping[tuple[str, int | None, str], Printed] = field(default_factory=dict)
    paper_archs: Mapping[tuple[str, int | None, str], tuple[Printed, str]] = field(default_factory=dict)
    paper_ratio: Mapping[tuple[str, int], str] = field(default_factory=dict)
    paper_arch: str = ""
    remarks: tuple[str, ...] = ()
    plots: tuple[Plot, ...] = ()

    def varied(self, section: str) -> set[str]:
        """Fields of a section that columns set: what may differ within one table of it."""
        return {name for column in self.columns for name in column.fields.get(section, {})}
