"""Per-slide distillation: every slide's patches become a few per class, one idempotent job and one file per slide (paper 3)."""

import copy
import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor, nn

from histodd_bench import __version__, presets
from histodd_bench.baselines.herding import Herding, herd
from histodd_bench.baselines.random import stratified_draw
from histodd_bench.data.centres import open_experiment
from histodd_bench.data.patchset import PatchSet
from histodd_bench.distill.histodd import VERSION as HISTODD_VERSION
from histodd_bench.distill.histodd import HistoDD
from histodd_bench.engines import Engine
from histodd_bench.environment import own_random
from histodd_bench.errors import HistoddError, UsageError
from histodd_bench.experiment import Experiment
from histodd_bench.files import canonical, digest, locked, write_bytes, write_text
from histodd_bench.models import ModelPool
from histodd_bench.progress import Progress
from histodd_bench.request import Request
from histodd_bench.results import finite
from histodd_bench.sets import _safe
from histodd_bench.stain import fit_set
from histodd_bench.stopwatch import stopwatch
from histodd_bench.training import predict

VERSION = 1  # raised when the same configuration would give other patches
METHODS = ("histodd", "random", "herding")
FOLDER, WORK = "slides", "work"
ATTEMPTS = 2  # of every slide

# A slide is small and its networks are trained already: those of the pool are matched, from one stratified draw, in fewer outer
# steps than for a whole data set. Any histodd field that the command line sets wins over these.
_POOL = {"networks": "pool", "initial": "real"}
SLIDE_FIELDS: dict[str, dict[str, Any]] = {
    "quick": {"outer_steps": 3, "inner_steps": 8, "real_batch": 32, **_POOL},
    "standard": {"outer_steps": 20, "inner_steps": 10, **_POOL},
    "paper": {},
}


class SlideJob(NamedTuple):
    """One slide's set: how many patches per class at most, and from which seed."""

    slide: str
    ipc: int
    seed: int


@dataclass(frozen=True)
class SlideSet:
    """A slide's few patches, read back.

    Attributes:
        patches: float32 (distilled) or uint8 (selected), all of one group, the slide.
        seconds: what making them took, over all restarts.
        had: patches per class that the slide has.
        capped: class name -> patches, where the slide has fewer than were asked for.
    """

    patches: PatchSet
    seconds: float
    had: tuple[int, ...]
    capped: Mapping[str, int]


class SlidePool:
    """What a distiller needs of a pool, for one slide: the shared networks (read once) and the slide's own stain fits."""

    def __init__(self, pool: ModelPool) -> None:
        self.preprocessing = pool.preprocessing
        self.progress = Progress.silent()  # a slide's start is not worth a bar of its own
        self._pool = pool
        self._networks = [pool.load(i) for i in range(len(pool))]
        self._slide: PatchSet | None = None

    def of(self, slide: PatchSet) -> "SlidePool":
        """The same networks for the patches of a slide."""
        other = copy.copy(self)
        other._slide = slide
        return other

    def __len__(self) -> int:
        return len(self._networks)

    def load(self, i: int) -> nn.Module:
        """A fresh copy of network ``i``."""
        return copy.deepcopy(self._networks[i])

    def new(self, seed: int) -> nn.Module:
        """A newly initialised network of the pool's kind."""
        return self._pool.new(seed)

    def fits(self) -> tuple[Tensor, Tensor]:
        """Stain fits of the slide's patches onto the training set's template."""
        assert self._slide is not None
        return fit_set(self._slide, self.preprocessing.template)


