"""Histo-DD: gradient matching with pre-trained networks, model augmentation and Siamese stain augmentation (Algorithm 1)."""

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from histodd_bench.augment import OPERATIONS, Draw, SiameseAugment, require_operations
from histodd_bench.baselines.gradmatch import gradient_matched
from histodd_bench.baselines.random import stratified_draw
from histodd_bench.data.patchset import PatchSet
from histodd_bench.distill.networks import augment_model, draw_seed, matched_parameters
from histodd_bench.errors import HistoddError, above_zero, at_least, below_one, probability
from histodd_bench.files import read_state, save_state, write_bytes, write_text
from histodd_bench.models import ModelPool
from histodd_bench.ops import gradient_distance
from histodd_bench.progress import Progress
from histodd_bench.stain import Preprocessing, fit_affine

VERSION = 4  # raised when the same fields would give other images


@dataclass(frozen=True)
class HistoDD:
    """The distiller; its fields are its hyperparameters (paper symbols in brackets).

    Attributes:
        outer_steps: networks drawn, one after the other [K].
        inner_steps: image and network updates per drawn network [U].
        step: how a gradient becomes an image update. ``plain``: SGD with ``image_lr`` as it is (the paper's rule).
            ``adaptive``: the same with each class's gradients divided by their root mean square over all steps so far.
            The size of the summed distance depends on data set, class count, network and ipc; the adaptive step does not,
            and yet networks whose gradients differ much still move the images more than those whose gradients agree.
        image_lr: learning rate of the images. ``plain``: the paper's 0.5 or 5e-3. ``adaptive``: root mean square change
            of a pixel in a typical step without momentum, in intensities of [0, 1]; with more than 10 patches in a class
            divided by sqrt(ipc / 10), since the gradient of n good patches is off by 1 / sqrt(n), so less must change.
        image_momentum: of the image update.
        image_decay: lower the learning rate to 0 along a half cosine over all K U steps.
        networks: drawn for the outer steps: ``pool``: one of the pre-trained networks, augmented (the paper's rule), or
            ``random``: a newly initialised one each time (Zhao et al. 2021), in which case the pool only serves the start.
        alpha: strength of the model augmentation (eq. 3) of networks of the pool, in filter norms.
        network_lr, network_momentum, network_weight_decay: SGD that updates the drawn network on real minibatches.
        balanced: the network's minibatch draws classes equally often, as the synthetic set has them, instead of in their
            natural proportions.
        real_batch: real patches per class and step; also the size of the network's minibatch.
        synthetic_batch: at most this many of a class's synthetic patches per step.
        augment: operations of the Siamese augmentation; one draw for every patch of both batches.
        stain_probability: how often that draw normalises the stains, where ``augment`` names ``stain``.
        distance: Dis of eq. 1.
        match: parameters whose gradients are matched: ``weights`` of convolutions and linear layers, ``features``: the
            same without the classifier (as the public code has it), or ``all`` (norms and biases too).
        initial: synthetic patches start as ``real`` ones, drawn stratified over slides; as ``matched`` ones, whose gradients
            together come closest to their class's, see :func:`~histodd_bench.baselines.gradmatch.gradient_matched`; or as ``noise``.
        start_patches: patches per class that a matched start chooses from.
    """

    outer_steps: int = 20
    inner_steps: int = 10
    step: Literal["adaptive", "plain"] = "adaptive"
    image_lr: float = 0.005
    image_momentum: float = 0.5
    image_decay: bool = True
    networks: Literal["random", "pool"] = "random"
    alpha: float = 0.05
    network_lr: float = 0.01
    network_momentum: float = 0.9
    network_weight_decay: float = 5e-4
    balanced: bool = True
    real_batch: int = 64
    synthetic_batch: int = 128
    augment: tuple[str, ...] = OPERATIONS
    stain_probability: float = 1.0
    distance: Literal["l1", "l2", "cosine"] = "l1"
    match: Literal["weights", "features", "all"] = "weights"
    initial: Literal["matched", "real", "noise"] = "matched"
    start_patches: int = 640

    def __post_init__(self) -> None:
        here = "histodd"
        at_least(0, here, outer_steps=self.outer_steps, inner_steps=self.inner_steps, alpha=self.alpha)
        at_least(0, here, network_lr=self.network_lr, network_weight_decay=self.network_weight_decay)
        at_least(1, here, real_batch=self.real_batch, synthetic_batch=self.synthetic_batch)
        at_least(1, here, start_patches=self.start_patches)
        above_zero(here, image_lr=self.image_lr)
        below_one(here, image_momentum=self.image_momentum, network_momentum=self.network_momentum)
        probability(here, stain_probability=self.stain_probability)
        require_operations(self.augment, "augmentation in histodd.augment")

    def __call__(
        self,
        train: PatchSet,
        ipc: int | tuple[int, ...],
        pool: ModelPool,
        seed: int,
        *,
        device: torch.device | str = "cpu",
        workdir: Path,
        progress: Progress,
    ) -> PatchSet:
        """Distil ``train`` into ``ipc`` float32 patches per class (or a number for each; a class with 0 takes no part).

        Continues from ``workdir/checkpoint.pt`` where an interrupted call left it, and then gives byte for byte what the
        unbroken call gives. Leaves ``workdir/history.json`` (per outer step the mean matching loss and the seconds) and
        ``workdir/initial.safetensors`` (the patches it started from, as ``images``).

        Raises:
            HistoddError: a class has fewer than ``ipc`` patches; the matching loss is no longer finite.
        """
        train.require(ipc)
        run = _Run(self, train, ipc, pool, seed, torch.device(device), workdir)
        with progress.task(f"Histo-DD {ipc} per class, seed {seed}", self.outer_steps, run.outer_step) as task:
            for _ in range(run.outer_step, self.outer_steps):
                start, losses = time.perf_counter(), []
                network = run.draw_network().train()
                optimizer = torch.optim.SGD(
                    network.parameters(), self.network_lr, self.network_momentum, weight_decay=self.network_weight_decay
                )
                for _ in range(self.inner_steps):
                    for label in run.present:
                        loss, gradient, rows = run.matching_loss(network, label)
                        run.update_images(rows, gradient)
                        losses.append(loss)
                    if len(run.present) > 1:  # patches of one class would only teach the network to answer that class
                        run.update_network(network, optimizer)
                mean_loss = float(torch.stack(losses).mean()) if losses else math.nan
                if losses and not math.isfinite(mean_loss):
                    raise HistoddError(
                        f"the matching loss became {mean_loss} in outer step {run.outer_step}: lower histodd.image_lr or alpha"
                    )
                run.finish_outer_step(mean_loss, time.perf_counter() - start)
                task.advance(loss=mean_loss)
        return run.result()


