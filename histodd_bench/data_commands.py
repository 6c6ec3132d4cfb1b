"""``data prepare``, ``info``, ``fetch``, ``stains`` and ``export``: data sets from files on disk to something that trains."""

import argparse
import math
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from histodd_bench.errors import UsageError, unknown_name
from histodd_bench.files import cache_folder, require_writable

_EXPORTS = ("clam", "imagefolder")


def run(args: argparse.Namespace) -> int:
    """Run one of the sub-commands; returns the exit code."""
    if args.data_command == "prepare" and args.workers > 1:
        _start_workers()
    from histodd_bench.data import DATASETS

    if args.data_command != "export" and args.name not in DATASETS:
        raise unknown_name("dataset", args.name, DATASETS)
    commands = {"prepare": _prepare, "info": _info, "fetch": _fetch, "stains": _stains, "export": _export}
    return commands[args.data_command](args)


def _start_workers() -> None:
    """Start the process that workers are forked from now: it imports what they need while this one does the same."""
    import multiprocessing
    from multiprocessing import forkserver

    multiprocessing.get_context("forkserver").set_forkserver_preload(["histodd_bench.data.extract"])
    forkserver.ensure_running()


def _root(args: argparse.Namespace) -> Path | None:
    from histodd_bench.data import DATASETS
    from histodd_bench.data.prepared import is_prepared

    root: Path | None = args.root
    if root is not None and not root.is_dir():
        raise UsageError(f"--root {root} is not a folder")
    if DATASETS[args.name].needs_root:
        if root is None:
            raise UsageError(f"dataset {args.name!r} reads your files: say where they are with --root")
    elif root is not None and not is_prepared(root):
        raise UsageError(f"dataset {args.name!r} is drawn: it reads no --root but a folder that 'data prepare' wrote")
    return root


# ---- prepare ---------------------------------------------------------------------------------------------------------


def _prepare(args: argparse.Namespace) -> int:
    from histodd_bench.data import DATASETS
    from histodd_bench.data.jobs import FilesJob
    from histodd_bench.data.prepared import is_prepared, prepare, prepare_files, require_other
    from histodd_bench.progress import Progress

    share = args.shard
    entry, root = DATASETS[args.name], _root(args)
    require_other(args.out, root)
    if root is not None and is_prepared(root):
        raise UsageError(f"--root {root} is already prepared: give it to --data-root of 'run'")
    given = [o for o in _TILING if getattr(args, o.lstrip("-").replace("-", "_")) is not None]
    if entry.source is None:
        if given or share != (1, 1) or args.dry_run:
            what = (given + ["--shard"] * (share != (1, 1)) + ["--dry-run"] * args.dry_run)[0]
            raise UsageError(f"{what} is for data sets that consist of slides; {args.name} consists of patches")
        with Progress() as progress:
            options: dict[str, Any] = {} if root is None else {"root": root}
            size = args.image_size or _NATIVE.get(args.name, 256)
            prepare_files(
                args.name,
                entry.load,
                size,
                args.out,
                progress=progress,
                seed=args.split_seed,
                workers=args.workers,
                **options,
            )
        return _finish(args)
    assert root is not None
    if args.dry_run and share != (1, 1):
        raise UsageError("--dry-run looks at all slides: it does not go with --shard")
    if args.coords is not None and (args.stride is not None or args.min_tissue is not None):
        raise UsageError("--coords says where the patches are: --stride and --min-tissue do not go with it")
    source = entry.source(root, args.split_seed)
    unused = [option for option in given if option != "--size"]
    if unused and all(isinstance(job, FilesJob) for job in source.jobs):
        raise UsageError(f"{unused[0]} is for slides that are cut up; {args.name} comes as patches")
    tiling = _tiling(args, source.tiling)
    size = args.image_size or (source.image_size if args.size is None else args.size)
    with Progress() as progress:
        for note in source.notes:
            progress.log(f"{args.name}: {note}")
        if args.dry_run:
            return _estimate(args, source, tiling, size, progress)
        outcome = prepare(source, tiling, size, args.out, workers=args.workers, share=share, progress=progress)
    if outcome.seconds:
        rate = outcome.patches / outcome.seconds
        print(
            f"{outcome.new} slides read in {outcome.seconds:.1f} s: {outcome.patches} patches, {rate:.0f} patches/s, "
            f"{outcome.new / outcome.seconds:.2f} slides/s"
        )
    for slide, reason in sorted(outcome.failed.items()):
        print(f"not used: {slide}: {reason}", file=sys.stderr)
    if share != (1, 1):
        print(f"part {share[0]}/{share[1]} is done; when all parts are, the same command without --shard collects them")
        return 0
    return _finish(args)


