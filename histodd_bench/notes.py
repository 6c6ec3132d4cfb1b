"""The notes below a table: what a reader must know of the protocol, the data and the machine."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from histodd_bench import bootstrap, paper
from histodd_bench.methods import all_methods
from histodd_bench.results import Record, unpack
from histodd_bench.tables import Table
from histodd_bench.wording import absent_classes, counted


def notes(table: Table, dataset: str, records: list[Record], part: pd.DataFrame, differences: bool) -> list[str]:
    """What a reader must know: networks, budget, stain policy, seeds, device, data.

    Args:
        part: rows of :func:`histodd_bench.results.to_frame`, one for each record.
        differences: whether the table shows points above the best coreset.
    """
    config, data = records[0]["config"], records[0]["data"]
    evaluation = config["eval"]
    varied = table.varied("eval")
    notes = []
    if data["procedural"]:
        notes.append(f"{dataset} is procedural: its pictures are computer-made; nothing here is about patients.")
    size = config["data"]["image_size"]
    width = evaluation.get("width")
    arch = f"{evaluation['arch']}{'' if width is None else f' (width {width})'}"
    pools = {
        (json.dumps(r["config"]["set"]["pool"], sort_keys=True), json.dumps(r["config"]["set"].get("fields", {})))
        for r in records
        if r["config"]["set"].get("pool") and _distilled(r["method"])
    }
    budget = _length(evaluation)
    if evaluation.get("epochs") is not None and evaluation.get("min_steps"):
        budget += f", or as many more as make {evaluation['min_steps']} steps,"
    augment = "by column" if "augment" in varied else ", ".join(evaluation["augment"]) or "none"
    notes.append(
        f"Evaluated on {'several networks' if table.across == 'archs' else arch} at {size} px: {budget} for every method, "
        f"Full included; SGD {evaluation['lr']} / {evaluation['momentum']} / {evaluation['weight_decay']}, batch "
        f"{evaluation['batch_size']}; augmentation {augment}; class sampling "
        f"{'balanced' if evaluation['balanced'] else 'natural'}; the last epoch is scored."
    )
    for pool, fields in sorted(pools):
        line = _distilled_on(json.loads(pool), json.loads(fields))
        notes += [] if line in notes else [line]
    notes += [] if varied & {"stain_train", "stain_test"} else _stain_notes(records)
    whole = "; Full has evaluation seeds only" if part["ipc"].isna().any() else ""
    selection = part["distill_seed"].dropna().nunique()
    seeds = counted(part["eval_seed"].nunique(), "evaluation seed")
    over = (
        f"{counted(selection, 'selection or distillation seed')} x {seeds}{whole}"
        if selection
        else f"{seeds}; selection and distillation seeds do not apply, since nothing is selected or distilled here"
    )
    notes.append(f"mean ± standard deviation (n) over at most {over}. - = not computed yet.")
    notes.append("Ratio % = images per class x classes / training patches. Best method with a budget in bold.")
    if differences:
        few = bootstrap.too_few(records[0])
        interval = f", without an interval: {few}" if few else (
            f" [95 % interval: test slides or patients drawn again {bootstrap.DRAWS} times, the same for both; seeds as they are]"
        )  # fmt: skip
        notes.append(
            f"Points above the best coreset: difference of the means{interval}. The best coreset is the one with the highest mean on "
            "these test patches, which favours the coresets."
        )
    devices = sorted({_device(table, r["environment"]) for r in records})
    notes.append(
        f"Times on {'; '.join(devices)}: the median epoch after the first, loading included; (xN) = N times less than Full."
    )
    if any(m.key == "metrics.epoch_seconds" for m in table.metrics) and any(_beside(table, r["environment"]) for r in records):
        notes.append(SIDE_BY_SIDE)
    if "derived.epochs_to_pay" in {m.key for m in table.metrics}:
        paid = (
            "Epochs after which it has paid for itself: making the set, its networks included, over the time it saves in every "
            "epoch against the whole set. What several sets share is counted for each. "
        )
        notes.append(
            f"{paid if part['derived.epochs_to_pay'].notna().any() else ''}Loading is timed alone, after "
            "the training; peak memory is that of the device's allocator, on a CPU of the whole process."
        )
    if table.across == "archs":
        notes += epoch_costs(part)
    notes.append(
        f"Data: {data['train_patches']} training patches of {data['train_groups']} slides or patients, {data['test_patches']} test "
        f"patches of {data['test_groups']}; classes {', '.join(data['classes'])}."
    )
    notes += [] if table.kind == "sequence" else missing_classes(records, "patch")
    notes += data["notes"] if table.kind == "sequence" else [f"{dataset}: {note}" for note in data["notes"]]
    notes += table.remarks
    if any(key[0] == dataset for key in table.paper_archs):
        notes.append(f"'paper': as printed in the paper for {paper.DATASETS.get(dataset, dataset)}, at 256 or 1024 px.")
    if any(key[0] == dataset for key in table.paper):
        notes.append(
            f"'paper': as printed in the paper for {paper.DATASETS.get(dataset, dataset)}, on {table.paper_arch}."
        )
    return notes


def missing_classes(records: Sequence[Record], of: str) -> list[str]:
    """A warning about classes that the test set lacks, from the labels that records keep with their predictions; empty where
    the data set's own notes have it. ``of`` is what is labelled: ``patch`` or ``slide``."""
    if not records:
        return []
    data = records[0]["data"]
    try:
        packed = {p["zlib_base64"]: p for p in (r["predictions"]["labels"] for r in records)}  # mostly the same in all
        present = {label for p in packed.values() for label in np.unique(unpack(p)).tolist()}
    except (KeyError, ValueError):
        return []
    counts = [int(label in present) for label in range(len(data["classes"]))]
    return [warning for warning in absent_classes("test", data["classes"], counts, of) if warning not in data["notes"]]


