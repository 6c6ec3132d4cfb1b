"""From a source to a dataset: every slide into a shard of its own, then all shards into the stores ``train`` and ``test``.

A shard is named by everything it depends on and appears only when complete, so an interrupted extraction, or one spread over
machines by ``share``, goes on where it was. Patches are ordered by class, slide, row and column, whatever the order of work.
"""

import re
import shutil
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from histodd_bench.data import store
from histodd_bench.data.images import at_once, enlarged
from histodd_bench.data.jobs import Job, Report, Source, Tiling
from histodd_bench.data.store import Dataset, StoreWriter, cached_dataset
from histodd_bench.data.template import write_template
from histodd_bench.data.workers import Failed, run_jobs
from histodd_bench.errors import HistoddError
from histodd_bench.files import digest, locked, writing

SHARDS = "slides"
_NAMED = 5


@dataclass
class Outcome:
    """What an extraction did: shards by slide, and what could not be used, by slide."""

    shards: dict[str, Path] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    new: int = 0
    patches: int = 0
    seconds: float = 0.0

    def add(self, other: "Outcome") -> None:
        """Take in what was done for other slides."""
        self.shards |= other.shards
        self.failed |= other.failed
        self.new, self.patches = self.new + other.new, self.patches + other.patches
        self.seconds += other.seconds


@dataclass(frozen=True)
class _Extraction:
    """One job and where its result goes: what is sent to a worker."""

    job: Job
    target: Path
    tiling: Tiling
    image_size: int
    classes: tuple[str, ...]


def safe_name(text: str) -> str:
    """A file name made of a slide's or class's name, whatever that is: no separators, not hidden, not too long."""
    return re.sub(r"[^A-Za-z0-9._+-]+", "_", text).lstrip(".-")[:80] or "_"


def shard_folder(folder: Path, job: Job, tiling: Tiling, image_size: int, classes: Sequence[str]) -> Path:
    """Where the shard of a job is."""
    return folder / f"{safe_name(job.slide)}-{job.key(tiling, image_size, classes)[:16]}"


def require_sides(source: Source, *, scored: bool) -> None:
    """Refuse a source without training slides, or without test slides if something is to be scored, before hours of work.

    Raises:
        HistoddError: naming the side.
    """
    for split, what in (("train", "learn from"), ("test", "score on"))[: 1 + scored]:
        if not any(job.split == split for job in source.jobs):
            raise HistoddError(
                f"{source.name}: none of {len(source.jobs)} slides is in the {split} set: add slides to {what}, or change the split"
            )


