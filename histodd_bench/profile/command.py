"""``python -m histodd_bench profile``: options to a request, the record to a file and the terminal."""

import argparse
import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any

from histodd_bench.errors import UsageError, unknown_name
from histodd_bench.files import require_writable, write_text, writing


def run_profile(args: argparse.Namespace, threads: int) -> int:
    """Measure what the options ask for, write the record and print it; with ``--show`` print one that is there.

    ``threads`` are used where the options name none.
    """
    from histodd_bench.profile.report import show

    if args.show:
        others = {"--quick": args.quick, "--shapes": args.shapes, "--dtypes": args.dtypes, "--backends": args.backends,
                  "--images": args.images, "--seconds": args.seconds, "--device": args.device, "--threads": args.threads,
                  "--out": args.out, "--trace": args.trace, "what to measure": args.what}  # fmt: skip
        unused = [name for name, value in others.items() if value]
        if unused:
            raise UsageError(f"--show prints a record and measures nothing: {unused[0]} does not go with it")
        show(read_record(args.show))
        return 0
    threads = args.threads or threads
    from histodd_bench.environment import configure
    from histodd_bench.profile.problems import DEFAULT_DTYPES, DTYPES, OPERATORS, QUICK_SHAPES, SHAPES
    from histodd_bench.profile.run import Request, measure, trace

    known = (*OPERATORS, "step")
    for name in args.what:
        if name not in known:
            raise unknown_name("measurement", name, known)
    for name in args.dtypes or ():
        if name not in DTYPES:
            raise unknown_name("dtype", name, DTYPES)
    if args.images and not args.images.is_dir():
        raise UsageError(f"--images {args.images} is not a folder")
    check_backends(args.backends or ())
    check_used(args, tuple(dict.fromkeys(args.what)) or known)

    def log(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    for path, option in ((args.out, "--out"), (args.trace, "--trace")):
        if path is not None:
            require_writable(path, option)
    device = configure(args.device or "auto", threads)
    request = Request(
        operators=tuple(dict.fromkeys(args.what)) or known,
        shapes=args.shapes or (QUICK_SHAPES if args.quick else SHAPES),
        dtypes=args.dtypes or DEFAULT_DTYPES,
        device=device,
        backends=args.backends or (),
        seconds=args.seconds or (0.3 if args.quick else 1.0),
        images=args.images,
        command=_command(args, threads),
        quick=args.quick,
    )
    record = measure(request, log)
    out = args.out or Path("runs") / "profile" / f"{device_folder(record)}.json"
    write_text(out, json.dumps(record, indent=1) + "\n")
    if args.trace:
        with writing(args.trace, "--trace"):
            trace(request, args.trace, log)
        log(f"trace: {args.trace}")
    show(record)
    log(f"record: {out}")
    return 0


def check_used(args: argparse.Namespace, what: tuple[str, ...]) -> None:
    """Refuse options that nothing of ``what`` is measured by.

    Raises:
        UsageError: naming the option.
    """
    patches = [name for name in what if name not in ("step", "gradient_distance")]
    for option, value in (("--shapes", args.shapes), ("--dtypes", args.dtypes), ("--images", args.images)):
        if value and not patches:
            raise UsageError(
                f"{option} is of patches, which {' and '.join(what)} {'does' if len(what) == 1 else 'do'} not take"
            )
    if args.backends and set(what) == {"step"}:
        raise UsageError("--backends is of the operators: step measures compiled and reference")


def check_backends(names: tuple[str, ...]) -> None:
    """Refuse backends that do not exist, and packages that are not installed.

    Raises:
        UsageError: naming the nearest match, or what to install.
    """
    from histodd_bench.profile.peers import PACKAGES
    from histodd_bench.profile.problems import COMPILED, OTHERS, REFERENCE

    known = (COMPILED, REFERENCE, *OTHERS, *PACKAGES)
    for name in names:
        if name not in known:
            raise unknown_name("backend", name, known)
        if name in PACKAGES and not PACKAGES[name].installed:
            raise UsageError(f"--backends {name}: not installed: pip install {PACKAGES[name].distribution}")


def read_record(path: Path) -> dict[str, Any]:
    """A record that ``profile`` wrote.

    Raises:
        UsageError: there is none, or the file is something else.
    """
    from histodd_bench.profile.run import FORMAT

    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    except ValueError:
        record = {}
    if not isinstance(record, dict) or record.get("format") != FORMAT or "measurements" not in record:
        raise UsageError(f"{path} is not a record of 'profile' (of this version)")
    return record


def device_folder(record: dict[str, Any]) -> str:
    """Name of a device as part of a path: ``amd-epyc``."""
    return re.sub(r"[^a-z0-9]+", "-", record["environment"]["device"].lower()).strip("-") or "device"


def _command(args: argparse.Namespace, threads: int) -> str:
    line = ["python", "-m", "histodd_bench", "profile", *args.what]
    if args.quick:
        line.append("--quick")
    if args.shapes:
        line += ["--shapes", ",".join(f"{n}x{side}" for n, side in args.shapes)]
    for name in ("dtypes", "backends"):
        if getattr(args, name):
            line += [f"--{name}", ",".join(getattr(args, name))]
    if args.images:
        line += ["--images", "DIR"]
    if args.seconds:
        line += ["--seconds", f"{args.seconds:g}"]
    return shlex.join([*line, "--device", args.device or "auto", "--threads", str(threads)])
