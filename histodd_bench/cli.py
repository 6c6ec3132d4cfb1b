"""The command line. Heavy modules are imported by the commands that need them: ``--help`` and ``show`` start at once."""

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from histodd_bench.errors import HistoddError, UsageError, unknown_name
from histodd_bench.interrupt import EXIT, prompt_exit
from histodd_bench.options import make_parser

if TYPE_CHECKING:
    from histodd_bench.experiment import Cell, Request
    from histodd_bench.layout import Grid
    from histodd_bench.progress import Progress
    from histodd_bench.results import Record
    from histodd_bench.tables import Table

FORMATS = ("rich", "markdown", "latex", "csv", "json")


def cache_folder() -> Path:
    """Where data and networks are kept between runs: ``HISTODD_CACHE``, or ``histodd-bench`` in the user's cache folder."""
    named = os.environ.get("HISTODD_CACHE")
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "histodd-bench"


MOST_WORKERS = 8  # by default: every process holds torch and its own batches


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def make_requests(args: argparse.Namespace, table: "Table | None", out: Path) -> "list[Request]":
    """Requests, one per data set, from options; every name is checked before anything is loaded."""
    from histodd_bench import presets
    from histodd_bench.data import DATASETS
    from histodd_bench.experiment import Request

    preset = presets.get_preset(args.preset)
    names = args.dataset or ("demo",)
    for name in names:
        if name not in DATASETS:
            raise unknown_name("dataset", name, DATASETS)
        if DATASETS[name].needs_root and args.data_root is None:
            raise UsageError(f"dataset {name!r} reads your files: say where they are with --data-root")
    asked = args.methods or (tuple(c.method for c in table.columns) if table else ())
    stain = args.stain or preset.stain
    if stain not in presets.STAIN:
        raise unknown_name("stain policy", stain, presets.STAIN)
    distill = presets.parse_arch(args.distill_arch or preset.distill_arch, preset.widths)
    return [
        Request(
            dataset=name,
            preset=preset,
            methods=presets.check_methods(asked),
            ipc=args.ipc or (table.ipc if table and table.ipc else preset.ipc),
            archs=tuple(dict.fromkeys(presets.parse_arch(a, preset.widths) for a in args.archs or preset.archs)),
            distill_arch=distill,
            seeds=args.seeds or preset.seeds,
            eval_seeds=args.eval_seeds or preset.eval_seeds,
            image_size=args.image_size or preset.image_size,
            stain=stain,
            threads=args.threads or min(preset.threads, _cores()),
            device=args.device,
            out=out,
            cache=cache_folder(),
            data_root=args.data_root,
            split_seed=args.split_seed,
            workers=args.workers or min(_cores(), MOST_WORKERS),
            overrides=presets.parse_overrides(args.settings),
        )
        for name in names
    ]


def _announce(request: "Request", progress: "Progress", todo: "Sequence[Cell]") -> None:
    def text(arch: tuple[str, int | None]) -> str:
        return arch[0] if arch[1] is None else f"{arch[0]} (width {arch[1]})"

    progress.log(
        f"{request.dataset}, preset {request.preset.name}: {request.image_size} px, distils on {text(request.distill_arch)}, "
        f"evaluates on {', '.join(map(text, request.archs))}; ipc {', '.join(map(str, request.ipc))}; "
        f"{request.seeds} x {request.eval_seeds} seeds; {len(todo)} cells; {request.threads} threads; results in {request.out}"
    )


