"""Options of ``data prepare``, ``info``, ``fetch``, ``stains`` and ``export``."""

import argparse
from pathlib import Path
from typing import Any

from histodd_bench.option_types import count, part, place, positive, seed, side

_PREPARE = """\
examples:
  data prepare slides --root my_slides --out my_patches --magnification 20 --size 224
  data prepare camelyon16 --root CAMELYON16 --out /fast/camelyon16 --workers 16
  data prepare tcga-idh --root TCGA --out /fast/tcga --image-size 256 --dry-run

Finished slides are skipped on a rerun. --shard 1/4 to 4/4 on four machines extract a quarter of the slides each; the same
command without --shard then collects them. Afterwards: run table1 --dataset NAME --data-root OUT.
"""


def add_data_options(parser: Any) -> None:
    """Give the command ``data`` its sub-commands; ``args.data_command`` is their name."""
    raw = argparse.RawDescriptionHelpFormatter
    commands = parser.add_subparsers(dest="data_command", metavar="WHAT", required=True)

    def command(name: str, help: str, epilog: str = "") -> Any:
        sub = commands.add_parser(name, help=help, description=help, epilog=epilog, formatter_class=raw)
        sub.add_argument("--debug", action="store_true", help="show tracebacks")
        return sub

    sub = command("prepare", "cut slides into patches (or read patches) once, into a folder for --data-root", _PREPARE)
    sub.add_argument("name", metavar="DATASET", help="e.g. slides, camelyon16, tcga-idh; 'list datasets' names them")
    sub.add_argument("--root", "--data-root", type=Path, metavar="DIR", help="folder of its files, where it needs one")
    sub.add_argument("--out", type=place, required=True, metavar="DIR", help="folder to write into")
    sub.add_argument(
        "--image-size", type=side, metavar="PX", help="side at which patches are stored (default: the data set's)"
    )
    sub.add_argument(
        "--split-seed", type=seed, default=0, metavar="N", help="seed of the split, where there is none (0)"
    )
    sub.add_argument(
        "--workers", type=count, metavar="N", help="processes, one slide each at a time (default: one more than cores)"
    )
    sub.add_argument(
        "--shard",
        type=part,
        default=(1, 1),
        metavar="I/N",
        help="only the I-th of N parts of the slides; no collecting",
    )
    sub.add_argument("--dry-run", action="store_true", help="say how many patches and bytes to expect; write nothing")
    tiles = sub.add_argument_group("how slides are cut up (defaults: the data set's)")
    tiles.add_argument("--size", type=count, metavar="PX", help="side of a patch in pixels at the target scale")
    tiles.add_argument(
        "--magnification", type=positive, metavar="X", help="target scale: 40 is 0.25 microns per pixel, 5 is 2"
    )
    tiles.add_argument("--target-mpp", type=positive, metavar="MPP", help="target scale in microns per pixel, instead")
    tiles.add_argument(
        "--mpp", type=positive, metavar="MPP", help="scale of level 0 of all slides, whatever their files say"
    )
    tiles.add_argument(
        "--stride", type=count, metavar="PX", help="distance between patches at the target scale (default: --size)"
    )
    tiles.add_argument("--min-tissue", type=float, metavar="SHARE", help="keep patches with more tissue than this")
    tiles.add_argument(
        "--positive", type=float, metavar="SHARE", help="from this share inside an outline on, a patch has its class"
    )
    tiles.add_argument(
        "--negative", type=float, metavar="SHARE", help="up to this share, a patch counts as outside; between: left out"
    )
    tiles.add_argument("--coords", type=Path, metavar="DIR", help="take patches from CLAM's <slide>.h5 files")

    sub = command("info", "what is known of a data set, beside what is found on disk")
    sub.add_argument("name", metavar="DATASET", help="'list datasets' names them")
    sub.add_argument(
        "--root", "--data-root", type=Path, metavar="DIR", help="folder of its files, or one that 'prepare' wrote"
    )
    sub.add_argument(
        "--split-seed", type=seed, default=0, metavar="N", help="seed of the split, where there is none (0)"
    )

    sub = command("fetch", "download a data set that is openly available, or say where to get it")
    sub.add_argument("name", metavar="DATASET", help="'list datasets' names them")
    sub.add_argument("--out", type=place, metavar="DIR", help="folder to download into")

    sub = command("stains", "how differently slides are stained, before and after normalisation: a table and a picture")
    sub.add_argument("name", metavar="DATASET", help="'list datasets' names them")
    sub.add_argument(
        "--root", "--data-root", type=Path, metavar="DIR", help="folder of its files, or one that 'prepare' wrote"
    )
    sub.add_argument("--out", type=place, required=True, metavar="DIR", help="folder for stains.csv and stains.png")
    sub.add_argument(
        "--image-size", type=side, metavar="PX", help="side of the patches (default: as prepared, or 256)"
    )
    sub.add_argument(
        "--split-seed", type=seed, default=0, metavar="N", help="seed of the split, where there is none (0)"
    )
    sub.add_argument("--workers", type=count, metavar="N", help="processes that read files (default: one per core)")

    sub = command("export", "write a prepared data set as PNG folders or as coordinates for CLAM")
    sub.add_argument("root", type=Path, metavar="PREPARED", help="folder that 'prepare' wrote")
    sub.add_argument("--to", required=True, metavar="WHAT", help="imagefolder or clam")
    sub.add_argument("--out", type=place, required=True, metavar="DIR", help="folder to write into")
