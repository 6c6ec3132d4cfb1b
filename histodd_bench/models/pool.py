"""ModelPool: the pre-trained networks S of Algorithm 1, trained once, cached on disk, resumable after any epoch."""

import dataclasses
import json
import math
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from histodd_bench.data.patchset import PatchSet
from histodd_bench.errors import HistoddError, UsageError, at_least
from histodd_bench.files import digest, locked, read_state, save_state, write_text
from histodd_bench.models.registry import build
from histodd_bench.progress import Progress
from histodd_bench.stain import Preprocessing, describe, fit_set
from histodd_bench.training import Trainer, TrainRecipe

VERSION = 1  # raised when the same recipe would give other networks


@dataclass(frozen=True, kw_only=True)
class PoolRecipe(TrainRecipe):
    """Which networks a pool holds; how they are trained is inherited from :class:`TrainRecipe`.

    Attributes:
        arch: a key of MODELS.
        width: of that network; None for the published width.
        image_size: side of the patches in pixels; None for that of the training set (another size is
            refused).
        networks: how many, with initialisations, shuffling and augmentation from seeds 0, 1, ... (paper 3.1:
            5).
        epochs: the paper does not state it.
    """

    section: ClassVar[str] = "pool"

    arch: str
    width: int | None = None
    image_size: int | None = None
    networks: int = 5
    epochs: int | None = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, self.section, networks=self.networks)


@dataclass
class Spent:
    """Seconds behind what a pool and its relatives share: training of the networks, and what :meth:`ModelPool.kept` keeps.

    Attributes:
        total: over all that was used, whichever run made it.
        here: what this process spent on it, training counted epoch by epoch.
    """

    total: float = 0.0
    here: float = 0.0


