"""``compare``: what differs between two runs, in configuration and in every cell. Nothing is computed but differences."""

import csv
import io
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from histodd_bench import bootstrap, results
from histodd_bench.errors import HistoddError
from histodd_bench.grid import network
from histodd_bench.results import Record, aggregate, finite, flat_config

METRICS = {  # key in a record -> heading, scale; differences are in these units
    "accuracy": ("accuracy, points", 100.0),
    "balanced_accuracy": ("balanced accuracy, points", 100.0),
    "auc": ("macro AUC, points", 100.0),
    "epoch_seconds": ("seconds per epoch", 1.0),
}
_LEFT_OUT = ("set.seed", "eval.seed", "set.memory")  # seeds, and what repeats them


@dataclass(frozen=True)
class Change:
    """One metric of one cell in both runs; means over seeds, B less A, and its 95 % interval (NaN: not to be had).

    Attributes:
        how: ``slides, paired``: the same test slides drawn again for both; ``slides``: different test sets; ``seeds``: from
            the standard deviations over seeds.
    """

    cell: str
    metric: str
    a: float
    b: float
    n_a: int
    n_b: int
    difference: float
    low: float
    high: float
    how: str

    @property
    def clear(self) -> bool:
        """Whether the interval excludes zero."""
        return self.low > 0 or self.high < 0


@dataclass
class Comparison:
    """What differs.

    Attributes:
        configuration: field -> pairs of values in A and B, each with the cells it was seen in.
        changes: every cell that both runs have.
        only_a, only_b: cells of one run alone.
        same: cells whose records are the very same configuration in both.
    """

    names: tuple[str, str]
    configuration: dict[str, dict[tuple[str, str], int]] = field(default_factory=dict)
    changes: list[Change] = field(default_factory=list)
    only_a: list[str] = field(default_factory=list)
    only_b: list[str] = field(default_factory=list)
    same: int = 0


Group = tuple[dict[str, Any], list[Record], str]  # configuration without seeds, its records, where it stands in a table


def compare(run_a: Path, run_b: Path) -> Comparison:
    """Compare two run folders.

    Cells are matched by data set, network, method and images per class; where a run has several of these, the pairs whose
    configurations differ least.

    Raises:
        HistoddError: a folder is missing or holds no results.
    """
    made = Comparison((str(run_a), str(run_b)))
    sides = [_grouped(run) for run in (run_a, run_b)]
    for place in dict.fromkeys([*sides[0], *sides[1]]):
        left, right = list(sides[0].get(place, [])), list(sides[1].get(place, []))
        tell = len(left) > 1 or len(right) > 1
        shared = _shared(left + right)
        for a, b in _pairs(left, right):
            differing = {k for k in a[0].keys() | b[0].keys() if a[0].get(k) != b[0].get(k)}
            for name in sorted(differing):
                pair = json.dumps(a[0].get(name)), json.dumps(b[0].get(name))
                counts = made.configuration.setdefault(name, {})
                counts[pair] = counts.get(pair, 0) + 1
            made.same += not differing
            name = _named(place, b, shared if tell else None)
            made.changes += _changes(name, a[1], b[1])
            left.remove(a)
            right.remove(b)
        made.only_a += [_named(place, g, shared if tell else None) for g in left]
        made.only_b += [_named(place, g, shared if tell else None) for g in right]
    return made


def _grouped(run: Path) -> dict[tuple[str, ...], list[Group]]:
    if not run.is_dir():
        raise HistoddError(f"no results in {run}: give the folder that --out named")
    records, _ = results.read_records(run)
    if not records:
        raise HistoddError(f"no results in {run} yet")
    places = {
        key: f"{table}: {', '.join(t for t in where[0] if t)}"
        for table, part in results.read_plan(run).items()
        for asked in part.values()
        for key, where in asked.get("cells", {}).items()
    }
    found: dict[tuple[str, ...], dict[str, Group]] = {}
    for r in records:
        budget = "" if r["ipc"] is None else f"{r['ipc']} per class"
        flat = {k: v for k, v in flat_config(r["config"]).items() if k not in _LEFT_OUT}
        groups = found.setdefault((r["dataset"], r["arch"], r["method"], budget), {})
        groups.setdefault(json.dumps(flat, sort_keys=True), (flat, [], places.get(r["key"], "")))[1].append(r)
    return {place: list(groups.values()) for place, groups in found.items()}


def _pairs(left: Sequence[Group], right: Sequence[Group]) -> list[tuple[Group, Group]]:
    """Groups of both sides, the most alike first; each at most once."""

    def distance(a: Group, b: Group) -> int:
        return sum(a[0].get(k) != b[0].get(k) for k in a[0].keys() | b[0].keys())

    ranked = sorted(
        ((distance(a, b), i, j) for i, a in enumerate(left) for j, b in enumerate(right)), key=lambda t: t
    )  # fmt: skip
    used_a: set[int] = set()
    used_b: set[int] = set()
    chosen = []
    for _, i, j in ranked:
        if i not in used_a and j not in used_b:
            used_a.add(i)
            used_b.add(j)
            chosen.append((i, j))
    return [(left[i], right[j]) for i, j in sorted(chosen)]


def _shared(groups: Sequence[Group]) -> set[str]:
    """Fields that all groups agree on."""
    return {k for k in groups[0][0] if all(g[0].get(k) == groups[0][0][k] for g in groups)}


