"""Per-slide distillation: every slide's patches become a few per class, one idempotent job and one file per slide (paper 3)."""

import copy
import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor, nn

from histodd_bench import __version__, presets
from histodd_bench.baselines.herding import Herding, herd
from histodd_bench.baselines.random import stratified_draw
from histodd_bench.data.patchset import PatchSet
from histodd_bench.distill.histodd import HistoDD
from histodd_bench.environment import own_random
from histodd_bench.errors import HistoddError, UsageError
from histodd_bench.experiment import Experiment
from histodd_bench.files import canonical, digest, locked, plain, write_bytes
from histodd_bench.models import ModelPool
from histodd_bench.progress import Progress
from histodd_bench.results import finite
from histodd_bench.sets import file_name
from histodd_bench.stain import fit_set
from histodd_bench.stopwatch import stopwatch
from histodd_bench.training import predict

VERSION = 1  # raised when the same configuration would give other patches
METHODS = ("histodd", "random", "herding")
FOLDER, WORK = "slides", "work"

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

    def kept(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        """What ``make`` computes; a slide's is used once, so nothing is kept."""
        return make()

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
        fields = plain(dataclasses.asdict(self.method(ipc)))
        return {**base, "set": {**base["set"], "fields": fields, "level": "slide", "slide_version": VERSION}}

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
        name = f"{file_name(job.slide)}-{digest(job.slide)[:8]}"
        return self.request.out / FOLDER / self.title(job.ipc, job.seed) / f"{name}.safetensors"

    # ---- making it ---------------------------------------------------------------------------------------------------

    def finished(self, job: SlideJob) -> bool:
        """Whether the slide's file is there, whole, and made from this configuration."""
        return card_of(self.path(job)).get("key") == self.key(job.ipc, job.seed)

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
        card = card_of(path)
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


def card_of(path: Path) -> dict[str, Any]:
    """The card in a slide's file; empty where there is no whole file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return json.loads((file.metadata() or {})["card"])
    except (OSError, SafetensorError, KeyError, ValueError):
        return {}
