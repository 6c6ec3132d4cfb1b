"""``show``: what is in a folder of results, as the command line asks for it. Computes nothing and loads no torch."""

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from histodd_bench.errors import HistoddError, UsageError, unknown_name
from histodd_bench.results import Record

if TYPE_CHECKING:
    from histodd_bench.tables import Table

FORMATS = ("rich", "markdown", "latex", "csv", "json")


def write_tables(table: "Table", out: Path) -> None:
    """Markdown, LaTeX and CSV files of everything that ``out`` holds of a table."""
    from histodd_bench import layout, render, results
    from histodd_bench.files import write_text

    records, _ = results.read_records(out)
    plan = results.read_plan(out)
    made = layout.grids(table, records, plan.get(table.name), results.claimed(plan, but=table.name))
    for name, suffix in render.FILES.items():
        write_text(out / f"{table.name}.{suffix}", render.FORMATS[name](made))


def run_show(args: argparse.Namespace) -> int:
    """Print a table, or the part of it that options single out; what was not asked for is left out of it."""
    from histodd_bench.tables import get_table

    table = get_table(args.table)
    if args.format not in FORMATS:
        raise unknown_name("format", args.format, FORMATS)
    if args.predictions and args.format != "json":
        raise UsageError("--predictions is for --format json: tables show none")
    out = args.out or Path("runs") / table.name

    from histodd_bench import layout, render, results

    if not out.is_dir():
        raise HistoddError(f"no results in {out}: 'run {table.name}' computes them, --out names another folder")
    records, ignored = results.read_records(out)
    for line in ignored:
        print(line, file=sys.stderr)
    whole_plan = results.read_plan(out)
    plan: dict[str, Any] = dict(whole_plan.get(table.name, {}))
    _check_names(args, records, plan)
    table, plan = _asked(args, table, plan)
    archs = {a.partition(":")[0] for a in args.archs or ()}
    records = [
        r
        for r in records
        if (not args.dataset or r["dataset"] in args.dataset)
        and (not args.methods or r["method"] in (*args.methods, "none"))
        and (not archs or r["arch"] in archs)
        and (not args.ipc or r["ipc"] is None or r["ipc"] in args.ipc)
    ]
    if args.format == "json":
        print(render.as_json(records, predictions=args.predictions), end="")
        return 0
    made = layout.grids(table, records, plan, results.claimed(whole_plan, but=table.name))
    if not made:
        such = "such " if args.dataset or args.methods or args.archs or args.ipc else ""
        print(f"no {such}results in {out} yet: 'run {table.name}' computes them", file=sys.stderr)
        return 0
    if args.format == "rich" and sys.stdout.isatty():
        import shutil

        print(render.rich(made, width=max(shutil.get_terminal_size().columns, 60), colour=True), end="")
    else:
        print(render.FORMATS[args.format](made), end="")
    return 0


def _asked(args: argparse.Namespace, table: "Table", plan: Mapping[str, Any]) -> tuple["Table", dict[str, Any]]:
    """The table and its plan without what the options leave out: that would look as if it had not been computed."""
    kept = {name: dict(asked) for name, asked in plan.items() if not args.dataset or name in args.dataset}
    for asked in kept.values():
        if args.ipc:
            asked["ipc"] = list(args.ipc)
        if args.methods:
            asked["methods"] = [m for m in asked.get("methods", ()) if m in args.methods]
    if args.methods:
        table = replace(table, columns=tuple(c for c in table.columns if c.method in args.methods))
    return table, kept


def _check_names(args: argparse.Namespace, records: Sequence[Record], plan: Mapping[str, Any]) -> None:
    """Refuse names that are neither in the results nor known at all, with the nearest match."""

    def check(kind: str, names: Sequence[str] | None, there: Iterable[str], known: Iterable[str]) -> None:
        for name in names or ():
            if name not in (*there, *known):
                raise unknown_name(kind, name, {*there, *known})

    from histodd_bench.methods import all_methods

    check("method", args.methods, {r["method"] for r in records}, all_methods())
    datasets, archs = {*plan, *(r["dataset"] for r in records)}, {r["arch"] for r in records}
    wanted = [a.partition(":")[0] for a in args.archs or ()]
    if not (set(args.dataset or ()) <= datasets and set(wanted) <= archs):  # the names of all others load torch
        from histodd_bench.data import DATASETS
        from histodd_bench.mil import MIL_MODELS
        from histodd_bench.models import MODELS, PRETRAINED

        check("dataset", args.dataset, datasets, DATASETS)
        check("model", wanted, archs, {**MODELS, **PRETRAINED, **MIL_MODELS})
