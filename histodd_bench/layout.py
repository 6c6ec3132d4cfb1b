"""From records to grids of cells: which rows and columns a table has, and the notes below it. No format, no computing."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from histodd_bench import paper, results
from histodd_bench.methods import all_methods
from histodd_bench.results import Record
from histodd_bench.tables import Column, Metric, Table


@dataclass(frozen=True)
class Value:
    """One number of a table: mean, sd and n over seeds.

    Attributes:
        metric: how it is printed.
        best: the best of its row.
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


Cell = Value | str | None  # None: nothing there yet


@dataclass
class Row:
    """One row: the block it belongs to, images per class, Ratio%, and a cell for each column."""

    block: str
    ipc: str
    ratio: str
    cells: list[Cell]
    source: str = "ours"


@dataclass
class Grid:
    """One table of one data set, protocol and network."""

    title: str
    dataset: str
    arch: str
    columns: list[str]
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def grids(
    table: Table, records: Sequence[Record], plan: Mapping[str, Mapping[str, Sequence[Any]]] | None = None
) -> list[Grid]:
    """The grids of a table: one for each data set, protocol (what results must share to be compared) and network."""
    frame = results.to_frame(records)
    made = []
    for (dataset, _, arch, _), part in frame.groupby(["dataset", "protocol", "arch", "width"], dropna=False, sort=True):
        rows = [r for r, keep in zip(records, frame.index.isin(part.index), strict=True) if keep]
        made.append(_grid(table, str(dataset), str(arch), part, rows, (plan or {}).get(str(dataset), {})))
    return made


def _grid(
    table: Table, dataset: str, arch: str, part: pd.DataFrame, records: list[Record], asked: Mapping[str, Sequence[Any]]
) -> Grid:
    config, data = records[0]["config"], records[0]["data"]
    width = config["eval"].get("width")
    label = f"{dataset} (procedural data)" if data["procedural"] else dataset
    network = arch if width is None else f"{arch} (width {width})"
    columns = _columns(table, part)
    grid = Grid(f"{table.title}: {label}, {network}", dataset, network, [title for title, _ in columns])
    budgets = sorted({int(i) for i in part["ipc"].dropna()} | {int(i) for i in asked.get("ipc", ())})
    for metric in table.metrics:
        if metric.key not in part.columns or part[metric.key].isna().all():
            continue
        whole = next((v for _, c in columns for v in [_value(c, None, metric)] if v is not None), None)
        for i, ipc in enumerate(budgets or [None]):
            cells: list[Cell] = [
                _value(c, ipc, metric) or (_value(c, None, metric) if i == 0 else "") for _, c in columns
            ]
            cells = [_blank(c, column) for c, (_, column) in zip(cells, columns, strict=True)]
            grid.rows.append(
                Row(
                    metric.title,
                    "" if ipc is None else str(ipc),
                    _ratio(ipc, data),
                    _finish(cells, metric, whole, bool(ipc)),
                )
            )
            if metric is table.metrics[0]:
                grid.rows += _paper_row(table, dataset, metric, ipc, i == 0, grid.columns)
    grid.notes = _notes(table, records, part)
    return grid


