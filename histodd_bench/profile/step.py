"""One step of the distillation, taken apart: where its time goes, with the compiled operators and with the references.

The step is that of :class:`histodd_bench.distill.histodd.HistoDD`, with its backward pass cut at the augmented patches
and at the synthetic gradients, so that every part can be timed; a test compares the gradient with the distiller's.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from histodd_bench import ops
from histodd_bench.augment import Draw, SiameseAugment
from histodd_bench.ops.macenko_fit import OK
from histodd_bench.profile.measure import spread, synchronise, take_turns
from histodd_bench.profile.patches import procedural
from histodd_bench.stain import Preprocessing

CLASSES, IPC, REAL_BATCH, SIDE = 2, 10, 64, 64
AUGMENTATION = ("augment, real", "fit, synthetic", "augment, synthetic", "augment, backward")


@dataclass(frozen=True)
class Operators:
    """The operators, compiled or as references."""

    name: str
    stain_augment: Callable[..., Tensor]
    macenko_fit: Callable[..., tuple[Tensor, Tensor, Tensor]]
    macenko_affine: Callable[..., Tensor]
    gradient_distance: Callable[..., Tensor]


COMPILED = Operators("compiled", ops.stain_augment, ops.macenko_fit, ops.macenko_affine, ops.gradient_distance)
REFERENCE = Operators(
    "reference",
    ops.stain_augment_reference,
    ops.macenko_fit_reference,
    ops.macenko_affine_reference,
    ops.gradient_distance_reference,
)


class Clock:
    """Seconds of each named part, added up; a CUDA device is waited for at both ends of a part."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        synchronise(self.device)
        start = time.perf_counter()
        yield
        synchronise(self.device)
        self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - start


@dataclass(frozen=True)
class Matching:
    """What matching one class needs.

    Attributes:
        operators: which implementation augments and measures.
        network: in training mode.
        parameters: whose gradients are matched.
        preprocessing: channel statistics and stain template.
        device: where everything lies.
    """

    operators: Operators
    network: nn.Module
    parameters: list[Tensor]
    preprocessing: Preprocessing
    device: torch.device

    def view(self, images: Tensor, warp: Tensor | None, stain: Tensor, valid: Tensor) -> Tensor:
        """Patches as the network sees them (see :class:`Preprocessing`), by this implementation."""
        warp = None if warp is None else warp.to(self.device).expand(len(images), 2, 3)
        mean, std = torch.tensor(self.preprocessing.mean), torch.tensor(self.preprocessing.std)
        mean, std = mean.to(self.device), std.to(self.device)
        return self.operators.stain_augment(images, stain, warp, mean, std, valid=valid)

    def gradient(
        self, real: Tensor, fits: tuple[Tensor, Tensor], images: Tensor, label: int, draw: Draw, clock: Clock
    ) -> tuple[Tensor, Tensor]:
        """The distance of one class (paper eq. 1), and its gradient with respect to the synthetic patches.

        Args:
            real: ``[B,3,H,W]`` uint8 patches of the class; ``fits``: their ``[A|b]`` ``[B,3,4]`` and validity ``[B]``.
            images: ``[N,3,H,W]`` float synthetic patches of the class.
            draw: the augmentation that both share.
        """
        images = images.detach().requires_grad_(True)
        with clock("augment, real"):
            x = self.view(real, draw.warp, *fits)
        with clock("network forward, real"):
            loss = F.cross_entropy(self.network(x), torch.full((len(x),), label, device=self.device))
        with clock("gradients, real"):
            wanted = [g.detach() for g in torch.autograd.grad(loss, self.parameters)]
        with clock("fit, synthetic"):
            stain_matrix, top, status = self.operators.macenko_fit(images.detach())
            stain = self.operators.macenko_affine(stain_matrix, top, *self.preprocessing.template.tensors(images.device))
        with clock("augment, synthetic"):
            view = self.view(images, draw.warp, stain, status == OK)
        x = view.detach().requires_grad_(True)
        with clock("network forward, synthetic"):
            loss = F.cross_entropy(self.network(x), torch.full((len(x),), label, device=self.device))
        with clock("gradients, synthetic"):
            found = torch.autograd.grad(loss, self.parameters, create_graph=True)
        cut = [g.detach().requires_grad_(True) for g in found]
        with clock("distance"):
            distance = self.operators.gradient_distance(wanted, cut)
        with clock("distance, backward"):
            upstream = torch.autograd.grad(distance, cut)
        with clock("network backward"):
            (gradient,) = torch.autograd.grad(found, x, upstream)
        with clock("augment, backward"):
            (gradient,) = torch.autograd.grad(view, images, gradient)
        return distance.detach(), gradient


