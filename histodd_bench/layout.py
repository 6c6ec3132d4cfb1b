"""From records to grids of cells: which rows and columns a table has. No format, no computing."""

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from typing import Any

import pandas as pd

from histodd_bench import bootstrap, results
from histodd_bench.files import digest, plain
from histodd_bench.grid import Cell, Grid, Interval, Row, Value, labelled, network, shown, value
from histodd_bench.methods import all_methods, method_entry
from histodd_bench.notes import notes
from histodd_bench.results import Record
from histodd_bench.tables import Metric, SlideTable, Table, Times
from histodd_bench.titles import configuration, group_titles

Asked = Mapping[str, Any]  # what the plan says of one table and data set


def grids(
    table: Table,
    records: Sequence[Record],
    plan: Mapping[str, Asked] | None = None,
    elsewhere: Collection[str] = (),
) -> list[Grid]:
    """The grids of a table: one for each data set, protocol (what results must share to be compared) and network.

    Args:
        table: the declaration.
        records: of any tables.
        plan: data set -> what was asked of this table, see :func:`histodd_bench.results.write_plan`.
        elsewhere: keys of records that only other tables asked for.
    """
    plan = plan or {}
    if table.kind == "statistics":
        return [_statistics(table, name, asked["facts"]) for name, asked in plan.items() if "facts" in asked]
    if isinstance(table, SlideTable):
        module, _, name = table.layout.partition(":")
        slide_level: list[Grid] = getattr(import_module(module), name)(table, records, plan)
        return slide_level
    placed = [(r, row, title) for r in records if r["key"] not in elsewhere for row, title in _places(table, r, plan)]
    frame = results.to_frame([r for r, _, _ in placed])
    frame["row"], frame["title"] = [row for _, row, _ in placed], [title for _, _, title in placed]
    varied, other_data = table.varied("eval"), bool(table.varied("data"))
    frame["protocol"] = [results.protocol(r["config"], varied, other_data) for r, _, _ in placed]
    _derive(frame)
    by = ["dataset", "protocol", *(["arch", "width"] if table.across == "methods" else [])]
    made, groups = [], []
    for (dataset, *_), part in frame.groupby(by, dropna=False, sort=True):
        rows = {i: placed[i][0] for i in part.index}
        made.append(_Builder(table, str(dataset), part.copy(), rows, plan.get(str(dataset), {})).grid())
        groups.append(list(rows.values()))

    def shared(r: Record) -> dict[str, Any]:
        of = results.shared(r["config"], varied, other_data)
        data = {k: digest(v) if isinstance(v, list) else v for k, v in of["data"].items()}  # of each stage
        return {**of, "data": data, "folder": r["data"].get("folder")}

    own = {group[0]["key"]: grid.title for group, grid in zip(groups, made, strict=True)}
    for grid, title in zip(made, group_titles(groups, lambda r: own[r["key"]], shared), strict=True):
        grid.title, grid.configuration = title, configuration(title, grid.title)
    return made


def _places(table: Table, record: Record, plan: Mapping[str, Asked]) -> list[tuple[str, str]]:
    """Where a record stands: as the plan says, or in every column whose method and fields it has."""
    asked = plan.get(record["dataset"], {}).get("cells", {}).get(record["key"])
    if asked:
        return [(row, title) for row, title in asked]
    method, config = record["method"], record["config"]
    if "level" in config:  # of a slide-level table
        return []
    stages = config["set"].get("stages")
    if (stages is not None) != (table.kind == "sequence"):
        return []
    if method not in {c.method for c in table.columns}:
        known = all_methods()
        return [("", known[method].title if method in known else method)]
    if stages is not None:
        row = stage_row(stages, record["dataset"].split(SEQUENCE))
        return [(row, c.title) for c in table.columns if c.method == method]
    fields = config["set"].get("fields") or {}
    sections = {method: fields, "pool": config["set"].get("pool") or {}, "eval": config["eval"], "data": config["data"]}
    prepared = {k: config["data"][k] for k in table.varied("data") if k in config["data"]}
    return [
        (c.row.format(**fields) if "{" in c.row else c.row, c.title)
        for c in table.columns
        if c.method == method
        and prepared == dict(c.fields.get("data", {}))
        and all(_agrees(wanted, sections.get(s, {})) for s, wanted in c.fields.items())
    ]