class ModelPool:
    """Networks trained on one set by one recipe. Network ``i`` depends on seed ``i`` alone, not on how many there are.

    Args:
        train: what they are trained on.
        recipe: architecture and training.
        cache: folder; networks go to ``cache/<key>/network-<i>.pt``.
        device: where they are trained and returned.
        progress: where training reports to; silent by default.
        preprocessing: of the training set; computed on first use by default.

    Attributes:
        spent: seconds behind what :meth:`load` and :meth:`kept` returned, shared with pools made by
            :meth:`with_recipe`.
    """

    def __init__(
        self,
        train: PatchSet,
        recipe: PoolRecipe,
        *,
        cache: Path,
        device: torch.device | str = "cpu",
        progress: Progress | None = None,
        preprocessing: Preprocessing | None = None,
    ) -> None:
        height, width = train.image_size
        if height != width:
            raise HistoddError(f"patches must be square, got {height} x {width}")
        if recipe.image_size not in (None, height):
            raise UsageError(f"the pool is for patches of {recipe.image_size} px, the training set has {height} px")
        self.train, self.recipe, self.cache = train, recipe, Path(cache)
        self.device, self.progress = torch.device(device), progress or Progress.silent()
        self.spent = Spent()
        self._counted: set[Path] = set()
        self._known_preprocessing = preprocessing
        self._fits: list[tuple[Tensor, Tensor]] = []  # one entry once fitted, shared with relatives

    @cached_property
    def preprocessing(self) -> Preprocessing:
        """Channel statistics and stain template of the training set."""
        return self._known_preprocessing or describe(self.train)

    def fits(self) -> tuple[Tensor, Tensor]:
        """Stain fits of every training patch onto the template (``[N,3,4]``, valid ``[N]``); computed on first use."""
        if not self._fits:
            self._fits.append(fit_set(self.train, self.preprocessing.template))
        return self._fits[0]

    @cached_property
    def key(self) -> str:
        """SHA-256 (hex) of everything the networks depend on: patches, recipe, torch, device and CPU threads."""
        recipe = dataclasses.asdict(self.recipe)
        del recipe["networks"], recipe["image_size"], recipe["stain_test"]
        on_gpu = self.device.type == "cuda"
        return digest(
            {
                "version": VERSION,
                "train": self.train.fingerprint(),
                "preprocessing": dataclasses.asdict(self.preprocessing),
                "recipe": recipe,
                "torch": torch.__version__,
                "device": torch.cuda.get_device_name(self.device) if on_gpu else self.device.type,
                "threads": None if on_gpu else torch.get_num_threads(),
            }
        )

    def __len__(self) -> int:
        return self.recipe.networks

    def load(self, i: int) -> nn.Module:
        """Network ``i`` on the device, in evaluation mode; a fresh copy at every call. Trained and cached on first use.

        Raises:
            IndexError: there is no such network.
            HistoddError: training diverged, or the cache is damaged or cannot be written.
        """
        state = self._state(i)
        model = self._build(i)
        model.load_state_dict(state["model"])
        return model.to(self.device).eval()

    def new(self, seed: int) -> nn.Module:
        """A newly initialised network of the recipe on the device, in evaluation mode; nothing is trained or kept."""
        return self._build(seed).to(self.device).eval()

    def forgetting(self, i: int) -> "ForgettingCounts":
        """How often network ``i`` forgot each training patch while it was trained. Trained and cached on first use."""
        return ForgettingCounts(**self._state(i)["forgetting"])

    def kept(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        """A tensor computed from the training set with networks of the pool: made at the first call, then read.

        Args:
            name: of the file beside the networks; says all that the tensor depends on, apart from what :attr:`key` says.
            make: computes it, the same at every call; what this takes counts in :attr:`spent`.
        """
        path = self.cache / self.key[:32] / f"{name}.pt"
        begun, trained = time.perf_counter(), self.spent.here
        state = _read(path)
        if state is None:
            with _alone(path, self.progress):
                state = _read(path)
                if state is None:
                    start, before = time.perf_counter(), self.spent.here
                    made = make().cpu()
                    seconds = time.perf_counter() - start - (self.spent.here - before)
                    state = {"value": made, "seconds": seconds}
                    save_state(path, state)
        if path not in self._counted:
            self._counted.add(path)
            self.spent.total += state["seconds"]
        self.spent.here = trained + time.perf_counter() - begun  # waiting for another process included
        value: Tensor = state["value"]
        return value

    def prepare(self) -> None:
        """Train every network that is not in the cache."""
        for i in range(len(self)):
            self._state(i)

    def with_recipe(self, **changes: Any) -> Self:
        """A pool on the same set, cache and device whose recipe has other fields; ``spent`` is shared."""
        if changes.get("steps") is not None:
            changes.setdefault("epochs", None)
        elif changes.get("epochs") is not None:
            changes.setdefault("steps", None)
        if changes.get("arch", self.recipe.arch) != self.recipe.arch:
            changes.setdefault("width", None)  # a width means something else to another network
        pool = type(self)(
            self.train,
            dataclasses.replace(self.recipe, **changes),
            cache=self.cache,
            device=self.device,
            progress=self.progress,
            preprocessing=self.preprocessing,
        )
        pool.spent, pool._counted, pool._fits = self.spent, self._counted, self._fits
        return pool

    def _build(self, i: int) -> nn.Module:
        r = self.recipe
        size = self.train.image_size[0]
        return build(r.arch, num_classes=self.train.num_classes, image_size=size, width=r.width, generator_seed=i)

    def _state(self, i: int) -> dict[str, Any]:
        """What is kept of network ``i``: ``model``, ``forgetting`` and ``epoch_seconds``. Trains it if need be."""
        if not 0 <= i < len(self):
            raise IndexError(f"network {i} of a pool of {len(self)}")
        path = self.cache / self.key[:32] / f"network-{i}.pt"
        state = _read(path)
        if state is None:
            with _alone(path, self.progress):
                state = _read(path) or self._train(i, path)  # another run may have trained it while this one waited
        if path not in self._counted:
            self._counted.add(path)
            self.spent.total += sum(state["epoch_seconds"])
        return state

    def _train(self, i: int, path: Path) -> dict[str, Any]:
        """Train network ``i``, going on after the last epoch that an interrupted run finished."""
        counts = ForgettingCounts.zeros(len(self.train), self.device)
        trainer = Trainer(
            self._build(i).to(self.device),
            self.train,
            self.recipe,
            self.preprocessing,
            seed=i,
            device=self.device,
            on_batch=counts.update,
            fits=self.fits() if self.recipe.augmentation.stains else None,
        )
        checkpoint = path.with_name(f"network-{i}.checkpoint.pt")
        saved = _read(checkpoint)
        if saved is not None:
            trainer.load_state_dict(saved["trainer"])
            counts.load(saved["forgetting"])
        name = f"{self.recipe.arch} (seed {i})"
        with self.progress.task(f"training {name}", trainer.total_steps, trainer.step) as task:
            while not trainer.done:
                step, loss = trainer.step, trainer.run_epoch()
                self.spent.here += trainer.epoch_seconds[-1]
                if not math.isfinite(loss):
                    raise HistoddError(
                        f"training {name} diverged in epoch {trainer.epoch}: lower its learning rate ({self.recipe.lr})"
                    )
                if not trainer.done:
                    save_state(checkpoint, {"trainer": trainer.state_dict(), "forgetting": vars(counts)})
                task.advance(trainer.step - step, loss=loss)
        recipe = path.with_name("recipe.json")  # one for all networks of the pool, which other processes train meanwhile
        with _alone(recipe, self.progress):
            write_text(recipe, json.dumps(dataclasses.asdict(self.recipe), indent=1))
        state = {
            "model": trainer.model.state_dict(),
            "forgetting": vars(counts),
            "epoch_seconds": trainer.epoch_seconds,
        }
        save_state(path, state)
        checkpoint.unlink(missing_ok=True)
        return state


@dataclass
class ForgettingCounts:
    """Forgetting events per patch (Toneva et al. 2019, section 3), counted in training minibatches before the update.

    Attributes:
        forgotten: ``[N]`` int32, times the patch went from classified correctly to incorrectly between presentations.
        learned: ``[N]`` bool, whether it was ever classified correctly.
        correct: ``[N]`` bool, whether it was at its last presentation.
    """

    forgotten: Tensor
    learned: Tensor
    correct: Tensor

    @classmethod
    def zeros(cls, n: int, device: torch.device | str = "cpu") -> Self:
        """Counts before training."""
        learned = torch.zeros(n, dtype=torch.bool, device=device)
        return cls(torch.zeros(n, dtype=torch.int32, device=device), learned, learned.clone())

    def update(self, indices: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Take in one minibatch: patch indices ``[n]``, logits ``[n,C]``, labels ``[n]``."""
        indices = indices.to(self.correct.device)
        now = logits.argmax(1) == labels
        self.forgotten[indices] += (self.correct[indices] & ~now).int()
        self.correct[indices] = now
        self.learned[indices] |= now

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from saved counts."""
        for name, values in state.items():
            getattr(self, name).copy_(values)


def _alone(path: Path, progress: Progress) -> AbstractContextManager[None]:
    """Hold the lock of a file in the pool, for caches shared by several runs."""
    return locked(path.with_suffix(".lock"), lambda: progress.log(f"waiting for another run that makes {path}"))


def _read(path: Path) -> dict[str, Any] | None:
    return read_state(path) if path.exists() else None
