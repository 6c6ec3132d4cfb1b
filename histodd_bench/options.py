"""The command line's options and help; what the commands do is in :mod:`histodd_bench.cli`."""

import argparse
import difflib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from histodd_bench import __version__
from histodd_bench.data_options import add_data_options
from histodd_bench.errors import UsageError
from histodd_bench.methods import METHODS
from histodd_bench.option_types import count, counts, names, option, part, place, positive, seed, shapes, side
from histodd_bench.sharing_cli import add_sharing_options

DESCRIPTION = """\
Distil a large set of H&E patches into a few, and measure it against coresets and the whole set.

  python -m histodd_bench run table1                       the demo (procedural slides), minutes on 2 cores
  python -m histodd_bench run table1 --dataset idc --data-root DIR
  python -m histodd_bench run table1 --dataset imagefolder --data-root DIR --ipc 10 --seeds 5
  python -m histodd_bench show table1 --format markdown    what is there; computes nothing
  python -m histodd_bench run all --out runs/mine          every table and figure; cells they share are computed once
  python -m histodd_bench report runs/mine                 one self-contained HTML page of it
  python -m histodd_bench list                             tables, data sets, methods, models, presets
  python -m histodd_bench doctor                           versions, devices, compiled operators
"""

RUN_EPILOG = """\
examples:
  run table1                                        all methods on the demo with the quick preset
  run table1 --dataset idc --data-root DIR          real patches
  run table1 --methods random,histodd --ipc 10      part of the table; the rest can follow at any time
  run table1 --archs convnet-d3:64,resnet18         networks, with a width after the colon
  run table1 --set histodd.alpha=1 --set pool.epochs=3 --set eval.lr=0.02
  run table1 --preset paper --dry-run               what would it take? times a sample of each phase

An interrupted run continues with the same command. Finished cells are never computed again; changed options make new
ones. 'list' names everything that can follow --dataset, --methods, --archs and --preset; 'list fields' what --set takes.
"""


PROFILE_EPILOG = """\
what can be measured (default: everything):
  stain_augment      stain affine and channel normalisation, without and with a warp; forward, backward, both
  macenko_fit        stain vectors and maximum concentrations of every patch
  normalise          fit + normalise: what the public stain packages do
  gradient_distance  the L1 distance of gradients shaped like those of ResNet18 and ConvNet-D3
  step               a distillation step at 64 px, taken apart, compiled and with the references

Every backend is compared with the float64 reference first; what computes something else is reported and not timed.
Backends: compiled, reference (plain torch, this package's), torch.compile of it, plain (a lean rewrite in torch), loop
(the distance as public code has it), and the packages torchstain, stainx and torch-staintools where they are installed.
Bytes are those of every input and result once; bandwidth is beside that of a copy of 256 MiB in the same run, which data
that stay in a cache can exceed. Times of a busy machine mean nothing: stop other work first.

examples:
  profile --quick                                     a few minutes on 2 cores
  profile stain_augment --shapes 64x64,16x256 --dtypes float32 --threads 2
  profile normalise --backends compiled,torchstain    two of them
  profile step --trace step.json                      and a trace for chrome://tracing or ui.perfetto.dev
  profile --device cuda --out gpu.json
  profile --show gpu.json                             print a record again; measures nothing
"""