def _run(args: argparse.Namespace) -> int:
    from histodd_bench.tables import SlideTable, get_table

    table = get_table(args.table)
    out = args.out or Path("runs") / table.name
    requests = make_requests(args, table, out)

    from histodd_bench import experiment, results
    from histodd_bench.files import only_writer
    from histodd_bench.progress import Progress

    if args.dry_run:
        if isinstance(table, SlideTable):
            raise UsageError(
                f"--dry-run does not cover {table.name}: 'distill-slides --slides NAME' shows what one slide takes"
            )
        from histodd_bench.projection import project

        with Progress() as progress:
            for request in requests:
                print(project(experiment.Experiment(request, progress)), end="")
        return 0
    with only_writer(out), Progress() as progress:
        if isinstance(table, SlideTable):
            from importlib import import_module

            for request in requests:
                results.write_plan(out, table.name, {request.dataset: {"ipc": request.ipc, "methods": request.methods}})
            import_module(table.runner).run(args, table, requests, progress)
        for request in () if isinstance(table, SlideTable) else requests:
            todo = experiment.cells(request)
            _announce(request, progress, todo)
            results.write_plan(out, table.name, {request.dataset: {"ipc": request.ipc, "methods": request.methods}})
            current = experiment.Experiment(request, progress)
            progress.log(current.budget())
            experiment.run(current, todo)
    for line in _write_tables(table, out):
        print(line, file=sys.stderr)
    return _show(argparse.Namespace(table=table.name, out=out, format="rich", predictions=False, dataset=args.dataset,
                                    methods=None, archs=None, ipc=None))  # fmt: skip


def _grids(table: "Table", records: "list[Record]", plan: Any) -> "list[Grid]":
    """The table's grids, from its own module where it is a slide-level one."""
    from histodd_bench import layout
    from histodd_bench.tables import SlideTable

    if isinstance(table, SlideTable):
        from importlib import import_module

        module, _, name = table.layout.partition(":")
        found: list[Grid] = getattr(import_module(module), name)(table, records, plan)
        return found
    return layout.grids(table, records, plan)


def _write_tables(table: "Table", out: Path) -> list[str]:
    """Markdown, LaTeX and CSV files of everything in ``out``; one line that says where."""
    from histodd_bench import render, results
    from histodd_bench.files import write_text

    records, _ = results.read_records(out)
    made = _grids(table, records, results.read_plan(out).get(table.name))
    for name, suffix in render.FILES.items():
        write_text(out / f"{table.name}.{suffix}", render.FORMATS[name](made))
    files = ", ".join(f"{table.name}.{suffix}" for suffix in render.FILES.values())
    return [f"{out}: {files}; records/ one per cell, sets/ the patches, sheets/ their pictures"]


def _show(args: argparse.Namespace) -> int:
    from histodd_bench.tables import get_table

    table = get_table(args.table)
    if args.format not in FORMATS:
        raise unknown_name("format", args.format, FORMATS)
    out = args.out or Path("runs") / table.name

    from histodd_bench import render, results

    if not out.is_dir():
        raise HistoddError(f"no results in {out}: 'run {table.name}' computes them, --out names another folder")
    records, ignored = results.read_records(out)
    for line in ignored:
        print(line, file=sys.stderr)
    plan: dict[str, Any] = dict(results.read_plan(out).get(table.name, {}))
    if args.ipc:
        plan = {name: {**asked, "ipc": list(args.ipc)} for name, asked in plan.items()}
    archs = {a.partition(":")[0] for a in args.archs or ()}
    records = [
        r
        for r in records
        if (not args.dataset or r["dataset"] in args.dataset)
        and (not args.methods or r["method"] in args.methods)
        and (not archs or r["arch"] in archs)
        and (not args.ipc or r["ipc"] is None or r["ipc"] in args.ipc)
    ]
    if args.format == "json":
        print(render.as_json(records, predictions=args.predictions), end="")
        return 0
    made = _grids(table, records, plan)
    if not made:
        print(f"no results in {out} yet: 'run {table.name}' computes them", file=sys.stderr)
        return 0
    if args.format == "rich" and sys.stdout.isatty():
        import shutil

        print(render.rich(made, width=max(shutil.get_terminal_size().columns, 60), colour=True), end="")
    else:
        print(render.FORMATS[args.format](made), end="")
    return 0


def _list(args: argparse.Namespace) -> int:
    from histodd_bench.listing import SECTIONS

    if args.what is not None and args.what not in SECTIONS:
        raise unknown_name("list", args.what, SECTIONS)
    chosen = [args.what] if args.what else [s for s in SECTIONS if s != "fields"]
    for i, name in enumerate(chosen):
        rows = SECTIONS[name]()
        width = max((len(row[0]) for row in rows), default=0)
        print(("\n" if i else "") + name)
        for row in rows:
            print(f"  {row[0]:<{width}}  {row[1]}")
    return 0