def _named(place: tuple[str, ...], group: Group, shared: set[str] | None) -> str:
    """A cell in words; where there are several of a kind, with its place in a table or what sets it apart."""
    (dataset, arch, method, budget), (config, _, where) = place, group
    text = ", ".join(t for t in (dataset, network(arch, config.get("eval.width")), method, budget) if t)
    if shared is None:
        return text
    own = {k: v for k, v in config.items() if k not in shared and not k.startswith(("data.train", "data.test"))}
    told = where or ", ".join(f"{k}={json.dumps(v)}" for k, v in sorted(own.items()) if k != "eval.width")
    return f"{text} ({told})" if told else text


def _changes(cell: str, a: list[Record], b: list[Record]) -> list[Change]:
    found = []
    for metric, (title, scale) in METRICS.items():
        (mean_a, sd_a, n_a), (mean_b, sd_b, n_b) = (
            aggregate([r["metrics"].get(metric) for r in side]) for side in (a, b)
        )
        if not n_a or not n_b:
            continue
        low = high = math.nan
        how = ""
        drawn = bootstrap.difference(b, a, metric) if metric in bootstrap.METRICS else None
        if drawn is not None and math.isfinite(drawn.low):
            low, high, how = drawn.low, drawn.high, "slides, paired" if drawn.paired else "slides"
        elif n_a > 1 and n_b > 1:
            half = 1.96 * math.sqrt(sd_a**2 / n_a + sd_b**2 / n_b)
            low, high, how = mean_b - mean_a - half, mean_b - mean_a + half, "seeds"
        numbers = (mean_a, mean_b), (mean_b - mean_a, low, high)
        (mean_a, mean_b), (difference, low, high) = (tuple(x * scale for x in part) for part in numbers)  # type: ignore[misc]
        found.append(Change(cell, title, mean_a, mean_b, n_a, n_b, difference, low, high, how))
    return found


# ---- as text ---------------------------------------------------------------------------------------------------------

_HEADS = ("Cell", "Metric", "A", "B", "B less A", "95 % interval", "from")


def _cells(change: Change) -> list[str]:
    digits = 3 if "second" in change.metric else 1
    interval = "" if math.isnan(change.low) else f"[{change.low:+.{digits}f}, {change.high:+.{digits}f}]"
    return [
        change.cell,
        change.metric,
        f"{change.a:.{digits}f} ({change.n_a})",
        f"{change.b:.{digits}f} ({change.n_b})",
        f"{change.difference:+.{digits}f}{' *' if change.clear else ''}",
        interval,
        change.how,
    ]


def _summary(made: Comparison) -> list[str]:
    lines = [f"A: {made.names[0]}", f"B: {made.names[1]}"]
    lines.append(
        f"{made.same} cells have the same configuration in both."
        if made.same
        else "No cell has the same configuration in both."
    )
    for name, pairs in made.configuration.items():
        for (a, b), count in pairs.items():
            lines.append(f"{name}: {_short(a)} -> {_short(b)} ({count} cell{'s' if count > 1 else ''})")
    lines += [f"only in A: {name}" for name in made.only_a]
    lines += [f"only in B: {name}" for name in made.only_b]
    return lines


def _short(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."


_KEY = "(n) = records; * = the interval excludes zero; from: what was drawn again, or the spread over seeds."


def rich(made: Comparison) -> str:
    """For a terminal."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    stream = io.StringIO()
    console = Console(file=stream, width=400)
    for line in _summary(made):
        console.print(Text(line))
    table = Table()
    for i, head in enumerate(_HEADS):
        table.add_column(Text(head), justify="left" if i < 2 else "right")
    for i, change in enumerate(made.changes):
        last = i + 1 == len(made.changes) or made.changes[i + 1].cell != change.cell
        cells = _cells(change)
        cells[0] = "" if i and made.changes[i - 1].cell == change.cell else cells[0]
        table.add_row(*map(Text, cells), end_section=last)
    console.print(table)
    console.print(Text(_KEY))
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines()) + "\n"


def markdown(made: Comparison) -> str:
    """A list of what changed and a table of every cell."""
    from histodd_bench.render import safe

    lines = [f"- {safe(line)}" for line in _summary(made)]
    lines += ["", "| " + " | ".join(_HEADS) + " |", "|:--|:--|--:|--:|--:|--:|:--|"]
    lines += ["| " + " | ".join(safe(c) for c in _cells(change)) + " |" for change in made.changes]
    return "\n".join([*lines, "", f"- {safe(_KEY)}", ""])


def as_csv(made: Comparison) -> str:
    """One line per cell and metric, with full precision."""
    from histodd_bench.render import plain

    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["cell", "metric", "a", "b", "n_a", "n_b", "difference", "low", "high", "from"])
    for c in made.changes:
        ends = ["" if math.isnan(v) else repr(v) for v in (c.low, c.high)]
        writer.writerow([plain(c.cell), c.metric, repr(c.a), repr(c.b), c.n_a, c.n_b, repr(c.difference), *ends, c.how])
    return stream.getvalue()


def as_json(made: Comparison) -> str:
    """Everything."""
    fields = {
        n: [{"a": json.loads(a), "b": json.loads(b), "cells": k} for (a, b), k in p.items()]
        for n, p in made.configuration.items()
    }
    whole = {
        "a": made.names[0], "b": made.names[1], "same": made.same, "configuration": fields,
        "changes": [asdict(c) for c in made.changes], "only_a": made.only_a, "only_b": made.only_b,
    }  # fmt: skip
    return json.dumps(finite(whole), indent=1, allow_nan=False) + "\n"


FORMATS: dict[str, Callable[[Comparison], str]] = {
    "rich": rich,
    "markdown": markdown,
    "csv": as_csv,
    "json": as_json,
}