class Parser(argparse.ArgumentParser):
    """argparse without abbreviations, whose errors are one line that names the nearest option or command."""

    def __init__(self, *args: Any, **options: Any) -> None:
        options["allow_abbrev"] = False
        super().__init__(*args, **options)
        self.idle: set[str] = set()  # options of other commands that would do nothing with this one

    def error(self, message: str) -> NoReturn:
        wrong = re.match(r"unrecognized arguments: (\S+)|.*invalid choice: '([^']*)'", message)
        if wrong and wrong[1] in self.idle:
            raise UsageError(f"{wrong[1]} would do nothing here (see '{self.prog} --help')")
        known = list(self._option_string_actions)
        if wrong and wrong[2] is not None:
            message, known = f"unknown command {wrong[2]!r}", self.commands
        near = difflib.get_close_matches((wrong[1] or wrong[2]) if wrong else "", known, n=1)
        hint = f": did you mean {near[0]!r}?" if near else ""
        raise UsageError(f"{message}{hint} (see '{self.prog} --help')")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's, but a command refuses its own unknown options: only it knows the near ones."""
        found, rest = super().parse_known_args(args, namespace)
        if rest:
            self.error(f"unrecognized arguments: {' '.join(rest)}")
        return found, rest

    @property
    def commands(self) -> list[str]:
        """Names of the sub-commands."""
        return [n for a in self._actions if isinstance(a, argparse._SubParsersAction) for n in a.choices]


_UNSCORED = ("methods", "archs", "eval_seeds")  # say nothing to commands that make sets and do not evaluate them


def _shared(parser: Parser, *, table: bool = True, without: tuple[str, ...] = ()) -> None:
    """Options with the same name and meaning everywhere; ``without`` are those that would do nothing here."""
    parser.set_defaults(**dict.fromkeys(without))
    parser.idle = {f"--{name.replace('_', '-')}" for name in without}
    data = parser.add_argument_group("data")
    data.add_argument(
        "--dataset", type=names, metavar="NAME[,NAME]", help="data set (default: demo)" if table else "data set"
    )
    data.add_argument("--data-root", action="append", default=[], metavar="DIR", help="folder of its files, where it needs one; "
                      "NAME=DIR for each, where several do")  # fmt: skip
    data.add_argument(
        "--image-size", type=side, metavar="PX", help="patches are resized to this side (default: the preset's)"
    )
    data.add_argument(
        "--split-seed", type=seed, default=0, metavar="N", help="seed of the split by slide, where there is none (0)"
    )
    what = parser.add_argument_group("what to compute")
    what.add_argument("--preset", default="quick", metavar="NAME", help="quick (default), standard or paper")
    of_results: list[tuple[str, Any, str, str]] = [
        ("ipc", counts, "N[,N]", "images per class (default: the preset's)"),
        ("methods", names, "NAME[,NAME]", "methods (default: the table's)"),
        ("archs", names, "NAME[:WIDTH][,...]", "networks that are trained on the sets and scored"),
        ("distill_arch", str, "NAME[:WIDTH]", "network whose gradients are matched"),
        ("seeds", count, "N", "how many selection or distillation seeds: 0 to N-1"),
        ("eval_seeds", count, "N", "how many evaluation seeds for each: 0 to N-1"),
    ]
    for name, kind, metavar, help in of_results:
        if name not in without:
            what.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar=metavar, help=help)
    what.add_argument(
        "--stain", metavar="POLICY", help="stain normalisation: auto, off, half or on; the same for every method"
    )
    what.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", dest="settings",
                      help="any field, e.g. histodd.alpha=1, pool.epochs=3, eval.lr=0.02; repeat for more")  # fmt: skip
    how = parser.add_argument_group("how")
    how.add_argument(
        "--device", default="auto", metavar="NAME", help="cpu, cuda, cuda:1, ... (default: cuda where there is one)"
    )
    how.add_argument(
        "--threads", type=count, metavar="N", help="CPU threads; part of the configuration (default: the preset's)"
    )
    how.add_argument(
        "--workers", type=count, metavar="N",
        help="processes that compute cells on a CPU, each with --threads threads, and read files (default: as many as have cores)",
    )  # fmt: skip
    how.add_argument("--out", type=place, metavar="DIR", help="folder of results (default: runs/<table or command>)")
    if "dry_run" not in without:
        how.add_argument(
            "--dry-run",
            action="store_true",
            help="time a sample of each phase and project the total; compute nothing else",
        )
    how.add_argument("--debug", action="store_true", help="show tracebacks")


