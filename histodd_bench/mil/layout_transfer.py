"""From the records of Table 5 to grids: one for each direction, patch level and slide level side by side."""

import json
import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from histodd_bench.bootstrap import FEWEST, difference
from histodd_bench.files import digest
from histodd_bench.grid import Cell, Grid, Row, network
from histodd_bench.mil import MIL_MODELS
from histodd_bench.mil.layout import (
    HEAD,
    block,
    column_titles,
    frames_of,
    groups_of,
    ordered_sets,
    paper_rows,
    shown_name,
    slide_records,
    stain_notes,
    variants,
)
from histodd_bench.notes import SIDE_BY_SIDE, missing_classes, side_by_side
from histodd_bench.results import Record
from histodd_bench.tables.slide_level import SlideTable
from histodd_bench.titles import configuration, group_titles
from histodd_bench.wording import counted

PAPER_CENTRES = {"radboud": "C1", "utrecht": "C2"}  # of Camelyon16, by what their names contain
_WITH = {
    True: "beside those slides ('No transfer': on those alone, for as many epochs)",
    False: "and on nothing else ('No transfer': not at all)",
}
GAIN = "Share of the full data's gain, %"


def _shared(record: Record) -> dict[str, Any]:
    """What the numbers of one grid share: data of both centres and how models are fine-tuned."""
    return {k: v for k, v in record["config"].items() if k not in ("eval", "set")}


def _training(record: Record) -> dict[str, Any]:
    """How the target's own model was trained, the seed aside."""
    return {k: v for k, v in record["config"]["eval"].items() if k != "seed"}


def _column(record: Record) -> str:
    evaluation = record["config"]["eval"]
    if evaluation["at"] == "slide":
        return f"Slides, {MIL_MODELS[record['arch']].title}"
    return f"Patches, {network(record['arch'], evaluation['width'])}"


def table5_grids(
    table: SlideTable, records: Sequence[Record], plan: Mapping[str, Mapping[str, Sequence[Any]]] | None = None
) -> list[Grid]:
    """One grid per data set, direction, and what the records must share to be compared."""
    made = []
    groups = groups_of(slide_records(records, table), lambda r: (r["dataset"], digest(_shared(r))))

    def plain(r: Record) -> str:
        return f"{table.title}: {shown_name(r)}, {r['config']['source']} => {r['config']['target']}"

    for title, same in zip(group_titles(groups, plain, _shared), groups, strict=True):
        config, dataset = same[0]["config"], same[0]["dataset"]
        headings = column_titles(same, _column, _training)
        columns = sorted(set(headings.values()))
        labels: dict[str, str] = {}
        for column in columns:
            labels |= variants([r for r in same if headings[r["key"]] == column])
        sets = [(None, "No transfer", ""), *ordered_sets(table, same, labels, (plan or {}).get(dataset, {}))]
        frames = frames_of(table, same, labels, headings)
        grid = Grid(title, dataset, ", ".join(sorted({r["arch"] for r in same})), columns, head=HEAD)
        grid.procedural, grid.configuration = same[0]["data"]["procedural"], configuration(title, plain(same[0]))
        source = next((name for part, name in PAPER_CENTRES.items() if part in config["source"].lower()), "")
        levels = {c: "slide" if c.startswith("Slides") else "patch" for c in columns}
        for metric in table.metrics:
            grid.rows += block(metric, sets, frames, columns, lambda ipc: "")
            if dataset == "camelyon16":
                grid.rows += paper_rows(table, metric, source, levels)
            if metric.key == "metrics.accuracy":
                grid.rows += _gains(same, sets, columns, labels, headings, {c.method: c.title for c in table.columns})
        grid.notes = _notes(same, headings)
        made.append(grid)
    return made


def _gains(
    records: Sequence[Record], sets: Sequence[tuple[int | None, str, str]], columns: Sequence[str],
    labels: Mapping[str, str], headings: Mapping[str, str], titles: Mapping[str, str],
) -> list[Row]:  # fmt: skip
    """What each set recovers of the accuracy that the full data add; undefined where they add nothing that can be told."""

    def those(column: str, ipc: int | None, title: str, label: str) -> list[Record]:
        def name(r: Record) -> str:
            return titles.get(r["method"], "No transfer" if r["method"] == "none" else r["method"])

        wanted = (column, ipc, title, label)
        return [r for r in records if (headings[r["key"]], r["ipc"], name(r), labels[r["key"]]) == wanted]

    def accuracies(of: Sequence[Record]) -> dict[int, float]:
        found: dict[int, list[float]] = {}
        for r in of:
            found.setdefault(r["eval_seed"], []).append(r["metrics"]["accuracy"])
        return {seed: fmean(values) for seed, values in found.items()}

    bounds = {c: (those(c, None, "No transfer", ""), those(c, None, "Full", "")) for c in columns}
    errors = {c: _sampling_error(full, none) for c, (none, full) in bounds.items()}
    rows = []
    for ipc, title, label in sets:
        if ipc is None:
            continue
        cells: list[Cell] = []
        for column in columns:
            none, full = (accuracies(bound) for bound in bounds[column])
            own = accuracies(those(column, ipc, title, label))
            seeds = sorted(none.keys() & full.keys() & own.keys())
            cells.append(
                share([none[s] for s in seeds], [full[s] for s in seeds], [own[s] for s in seeds], errors[column])
            )
        rows.append(Row(GAIN, str(ipc), "", cells, label=f"{title} ({label})" if label else title))
    return rows