_TILING = (
    "--size",
    "--magnification",
    "--target-mpp",
    "--mpp",
    "--stride",
    "--min-tissue",
    "--positive",
    "--negative",
    "--coords",
)
_NATIVE = {"idc": 50, "pcam": 96, "pathmnist": 28, "demo": 128}  # px; their own size


def _tiling(args: argparse.Namespace, default: Any) -> Any:
    if args.magnification is not None and args.target_mpp is not None:
        raise UsageError("--magnification and --target-mpp say the same: give one of them")
    if args.coords is not None and not args.coords.is_dir():
        raise UsageError(f"--coords {args.coords} is not a folder")
    target = 10 / args.magnification if args.magnification is not None else args.target_mpp
    given = {
        "size": args.size,
        "mpp": target,
        "override": args.mpp,
        "stride": args.stride,
        "min_tissue": args.min_tissue,
        "positive": args.positive,
        "negative": args.negative,
        "coordinates": None if args.coords is None else str(args.coords),
    }
    return replace(default, **{name: value for name, value in given.items() if value is not None})


def _estimate(args: argparse.Namespace, source: Any, tiling: Any, size: int, progress: Any) -> int:
    from histodd_bench.data.extract import estimate
    from histodd_bench.wording import absent_classes

    counts, failed = estimate(source, tiling, workers=args.workers, progress=progress)
    each = 3 * size * size + 7 * 8  # pixels and columns
    total = sum(map(sum, counts.values()))
    for split in ("train", "test"):
        slides = [job.slide for job in source.jobs if job.split == split and job.slide in counts]
        sums = [sum(counts[slide][label] for slide in slides) for label in range(len(source.classes))]
        classes = ", ".join(f"{name} {n:,}" for name, n in zip(source.classes, sums, strict=True))
        print(f"{split}: {len(slides)} slides, {sum(sums):,} patches ({classes})")
        for warning in absent_classes(split, source.classes, sums):
            print(warning, file=sys.stderr)
    print(
        f"{total:,} patches of {size} px: {_bytes(total * each)} in {args.out}, {_bytes(2 * total * each)} while collecting"
    )
    room = shutil.disk_usage(next(p for p in (args.out, *args.out.absolute().parents) if p.exists())).free
    if 2 * total * each > room:
        print(f"only {_bytes(room)} are free there", file=sys.stderr)
    for slide, reason in sorted(failed.items()):
        print(f"cannot be used: {slide}: {reason}", file=sys.stderr)
    return 0


