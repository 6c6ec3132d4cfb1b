"""``distill-slides``: what the command line asks of per-slide distillation."""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from histodd_bench.errors import HistoddError, UsageError
from histodd_bench.request import Request

if TYPE_CHECKING:
    from histodd_bench.experiment import Experiment


def distill(args: argparse.Namespace, requests: Sequence[Request], out: Path) -> int:
    """Distil the slides of every request; prints the folders. Fails where a slide failed twice, after all others are done."""
    from histodd_bench.data.centres import open_experiment
    from histodd_bench.engines import Engine
    from histodd_bench.progress import Progress
    from histodd_bench.slides_distill import FOLDER, SlideDistiller
    from histodd_bench.slides_run import distill_slides, summary

    name, options = args.engine or "local", dict(args.engine_options)
    Engine(name, 1, args.device, out / "work", options).check()  # before minutes of work
    failed: list[str] = []
    with Progress() as progress:
        for request in requests:
            request = replace(request, methods=(args.method,), ipc=request.ipc)
            distiller = SlideDistiller(open_experiment(request, progress), args.method)
            slides = None
            if args.slides:
                wrong = [name for name in args.slides if name not in distiller.slides]
                if wrong:
                    raise UsageError(f"--slides: {request.dataset} has no training slide {wrong[0]!r} with patches")
                slides = list(args.slides)
            workers = workers_of(request)
            engine = Engine(name, workers, engine_device(distiller.experiment), out / "work", options)
            progress.log(
                f"{request.dataset}: {len(distiller.slides)} slides, part {args.shard[0]} of {args.shard[1]}; "
                f"{args.method} {', '.join(map(str, request.ipc))} per class, {request.seeds} seeds; engine {name}, "
                f"{workers} workers with {request.threads} thread each; results in {out}"
            )
            failures = distill_slides(
                distiller, request.ipc, range(request.seeds), engine, progress, part=args.shard, slides=slides
            )
            failed += [f"{job.slide} ({job.ipc} per class, seed {job.seed}): {why}" for job, why in failures.items()]
            for seed in range(request.seeds):
                for ipc in request.ipc:
                    progress.log(summary(distiller, ipc, seed))
                    print(out / FOLDER / distiller.title(ipc, seed))
    if failed:
        raise HistoddError(
            f"{len(failed)} slides failed twice; all others are done, and the same command tries these again: "
            + "; ".join(failed[:5])
        )
    return 0


def engine_device(experiment: "Experiment") -> str:
    """The device that workers get: of the kind this process has, since the kind is part of every configuration."""
    named = experiment.request.device
    return named if ":" in named else experiment.device.type


def workers_of(request: Request) -> int:
    """How many workers compute at slide level: what ``--workers`` says, otherwise one per GPU or core."""
    from histodd_bench.engines import default_workers

    return request.slides.workers or default_workers(request.device, request.workers)