def _columns(table: Table, part: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """Titles and records of the columns: the table's, then other methods; several variants of one stand side by side."""
    declared = list(table.columns)
    named = {c.method for c in declared}
    known = all_methods()
    declared += [Column(known[m].title if m in known else m, m) for m in sorted(set(part["method"]) - named)]
    columns = []
    for column in declared:
        rows = part[part["method"] == column.method]
        if column.fields:
            wanted = {k: json.loads(json.dumps(v)) for k, v in column.fields.items()}
            rows = rows[[wanted.items() <= json.loads(v).items() for v in rows["variant"]]]
        labels = pd.Series("", index=rows.index)
        for _, same in rows.groupby("ipc", dropna=False):
            variants = {text: json.loads(text) for text in same["variant"].unique()}
            differing = sorted(
                {k for v in variants.values() for k in v if len({json.dumps(o.get(k)) for o in variants.values()}) > 1}
            )
            for text, fields in variants.items():
                labels[same.index[same["variant"] == text]] = ", ".join(f"{k}={fields.get(k)}" for k in differing)
        for text in sorted(labels.unique()) or [""]:
            columns.append((f"{column.title} ({text})" if text else column.title, rows[labels == text]))
    return columns


def _value(rows: pd.DataFrame, ipc: int | None, metric: Metric) -> Value | None:
    chosen = rows[rows["ipc"].isna() if ipc is None else (rows["ipc"] == ipc).fillna(False)]
    mean, sd, n = results.aggregate(chosen[metric.key].tolist())
    return Value(mean * metric.scale, sd * metric.scale, n, metric) if n else None


def _blank(cell: Cell, rows: pd.DataFrame) -> Cell:
    """Where a number means nothing (the whole set below its first row, its selection time) a cell is empty; else a gap."""
    is_whole = len(rows) > 0 and rows["ipc"].isna().all()
    return "" if cell in ("", None) and is_whole else (None if cell == "" else cell)


def _finish(cells: list[Cell], metric: Metric, whole: Value | None, budgeted: bool) -> list[Cell]:
    """Mark the best method with a budget, and how many times smaller than the whole set each number is."""
    numbers = [c for c in cells if isinstance(c, Value)]
    ranked = [c.mean for c in numbers if c is not whole and not _same(c, whole)]
    finished: list[Cell] = []
    for cell in cells:
        if isinstance(cell, Value) and not _same(cell, whole):
            best = (
                metric.best
                and budgeted
                and len(ranked) > 1
                and _shown(cell.mean, metric) == _shown(max(ranked), metric)
            )
            times = whole.mean / cell.mean if metric.times and whole is not None and cell.mean > 0 else None
            cell = Value(cell.mean, cell.sd, cell.n, metric, best, times)
        finished.append(cell)
    return finished


def _shown(mean: float, metric: Metric) -> str:
    """As printed: two methods that print the same number are equally good."""
    return f"{mean:.{metric.digits}f}"


def _same(a: Value, b: Value | None) -> bool:
    return b is not None and (a.mean, a.n) == (b.mean, b.n)


def _ratio(ipc: int | None, data: Mapping[str, Any]) -> str:
    if ipc is None:
        return ""
    percent = 100 * ipc * len(data["classes"]) / data["train_patches"]
    return f"{percent:.1f}" if percent >= 1 else f"{percent:.2g}"


def _paper_row(
    table: Table, dataset: str, metric: Metric, ipc: int | None, first: bool, columns: list[str]
) -> list[Row]:
    """The paper's numbers for this data set and budget, where it has them."""
    cells: list[Cell] = []
    for title in columns:
        printed = table.paper.get((dataset, ipc, title)) or (table.paper.get((dataset, None, title)) if first else None)
        cells.append(Value(*printed.value, 0, metric, printed=printed) if printed and ipc else "")
    if not any(cells):
        return []
    assert ipc is not None
    return [Row(metric.title, str(ipc), table.paper_ratio.get((dataset, ipc), ""), cells, source="paper")]


def _notes(table: Table, records: list[Record], part: pd.DataFrame) -> list[str]:
    """What a reader must know: networks, budget, stain policy, seeds, device, data."""
    config, data = records[0]["config"], records[0]["data"]
    evaluation = config["eval"]
    dataset = config["data"]["name"]
    notes = []
    if data["procedural"]:
        notes.append(f"{dataset} is procedural: its pictures are computer-made; nothing here is about patients.")
    size = config["data"]["image_size"]
    width = evaluation.get("width")
    pools = {json.dumps(r["config"]["set"]["pool"], sort_keys=True) for r in records if r["config"]["set"].get("pool")}
    budget = (
        f"{evaluation['epochs']} epochs" if evaluation.get("epochs") is not None else f"{evaluation['steps']} steps"
    )
    notes.append(
        f"Evaluated on {evaluation['arch']}{'' if width is None else f' (width {width})'} at {size} px: {budget} for every method, "
        f"Full included; SGD {evaluation['lr']} / {evaluation['momentum']} / {evaluation['weight_decay']}, batch "
        f"{evaluation['batch_size']}; augmentation {', '.join(evaluation['augment']) or 'none'}; class sampling "
        f"{'balanced' if evaluation['balanced'] else 'natural'}; the last epoch is scored."
    )
    for pool in (json.loads(p) for p in sorted(pools)):
        long = f"{pool['epochs']} epochs" if pool.get("epochs") is not None else f"{pool.get('steps')} steps"
        wide = "" if pool.get("width") is None else f" (width {pool['width']})"
        notes.append(f"Distilled on {pool['arch']}{wide}: {pool['networks']} networks, pre-trained for {long}.")
    notes += _stain_notes(records)
    selection = part["distill_seed"].dropna().nunique()
    notes.append(
        f"mean ± standard deviation (n) over at most {selection} selection or distillation seeds x "
        f"{part['eval_seed'].nunique()} evaluation seeds; Full has evaluation seeds only. - = not computed yet."
    )
    notes.append("Ratio % = images per class x classes / training patches. Best method with a budget in bold.")
    devices = sorted({f"{r['environment']['device']}, {r['environment']['threads']} threads" for r in records})
    notes.append(f"Times on {'; '.join(devices)}: the median epoch after the first; (xN) = N times less than Full.")
    notes.append(
        f"Data: {data['train_patches']} training patches of {data['train_groups']} slides or patients, {data['test_patches']} test "
        f"patches of {data['test_groups']}; classes {', '.join(data['classes'])}."
    )
    notes += [f"{dataset}: {note}" for note in data["notes"]]
    if any(key[0] == dataset for key in table.paper):
        notes.append(
            f"'paper': as printed in the paper for {paper.DATASETS.get(dataset, dataset)}, on {table.paper_arch}."
        )
    return notes


def _stain_notes(records: list[Record]) -> list[str]:
    seen: dict[str, str] = {}
    for record in records:
        recipe, policy = record["config"]["eval"], record.get("stain") or {}
        line = (
            f"Stain normalisation: training probability {recipe['stain_train']:g}, at test {'yes' if recipe['stain_test'] else 'no'}, "
            f"the same for every method ({policy.get('chosen', 'not recorded')}"
        )
        scores = policy.get("scores") or {}
        numbers = {k: v for k, v in scores.items() if isinstance(v, int | float) and math.isfinite(v)}
        line += (": " + ", ".join(f"{k} {v:.3f}" for k, v in numbers.items()) if numbers else "") + ")."
        seen.setdefault(line, line)
    return list(seen)
