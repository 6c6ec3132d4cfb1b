"""A prepared dataset: one folder with the stores ``train`` and ``test``, made once and given to ``--data-root`` ever after.

Preparing is resumable (finished slides are skipped), can be spread over machines (``share``), and leaves ``dataset.json`` last,
so that a folder without it is not taken for a finished dataset.
"""

import json
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from histodd_bench.data import store
from histodd_bench.data.extract import SHARDS, Outcome, extract, merge, require_sides
from histodd_bench.data.images import at_once, enlarged, resize
from histodd_bench.data.jobs import Job, Source, Tiling
from histodd_bench.data.patchset import PatchSet
from histodd_bench.data.store import Dataset, StoreWriter, cached_dataset, read_dataset, write_dataset
from histodd_bench.data.template import write_template
from histodd_bench.errors import UsageError
from histodd_bench.files import canonical, locked, move_folder, write_text, writing

_FILE = "dataset.json"


def is_prepared(folder: Path) -> bool:
    """Whether a folder holds a finished prepared dataset; a ``dataset.json`` of somebody else's does not make it one."""
    path = Path(folder) / _FILE
    try:
        return path.is_file() and (
            store.FORMAT in path.read_text("utf-8", "replace") or (folder / "train" / "meta.json").is_file()
        )
    except OSError:
        return False


def prepare(
    source: Source, tiling: Tiling, image_size: int, out: Path, *, workers: int = 1, share: tuple[int, int] = (1, 1),
    progress: Any,
) -> Outcome:  # fmt: skip
    """Extract a source into ``out``; with a ``share``, only that part of its slides, to be collected by a run without one.

    Raises:
        UsageError: ``out`` holds something else.
        HistoddError: it cannot be written, a class has no training patch, or test slides gave no patch.
    """
    require_sides(source, scored=False)
    settings = {"tiling": asdict(tiling), "image_size": image_size, "classes": list(source.classes)}
    wanted = {j.slide: [j.key(tiling, image_size, source.classes), j.split, j.patient, j.centre] for j in source.jobs}
    have = _check_out(out, source.name, settings)
    included = have.get("slides_in", {}) if have else {}
    if included == wanted:
        progress.log(f"{out}: already prepared, nothing to do")
        return Outcome()
    _claim(out / SHARDS, source.name, settings)

    def extracted(jobs: Iterable[Job]) -> Outcome:
        part = replace(source, jobs=tuple(jobs))
        return extract(part, tiling, image_size, out / SHARDS, workers=workers, share=share, progress=progress)

    if share != (1, 1):
        return extracted(source.jobs)
    outcome = extracted(job for job in source.jobs if included.get(job.slide) != wanted[job.slide])
    if included:
        # Only what is new, changed, or could not be used the last time was tried: where nothing came of it, all stays.
        if included == {slide: value for slide, value in wanted.items() if slide not in outcome.failed}:
            progress.log(f"{out}: already prepared; {len(outcome.failed)} slides still cannot be used")
            return outcome
        outcome.add(extracted(job for job in source.jobs if included.get(job.slide) == wanted[job.slide]))
    with locked(out / ".collecting.lock"):
        if is_prepared(out) and read_dataset(out).get("slides_in") == wanted:  # another process was faster
            shutil.rmtree(out / SHARDS, ignore_errors=True)
            return outcome
        with writing(out):
            (out / _FILE).unlink(missing_ok=True)
        notes, about = merge(source, outcome, image_size, out, progress)
        write_dataset(
            out,
            notes,
            dataset=source.name,
            procedural=source.procedural,
            settings=settings,
            slides_in={slide: value for slide, value in wanted.items() if slide in outcome.shards},
            slides=about,
        )
        if not outcome.failed:  # otherwise they are needed when the slide has been replaced
            shutil.rmtree(out / SHARDS, ignore_errors=True)
    return outcome


def prepare_files(
    name: str, load: Callable[..., Dataset], image_size: int, out: Path, *, progress: Any, **options: Any
) -> None:
    """Prepare a dataset that does not consist of slides: its adapter reads it into ``out``.

    Raises:
        As :func:`prepare` and the adapter.
    """
    settings = {"image_size": image_size, **{k: str(v) for k, v in options.items() if k in ("root", "seed")}}
    _check_out(out, name, settings)
    with locked(out / ".collecting.lock"):
        if _check_out(out, name, settings):
            progress.log(f"{out}: already prepared, nothing to do")
            return
        work = out / "work"
        dataset = load(image_size=image_size, cache=work, progress=progress, **options)
        assert dataset.folder is not None
        for split in ("train", "test"):
            move_folder(dataset.folder / split, out / split)
        write_template(out, progress)
        write_dataset(out, dataset.notes, dataset=name, procedural=dataset.procedural, settings=settings)
        shutil.rmtree(work, ignore_errors=True)


