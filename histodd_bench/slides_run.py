"""Running per-slide distillation: every missing slide on an engine, a second attempt for what failed, and an index of all."""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from histodd_bench.data.centres import open_experiment
from histodd_bench.engines import Engine
from histodd_bench.files import locked, write_text
from histodd_bench.progress import Progress
from histodd_bench.request import Request
from histodd_bench.results import finite
from histodd_bench.slides_distill import FOLDER, SlideDistiller, SlideJob, card_of

ATTEMPTS = 2  # of every slide


def _open(request: Request, method: str, centre: str | None, device: str) -> Callable[[SlideJob], None]:
    """What a worker does first: load the data set and the networks that all slides share."""
    experiment = open_experiment(dataclasses.replace(request, device=device), Progress.silent(), centre)
    return SlideDistiller(experiment, method, centre).make


def shard(slides: Sequence[str], part: tuple[int, int]) -> list[str]:
    """Part ``i`` of ``n`` (counted from 1) of the slides; the parts are disjoint and together all."""
    i, n = part
    return list(slides[i - 1 :: n])


def distill_slides(
    distiller: SlideDistiller,
    ipcs: Sequence[int],
    seeds: Sequence[int],
    engine: Engine,
    progress: Progress,
    *,
    part: tuple[int, int] = (1, 1),
    slides: Sequence[str] | None = None,
) -> dict[SlideJob, str]:
    """Make every set that is not finished. A slide that fails is tried once more; what still fails is returned, with why.

    Writes ``slides.json`` beside the files: every slide's counts, seconds and caps, and what failed.

    Args:
        part: (i, n): this call's share of the slides.
        slides: only these; all training slides with patches by default.
    """
    chosen = shard(distiller.slides if slides is None else slides, part)
    jobs = [SlideJob(slide, ipc, seed) for seed in seeds for ipc in ipcs for slide in chosen]
    todo = [job for job in jobs if not distiller.finished(job)]
    for name in distiller.empty:
        progress.log(f"slide {name} has no patches: left out")
    failures: dict[SlideJob, str] = {}
    if todo:
        distiller.prepare(todo)
        opener = partial(_open, distiller.request, distiller.name, distiller.centre)
        title = f"{distiller.request.dataset}: {distiller.name} per slide"
        with progress.task(title, len(jobs), done=len(jobs) - len(todo)) as task:
            failures = engine.run(opener, todo, task.advance)
            for _ in range(ATTEMPTS - 1):
                again = [job for job in todo if not distiller.finished(job)]
                for job in again:
                    reason = failures.get(job, "it left no file")
                    progress.log(f"slide {job.slide}, {job.ipc} per class, seed {job.seed}: {reason}: trying again")
                new = engine.run(opener, again, lambda: None)
                failures = {job: new.get(job, "it left no file") for job in again if not distiller.finished(job)}
    for ipc in ipcs:
        for seed in seeds:
            _write_index(
                distiller, ipc, seed, {j.slide: t for j, t in failures.items() if (j.ipc, j.seed) == (ipc, seed)}
            )
    return failures


def _write_index(distiller: SlideDistiller, ipc: int, seed: int, failed: Mapping[str, str]) -> None:
    folder = distiller.request.out / FOLDER / distiller.title(ipc, seed)
    rows = {}
    for name in distiller.slides:
        card = card_of(distiller.path(SlideJob(name, ipc, seed)))
        if card.get("key") == distiller.key(ipc, seed):
            rows[name] = {k: card[k] for k in ("had", "kept", "capped", "seconds")}
            rows[name]["file"] = distiller.path(SlideJob(name, ipc, seed)).name
    index = {
        "dataset": distiller.request.dataset,
        "procedural": distiller.experiment.dataset.procedural,
        "method": distiller.name,
        "ipc": ipc,
        "seed": seed,
        "classes": list(distiller.train.classes),
        "key": distiller.key(ipc, seed),
        "config": distiller.config(ipc, seed),
        "slides": rows,
        "missing": [name for name in distiller.slides if name not in rows],
        "empty": list(distiller.empty),
        "failed": dict(failed),
    }
    with locked(folder / ".lock"):  # shards that end together
        write_text(folder / "slides.json", json.dumps(finite(index), indent=1, allow_nan=False) + "\n")


def summary(distiller: SlideDistiller, ipc: int, seed: int) -> str:
    """One line about a set: slides, patches before and after, caps, seconds per slide."""
    from statistics import median

    folder = distiller.request.out / FOLDER / distiller.title(ipc, seed)
    index = json.loads((folder / "slides.json").read_text(encoding="utf-8"))
    rows = index["slides"].values()
    capped = sum(bool(r["capped"]) for r in rows)
    seconds = [r["seconds"] for r in rows]
    had, kept = (sum(sum(r[name]) for r in rows) for name in ("had", "kept"))
    text = f"{len(rows)} of {len(distiller.slides)} slides, {had} patches -> {kept}"
    text += f", {median(seconds):.2f} s per slide (median; {sum(seconds):.1f} s in all)" if seconds else ""
    if capped:
        text += f"; {capped} slides have fewer than {ipc} patches of a class, and all of those were kept"
    return f"{distiller.name} {ipc} per class, seed {seed}: {text}: {folder}"