def _sampling_error(full: Sequence[Record], none: Sequence[Record]) -> float:
    """Standard error of the full data's gain over other test slides, from the width of its bootstrap interval; infinite where
    there are too few slides for one."""
    gain = difference(full, none) if full and none else None
    if gain is None:
        return 0.0
    return (gain.high - gain.low) / (2 * 1.96) if math.isfinite(gain.low) else math.inf


def share(none: Sequence[float], full: Sequence[float], own: Sequence[float], sampling_error: float = 0.0) -> str | None:
    """The share of the full data's gain in percent, as text; accuracies are paired by seed.

    None without numbers; ``undefined`` where the full data's gain is not above its standard error over seeds (or that is
    unknown), nor where it is not above ``sampling_error``.
    """
    if not none:
        return None
    gains = [f - n for f, n in zip(full, none, strict=True)]
    error = stdev(gains) / math.sqrt(len(gains)) if len(gains) > 1 else math.inf
    gain = fmean(gains)
    if gain <= max(error, sampling_error):
        return "undefined"
    return f"{100 * fmean([o - n for o, n in zip(own, none, strict=True)]) / gain:.0f}"


def _notes(records: Sequence[Record], headings: Mapping[str, str]) -> list[str]:
    first = records[0]
    config, data, dataset = first["config"], first["data"], first["dataset"]
    notes = []
    if data["procedural"]:
        notes.append(f"{dataset} is procedural: its pictures are computer-made; nothing here is about patients.")
    transfer = config["transfer"]
    notes.append(
        f"A model trained on the training slides of {config['target']} is fine-tuned for {counted(transfer['epochs'], 'epoch')} on what "
        f"{config['source']} shares {_WITH[transfer['rehearsal']]}, and scored on the test slides of {config['target']}. This is the "
        "order of the paper's text; its caption has it the other way round. The paper fine-tunes CLAM for 10 epochs on the full data, "
        "here every set has the same number."
    )
    notes.append(
        f"'{GAIN}' = (set - no transfer) / (Full - no transfer), accuracies paired by training seed; undefined where Full's gain is not "
        f"above its standard errors, over training seeds and over test slides drawn again ({FEWEST} or more): below zero, too."
    )
    for column in sorted(set(headings.values())):
        part = [r for r in records if headings[r["key"]] == column]
        evaluation = part[0]["config"]["eval"]
        slide = evaluation["at"] == "slide"
        trained = evaluation["model"]["lr"] if slide else evaluation["lr"]
        line = f"{column}: trained for {counted(evaluation['epochs'], 'epoch')}, learning rate {trained:g}"
        line += f", fine-tuned with {evaluation['fine_lr']:g}"
        if "encoder" in evaluation:
            line += f"; encoder of {config['target']}: {evaluation['encoder']['title']}"
        fields = {json.dumps(r["config"]["set"].get("fields", {})) for r in part if r["method"] == "histodd"}
        for text in sorted(fields):
            own = json.loads(text)
            line += f"; Histo-DD {own['outer_steps']} outer x {own['inner_steps']} inner steps"
        notes.append(line + ".")
    notes += stain_notes(records)
    seeds = len({r["distill_seed"] for r in records if r["distill_seed"] is not None})
    notes.append(
        f"mean ± standard deviation (n) over at most {counted(seeds, 'selection or distillation seed')} x "
        f"{counted(len({r['eval_seed'] for r in records}), 'training seed')}. - = not computed yet. The best set of each budget in bold."
    )
    devices = sorted({f"{r['environment']['device']}, {counted(r['environment']['threads'], 'thread')}" for r in records})
    notes.append(
        f"Times on {'; '.join(devices)}; (xN) = N times less than Full. Storage is what the source centre shares."
    )
    notes += [SIDE_BY_SIDE] if any(side_by_side(r["environment"]) for r in records) else []
    slides = ", ".join(
        f"{a} + {b} {c}" for a, b, c in zip(data["train_slides"], data["test_slides"], data["classes"], strict=True)
    )
    notes.append(f"Slides of {config['target']} (training + test): {slides}; {data['test_patches']} test patches.")
    for of in ("patch", "slide"):
        notes += missing_classes([r for r in records if r["config"]["eval"]["at"] == of], of)
    return notes + [f"{dataset}: {note}" for note in data["notes"]]