def _check_out(out: Path, name: str, settings: dict[str, Any]) -> dict[str, Any] | None:
    """What is prepared in ``out`` already, None for nothing; refuses a folder with other content of the same names."""
    if is_prepared(out):
        have = read_dataset(out)
        same = json.loads(json.dumps(settings))
        if have.get("dataset") != name or have.get("settings") != same:
            raise UsageError(
                f"{out} holds {have.get('dataset', 'a dataset')} prepared with other settings: choose another --out, or delete it"
            )
        return have
    for part in ("train", "test", SHARDS):
        there = out / part
        ours = part == SHARDS or (there / "meta.json").is_file()
        if there.exists() and not (ours and there.is_dir()):
            raise UsageError(f"{there} is not something that 'data prepare' wrote: choose another --out")
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    return None


def _claim(shards: Path, name: str, settings: dict[str, Any]) -> None:
    """Say in a folder of extracted slides what they are for; refuse one that is for something else, which would be lost."""
    path, mine = shards / "settings.json", canonical({"dataset": name, **settings})
    with locked(path.with_suffix(".lock")):
        if not path.exists():
            write_text(path, mine)
        elif path.read_text(encoding="utf-8", errors="replace") != mine:
            raise UsageError(
                f"{shards} holds slides extracted for another data set or with other settings: choose another --out, or delete it"
            )


def load_prepared(root: Path, name: str, image_size: int, cache: Path, workers: int, progress: Any) -> Dataset:
    """Open a prepared dataset at ``image_size`` px; another size than the stored one is resized once, into the cache.

    Raises:
        UsageError: it is another dataset.
        StoreError: it is damaged.
    """
    described = read_dataset(root)
    if described.get("dataset", name) != name:
        raise UsageError(f"{root} is prepared from {described['dataset']!r}: use --dataset {described['dataset']}")
    dataset = store.open_dataset(root, name, bool(described.get("procedural", False)))
    stored = dataset.train.image_size[0]
    if stored == image_size:
        return dataset

    def build(folder: Path) -> list[str]:
        total = len(dataset.train) + len(dataset.test)
        with progress.task(f"{name}: resizing patches from {stored} to {image_size} px", total) as task:
            for split, patches in (("train", dataset.train), ("test", dataset.test)):
                _resized(patches, image_size, folder / split, workers, task.advance)
        write_template(folder, progress)
        return [*dataset.notes, *enlarged({stored: total}, total, image_size)]

    key = {"prepared": [dataset.train.fingerprint(), dataset.test.fingerprint()], "size": image_size}
    return cached_dataset(cache, name, key, dataset.procedural, build, progress)


def _resized(patches: PatchSet, size: int, target: Path, workers: int, advance: Callable[[int], object]) -> None:
    def shrink(patch: np.ndarray) -> np.ndarray:
        return resize(patch.transpose(1, 2, 0), size, size).transpose(2, 0, 1)

    with StoreWriter(target, (size, size), patches.classes, patches.centre_names) as writer:
        with ThreadPoolExecutor(max(workers, 1)) as pool:
            step = at_once(max(size, *patches.image_size))
            for start in range(0, len(patches), step):
                part = slice(start, start + step)
                images = np.stack(list(pool.map(shrink, patches.images[part].numpy())))
                groups = [patches.group_names[g] for g in patches.groups[part].tolist()]
                more = {} if patches.centres is None else {"centres": patches.centres[part].tolist()}
                writer.append(images, patches.labels[part].tolist(), groups, **more)
                advance(len(images))
        writer.finish()


def require_other(out: Path, root: Path | None) -> None:
    """Refuse to write into the folder that is read.

    Raises:
        UsageError: they are the same, or ``out`` contains ``root``.
    """
    if root is not None and (out.resolve() == root.resolve() or out.resolve() in root.resolve().parents):
        raise UsageError(f"--out {out} is or contains --root {root}: choose a folder of its own for what is written")
