"""From slide-level records to grids: sets of patches below each other, models side by side."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pandas as pd

from histodd_bench import paper, results
from histodd_bench.files import digest
from histodd_bench.grid import Cell, Grid, Row, Value, labelled, value
from histodd_bench.mil import MIL_MODELS
from histodd_bench.notes import SIDE_BY_SIDE, missing_classes, side_by_side
from histodd_bench.results import Record
from histodd_bench.tables.declaration import Metric
from histodd_bench.tables.slide_level import SlideTable
from histodd_bench.titles import configuration, group_titles
from histodd_bench.wording import counted

FULL, HEAD = "Full", "Set"
_OWN = ("arch", "width", "seed", "model")  # of the training configuration: what models of one table need not share


def shared_config(record: Record) -> dict[str, Any]:
    """What slide-level numbers must share to stand in one table: data, encoder and the training that all models have in common."""
    config = record["config"]
    rest = {k: v for k, v in config.items() if k not in ("eval", "set")}
    return {**rest, "eval": {k: v for k, v in config["eval"].items() if k not in _OWN}}


def own_config(record: Record) -> dict[str, Any]:
    """What the training of one model has of its own, the seed aside."""
    return {k: v for k, v in record["config"]["eval"].items() if k in _OWN and k not in ("arch", "seed")}


def column_titles(
    records: Sequence[Record], title: Callable[[Record], str], config: Callable[[Record], Mapping[str, Any]]
) -> dict[str, str]:
    """Record key -> heading of its column: trainings that differ stand side by side, under what tells them apart."""
    groups = groups_of(records, lambda r: (title(r), digest(config(r))))
    titles = group_titles(groups, title, config)
    return {r["key"]: text for text, same in zip(titles, groups, strict=True) for r in same}


def groups_of(records: Sequence[Record], key: Callable[[Record], Any]) -> list[list[Record]]:
    """Records that agree in ``key``, groups in the order of their first record."""
    found: dict[Any, list[Record]] = {}
    for record in records:
        found.setdefault(key(record), []).append(record)
    return list(found.values())


def slide_records(records: Sequence[Record], table: SlideTable) -> list[Record]:
    """Those of a slide-level table: other records may lie in the same folder."""
    return [
        r
        for r in records
        if r["config"].get("level") in ("slide", "transfer") and r["config"].get("table", "table4") == table.name
    ]


def variants(records: Sequence[Record]) -> dict[str, str]:
    """Record key -> what singles out its set among others of the same method: the fields that differ, or nothing."""
    labels = {}
    for same in groups_of(records, lambda r: (r["method"], r["ipc"])):
        fields = {r["key"]: results.variant(r["config"]) for r in same}
        names = {n for v in fields.values() for n in v}
        differing = sorted(n for n in names if len({json.dumps(v.get(n)) for v in fields.values()}) > 1)
        for key, own in fields.items():
            labels[key] = ", ".join(f"{n}={own.get(n)}" for n in differing)
    return labels


def block(
    metric: Metric, sets: Sequence[tuple[int | None, str, str]], frames: Mapping[tuple[Any, ...], pd.DataFrame],
    columns: Sequence[str], ratio: Callable[[int | None], str],
) -> list[Row]:  # fmt: skip
    """The rows of one metric.

    Args:
        sets: (images per class or None, title, variant) of every row.
        frames: rows of the frame by (column, ipc, title, variant).
        ratio: text of the column Ratio %.
    """
    rows = []
    empty = pd.DataFrame()
    cells = {(c, *s): value(frames.get((c, *s), empty), metric) for s in sets for c in columns}
    for ipc, title, variant in sets:
        row: list[Cell] = []
        for column in columns:
            cell = cells[column, ipc, title, variant]
            whole = next((cells[column, i, t, v] for i, t, v in sets if i is None and t == FULL), None)
            rivals = [cells[column, *s] for s in sets if s[0] == ipc]
            if cell is not None and ipc is not None:
                top = max(r.mean for r in rivals if r is not None)
                best = metric.best and len([r for r in rivals if r is not None]) > 1
                best = best and f"{cell.mean:.{metric.digits}f}" == f"{top:.{metric.digits}f}"
                times = whole.mean / cell.mean if metric.times and whole is not None and cell.mean > 0 else None
                cell = Value(cell.mean, cell.sd, cell.n, metric, best, times)
            # Computed, but the number means nothing there (the AUC of one class): empty; else a gap.
            row.append("" if cell is None and (column, ipc, title, variant) in frames else cell)
        budget = "" if ipc is None else str(ipc)
        rows.append(Row(metric.title, budget, ratio(ipc), row, label=f"{title} ({variant})" if variant else title))
    return rows if any(isinstance(c, Value) for r in rows for c in r.cells) else []


def paper_rows(table: SlideTable, metric: Metric, dataset: str, columns: Mapping[str, str]) -> list[Row]:
    """The paper's numbers for a data set (or source centre) below those of ours.

    Args:
        columns: title -> what the table's paper numbers call it.
    """
    texts = {
        "metrics.epoch_seconds": table.paper_seconds,
        "metrics.epochs": table.paper_epochs,
        "storage.disk_bytes": table.paper_storage,
    }.get(metric.key, {})
    rows = []
    for ipc in sorted({i for d, i, _ in table.paper_accuracy if d == dataset}, key=lambda i: (i is None, i)):
        cells: list[Cell] = []
        for name in columns.values():
            printed = table.paper_accuracy.get((dataset, ipc, name)) if metric.key == "metrics.accuracy" else None
            cells.append(
                Value(*printed.value, 0, metric, printed=printed) if printed else texts.get((dataset, ipc, name), "")
            )
        if any(c != "" for c in cells):
            budget, label = ("", FULL) if ipc is None else (str(ipc), "Histo-DD")
            rows.append(Row(metric.title, budget, "", cells, source="paper", label=label))
    return rows


def ordered_sets(
    table: SlideTable, records: Sequence[Record], labels: Mapping[str, str], asked: Mapping[str, Sequence[Any]]
) -> list[tuple[int | None, str, str]]:
    """The rows of every block: budgets ascending, in each the methods in the table's order; the whole set last."""
    methods = [c for c in table.columns if c.method != "full"]
    budgets = sorted({r["ipc"] for r in records if r["ipc"] is not None} | {int(i) for i in asked.get("ipc", ())})
    wanted = set(asked.get("methods", ())) | {r["method"] for r in records}
    rows: list[tuple[int | None, str, str]] = []
    for ipc in budgets:
        for column in methods:
            own = {labels[r["key"]] for r in records if r["method"] == column.method and r["ipc"] == ipc}
            if column.method in wanted:
                rows += [(ipc, column.title, label) for label in sorted(own) or [""]]
    return rows + ([(None, FULL, "")] if "full" in wanted else [])


