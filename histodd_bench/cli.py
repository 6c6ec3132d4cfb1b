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
from histodd_bench.files import cache_folder
from histodd_bench.interrupt import EXIT, prompt_exit
from histodd_bench.options import make_parser
from histodd_bench.sharing_cli import run_export, run_import, run_leakage
from histodd_bench.show_cli import FORMATS, run_show, write_tables
from histodd_bench.workers import MOST_WORKERS, cores

if TYPE_CHECKING:
    from histodd_bench.request import Request
    from histodd_bench.tables import Table


def _data_roots(given: "Sequence[str]", names: "Sequence[str]") -> dict[str, Path | None]:
    """Folders of data sets: what ``--data-root NAME=DIR`` says of each, else a plain ``--data-root DIR``."""
    from histodd_bench.data import DATASETS

    pairs = [(text, *text.partition("=")[::2]) for text in given]
    named = {key: Path(folder) for text, key, folder in pairs if "=" in text and key in DATASETS}
    plain = [Path(text) for text, key, _ in pairs if not ("=" in text and key in DATASETS)]
    unused = [name for name in named if name not in names]
    if unused:
        raise UsageError(f"--data-root {unused[0]}=...: --dataset does not name {unused[0]}")
    if len(plain) > 1:
        raise UsageError("--data-root is given twice without a name: say NAME=DIR for each data set")
    reading = [name for name in names if DATASETS[name].needs_root]
    found: dict[str, Path | None] = dict.fromkeys(names)
    for name in names:
        if name in named:
            found[name] = named[name]
        elif plain and (name in reading or not reading):  # beside one that reads files, a drawn one needs none
            found[name] = plain[0]
        elif name in reading:
            raise UsageError(f"dataset {name!r} reads your files: say where they are with --data-root")
    return found


