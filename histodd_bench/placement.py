"""Where cells stand in the table that asked for them: kept in a run's plan, since several columns may share a cell."""

import dataclasses

from histodd_bench import results
from histodd_bench.experiment import Experiment
from histodd_bench.methods import method_entry
from histodd_bench.request import Changes, cells, changes_of, columns_of


def places(experiment: Experiment) -> dict[str, list[list[str]]]:
    """By record key, where the cells asked for stand in the table: pairs of row label and column title."""
    by_changes: dict[tuple[str, Changes], list[tuple[str, str]]] = {}
    for column in columns_of(experiment.request):
        by_changes.setdefault((column.method, changes_of(column)), []).append((column.row, column.title))
    found: dict[str, list[list[str]]] = {}
    for cell in cells(experiment.request):
        fields = dataclasses.asdict(experiment.method(cell.method, cell.ipc, cell.changes))
        here = found.setdefault(results.key_of(experiment.cell_config(cell)), [])
        for row, title in by_changes[cell.method, cell.changes]:
            place = [row.format(**fields), title]
            here += [] if place in here else [place]
    return found


def rows(experiment: Experiment) -> list[str]:
    """Labels of the table's rows, in the order of its declaration."""
    labels = [
        column.row.format(**dataclasses.asdict(experiment.method(column.method, ipc, changes_of(column))))
        for column in columns_of(experiment.request)
        for ipc in (experiment.request.ipc if not method_entry(column.method).whole else (None,))
    ]
    return list(dict.fromkeys(labels))