class InnerStep:
    """An inner step of a distillation of 64 px patches in two classes, on procedural patches: every class's images, then
    the network, are updated once.

    Args:
        operators: the implementation.
        width: of the ConvNet-D3.
    """

    def __init__(self, operators: Operators, device: torch.device, width: int) -> None:
        from histodd_bench.distill.histodd import matched_parameters
        from histodd_bench.models import build

        self.device, self.generator = device, torch.Generator().manual_seed(0)
        self.pool = procedural(256, SIDE)
        self.synthetic = (self.pool[: CLASSES * IPC].float() / 255).to(device)
        self.velocity = torch.zeros_like(self.synthetic)
        network = build("convnet-d3", num_classes=CLASSES, image_size=SIDE, width=width, generator_seed=0)
        network = network.to(device).train()
        preprocessing = Preprocessing((0.7, 0.5, 0.65), (0.2, 0.25, 0.2))
        self.matching = Matching(operators, network, matched_parameters(network, "weights"), preprocessing, device)
        stain_matrix, top, status = operators.macenko_fit(self.pool)  # once: fits of real patches are kept
        self.fits = preprocessing.template.affine(stain_matrix, top), status == OK
        self.optimizer = torch.optim.SGD(network.parameters(), 0.01, 0.9, weight_decay=5e-4)
        self.augmentation = SiameseAugment()

    def real(self, clock: Clock) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """A minibatch of real patches with their fits, on the device."""
        with clock("load real patches"):
            rows = torch.randint(len(self.pool), (REAL_BATCH,), generator=self.generator)
            return self.pool[rows].to(self.device), (
                self.fits[0][rows].to(self.device),
                self.fits[1][rows].to(self.device),
            )

    def __call__(self) -> dict[str, float]:
        """Do one; the seconds of every part."""
        clock, matching = Clock(self.device), self.matching
        for label in range(CLASSES):
            real, fits = self.real(clock)
            mine = slice(label * IPC, (label + 1) * IPC)
            draw = self.augmentation.draw(self.generator)
            _, gradient = matching.gradient(real, fits, self.synthetic[mine], label, draw, clock)
            with clock("image step"):
                velocity = 0.5 * self.velocity[mine] + gradient / gradient.square().mean().sqrt().clamp(min=1e-20)
                self.velocity[mine] = velocity
                self.synthetic[mine] = (self.synthetic[mine] - 0.005 * velocity).clamp_(0, 1)
        real, fits = self.real(clock)
        draw = self.augmentation.draw(self.generator, len(real))
        with clock("augment, real"):
            x = matching.view(real, draw.warp, *fits)
        with clock("network step"):
            labels = torch.arange(len(x), device=self.device) % CLASSES
            self.optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(matching.network(x), labels).backward()
            self.optimizer.step()
        return clock.seconds


def step_width(device: torch.device, quick: bool) -> int:
    """Of the ConvNet-D3: 128 as the ``standard`` preset has it, 32 as ``quick`` has it; a CPU takes seconds for the latter."""
    return 32 if quick or device.type == "cpu" else 128


def measure_step(
    device: torch.device, *, quick: bool, seconds: float, log: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
    """Times of every part with both implementations, and what share of the step the augmentation has."""
    width = step_width(device, quick)
    log(f"step: ConvNet-D3 {width} wide, {SIDE} px, {CLASSES} classes, real batch {REAL_BATCH}, {IPC} per class")
    steps = {o.name: InnerStep(o, device, width) for o in (COMPILED, REFERENCE)}
    parts: dict[str, list[str]] = {}

    def run(name: str) -> list[float]:
        taken = steps[name]()
        parts[name] = list(taken)
        return list(taken.values())

    samples = take_turns({name: lambda n=name: run(n) for name in steps}, 5 * seconds)  # type: ignore[misc]
    record: dict[str, Any] = {
        "settings": {"network": "convnet-d3", "width": width, "side": SIDE, "classes": CLASSES,
                     "real_batch": REAL_BATCH, "ipc": IPC},
        "parts": {}, "total": {}, "augmentation": {}, "augmentation_share": {},
    }  # fmt: skip
    for name, columns in samples.items():
        rows = list(zip(*columns, strict=True))
        record["parts"][name] = {p: spread(c) for p, c in zip(parts[name], columns, strict=True)}
        places = [i for i, part in enumerate(parts[name]) if part in AUGMENTATION]
        record["total"][name] = spread([sum(row) for row in rows])
        record["augmentation"][name] = spread([sum(row[i] for i in places) for row in rows])
        record["augmentation_share"][name] = spread([sum(row[i] for i in places) / sum(row) for row in rows])["median"]
    return record


def step_calls(device: torch.device, *, quick: bool) -> list[tuple[str, Callable[[], Any]]]:
    """One call of the step by each implementation, for a trace."""
    width = step_width(device, quick)
    return [(f"step: {o.name}", InnerStep(o, device, width)) for o in (COMPILED, REFERENCE)]