def make_requests(args: argparse.Namespace, table: "Table | None", out: Path) -> "list[Request]":
    """Requests, one per data set, from options; every name is checked before anything is loaded."""
    from histodd_bench import presets
    from histodd_bench.data import DATASETS
    from histodd_bench.mil import check_models
    from histodd_bench.request import Request, SlideOptions
    from histodd_bench.tables import SlideTable

    preset = presets.get_preset(args.preset)
    options: dict[str, Any] = dict(table.options.get(preset.name, {})) if table else {}
    names = args.dataset or ("demo",)
    for name in names:
        if name not in DATASETS:
            raise unknown_name("dataset", name, DATASETS)
    roots = _data_roots(args.data_root, names)
    asked = args.methods or (tuple(dict.fromkeys(c.method for c in table.columns)) if table else ())
    stain = args.stain or options.get("stain") or preset.stain
    ipc = args.ipc or options.get("ipc") or (table.ipc if table else None) or preset.ipc
    archs = args.archs or options.get("archs") or preset.archs
    if stain not in presets.STAIN:
        raise unknown_name("stain policy", stain, presets.STAIN)
    distill = presets.parse_arch(args.distill_arch or preset.distill_arch, preset.widths)
    overrides, image_size = presets.parse_overrides(args.settings), args.image_size or preset.image_size
    presets.check_recipes(overrides, distill[0])
    threads = args.threads or min(options.get("threads") or preset.threads, cores())
    slides = SlideOptions(workers=args.workers)
    if isinstance(table, SlideTable):
        from histodd_bench.mil.requirements import check_request

        overrides = presets.with_defaults(table.fields.get(preset.name, {}), overrides)
        slides = SlideOptions(check_models(args.mil or table.models), args.encoder or "auto", args.encoder_weights,
                              args.engine or "local", dict(args.engine_options), args.workers)  # fmt: skip
        check_request(slides, image_size, args.device, out)
    return [
        Request(
            dataset=name,
            preset=preset,
            methods=presets.check_methods(asked),
            ipc=ipc,
            archs=tuple(dict.fromkeys(presets.parse_arch(a, preset.widths) for a in archs)),
            distill_arch=distill,
            seeds=args.seeds or options.get("seeds") or preset.seeds,
            eval_seeds=args.eval_seeds or options.get("eval_seeds") or preset.eval_seeds,
            image_size=image_size,
            stain=stain,
            threads=threads,
            device=args.device,
            out=out,
            cache=cache_folder(),
            data_root=roots[name],
            split_seed=args.split_seed,
            workers=args.workers or max(1, min(cores() // threads, MOST_WORKERS)),
            overrides=overrides,
            columns=table.columns if table else (),
            slides=slides,
        )
        for name in names
    ]


def _run(args: argparse.Namespace) -> int:
    from histodd_bench.tables import TABLES, SlideTable, get_table

    names = list(TABLES) if args.table == "all" else [n.strip() for n in args.table.split(",")]
    tables = [get_table(name) for name in names]
    options = {"mil": "--mil", "encoder": "--encoder", "encoder_weights": "--encoder-weights", "engine": "--engine",
               "engine_options": "--engine-option"}  # fmt: skip
    given = [option for name, option in options.items() if getattr(args, name)]
    if given and not any(isinstance(table, SlideTable) for table in tables):
        known = ", ".join(name for name, table in TABLES.items() if isinstance(table, SlideTable))
        raise UsageError(f"{given[0]} is for tables of slide-level models: {known}")
    out = args.out or Path("runs") / (tables[0].name if len(tables) == 1 else "all")
    requests = {table.name: make_requests(args, table, out) for table in tables}

    from histodd_bench.files import only_writer
    from histodd_bench.progress import Progress
    from histodd_bench.running import possible, project_table, run_table

    if args.dry_run:
        with Progress() as progress:
            for table in tables:
                print(
                    (f"{table.name}\n" if len(tables) > 1 else "")
                    + project_table(table, requests[table.name], progress),
                    end="",
                )
        return 0
    with only_writer(out), Progress() as progress:
        finished = []
        for table in tables:
            asked = requests[table.name]
            if args.table == "all":
                asked = possible(table, asked, progress)
            if asked:
                run_table(table, asked, out, progress)
                write_tables(table, out)
                finished.append(table)
    files = ", ".join(f"{finished[0].name}.{suffix}" for suffix in ("md", "tex", "csv"))
    print(f"{out}: {files}; records/ one per cell, sets/ the patches, sheets/ their pictures; 'report {out}' makes a page of it",
          file=sys.stderr)  # fmt: skip
    for table in finished:
        shown = args.dataset if table.kind in ("cells", "slides") else None
        run_show(argparse.Namespace(table=table.name, out=out, format="rich", predictions=False, dataset=shown,
                                    methods=None, archs=None, ipc=None))  # fmt: skip
    return 0


def _list(args: argparse.Namespace) -> int:
    from histodd_bench.listing import SECTIONS, fields
    from histodd_bench.presets import get_preset

    if args.what is not None and args.what not in (*SECTIONS, "fields"):
        raise unknown_name("list", args.what, (*SECTIONS, "fields"))
    if args.preset and args.what != "fields":
        raise UsageError("--preset is for 'list fields': no other list depends on it")
    preset = get_preset(args.preset or "quick")
    chosen = [args.what] if args.what else list(SECTIONS)
    for i, name in enumerate(chosen):
        rows = fields(preset) if name == "fields" else SECTIONS[name]()
        width = max((len(row[0]) for row in rows), default=0)
        print(("\n" if i else "") + name + (f", as preset {preset.name} has them" if name == "fields" else ""))
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
    if args.dataset and len(args.dataset) > 1:
        raise UsageError("--dataset: a set is evaluated on one data set at a time")
    request = replace(make_requests(args, None, args.out or Path("runs") / "evaluate")[0], methods=(), ipc=())
    for section, fields in request.overrides.items():
        if section != "eval":  # the set is there: nothing makes it
            raise UsageError(f"--set {section}.{next(iter(fields))} would do nothing here: only fields of eval do")

    from histodd_bench import render
    from histodd_bench.experiment import Experiment
    from histodd_bench.files import only_writer
    from histodd_bench.folder_evaluation import evaluate_folder
    from histodd_bench.progress import Progress

    with only_writer(request.out), Progress() as progress:
        records, made = evaluate_folder(Experiment(request, progress), args.set)
    print(render.as_json(records) if args.format == "json" else render.FORMATS[args.format](made), end="")
    return 0


def _report(args: argparse.Namespace) -> int:
    from histodd_bench import report

    if args.every is not None and not args.follow:
        raise UsageError("--every is how often --follow writes: it does nothing without")
    every = args.every or 10
    print(report.follow(args.run, args.out, seconds=every) if args.follow else report.write_report(args.run, args.out))
    return 0


def _compare(args: argparse.Namespace) -> int:
    if args.format not in ("rich", "markdown", "csv", "json"):
        raise unknown_name("format", args.format, ("rich", "markdown", "csv", "json"))
    from histodd_bench import compare

    print(compare.FORMATS[args.format](compare.compare(args.run_a, args.run_b)), end="")
    return 0


def _data(args: argparse.Namespace) -> int:
    from histodd_bench.data_commands import run

    # One more than cores: a worker waits for the disk at the end of every slide.
    args.workers = getattr(args, "workers", None) or min(cores() + 1, MOST_WORKERS)
    return run(args)


def _doctor(args: argparse.Namespace) -> int:
    from histodd_bench.doctor import report

    print(report(cache_folder()), end="")
    return 0


def _profile(args: argparse.Namespace) -> int:
    from histodd_bench.profile.command import run_profile

    return run_profile(args, cores())


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "run": _run,
    "show": run_show,
    "list": _list,
    "distill": _make,
    "distill-slides": _distill_slides,
    "select": _make,
    "evaluate": _evaluate,
    "export": run_export,
    "import": run_import,
    "leakage": run_leakage,
    "report": _report,
    "compare": _compare,
    "profile": _profile,
    "data": _data,
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