def _bytes(count: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            return f"{count:.3g} {unit}" if unit != "bytes" else f"{count:.0f} bytes"
        count /= 1000
    raise AssertionError


def _finish(args: argparse.Namespace) -> int:
    print("\n".join(_prepared_lines(args.out)))
    print(f"ready: run table1 --dataset {args.name} --data-root {args.out}")
    return 0


# ---- info ------------------------------------------------------------------------------------------------------------


def _info(args: argparse.Namespace) -> int:
    from histodd_bench.data import DATASETS
    from histodd_bench.data.facts import FACTS, SUPPLEMENTARY_TABLE1
    from histodd_bench.data.prepared import is_prepared

    facts, entry = FACTS.get(args.name), DATASETS[args.name]
    if facts is None:
        lines = [f"{args.name}: {entry.description}", "  there are no published facts to compare with"]
    else:
        lines = [facts.title, *(f"  {line}" for line in facts.known), f"  where: {facts.where}"]
    printed = SUPPLEMENTARY_TABLE1.get(args.name)
    if printed:
        lines += [
            "",
            *_table("the paper's supplementary Table 1", [("patches", *printed[:2]), ("slides", *printed[2:])]),
        ]
    if args.root is not None:
        _root(args)
        lines.append("")
        if is_prepared(args.root):
            lines += _prepared_lines(args.root)
        elif entry.source is not None:
            lines += _source_lines(entry.source(args.root, args.split_seed), args.root)
        elif entry.count is not None:
            lines += _count_lines(entry.count(args.root, args.split_seed), args.root)
        else:
            lines.append(f"patches in {args.root} are counted by 'data prepare {args.name}'")
    print("\n".join(lines))
    return 0


def _table(title: str, rows: list[tuple[str, int, int]]) -> list[str]:
    width = max(len(title), *(len(name) + 2 for name, *_ in rows))
    head = f"{title:<{width}}  {'train':>12}  {'test':>12}"
    return [head, *(f"  {name:<{width - 2}}  {train:>12,}  {test:>12,}" for name, train, test in rows)]


def _count_lines(counts: Any, root: Path) -> list[str]:
    from histodd_bench.wording import absent_classes

    classes = zip(counts.classes, counts.train, counts.test, strict=True)
    rows = [("patches", sum(counts.train), sum(counts.test)), *((f"patches of {name}", a, b) for name, a, b in classes)]
    notes = [*counts.notes, *absent_classes("test", counts.classes, counts.test)]
    return _table(f"found in {root}", rows) + [f"  note: {note}" for note in notes]


def _source_lines(source: Any, root: Path) -> list[str]:
    from histodd_bench.data.jobs import FilesJob

    rows: list[tuple[str, int, int]] = []

    def row(name: str, values: dict[str, int]) -> None:
        rows.append((name, values.get("train", 0), values.get("test", 0)))

    def count(jobs: list[Any], of: Any = lambda job: 1) -> dict[str, int]:
        return {split: sum(of(job) for job in jobs if job.split == split) for split in ("train", "test")}

    jobs = list(source.jobs)
    if all(isinstance(job, FilesJob) for job in jobs):
        row("patches", count(jobs, lambda job: len(job.files)))
    row("slides", count(jobs))
    for label, name in enumerate(source.classes):
        row(f"slides with {name}", count([job for job in jobs if label in _labels(job)]))
    for index, name in enumerate(source.centres):
        row(f"slides of {name}", count([job for job in jobs if job.centre == index]))
    lines = _table(f"found in {root}", rows)
    if not all(isinstance(job, FilesJob) for job in jobs):
        lines.append("  patches are counted by 'data prepare', or estimated by its --dry-run")
    return lines + [f"  note: {note}" for note in source.notes]


def _labels(job: Any) -> set[int]:
    """Classes that a slide can give patches of."""
    if hasattr(job, "files"):
        return {label for _, label, *_ in job.files}
    return ({job.label} | {label for _, label in job.inside} | {job.outside}) - {None}


def _prepared_lines(folder: Path) -> list[str]:
    import json

    from histodd_bench.data import store
    from histodd_bench.data.template import FILE

    described = store.read_dataset(folder)
    stores = {split: store.load(folder / split) for split in ("train", "test")}
    train, test = stores["train"], stores["test"]
    rows = [("patches", len(train), len(test))]
    slides = {split: len(store.slide_names(folder / split)) for split in stores}
    if any(slides.values()):
        rows.append(("slides", slides["train"], slides["test"]))
    rows.append(("patients or groups", len(train.groups.unique()), len(test.groups.unique())))
    rows += [
        (f"patches of {name}", a, b)
        for name, a, b in zip(train.classes, train.class_counts(), test.class_counts(), strict=True)
    ]
    size = train.image_size[0]
    lines = _table(f"prepared in {folder}, {size} px", rows)
    if (folder / FILE).is_file():
        try:
            kept = json.loads((folder / FILE).read_text(encoding="utf-8"))
            of = f" of {kept['slide']}, at ({kept['x']}, {kept['y']})" if "slide" in kept else ""
            lines.append(f"  stain template: training patch {kept['index']}{of}")
        except (OSError, ValueError, KeyError, TypeError):
            lines.append(f"  stain template: {FILE} is damaged and not used; it is found again whenever it is needed")
    return lines + [f"  note: {note}" for note in described.get("notes") or ()]


# ---- stains ----------------------------------------------------------------------------------------------------------


def _stains(args: argparse.Namespace) -> int:
    from histodd_bench.data import load_dataset, store
    from histodd_bench.data.prepared import is_prepared
    from histodd_bench.data.stain_report import PATCHES, spread, stain_rows, write_report
    from histodd_bench.progress import Progress

    root = _root(args)
    require_writable(args.out / "stains.csv")
    size = args.image_size
    if size is None:
        stored = root is not None and is_prepared(root)
        size = store.load(Path(str(root)) / "train").image_size[0] if stored else _NATIVE.get(args.name, 256)
    with Progress() as progress:
        dataset = load_dataset(
            args.name, root=root, image_size=size, seed=args.split_seed, cache=cache_folder() / "data",
            workers=args.workers, progress=progress,
        )  # fmt: skip
        rows = stain_rows(dataset, progress)
    write_report(rows, args.out)
    centres = sorted({row.centre for row in rows})
    print(
        f"{len(rows)} slides, up to {PATCHES} patches each; mean angle to the mean stain, and variation of its amount"
    )
    width = max(len("centre"), len("all slides"), *map(len, centres))
    print(f"  {'':<{width}}  {'haematoxylin':>24}  {'eosin':>24}")
    for title, part in [("all slides", rows), *((c, [r for r in rows if r.centre == c]) for c in centres if c)]:
        for after in (False, True):
            h, e, h_varied, e_varied = spread(part, after)
            cells = f"{_spread(h, h_varied)}  {_spread(e, e_varied)}"
            print(f"  {title:<{width}}  {cells}  {'after' if after else 'before'} normalisation")
    failed = [row for row in rows if row.before.stain is None]
    if failed:
        print(f"  {len(failed)} slides could not be fitted, e.g. {failed[0].slide}: {failed[0].before.status}")
    print(f"{args.out}: stains.csv, stains.png")
    return 0


def _spread(angle: float, varied: float) -> str:
    """An angle and a variation; a dash where nothing could be fitted."""
    return f"{'-':>22}" if math.isnan(angle) else f"{angle:>9.2f} deg {varied:>8.1%}"


# ---- fetch and export ------------------------------------------------------------------------------------------------


def _fetch(args: argparse.Namespace) -> int:
    from histodd_bench.data.facts import where
    from histodd_bench.data.fetch import REMOTES, fetch, remote_files
    from histodd_bench.progress import Progress

    if args.name not in REMOTES:
        print(f"{args.name} is not downloaded by this program. Where to get it: {where(args.name)}")
        return 0
    if args.out is None:
        raise UsageError("say where to download to with --out")
    with Progress() as progress:
        files = fetch(remote_files(args.name), args.out, progress)
    print(f"{len(files)} files in {args.out}")
    return 0


def _export(args: argparse.Namespace) -> int:
    from histodd_bench.data.export import export_coordinates, export_images
    from histodd_bench.data.prepared import is_prepared, require_other
    from histodd_bench.progress import Progress

    if args.to not in _EXPORTS:
        raise unknown_name("export", args.to, _EXPORTS)
    if not is_prepared(args.root):
        raise UsageError(f"{args.root} is not a prepared data set: 'data prepare' makes one")
    require_other(args.out, args.root)
    with Progress() as progress:
        if args.to == "imagefolder":
            print(f"{export_images(args.root, args.out, progress)} patches in {args.out}")
        else:
            print(f"coordinates of {export_coordinates(args.root, args.out)} slides in {args.out}")
    return 0