def _distilled(method: str) -> bool:
    known = all_methods()
    return method not in known or known[method].synthetic


def _length(recipe: Mapping[str, Any]) -> str:
    return counted(recipe["epochs"], "epoch") if recipe.get("epochs") is not None else counted(recipe["steps"], "step")


def _distilled_on(pool: dict[str, Any], fields: dict[str, Any]) -> str:
    arch = pool["arch"] + ("" if pool.get("width") is None else f" (width {pool['width']})")
    trained = f"{counted(pool['networks'], 'network')}, pre-trained for {_length(pool)}"
    if fields.get("networks") != "random":
        return f"Distilled on {arch}: {trained}."
    start = f"; the start chosen on as many new ones and {trained}" if fields.get("initial") == "matched" else ""
    return f"Distilled on {arch}: a newly initialised network in every outer step{start}."


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


def epoch_costs(part: pd.DataFrame) -> list[str]:
    """What an epoch takes, taken apart: seconds for each optimiser step and for each patch, fitted for every network.

    Relative least squares of ``epoch = steps x a + patches x b`` over the records, with neither below zero. It explains why the
    factor against the whole set is not the ratio of set sizes.

    Args:
        part: rows of :func:`histodd_bench.results.to_frame`, with ``title`` naming the network.
    """
    lines = []
    columns = ["metrics.epoch_seconds", "metrics.steps", "metrics.epochs", "storage.count"]
    if not set(columns) <= set(part.columns):
        return []
    for title, rows in part.groupby("title", sort=False):
        epoch, steps, epochs, patches = (rows[c].astype(float).to_numpy() for c in columns)
        small, whole = rows["ipc"].notna().to_numpy(), rows["ipc"].isna().to_numpy()
        if not small.any() or not whole.any() or not (np.isfinite(epoch) & (epoch > 0)).all():
            continue
        made = np.stack([steps / epochs, patches], 1) / epoch[:, None]
        (a, b), *_ = np.linalg.lstsq(made, np.ones(len(epoch)), rcond=None)
        if a < 0:
            a, b = 0.0, float(made[:, 1].sum() / (made[:, 1] ** 2).sum())
        if b < 0:
            a, b = float(made[:, 0].sum() / (made[:, 0] ** 2).sum()), 0.0
        smallest = patches[small].min()
        ratio = patches[whole].mean() / smallest
        found = epoch[whole].mean() / epoch[small & (patches == smallest)].mean()
        lines.append(
            f"{title}: an epoch takes about {1000 * a:.3g} ms for each step and {1000 * b:.3g} ms for each patch (fitted), so "
            f"{smallest:.0f} patches are {found:.0f} times faster than {patches[whole].mean():.0f} (x{ratio:.0f} patches)."
        )
    return lines


# Said wherever times per epoch are shown that were not taken alone.
SIDE_BY_SIDE = (
    "Times were taken while other processes computed beside, now more and now fewer, which slows each: those of different "
    "columns can only be compared in a run with --workers 1 (and an --out of its own, since finished cells stay)."
)


def side_by_side(environment: dict[str, Any]) -> int:
    """How many processes computed at once where a record was made; 0 where it was the only one, or none is known."""
    workers = environment.get("workers") or 0
    return workers if workers > 1 else 0


def _beside(table: Table, environment: dict[str, Any]) -> int:
    # Trainings on memories were never done side by side, though older records give --workers.
    return 0 if table.kind == "sequence" else side_by_side(environment)


def _device(table: Table, environment: dict[str, Any]) -> str:
    side = _beside(table, environment)
    beside = f", {side} processes side by side" if side else ""
    return f"{environment['device']}, {counted(environment['threads'], 'thread')}{beside}"