def extract(
    source: Source, tiling: Tiling, image_size: int, folder: Path, *, workers: int = 1, share: tuple[int, int] = (1, 1),
    progress: Any,
) -> Outcome:  # fmt: skip
    """Extract what ``folder`` lacks.

    Args:
        folder: of the shards.
        workers: processes; each slide is read by one, with a handle of its own.
        share: (i, n): only every n-th slide, beginning with the i-th (1-based).

    Raises:
        HistoddError: the folder cannot be written.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    outcome, todo = Outcome(), []
    mine = [job for index, job in enumerate(source.jobs) if index % share[1] == share[0] - 1]
    for job in mine:
        target = shard_folder(folder, job, tiling, image_size, source.classes)
        outcome.shards[job.slide] = target
        if not _finished(target):
            todo.append(_Extraction(job, target, tiling, image_size, source.classes))
    if len(todo) < len(mine):
        progress.log(f"{source.name}: {len(mine) - len(todo)} of {len(mine)} slides are extracted already")
    start = time.monotonic()
    with progress.task(f"{source.name}: slides", len(mine), done=len(mine) - len(todo)) as task:

        def rates() -> dict[str, float]:
            elapsed = max(time.monotonic() - start, 1e-9)
            return {"slides/s": outcome.new / elapsed, "patches/s": outcome.patches / elapsed}

        def advance(n: int) -> None:
            outcome.patches += n
            task.advance(0, **rates())

        for index, result in run_jobs(_extract_one, todo, workers, advance):
            slide = todo[index].job.slide
            if isinstance(result, Failed):
                outcome.failed[slide] = result.reason
                del outcome.shards[slide]
                progress.log(f"{source.name}: {slide}: {result.reason}")
            outcome.new += 1
            task.advance(1, **rates())
    outcome.seconds = time.monotonic() - start
    return outcome


def _extract_one(item: _Extraction, report: Report) -> None:
    with locked(item.target.with_name(item.target.name + ".lock")):  # another process may be at the same slide
        if not _finished(item.target):
            item.job.extract(item.target, item.tiling, item.image_size, item.classes, report)


def _finished(target: Path) -> bool:
    try:
        store.load(target)
    except store.StoreError:
        return False
    return True


def estimate(
    source: Source, tiling: Tiling, *, workers: int = 1, progress: Any
) -> tuple[dict[str, list[int]], dict[str, str]]:
    """Patches per class that each slide would give, without reading them, and the slides that cannot be used."""
    require_sides(source, scored=False)
    counts: dict[str, list[int]] = {}
    failed: dict[str, str] = {}
    items = [_Extraction(job, Path(), tiling, 1, source.classes) for job in source.jobs]
    with progress.task(f"{source.name}: looking at slides", len(items)) as task:
        for index, result in run_jobs(_count_one, items, workers, lambda n: None):
            slide = items[index].job.slide
            if isinstance(result, Failed):
                failed[slide] = result.reason
            else:
                counts[slide] = result
            task.advance(1)
    return counts, failed


def _count_one(item: _Extraction, report: Report) -> list[int]:
    return item.job.count(item.tiling, item.classes)


def merge(
    source: Source, outcome: Outcome, image_size: int, folder: Path, progress: Any
) -> tuple[list[str], dict[str, Any]]:
    """Write the stores ``train`` and ``test`` under ``folder`` from shards, and the stain template.

    Returns:
        Notes for the reader of results, and per slide what is known of it, as JSON values.

    Raises:
        HistoddError: no training patches of a class, or no patches of the test slides.
    """
    about = {slide: store.about(path) for slide, path in outcome.shards.items()}
    jobs, copies = _without_copies(source.jobs, about)
    total = sum(len(store.load(outcome.shards[job.slide])) for job in jobs)
    with progress.task(f"{source.name}: collecting patches", total) as task:
        for split in ("train", "test"):
            part = sorted((job for job in jobs if job.split == split), key=lambda job: job.slide)
            counts = _write_split(source, part, outcome.shards, image_size, folder / split, task.advance)
            lost = f"; {_sentence(outcome.failed, 'slides could not be used')}" if outcome.failed else ""
            for name, count in zip(source.classes, counts, strict=True):
                if split == "train" and count == 0:
                    raise HistoddError(f"{source.name}: class {name!r} has no training patch{lost}")
            if split == "test" and not any(counts) and any(job.split == "test" for job in source.jobs):
                raise HistoddError(f"{source.name}: there is no test patch{lost}")
    write_template(folder, progress)
    notes = list(source.notes)
    if outcome.failed:
        notes.append(_sentence(outcome.failed, f"of {len(source.jobs)} slides could not be used"))
    tiles = {
        slide: f"{facts['unreadable']} at {', '.join(facts['tiles'])}"
        for slide, facts in about.items()
        if facts.get("unreadable")
    }
    if tiles:
        n = sum(facts.get("unreadable", 0) for facts in about.values())
        notes.append(f"{n} patches could not be decoded, in {_sentence(tiles, 'slides')}")
    sides: Counter[int] = Counter()  # of patches before they were resized
    for job in jobs:
        sides += Counter({int(side): n for side, n in about[job.slide].get("sides", {}).items()})
    notes += enlarged(sides, total, image_size)
    if copies:
        notes.append(_sentence(copies, "slides are copies of others and were left out"))
    return notes, about


def _sentence(named: dict[str, str], what: str) -> str:
    shown = [f"{slide} ({reason})" for slide, reason in sorted(named.items())[:_NAMED]]
    more = f" and {len(named) - _NAMED} more" if len(named) > _NAMED else ""
    return f"{len(named)} {what}: {', '.join(shown)}{more}"


def _without_copies(jobs: Sequence[Job], about: dict[str, Any]) -> tuple[list[Job], dict[str, str]]:
    """Jobs that have a shard, without slides that hold the same picture as an earlier one (training slides first)."""
    seen: dict[str, str] = {}
    kept, copies = [], {}
    for job in sorted(jobs, key=lambda job: (job.split != "train", job.slide)):
        if job.slide not in about:
            continue
        picture = about[job.slide].get("quickhash")
        if picture and picture in seen:
            copies[job.slide] = f"the same picture as {seen[picture]}"
            continue
        if picture:
            seen[picture] = job.slide
        kept.append(job)
    return kept, copies


def _write_split(
    source: Source, jobs: Sequence[Job], shards: dict[str, Path], image_size: int, target: Path,
    advance: Callable[[int], object],
) -> list[int]:  # fmt: skip
    with StoreWriter(target, (image_size, image_size), source.classes, source.centres) as writer:
        for label in range(len(source.classes)):
            for job in jobs:
                shard, columns = store.load(shards[job.slide]), store.load_columns(shards[job.slide])
                order = np.flatnonzero(columns["labels"] == label)
                for start in range(0, len(order), at_once(image_size)):
                    index = order[start : start + at_once(image_size)]
                    n = len(index)
                    more: dict[str, Any] = {name: columns[name][index] for name in ("x", "y", "level", "mpp")}
                    if source.centres:
                        more["centres"] = [job.centre or 0] * n
                    images = shard.images.numpy()[index]
                    writer.append(images, [label] * n, [job.patient] * n, slides=[job.slide] * n, **more)
                    advance(n)
        return writer.finish().class_counts()


def load_source(source: Source, image_size: int, cache: Path, workers: int, progress: Any) -> Dataset:
    """Open the patches of a source, from the cache where they have been extracted before."""
    require_sides(source, scored=True)
    keys = [
        [job.slide, job.patient, job.split, job.centre, job.key(source.tiling, image_size, source.classes)]
        for job in source.jobs
    ]
    key = {"jobs": keys, "centres": list(source.centres), "notes": list(source.notes), "size": image_size}
    shards = Path(cache) / f"{source.name}-{SHARDS}-{digest([source.name, image_size, [k[0] for k in keys]])[:16]}"

    def build(folder: Path) -> list[str]:
        outcome = extract(source, source.tiling, image_size, shards, workers=workers, progress=progress)
        notes, _ = merge(source, outcome, image_size, folder, progress)
        return notes

    dataset = cached_dataset(cache, source.name, key, source.procedural, build, progress)
    if shards.exists():
        shutil.rmtree(shards, ignore_errors=True)
    return dataset