def _agrees(wanted: Mapping[str, Any], found: Mapping[str, Any]) -> bool:
    return all(k in found and found[k] == plain(v) for k, v in wanted.items() if not isinstance(v, Times))


def _derive(frame: pd.DataFrame) -> None:
    """``derived.epochs_to_pay``: seconds of making a set over what it saves in every epoch of training this network."""
    frame["derived.epochs_to_pay"] = math.nan
    needed = {"seconds.total", "metrics.epoch_seconds"}
    if not needed <= set(frame.columns):
        return
    for _, part in frame.groupby(["dataset", "protocol", "arch", "width"], dropna=False):
        whole = part[part["ipc"].isna()]["metrics.epoch_seconds"].astype(float).mean()
        saved = (whole - part["metrics.epoch_seconds"].astype(float)).where(lambda s: s > 0)
        frame.loc[part.index, "derived.epochs_to_pay"] = part["seconds.total"].astype(float) / saved


class _Builder:
    """Makes one grid from the part of the frame that belongs to it."""

    def __init__(
        self, table: Table, dataset: str, part: pd.DataFrame, records: Mapping[int, Record], asked: Asked
    ) -> None:
        self.table, self.dataset, self.part, self.records, self.asked = table, dataset, part, records, asked
        self.first = next(iter(records.values()))
        self.archs = table.across == "archs"
        if self.archs:
            row = part["row"].where(part["row"] == "", ", " + part["row"])
            part["row"] = part["title"] + row
            names = list(zip(part["arch"], part["width"], strict=True))
            part["title"] = [network(a, None if pd.isna(w) else int(w)) for a, w in names]
        self._tell_variants_apart()
        self.rows, self.titles = self._labels("row"), self._labels("title")
        self.budgets = sorted({int(i) for i in part["ipc"].dropna()} | {int(i) for i in asked.get("ipc", ())})
        self.whole = {
            (r, t) for (r, t), same in part.groupby(["row", "title"], sort=False) if same["ipc"].isna().all()
        }  # fmt: skip
        self.values: dict[tuple[str, int | None, str], dict[str, Value]] = {}
        self.cell_records: dict[tuple[str, int | None, str], list[Record]] = {}
        for (row, ipc, title), same in part.groupby(["row", "ipc", "title"], dropna=False, sort=False):
            place = str(row), None if pd.isna(ipc) else int(ipc), str(title)
            self.cell_records[place] = [records[i] for i in same.index]
            self.values[place] = {m.key: v for m in table.metrics for v in [value(same, m)] if v is not None}

    def _tell_variants_apart(self) -> None:
        """Several variants of one method at one place stand side by side, under what tells them apart."""
        part, name = self.part, "row" if self.archs else "title"
        labels = pd.Series("", index=part.index)
        for _, same in part.groupby(["row", "title", "ipc"], dropna=False):
            variants = {text: json.loads(text) for text in same["variant"].unique()}
            differing = sorted(
                {k for v in variants.values() for k in v if len({json.dumps(o.get(k)) for o in variants.values()}) > 1}
            )
            for text, fields in variants.items():
                labels[same.index[same["variant"] == text]] = ", ".join(f"{k}={fields.get(k)}" for k in differing)
        part["plain"] = part[name]
        part[name] = part[name].where(labels == "", part[name] + " (" + labels + ")")

    def _labels(self, name: str) -> list[str]:
        """Rows or columns in order: as declared, each with its variants, then others, the whole training set last."""
        present = list(dict.fromkeys(self.part[name]))
        if self.archs:
            if name == "title":
                order = list(self.asked.get("archs", ()))
                return sorted(present, key=lambda t: order.index(t) if t in order else len(order))
            declared = [c.title for c in self.table.columns]
        elif name == "title":
            declared = [c.title for c in self.table.columns]
        else:
            declared = self.asked.get("rows") or [c.row for c in self.table.columns if "{" not in c.row]
        if name == "row" and not self.archs:
            return list(dict.fromkeys([*declared, *present]))
        plain = dict(zip(self.part[name], self.part["plain"], strict=True))
        ordered: list[str] = []
        for title in dict.fromkeys(declared):
            ordered += sorted(t for t in present if plain[t] == title) or [title]
        whole = {c.title for c in self.table.columns if method_entry(c.method).whole}
        last = [t for t in ordered if plain.get(t, t) in whole]
        first = [t for t in ordered if t not in last]
        return first + sorted(t for t in present if t not in ordered) + last

    def grid(self) -> Grid:
        config, data = self.first["config"], self.first["data"]
        label = labelled(self.dataset, data["procedural"])
        arch = "several networks" if self.archs else network(config["eval"]["arch"], config["eval"].get("width"))
        title = f"{self.table.title}: {label}" + ("" if self.archs else f", {arch}")
        made = Grid(title, self.dataset, arch, list(self.titles), procedural=data["procedural"])
        made.head = "Method" if self.archs else "" if self.rows == [""] else "Setting"
        for metric in self.table.metrics:
            if not any(metric.key in v for v in self.values.values()):
                continue
            made.rows += self._block(metric)
            if metric.interval:
                made.rows += self._intervals(metric)
        differences = any(isinstance(c, Interval) for r in made.rows for c in r.cells)
        made.notes = notes(self.table, self.dataset, list(self.records.values()), self.part, differences)
        order = {name: i for i, name in enumerate([*self.rows, *self.titles])}
        for (row, ipc, title), values in sorted(self.values.items(), key=lambda v: (order[v[0][2]], order[v[0][0]])):
            panel, name = (title, row) if self.archs else (row, title)
            made.series.setdefault(panel, {}).setdefault(name, {})[ipc] = values
        return made

    def _block(self, metric: Metric) -> list[Row]:
        rows: list[Row] = []
        for r, label in enumerate(self.rows):
            budgets: list[int | None] = list(self.budgets) or [None]
            if self.archs and all((label, t) in self.whole or (label, t) not in self._known for t in self.titles):
                budgets = [None]
            for i, ipc in enumerate(budgets):
                cells = [self._cell(metric, label, ipc, title, i == 0) for title in self.titles]
                if self.archs and all(c in ("", None) for c in cells) and label not in self._present:
                    continue
                ratio = "100" if self.archs and ipc is None else _ratio(ipc, self.first["data"])
                rows.append(Row(metric.title, "" if ipc is None else str(ipc), ratio, cells, label=label))
                rows += self._paper(metric, label, r == 0, ipc, i == 0)
        return rows

    @property
    def _known(self) -> set[tuple[str, str]]:
        return {(row, title) for row, _, title in self.values}

    @property
    def _present(self) -> set[str]:
        return {row for row, _, _ in self.values}

    def _cell(self, metric: Metric, row: str, ipc: int | None, title: str, first: bool) -> Cell:
        value = self.values.get((row, ipc, title), {}).get(metric.key)
        whole_set = self.values.get((row, None, title), {}).get(metric.key)
        if value is None and first and not self.archs and whole_set is not None:
            return whole_set
        if value is None:
            # Where a number means nothing (the whole set below its first row, its selection time) a cell is empty; else a gap.
            return "" if (row, title) in self.whole or (row, ipc, title) in self.values else None
        if ipc is None:
            return value
        whole = self._whole_value(metric, row, title)
        times = whole.mean / value.mean if metric.times and whole is not None and value.mean > 0 else None
        rivals = self._rivals(metric, row, ipc, title)
        best = metric.best and len(rivals) > 1 and shown(value.mean, metric) == shown(max(rivals), metric)
        return replace(value, best=best, times=times)

    def _whole_value(self, metric: Metric, row: str, title: str) -> Value | None:
        for place, values in self.values.items():
            if place[1] is None and (place[2] == title if self.archs else place[0] == row) and metric.key in values:
                return values[metric.key]
        return None

    def _rivals(self, metric: Metric, row: str, ipc: int, title: str) -> list[float]:
        """Numbers of the methods that compete for being the best: those of the row, or of the network."""
        return [
            v[metric.key].mean
            for (r, i, t), v in self.values.items()
            if i == ipc and (t == title if self.archs else r == row) and metric.key in v
        ]

    def _intervals(self, metric: Metric) -> list[Row]:
        """Every distilled set less the best coreset of the same budget (and network)."""
        known = all_methods()

        def kind(place: tuple[str, int | None, str]) -> str:
            entry = known.get(self.cell_records[place][0]["method"])
            return "" if entry is None or entry.whole else "distilled" if entry.synthetic else "coreset"

        found: dict[tuple[str, int, str], Interval] = {}
        for place in self.values:
            row, ipc, title = place
            if ipc is None or kind(place) != "distilled" or metric.key not in self.values[place]:
                continue
            rivals = [
                p
                for p, v in self.values.items()
                if p[1] == ipc and kind(p) == "coreset" and metric.key in v
                and (p[2] == title if self.archs else p[0] == row)
            ]  # fmt: skip
            if not rivals:
                continue
            means = {p: self.values[p][metric.key].mean for p in (place, *rivals)}
            best = max(rivals, key=means.__getitem__)
            name = metric.key.removeprefix("metrics.")
            made = bootstrap.difference(self.cell_records[place], self.cell_records[best], name)
            if made is not None:
                low, high = made.low * metric.scale, made.high * metric.scale  # of predictions as records keep them: rounded
                against = best[0] if self.archs else best[2]
                found[row, ipc, title] = Interval(means[place] - means[best], low, high, against)
        block = f"{metric.title.removesuffix(' %')}, points above the best coreset"
        places = dict.fromkeys((row, ipc) for row, ipc, _ in found)
        ordered = sorted(places, key=lambda p: (self.rows.index(p[0]), p[1]))
        return [
            Row(block, str(ipc), _ratio(ipc, self.first["data"]), [found.get((row, ipc, t), "") for t in self.titles], label=row)
            for row, ipc in ordered
        ]  # fmt: skip

    def _paper(self, metric: Metric, label: str, first_row: bool, ipc: int | None, first: bool) -> list[Row]:
        """The paper's numbers for this data set and budget, where it has them."""
        table, cells = self.table, list[Cell]()
        if self.archs:
            if metric.key not in (table.metrics[0].key, "metrics.epoch_seconds") or label not in ("Histo-DD", "Full"):
                return []
            for title in self.titles:
                both = table.paper_archs.get((self.dataset, ipc, title.partition(" ")[0]))
                printed = Value(*both[0].value, 0, metric, printed=both[0]) if both else ""
                cells.append(both[1] if both and metric.key == "metrics.epoch_seconds" else printed)
        elif metric is table.metrics[0] and first_row and ipc is not None:
            for title in self.titles:
                number = table.paper.get((self.dataset, ipc, title))
                number = number or (table.paper.get((self.dataset, None, title)) if first else None)
                cells.append(Value(*number.value, 0, metric, printed=number) if number else "")
        if not any(cells):
            return []
        ratio = table.paper_ratio.get((self.dataset, ipc), "") if ipc is not None else "100"
        return [Row(metric.title, "" if ipc is None else str(ipc), ratio, cells, source="paper", label=label)]