def _make(args: argparse.Namespace) -> int:
    from histodd_bench import presets
    from histodd_bench.methods import all_methods, method_entry

    entry = method_entry(args.method)
    wanted = args.command == "distill"
    if entry.whole or entry.synthetic != wanted:
        fitting = [n for n, e in all_methods().items() if not e.whole and e.synthetic == wanted]
        raise UsageError(f"{args.method!r} is not a method for '{args.command}': choose from {', '.join(fitting)}")
    presets.get_preset(args.preset)
    out = args.out or Path("runs") / "sets"
    requests = [replace(r, methods=(args.method,)) for r in make_requests(args, None, out)]

    from histodd_bench import experiment
    from histodd_bench.files import only_writer
    from histodd_bench.progress import Progress

    if args.dry_run:
        from histodd_bench.projection import project

        with Progress() as progress:
            for request in requests:
                print(project(experiment.Experiment(request, progress)), end="")
        return 0
    folders: list[Path] = []
    with only_writer(out), Progress() as progress:
        for request in requests:
            current = experiment.Experiment(request, progress)
            for seed in range(request.seeds):
                for ipc in request.ipc:
                    made = current.make(args.method, ipc, seed)
                    folders.append(out / experiment.SETS / str(made.name))
                    progress.log(f"{args.method} {ipc} per class, seed {seed}: {folders[-1]}")
    for folder in folders:
        print(folder)
    return 0


def _distill_slides(args: argparse.Namespace) -> int:
    from histodd_bench.slides_cli import distill

    out = args.out or Path("runs") / "slides"
    if args.dry_run:
        raise UsageError("--dry-run does not cover distill-slides: --slides NAME shows what one slide takes")
    args.threads = args.threads or 1  # one per worker: slides are many
    return distill(args, make_requests(args, None, out), out)


def _evaluate(args: argparse.Namespace) -> int:
    if args.format not in FORMATS:
        raise unknown_name("format", args.format, FORMATS)
    if not args.set.is_dir():
        raise UsageError(f"{args.set} is not a folder: give a saved set or a folder of images <class>/*")
    request = replace(make_requests(args, None, args.out or Path("runs") / "evaluate")[0], methods=(), ipc=())

    from histodd_bench import render
    from histodd_bench.experiment import Experiment
    from histodd_bench.files import only_writer
    from histodd_bench.folder_evaluation import evaluate_folder
    from histodd_bench.progress import Progress

    with only_writer(request.out), Progress() as progress:
        records, made = evaluate_folder(Experiment(request, progress), args.set)
    print(render.as_json(records) if args.format == "json" else render.FORMATS[args.format](made), end="")
    return 0


def _doctor(args: argparse.Namespace) -> int:
    from histodd_bench.doctor import report

    print(report(cache_folder()), end="")
    return 0


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "run": _run,
    "show": _show,
    "list": _list,
    "distill": _make,
    "distill-slides": _distill_slides,
    "select": _make,
    "evaluate": _evaluate,
    "doctor": _doctor,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit code: 0, 1 failure, 2 usage, 130 interrupted."""
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in argv
    again = (
        "interrupted: nothing is lost; the same command continues from here:\n  python -m histodd_bench "
        + shlex.join(argv)
    )
    try:
        with prompt_exit(lambda: again):
            return _main(argv)
    except KeyboardInterrupt:
        print(again, file=sys.stderr)
        return EXIT
    except BrokenPipeError:  # | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except HistoddError as error:
        if debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except Exception as error:
        if debug:
            raise
        full = isinstance(error, MemoryError) or "out of memory" in str(error).lower()
        line = str(error).splitlines()[0] if str(error) else "no details"
        print(
            f"error: {'out of memory' if full else type(error).__name__}: {line} (--debug shows where)", file=sys.stderr
        )
        return 1


def _main(argv: list[str]) -> int:
    parser = make_parser(COMMANDS)
    args = parser.parse_args(argv)
    if args.command is None:
        parser.print_help()
        return 2
    code: int = args.function(args)
    return code