class SlideDistiller:
    """Makes the sets of one method, slide by slide, from the training slides of an experiment.

    Args:
        experiment: data set, pool, stain policy.
        method: ``histodd``, or ``random`` and ``herding`` for real patches of each slide.
        centre: the scanning centre whose slides the experiment holds, where it does not hold all.

    Raises:
        UsageError: another method.
    """

    def __init__(self, experiment: Experiment, method: str, centre: str | None = None) -> None:
        if method not in METHODS:
            raise UsageError(f"{method!r} cannot be applied slide by slide: choose from {', '.join(METHODS)}")
        self.experiment, self.name, self.centre = experiment, method, centre
        self.train, self.request = experiment.dataset.train, experiment.request
        present = set(self.train.groups.unique().tolist())
        self.slides = tuple(n for i, n in enumerate(self.train.group_names) if i in present)
        self.empty = tuple(n for i, n in enumerate(self.train.group_names) if i not in present)

    # ---- what is made ----------------------------------------------------------------------------------------------

    def method(self, ipc: int) -> Any:
        """The method with the fields of preset, slide level, stain policy and command line, later ones winning."""
        if self.name != "histodd":
            return self.experiment.method(self.name, ipc)
        request = self.request
        return presets.build(
            HistoDD,
            {"stain_probability": self.experiment.stain.train},
            request.preset.method_fields("histodd", ipc, request.dataset),
            SLIDE_FIELDS.get(request.preset.name, {}),
            request.overrides.get("histodd", {}),
        )

    def config(self, ipc: int, seed: int) -> dict[str, Any]:
        """What a set of all slides depends on."""
        base = self.experiment.set_config(self.name, ipc, seed)
        made = {**base["set"], "level": "slide", "slide_version": VERSION}
        made["fields"] = json.loads(json.dumps(dataclasses.asdict(self.method(ipc))))
        if self.name == "histodd":
            made["version"] = HISTODD_VERSION
        return {**base, "set": made}

    @cached_property
    def _keys(self) -> dict[tuple[int, int], str]:
        return {}

    def key(self, ipc: int, seed: int) -> str:
        """SHA-256 (hex) of :meth:`config`."""
        if (ipc, seed) not in self._keys:
            self._keys[ipc, seed] = digest(self.config(ipc, seed))
        return self._keys[ipc, seed]

    def title(self, ipc: int, seed: int) -> str:
        """The folder of a set of all slides."""
        return f"{self.request.dataset}-{self.name}-ipc{ipc}-s{seed}-{self.key(ipc, seed)[:12]}"

    def path(self, job: SlideJob) -> Path:
        """The file of one slide."""
        name = f"{_safe(job.slide)}-{digest(job.slide)[:8]}"
        return self.request.out / FOLDER / self.title(job.ipc, job.seed) / f"{name}.safetensors"

    # ---- making it ---------------------------------------------------------------------------------------------------

    def finished(self, job: SlideJob) -> bool:
        """Whether the slide's file is there, whole, and made from this configuration."""
        return _metadata(self.path(job)).get("key") == self.key(job.ipc, job.seed)

    def make(self, job: SlideJob) -> None:
        """Make one slide's file, unless it is finished; a slide that was interrupted goes on after its last outer step."""
        if self.finished(job):
            return
        path = self.path(job)
        workdir = self.request.out / WORK / FOLDER / path.parent.name / path.stem
        with locked(workdir.with_name(workdir.name + ".lock")):  # two runs may have been given the same slide
            if not self.finished(job):
                self._write(job, path, workdir)

    def _write(self, job: SlideJob, path: Path, workdir: Path) -> None:
        slide = self._patches(job.slide)
        had = slide.class_counts()
        budgets = tuple(min(job.ipc, n) for n in had)
        seed = int(digest([job.seed, job.slide])[:12], 16)
        with stopwatch(workdir, lambda: 0.0) as seconds, own_random(digest([self.key(job.ipc, job.seed), job.slide])):
            made = self._make(slide, job, budgets, seed, workdir)
        facts = {
            "key": self.key(job.ipc, job.seed),
            "slide": job.slide,
            "ipc": job.ipc,
            "seed": job.seed,
            "had": had,
            "kept": list(budgets),
            "capped": {n: b for n, b, h in zip(self.train.classes, budgets, had, strict=True) if 0 < h < job.ipc},
            "seconds": seconds[0],
            "versions": {"histodd-bench": __version__, "torch": torch.__version__},
        }
        from safetensors.torch import save

        tensors = {"images": made.images.cpu().contiguous(), "labels": made.labels.cpu()}
        data = save(tensors, {"card": canonical(finite(facts))})
        shutil.rmtree(
            workdir, ignore_errors=True
        )  # first: whoever is killed here has one slide to do again, and leaves nothing
        write_bytes(path, data)

    def _patches(self, name: str) -> PatchSet:
        if name not in self.slides:
            raise HistoddError(f"slide {name!r} has no patches in the training set")
        return self.train.subset((self.train.groups == self.train.group_names.index(name)).nonzero().flatten())

    def _make(self, slide: PatchSet, job: SlideJob, budgets: tuple[int, ...], seed: int, workdir: Path) -> PatchSet:
        if self.name == "random":
            return slide.subset(stratified_draw(slide, budgets, Generator().manual_seed(seed)))
        if self.name == "herding":
            chosen = []
            for label, budget in enumerate(budgets):
                members = slide.class_indices(label)
                if budget:
                    network, stain = self._herding(job)
                    features = predict(network, slide.subset(members), self.experiment.preprocessing, stain=stain,
                                       features=True, device=self.experiment.device)  # fmt: skip
                    chosen.append(members[herd(features, budget)])
            return slide.subset(torch.cat(chosen))
        return self.method(job.ipc)(
            slide, budgets, self._pool.of(slide), seed,
            device=self.experiment.device, workdir=workdir, progress=Progress.silent(),
        )  # fmt: skip

    @cached_property
    def _pool(self) -> SlidePool:
        return SlidePool(self.experiment.pool())

    @cached_property
    def _networks(self) -> dict[int, tuple[nn.Module, bool]]:
        return {}

    def _herding(self, job: SlideJob) -> tuple[nn.Module, bool]:
        """The network behind the features that herding sees: that of the patch-level method, one per seed."""
        if job.seed not in self._networks:
            fields: Herding = self.method(job.ipc)
            own = self.experiment.pool().with_recipe(
                arch=fields.arch, width=fields.width, epochs=fields.epochs, networks=job.seed + 1
            )
            self._networks[job.seed] = own.load(job.seed), own.recipe.stain_test
        return self._networks[job.seed]

    def prepare(self, jobs: Sequence[SlideJob]) -> None:
        """Train, in this process, every network that the jobs share."""
        if self.name == "histodd" and jobs:
            self.experiment.pool().prepare()
        if self.name == "herding":
            for job in {job.seed: job for job in jobs}.values():
                self._herding(job)

    # ---- reading it --------------------------------------------------------------------------------------------------

    def load(self, job: SlideJob) -> SlideSet:
        """Read one slide's file.

        Raises:
            HistoddError: it is not there, damaged, or made from another configuration.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = self.path(job)
        card = _metadata(path)
        if card.get("key") != self.key(job.ipc, job.seed):
            raise HistoddError(f"{path} is missing or damaged: run 'distill-slides' to have it made")
        try:
            tensors = load_file(path)
        except (OSError, SafetensorError) as error:
            raise HistoddError(f"{path} is damaged ({error}): delete it, and it will be made again") from None
        n = len(tensors["labels"])
        groups = torch.zeros(n, dtype=torch.int64)
        patches = PatchSet(tensors["images"], tensors["labels"], groups, (job.slide,), self.train.classes)
        return SlideSet(patches, card["seconds"], tuple(card["had"]), card["capped"])

    def load_all(self, ipc: int, seed: int, slides: Sequence[str] | None = None) -> tuple[PatchSet, list[SlideSet]]:
        """All slides' sets as one PatchSet, whose groups are the slides, and one by one."""
        chosen = list(self.slides if slides is None else slides)
        sets = [self.load(SlideJob(name, ipc, seed)) for name in chosen]
        if not sets:
            raise HistoddError(f"{self.request.dataset} has no slide with patches to distil")
        counts = torch.tensor([len(s.patches) for s in sets])
        patches = PatchSet(
            torch.cat([s.patches.images for s in sets]),
            torch.cat([s.patches.labels for s in sets]),
            torch.arange(len(sets)).repeat_interleave(counts),
            tuple(chosen),
            self.train.classes,
        )
        return patches, sets


def _metadata(path: Path) -> dict[str, Any]:
    """The card in a slide's file; empty where there is no whole file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return json.loads((file.metadata() or {})["card"])
    except (OSError, SafetensorError, KeyError, ValueError):
        return {}


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
        card = _metadata(distiller.path(SlideJob(name, ipc, seed)))
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