SEQUENCE = " > "  # between the names of data sets that arrive one after the other


def stage_row(stages: int, names: Sequence[str]) -> str:
    """Label of the row of a stage: its number and the data set that was added."""
    return f"{stages}. {'+ ' if stages > 1 else ''}{names[stages - 1]}"


def _ratio(ipc: int | None, data: Mapping[str, Any]) -> str:
    if ipc is None:
        return ""
    percent = 100 * ipc * len(data["classes"]) / data["train_patches"]
    return f"{percent:.1f}" if percent >= 1 else f"{percent:.2g}"


_COUNT = Metric("", "", digits=0, spread=False)


def _statistics(table: Table, dataset: str, facts: Mapping[str, Any]) -> Grid:
    """Counts of a data set: one row for everything and one for each class; the paper's below, where it has them."""
    columns = ["Training patches", "Test patches", "Training slides", "Test slides"]
    title = f"{table.title}: {labelled(dataset, facts['procedural'])}"
    made = Grid(title, dataset, "", columns, head="Class", budgets=False, procedural=facts["procedural"])
    for name, counts in facts["counts"].items():
        cells: list[Cell] = [Value(count, math.nan, 1, _COUNT) for count in counts]
        made.rows.append(Row("", "", "", cells, label=name))
        printed = [table.paper.get((dataset, None, c)) for c in columns]
        if len(made.rows) == 1 and all(printed):
            made.rows.append(Row("", "", "", [p.mean for p in printed if p], source="paper", label=name))
    made.notes = [*facts["notes"], *table.remarks]
    return made