def frames_of(
    table: SlideTable, records: Sequence[Record], labels: Mapping[str, str], headings: Mapping[str, str]
) -> dict[tuple[Any, ...], pd.DataFrame]:
    """The frame of records by (column, ipc, title, variant)."""
    titles = {c.method: c.title for c in table.columns} | {"none": "No transfer"}
    frame = results.to_frame(records)
    keys = [(headings[r["key"]], r["ipc"], titles.get(r["method"], r["method"]), labels[r["key"]]) for r in records]
    positions: dict[tuple[Any, ...], list[int]] = {}
    for i, key in enumerate(keys):
        positions.setdefault(key, []).append(i)
    return {key: frame.iloc[rows] for key, rows in positions.items()}


def table4_grids(
    table: SlideTable, records: Sequence[Record], plan: Mapping[str, Mapping[str, Sequence[Any]]] | None = None
) -> list[Grid]:
    """One grid per data set, encoder and common training."""
    made = []
    groups = groups_of(slide_records(records, table), lambda r: (r["dataset"], digest(shared_config(r))))

    def plain(r: Record) -> str:
        return f"{table.title}: {shown_name(r)}"

    for title, same in zip(group_titles(groups, plain, shared_config), groups, strict=True):
        first = same[0]
        data, dataset = first["data"], first["dataset"]
        labels = variants(same)
        headings = column_titles(same, lambda r: MIL_MODELS[r["arch"]].title, own_config)
        order = list(dict.fromkeys([*table.models, *sorted({r["arch"] for r in same})]))
        columns = {
            headings[r["key"]]: r["arch"]
            for r in sorted(same, key=lambda r: (order.index(r["arch"]), headings[r["key"]]))
        }
        grid = Grid(title, dataset, first["config"]["eval"]["encoder"]["title"], list(columns), head=HEAD)
        grid.procedural, grid.configuration = data["procedural"], configuration(title, plain(first))
        sets = ordered_sets(table, same, labels, (plan or {}).get(dataset, {}))
        frames = frames_of(table, same, labels, headings)
        counts = {r["ipc"]: r["storage"]["count"] for r in same if r["ipc"] is not None}

        def ratio(ipc: int | None, counts: dict[Any, int] = counts, whole: int = data["train_patches"]) -> str:
            return f"{100 * counts[ipc] / whole:.2g}" if ipc in counts else ""

        for metric in table.metrics:
            grid.rows += block(metric, sets, frames, list(columns), ratio)
            grid.rows += paper_rows(table, metric, dataset, columns)
        grid.notes = [*common_notes(same, headings), *_table4_notes(table, dataset)]
        made.append(grid)
    return made