def _engine(parser: Parser) -> None:
    """Options about where slides are distilled."""
    group = parser.add_argument_group("where slides are distilled")
    group.add_argument("--engine", metavar="NAME", help="local (default), slurm or ray")
    group.add_argument("--engine-option", type=option, action="append", default=[], metavar="NAME=VALUE", dest="engine_options",
                       help="slurm: a parameter of submitit, e.g. slurm_partition=gpu, timeout_min=600; ray: address=auto")  # fmt: skip


def make_parser(commands_by_name: dict[str, Callable[[argparse.Namespace], int]]) -> Parser:
    """All commands and options; ``args.function`` is the command's function."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="python -m histodd_bench", description=DESCRIPTION, formatter_class=raw)
    parser.add_argument("--version", action="version", version=f"histodd-bench {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    def command(name: str, help: str, epilog: str = "") -> Parser:
        sub: Parser = commands.add_parser(name, help=help, description=help, epilog=epilog, formatter_class=raw)
        sub.set_defaults(function=commands_by_name[name])
        return sub

    sub = command("run", "compute a table, or what is missing of it, and print it", RUN_EPILOG)
    sub.add_argument(
        "table", help="a table, e.g. table1, several separated by commas, or all; cells they share are computed once"
    )
    _shared(sub)
    slides = sub.add_argument_group("slide-level tables (table4, table5)")
    slides.add_argument("--mil", type=names, metavar="NAME[,NAME]", help="slide-level models (default: the table's)")
    slides.add_argument(
        "--encoder",
        metavar="NAME",
        help="auto (default), resnet50, pool, simclr, torchvision:NAME or timm:NAME",
    )
    slides.add_argument("--encoder-weights", metavar="FILE", help="a state dict, or 'random'; otherwise torch's cache")
    _engine(sub)

    sub = command("show", "print a table from the results that are there; computes nothing")
    sub.add_argument("table", nargs="?", default="table1", help="name of the table (default: table1)")
    sub.add_argument(
        "--format", default="rich", metavar="NAME", help="rich (default), markdown, latex, csv or json (the records)"
    )
    sub.add_argument("--predictions", action="store_true", help="keep per-patch predictions in --format json")
    for name, kind in (("--dataset", names), ("--methods", names), ("--archs", names), ("--ipc", counts)):
        sub.add_argument(name, type=kind, metavar="...", help="only these")
    sub.add_argument("--out", type=place, metavar="DIR", help="folder of results (default: runs/<table>)")
    sub.add_argument("--debug", action="store_true", help="show tracebacks")

    sub = command("list", "tables, data sets, methods, models and presets, one line each")
    sub.add_argument("what", nargs="?", help="only: tables, datasets, methods, models, presets, or fields (for --set)")
    sub.add_argument("--preset", metavar="NAME", help="with fields: the values of this preset (default: quick)")
    sub.add_argument("--debug", action="store_true", help="show tracebacks")

    sub = command(
        "distill",
        "distil sets and save them, without evaluating",
        "example:\n  distill --dataset demo --ipc 10 --seeds 1\n",
    )
    sub.add_argument("method", nargs="?", default="histodd", help="distillation method (default: histodd)")
    _shared(sub, table=False, without=_UNSCORED)
    sub = command(
        "select",
        "select coresets and save them, without evaluating",
        "example:\n  select herding --dataset demo --ipc 10,20\n",
    )
    coresets = ", ".join(name for name, entry in METHODS.items() if not (entry.makes or entry.whole))
    sub.add_argument("method", help=f"coreset method: {coresets}")
    _shared(sub, table=False, without=_UNSCORED)

    sub = command(
        "distill-slides",
        "distil every training slide into a few patches per class: one job and one file per slide",
        "examples:\n  distill-slides --dataset demo --ipc 10 --workers 2\n"
        "  distill-slides --dataset demo --ipc 10 --shard 3/8        the third of eight parts, e.g. of a job array\n"
        "  distill-slides --dataset demo --ipc 10 --engine slurm --workers 16 --engine-option slurm_partition=gpu\n",
    )
    sub.add_argument("method", nargs="?", default="histodd", help="histodd (default), random or herding")
    _shared(sub, table=False, without=_UNSCORED)
    sub.add_argument(
        "--shard", type=part, default=(1, 1), metavar="I/N", help="part I of N of the slides, from 1/N to N/N"
    )
    sub.add_argument("--slides", type=names, metavar="NAME[,NAME]", help="only these slides")
    _engine(sub)

    sub = command("evaluate", "train on a saved set, or any folder of images <class>/*, and score it on a data set's test patches",
                  "example:\n  evaluate runs/sets/sets/SET --dataset demo --archs convnet-d3:64\n")  # fmt: skip
    sub.add_argument("set", type=Path, help="folder of the set")
    _shared(sub, table=False, without=("methods", "ipc", "seeds", "distill_arch", "dry_run"))
    sub.add_argument("--format", default="rich", metavar="NAME", help="rich (default), markdown, latex, csv or json")

    add_sharing_options(command)

    sub = command("report", "write one self-contained HTML page of everything a run folder holds; computes nothing",
                  "example:\n  report runs/table1\n  report runs/all --follow     while a run writes there\n")  # fmt: skip
    sub.add_argument("run", type=Path, metavar="RUN_DIR", help="folder of results")
    sub.add_argument("--out", type=place, metavar="FILE", help="the page (default: RUN_DIR/report.html)")
    sub.add_argument("--follow", action="store_true", help="write it again and again until the run in progress ends")
    sub.add_argument("--every", type=count, metavar="SECONDS", help="with --follow: how often (10)")
    sub.add_argument("--debug", action="store_true", help="show tracebacks")

    sub = command("compare", "what differs between two run folders: the configuration, and every cell with an interval")
    sub.add_argument("run_a", type=Path, metavar="RUN_A", help="folder of results")
    sub.add_argument("run_b", type=Path, metavar="RUN_B", help="another one; differences are B less A")
    sub.add_argument("--format", default="rich", metavar="NAME", help="rich (default), markdown, csv or json")
    sub.add_argument("--debug", action="store_true", help="show tracebacks")

    sub = command(
        "profile", "time the operators beside what else computes the same, and a distillation step", PROFILE_EPILOG
    )
    sub.add_argument("what", nargs="*", help="what to measure (default: everything), see below")
    sub.add_argument("--quick", action="store_true", help="64 patches of 64 px and 16 of 256 px only, shorter")
    sub.add_argument("--shapes", type=shapes, metavar="NxPX[,...]",
                     help="patches x side (default: 64x64,256x64,64x224,16x256,256x256)")  # fmt: skip
    sub.add_argument(
        "--dtypes", type=names, metavar="NAME[,...]", help="uint8, float32 (default: both), float16, bfloat16"
    )
    sub.add_argument("--backends", type=names, metavar="NAME[,...]", help="only these (default: all that are there)")
    sub.add_argument(
        "--images", type=Path, metavar="DIR", help="take patches from a folder's images (default: procedural)"
    )
    sub.add_argument("--seconds", type=positive, metavar="S", help="time for each backend (default: 1; --quick: 0.3)")
    sub.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1, ... (default: cuda where there is one)")
    sub.add_argument("--threads", type=count, metavar="N", help="CPU threads (default: one per core)")
    sub.add_argument("--out", type=place, metavar="FILE", help="the record, JSON (default: runs/profile/<device>.json)")
    sub.add_argument("--trace", type=place, metavar="FILE", help="also a Chrome trace of one call of every backend")
    sub.add_argument("--show", type=Path, metavar="FILE", help="print a record that is there and measure nothing")
    sub.add_argument("--debug", action="store_true", help="show tracebacks")

    add_data_options(command("data", "prepare, describe, download or export a data set"))

    sub = command("doctor", "versions, devices, compiled operators, folders: what works here and why not")
    sub.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser
