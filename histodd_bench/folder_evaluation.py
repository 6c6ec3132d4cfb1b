"""Scoring one saved set, or any folder of images, on a data set's test patches."""

from pathlib import Path

from histodd_bench import layout, results, sets
from histodd_bench.experiment import Experiment, Made
from histodd_bench.leakage import identical
from histodd_bench.request import Cell
from histodd_bench.tables import TABLES, Table


def evaluate_folder(experiment: Experiment, folder: Path) -> tuple[list[results.Record], list[layout.Grid]]:
    """Train on the set in ``folder`` with every network and evaluation seed, and keep one record for each.

    Warns, then and below the table, should patches of it be test patches.

    Returns:
        The records, and their table with the metrics of Table 1.

    Raises:
        HistoddError: see :func:`histodd_bench.sets.load_any`.
    """
    request, experiment.processes = experiment.request, 1
    patches = sets.load_any(folder, experiment.dataset.train.classes, request.image_size)
    warnings = []
    if seen := identical(patches, experiment.dataset.test):
        warnings.append(
            f"WARNING: {seen} of the {len(patches)} patches in {folder} are identical to test patches of {request.dataset}: "
            "what was trained on cannot be scored on, leave those out of the set"
        )
        experiment.progress.log(warnings[0])
    smallest = min(patches.class_counts())
    ipc = smallest if smallest == max(patches.class_counts()) else None
    made = Made(patches, folder.name, {})
    known, ignored = results.read_records(request.out)
    for line in ignored:
        experiment.progress.log(line)
    by_key = {r["key"]: r for r in known}
    records = []
    for seed in range(request.eval_seeds):
        for arch, width in request.archs:
            cell = Cell(folder.name, ipc, arch, width, None, seed)
            config = experiment.evaluation_config(cell, {"method": folder.name, "fingerprint": patches.fingerprint()})
            key = results.key_of(config)
            record = by_key.get(key) or experiment.score(cell, config, made)
            if key not in by_key:
                results.write_record(request.out, record)
            records.append(record)
    base = TABLES["table1"]
    table = Table("evaluate", f"{folder.name}", (), base.metrics)
    grids = layout.grids(table, records)
    for grid in grids:
        grid.notes = warnings + grid.notes
    return records, grids
