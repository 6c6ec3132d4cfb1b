"""``export``, ``import`` and ``leakage``: what the command line asks of sets that are handed on."""

import argparse
import json
from pathlib import Path
from typing import Any

from histodd_bench.errors import UsageError
from histodd_bench.files import cache_folder, write_text
from histodd_bench.option_types import count, place, seed


def add_sharing_options(command: Any) -> None:
    """The three commands; ``command(name, help, epilog)`` makes a parser."""
    sub = command("export", "write a set to give away: no names of slides, no real patches that a distillation began with",
                  "examples:\n  export runs/table1/sets/SET --out shared/ours\n"
                  "  export runs/slides/slides/SET --out shared/ours      all slides that 'distill-slides' did, as one set\n")  # fmt: skip
    sub.add_argument("set", type=Path, help="folder of the set")
    sub.add_argument("--out", type=place, metavar="DIR", required=True, help="folder to write; must not exist")
    sub.add_argument("--debug", action="store_true", help="show tracebacks")

    sub = command("import", "take in a set that someone else exported, after checking it against its card",
                  "example:\n  import ~/Downloads/theirs\n  evaluate runs/imported/theirs --dataset slides --data-root DIR\n")  # fmt: skip
    sub.add_argument("set", type=Path, help="folder of the set, with card.json in it")
    sub.add_argument("--out", type=place, metavar="DIR", help="folder to write (default: runs/imported/<name>)")
    sub.add_argument("--debug", action="store_true", help="show tracebacks")

    sub = command("leakage", "how close a set is to the patches it was made from: copies, and who was in the data",
                  "example:\n  leakage runs/table1/sets/SET --dataset demo\n")  # fmt: skip
    sub.add_argument("set", type=Path, help="folder of the set")
    sub.add_argument("--dataset", metavar="NAME", default="demo", help="the data set it was made from (default: demo)")
    sub.add_argument("--data-root", type=Path, metavar="DIR", help="folder of its files, where it needs one")
    sub.add_argument("--split-seed", type=seed, default=0, metavar="N", help="seed of the split by slide (0)")
    sub.add_argument("--most", type=count, default=2000, metavar="N", help="patches membership is inferred of (2000)")
    sub.add_argument("--threads", type=count, metavar="N", help="CPU threads (default: torch's)")
    sub.add_argument("--out", type=place, metavar="FILE", help="also write the numbers as JSON")
    sub.add_argument("--debug", action="store_true", help="show tracebacks")


def run_export(args: argparse.Namespace) -> int:
    """Export a set and say what it is."""
    from histodd_bench.sharing import describe, export_set

    if not args.set.is_dir():
        raise UsageError(f"{args.set} is not a folder: give a saved set, or one of 'distill-slides'")
    _say(args.out, describe(export_set(args.set, args.out)))
    return 0


def run_import(args: argparse.Namespace) -> int:
    """Import a set and say what it is."""
    from histodd_bench.sharing import describe, import_set

    out = args.out or Path("runs") / "imported" / args.set.resolve().name
    _say(out, describe(import_set(args.set, out)))
    return 0


def _say(folder: Path, lines: list[str]) -> None:
    print(folder)
    for line in lines:
        print(f"  {line}")


def run_leakage(args: argparse.Namespace) -> int:
    """Measure a set beside its training data; prints a table."""
    import torch

    from histodd_bench import sets
    from histodd_bench.data import load_dataset
    from histodd_bench.leakage import as_record, measure
    from histodd_bench.progress import Progress

    if not args.set.is_dir():
        raise UsageError(f"{args.set} is not a folder: give a saved set")
    saved = sets.load(args.set)
    if args.threads:
        torch.set_num_threads(args.threads)
    with Progress() as progress:
        data = load_dataset(
            args.dataset, root=args.data_root, image_size=saved.patches.image_size[0], seed=args.split_seed,
            cache=cache_folder() / "data", workers=torch.get_num_threads(), progress=progress,
        )  # fmt: skip
    if saved.card.get("config", {}).get("data", {}).get("train") not in (None, data.train.fingerprint()):
        raise UsageError(
            f"{args.set} was not made from these training patches: give the --dataset, --data-root and --split-seed it was "
            "made with"
        )
    found = measure(saved.patches, data.train, data.test, saved.initial, most=args.most)
    if args.out:
        write_text(args.out, json.dumps({"set": args.set.name, "views": as_record(found)}, indent=1) + "\n")
    _print(found, len(saved.patches), len(data.train), len(data.test))
    return 0


def _print(found: list[Any], made: int, training: int, held_out: int) -> None:
    rows = [
        ("distance to the nearest training patch, median", lambda f: f"{f.to_training:.3f}"),
        ("the same of held-out patches of other slides", lambda f: f"{f.held_out:.3f}"),
        ("nearer than 99 % of held-out ones are", lambda f: f"{100 * f.copies:.0f} %"),
        ("nearest to the training patch it began as", lambda f: "-" if f.begun is None else f"{100 * f.begun:.0f} %"),
        ("membership: AUC of all training patches (0.5: none)", lambda f: f"{f.membership:.2f}"),
        ("told at 1 % false alarms", lambda f: f"{100 * f.caught:.1f} %"),
        ("membership: AUC of the patches it began as", lambda f: "-" if f.beginnings is None else f"{f.beginnings:.2f}"),
    ]
    print(f"{made} patches, made from {training:,}; {held_out:,} held-out patches of other slides")
    width = max(len(name) for name, _ in rows)
    print(f"{'':<{width}}" + "".join(f"{f.view:>12}" for f in found))
    for name, cell in rows:
        print(f"{name:<{width}}" + "".join(f"{cell(f):>12}" for f in found))