class _Run:
    """One distillation: the synthetic patches, what their updates remember, and the generator that draws everything."""

    def __init__(
        self,
        method: HistoDD,
        train: PatchSet,
        ipc: int | tuple[int, ...],
        pool: ModelPool,
        seed: int,
        device: torch.device,
        workdir: Path,
    ) -> None:
        self.method, self.train, self.device, self.workdir = method, train, device, workdir
        self.preprocessing: Preprocessing = pool.preprocessing
        self.augmentation = SiameseAugment(method.augment, stain_probability=method.stain_probability)
        self.generator = Generator().manual_seed(seed)
        self.fits = pool.fits() if self.augmentation.stains else None
        self.by_class = [train.class_indices(label) for label in range(train.num_classes)]
        self.pool = pool
        self.budgets = (ipc,) * train.num_classes if isinstance(ipc, int) else ipc
        self.present = [label for label, budget in enumerate(self.budgets) if budget]
        self.outer_step, self.image_steps = 0, 0
        self.history: list[dict[str, float]] = []
        if not self._resume((sum(self.budgets), 3, *train.image_size)):
            self._begin(seed)

    def _begin(self, seed: int) -> None:
        """Choose the patches to start from and save them."""
        method, train, device = self.method, self.train, self.device
        if method.initial == "matched":
            chosen = gradient_matched(
                train,
                self.budgets,
                self.pool,
                seed,
                candidates=method.start_patches,
                alpha=method.alpha,
                match=method.match,
                device=device,
            )
        else:
            chosen = stratified_draw(train, self.budgets, self.generator)
        self.labels = train.labels[chosen].to(device)
        self.images = train.float_batch(chosen, device).contiguous()
        if method.initial == "noise":
            self.images = torch.rand(self.images.shape, generator=self.generator).to(device)
        write_bytes(self.workdir / "initial.safetensors", safetensors.torch.save({"images": self.images.cpu()}))
        self.velocity = torch.zeros_like(self.images)
        self.square_sum = torch.zeros(train.num_classes, device=device)  # of the gradients' mean squares, per class

    def draw_network(self) -> nn.Module:
        """The network of an outer step, on the device."""
        if self.method.networks == "random":
            return self.pool.new(draw_seed(self.generator))
        network = self.pool.load(int(torch.randint(len(self.pool), (1,), generator=self.generator)))
        return augment_model(network, self.method.alpha, self.generator)

    def matching_loss(self, network: nn.Module, label: int) -> tuple[Tensor, Tensor, Tensor]:
        """Eq. 1 for one class: the distance, its gradient with respect to the synthetic patches used, and their rows."""
        method = self.method
        members = self.by_class[label]
        real = members[torch.randint(len(members), (method.real_batch,), generator=self.generator)]
        rows = (self.labels == label).nonzero().flatten()
        if len(rows) > method.synthetic_batch:
            rows = rows[torch.randperm(len(rows), generator=self.generator)[: method.synthetic_batch].to(rows.device)]
        draw = self.augmentation.draw(self.generator)
        parameters = matched_parameters(network, method.match)

        loss = F.cross_entropy(network(self._view_real(real, draw)), self._labels(label, len(real)))
        real_gradients = [g.detach() for g in torch.autograd.grad(loss, parameters)]

        images = self.images[rows].requires_grad_(True)
        loss = F.cross_entropy(network(self._view_synthetic(images, draw)), self._labels(label, len(rows)))
        synthetic_gradients = torch.autograd.grad(loss, parameters, create_graph=True)

        distance = gradient_distance(real_gradients, synthetic_gradients, method.distance)
        (gradient,) = torch.autograd.grad(distance, images)
        return distance.detach(), gradient, rows

    def update_images(self, rows: Tensor, gradient: Tensor) -> None:
        """One step of a class's images, clamped to [0, 1]."""
        method = self.method
        rate = method.image_lr
        if method.image_decay:
            total = method.outer_steps * method.inner_steps * len(self.present)
            rate *= 0.5 * (1 + math.cos(math.pi * self.image_steps / total))
        self.image_steps += 1
        if method.step == "adaptive":
            label = self.labels[rows[0]]
            self.square_sum[label] += gradient.square().mean()
            steps = -(-self.image_steps // len(self.present))  # of this class, this one included
            gradient = gradient / (self.square_sum[label] / steps).sqrt().clamp(min=1e-20)
            rate /= math.sqrt(max(self.budgets[int(label)] / 10, 1))
        velocity = method.image_momentum * self.velocity[rows] + gradient
        self.velocity[rows] = velocity
        self.images[rows] = (self.images[rows] - rate * velocity).clamp_(0, 1)

    def update_network(self, network: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """One SGD step of the drawn network on a real minibatch of all classes, with one augmentation draw per patch."""
        size = self.method.real_batch
        if self.method.balanced:
            labels = torch.tensor(self.present)[torch.randint(len(self.present), (size,), generator=self.generator)]
            counts = torch.tensor([len(members) for members in self.by_class])
            place = (torch.rand(size, generator=self.generator, dtype=torch.float64) * counts[labels]).long()
            indices = torch.stack([self.by_class[label][i] for label, i in zip(labels.tolist(), place, strict=True)])
        else:
            indices = torch.randint(len(self.train), (size,), generator=self.generator)
        x = self._view_real(indices, self.augmentation.draw(self.generator, len(indices)))
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(network(x), self.train.labels[indices].to(self.device)).backward()
        optimizer.step()

    def _labels(self, label: int, n: int) -> Tensor:
        return torch.full((n,), label, device=self.device)

    def _view_real(self, indices: Tensor, draw: Draw) -> Tensor:
        images = self.train.images[indices].to(self.device)
        warp = None if draw.warp is None else draw.warp.to(self.device).expand(len(indices), 2, 3)
        if self.fits is None or not bool(draw.stain.any()):
            return self.preprocessing(images, warp=warp)
        return self.preprocessing(
            images, warp=warp, stain=self.fits[0][indices], valid=self.fits[1][indices] & draw.stain
        )

    def _view_synthetic(self, images: Tensor, draw: Draw) -> Tensor:
        warp = None if draw.warp is None else draw.warp.to(self.device).expand(len(images), 2, 3)
        if not bool(draw.stain.any()):
            return self.preprocessing(images, warp=warp)
        stain, valid = fit_affine(images, self.preprocessing.template)  # refitted at every step, detached
        return self.preprocessing(images, warp=warp, stain=stain, valid=valid)

    def finish_outer_step(self, loss: float, seconds: float) -> None:
        """Count the step and save everything that the next one depends on."""
        self.outer_step += 1
        self.history.append({"outer_step": self.outer_step, "loss": loss, "seconds": seconds})
        state = {
            "version": VERSION,
            "images": self.images.cpu(),
            "labels": self.labels.cpu(),
            "velocity": self.velocity.cpu(),
            "square_sum": self.square_sum.cpu(),
            "generator": self.generator.get_state(),
            "outer_step": self.outer_step,
            "image_steps": self.image_steps,
            "history": self.history,
        }
        save_state(self.workdir / "checkpoint.pt", state)
        write_text(self.workdir / "history.json", json.dumps(self.history, indent=1))

    def _resume(self, shape: tuple[int, ...]) -> bool:
        """Take over the state that an interrupted call left, if there is one."""
        path = self.workdir / "checkpoint.pt"
        if not path.exists():
            return False
        state = read_state(path)
        if state.get("version") != VERSION or state["images"].shape != shape:
            raise HistoddError(f"{path} was written by another version or for another set: delete it to distil afresh")
        for name in ("images", "labels", "velocity", "square_sum"):
            setattr(self, name, state[name].to(self.device))
        self.generator.set_state(state["generator"])
        self.outer_step, self.image_steps, self.history = state["outer_step"], state["image_steps"], state["history"]
        return True

    def result(self) -> PatchSet:
        """The synthetic patches: float32 on the CPU, every one its own group."""
        n = len(self.labels)
        names = tuple(f"synthetic-{i}" for i in range(n))
        return PatchSet(self.images.cpu(), self.labels.cpu(), torch.arange(n), names, self.train.classes)