def shown_name(record: Record) -> str:
    """The data set's name as titles have it."""
    return labelled(record["dataset"], record["data"]["procedural"])


def common_notes(records: Sequence[Record], headings: Mapping[str, str]) -> list[str]:
    """What a reader must know about slide-level numbers: data, encoder, training, seeds, device."""
    first = records[0]
    config, data = first["config"], first["data"]
    evaluation, dataset = config["eval"], first["dataset"]
    notes = (
        [f"{dataset} is procedural: its pictures are computer-made; nothing here is about patients."]
        if data["procedural"]
        else []
    )
    notes.append(f"Encoder: {evaluation['encoder']['title']}; patches of {config['data']['image_size']} px.")
    settings = {}
    for r in records:
        e = r["config"]["eval"]
        if e["arch"] in MIL_MODELS:
            wide = "" if e["width"] is None else f", width {e['width']}"
            settings[headings[r["key"]]] = f"{e['model']['optimizer']} {e['model']['lr']:g}{wide}"
    notes.append(
        f"Slide models: {counted(evaluation['epochs'], 'epoch')}, one bag per step, slides drawn "
        f"{'equally often from every class' if evaluation['balanced'] else 'once per epoch'}; the last epoch is scored on bags of all "
        f"patches of the test slides; {'; '.join(f'{k}: {v}' for k, v in settings.items())}."
    )
    made = {
        json.dumps(r["config"]["set"].get("fields", {}), sort_keys=True) for r in records if r["method"] == "histodd"
    }
    for text in sorted(made):
        fields = json.loads(text)
        notes.append(
            f"Histo-DD per slide: {fields['outer_steps']} outer x {fields['inner_steps']} inner steps, real batch {fields['real_batch']}, "
            + (
                "newly initialised networks."
                if fields.get("networks") == "random"
                else "networks of one pool trained on all training slides."
            )
        )
    notes += stain_notes(records)
    seeds = len({r["distill_seed"] for r in records if r["distill_seed"] is not None})
    notes.append(
        f"mean ± standard deviation (n) over at most {counted(seeds, 'selection or distillation seed')} x "
        f"{counted(len({r['eval_seed'] for r in records}), 'training seed')}; Full has training seeds only. - = not computed yet. "
        "The best set of each budget in bold."
    )
    devices = sorted({f"{r['environment']['device']}, {counted(r['environment']['threads'], 'thread')}" for r in records})
    notes.append(
        f"Times on {'; '.join(devices)}: the median epoch after the first, features extracted before; (xN) = N times less than Full."
    )
    notes += [SIDE_BY_SIDE] if any(side_by_side(r["environment"]) for r in records) else []
    sizes, classes = data["bag_sizes"], data["classes"]
    slides = ", ".join(
        f"{a} + {b} {c}" for a, b, c in zip(data["train_slides"], data["test_slides"], classes, strict=True)
    )
    notes.append(
        f"Slides (training + test): {slides}; bags of {sizes[0]} to {sizes[2]} patches, median {sizes[1]}, all patches taken."
    )
    capped = sorted(
        {
            (r["ipc"], r["storage"]["capped_slides"], r["storage"]["slides"])
            for r in records
            if r["storage"].get("capped_slides")
        }
    )
    if capped:
        text = ", ".join(f"at {i} per class in {c} of {s} slides" for i, c, s in capped)
        notes.append(
            f"Never more than a slide has: some class of the slide had fewer patches than asked for {text}; all were kept."
        )
    return notes + missing_classes(records, "slide") + [f"{dataset}: {note}" for note in data["notes"]]


def stain_notes(records: Sequence[Record]) -> list[str]:
    """How stains were handled: one line for each way."""
    return list(
        dict.fromkeys(
            f"Stain normalisation: training probability {r['stain']['train']:g}, when scoring and before feature extraction "
            f"{'yes' if r['stain']['test'] else 'no'} ({r['stain']['chosen']})."
            for r in records
        )
    )


def _table4_notes(table: SlideTable, dataset: str) -> list[str]:
    notes = [
        "Per-slide sets have N patches of every class that the slide shows. Ratio % = patches in all bags / training patches."
    ]
    if any(d == dataset for d, _, _ in table.paper_accuracy):
        notes.append(
            f"'paper': as printed in the paper for {paper.DATASETS.get(dataset, dataset)} (CLAM without saying which, under CLAM-SB; "
            "its storage stands in the first column)."
        )
    return notes
