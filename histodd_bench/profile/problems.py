"""What is measured: one operator on one input, and every backend that computes it, with what must come out."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from histodd_bench.profile.patches import from_folder, procedural
from histodd_bench.profile.peers import IO, PACKAGES, loop_distance, plain_normalise, plain_stain_augment

OPERATORS = ("stain_augment", "macenko_fit", "normalise", "gradient_distance")
SHAPES = ((64, 64), (256, 64), (64, 224), (16, 256), (256, 256))  # patches, side
QUICK_SHAPES = ((64, 64), (16, 256))
DTYPES = {"uint8": torch.uint8, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
DEFAULT_DTYPES = ("uint8", "float32")
COMPILED, REFERENCE = "compiled", "reference"
OTHERS = (
    "torch.compile",
    "plain",
    "torch.compile of plain",
    "loop",
    "torch.compile of loop",
)
_COMPARED = 8  # patches; the reference in float64 of all of them would take longer than the rest


@dataclass(frozen=True)
class Backend:
    """One way to compute a problem.

    Attributes:
        name: ``compiled``, ``reference``, ``torch.compile``, ``plain``, or a package.
        function: of the problem's inputs.
        read: what is compared, from what ``function`` gives.
        expected: what that must be, in float64, where it is not the problem's own ``expected``.
        limit: largest difference that counts as the same, in ``unit``.
        unit: ``of the largest value`` (maximum) or ``grey levels`` (mean).
    """

    name: str
    function: Callable[..., Any]
    read: Callable[[Any], Tensor] = field(default=lambda out: out)
    expected: Callable[[], Tensor] | None = None
    limit: float = 1e-4
    unit: str = "of the largest value"


@dataclass(frozen=True)
class Problem:
    """One computation.

    Attributes:
        operator: one of :data:`OPERATORS`.
        title: what exactly.
        inputs: arguments of every backend.
        leaves: what is differentiated (tensors among ``inputs``); none: forward only.
        upstream: gradient of the result.
        forward_bytes, backward_bytes: of everything that has to be read and written once.
        expected: value and gradients in float64, of what ``compared`` keeps.
        compared: the part of a value or gradient that is compared.
        backends: by which it is computed.
    """

    operator: str
    title: str
    inputs: tuple[Any, ...]
    leaves: tuple[Tensor, ...]
    upstream: Tensor | None
    forward_bytes: int
    backward_bytes: int
    expected: Callable[[], list[Tensor]]
    compared: Callable[[Tensor], Tensor]
    backends: tuple[Backend, ...]


def problems(
    operators: Sequence[str],
    shapes: Sequence[tuple[int, int]],
    dtypes: Sequence[str],
    device: torch.device,
    images: Path | None = None,
) -> Iterator[Problem]:
    """Every problem, one after the other, so that only one set of inputs is held."""
    for operator in operators:
        if operator == "gradient_distance":
            yield from gradient_problems(device)
            continue
        for n, side in shapes:
            pixels = from_folder(images, n, side) if images else procedural(n, side)
            for dtype in dtypes:
                patches = pixels.to(device) if dtype == "uint8" else (pixels.float() / 255).to(device, DTYPES[dtype])
                yield from {
                    "stain_augment": stain_problems,
                    "macenko_fit": fit_problems,
                    "normalise": normalise_problems,
                }[operator](patches)


def _title(image: Tensor) -> str:
    n, _, h, w = image.shape
    return f"{n} x {h} x {w} {str(image.dtype).removeprefix('torch.')}"


def _compile(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=False)


def _bytes(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def stain_problems(image: Tensor) -> Iterator[Problem]:
    """Stain affine and channel normalisation, without and with a warp, each patch with its own parameters."""
    from histodd_bench.augment import SiameseAugment
    from histodd_bench.ops import stain_augment, stain_augment_reference

    n, device = len(image), image.device
    generator = torch.Generator().manual_seed(0)
    stain = (torch.eye(3, 4) + 0.1 * torch.randn(n, 3, 4, generator=generator)).to(device)
    draw = SiameseAugment(("flip", "rotate", "scale")).draw(generator, n)
    assert draw.warp is not None
    mean, std = torch.tensor([0.7, 0.5, 0.6], device=device), torch.tensor([0.2, 0.3, 0.1], device=device)
    upstream = torch.randn(image.shape, generator=generator).to(device, stain_augment(image[:1]).dtype)
    image = image.clone().requires_grad_(image.is_floating_point())
    for warp in (None, draw.warp.to(device)):
        few = slice(min(n, _COMPARED))

        def expected(warp: Tensor | None = warp, few: slice = few) -> list[Tensor]:
            x = image[few].detach()
            x = x.double().requires_grad_() if x.is_floating_point() else x
            wide = [stain[few].double(), None if warp is None else warp[few].double(), mean.double(), std.double()]
            out = stain_augment_reference(x, *wide, dtype=torch.float64)
            return [out.detach(), *(torch.autograd.grad(out, x, upstream[few].double()) if x.requires_grad else ())]

        half = image.dtype in (torch.float16, torch.bfloat16)
        backends = [
            Backend(COMPILED, stain_augment, limit=1e-2 if half else 1e-4),
            Backend(REFERENCE, stain_augment_reference, limit=1e-2 if half else 1e-4),
            Backend("torch.compile", _compile(stain_augment_reference), limit=1e-2 if half else 1e-4),
        ]
        if not half:
            backends += [
                Backend("plain", plain_stain_augment),
                Backend("torch.compile of plain", _compile(plain_stain_augment)),
            ]
        size = _bytes(upstream)
        yield Problem(
            "stain_augment",
            f"{'stain' if warp is None else 'warp + stain'}, {_title(image)}",
            (image, stain, warp, mean, std),
            (image,) if image.requires_grad else (),
            upstream,
            _bytes(image) + size,
            2 * _bytes(image) + size,
            expected,
            lambda t: t[:_COMPARED],
            tuple(backends),
        )


def fit_problems(image: Tensor) -> Iterator[Problem]:
    """Stain vectors and maximum concentrations of every patch."""
    from histodd_bench.ops import macenko_fit, macenko_fit_reference
    from histodd_bench.ops.macenko_fit import OK

    image = only_fitting(image)
    few = slice(min(len(image), _COMPARED))

    def read(fit: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        return torch.cat([fit[0].flatten(1), fit[1], (fit[2] != OK).to(fit[1])[:, None]], 1)

    def expected() -> list[Tensor]:
        x = image[few]
        return [read(macenko_fit_reference((x.double() / 255) if x.dtype == torch.uint8 else x.double()))]

    # A pixel that changes place at a percentile moves a vector by more than rounding does.
    limit = 1e-3
    yield Problem(
        "macenko_fit",
        _title(image),
        (image,),
        (),
        None,
        _bytes(image),
        0,
        expected,
        lambda t: t[few],
        (
            Backend(COMPILED, macenko_fit, read, limit=limit),
            Backend(REFERENCE, macenko_fit_reference, read, limit=limit),
            Backend("torch.compile", _compile(macenko_fit_reference), read, limit=limit),
        ),
    )


def only_fitting(image: Tensor) -> Tensor:
    """Patches that can be fitted, as many as there were: packages raise an error, or skip the batch, for others."""
    from histodd_bench.ops import macenko_fit
    from histodd_bench.ops.macenko_fit import OK

    good = (macenko_fit(image)[2] == OK).nonzero().flatten()
    if len(good) == len(image) or not len(good):
        return image
    return image[good[torch.arange(len(image), device=image.device) % len(good)]]


def normalise_problems(image: Tensor) -> Iterator[Problem]:
    """Fit every patch and normalise it to the Macenko reference: what the public packages do."""
    from histodd_bench.ops import macenko_affine_reference, macenko_fit_reference, stain_augment_reference
    from histodd_bench.ops.macenko_fit import OK
    from histodd_bench.stain import MacenkoNormalizer, StainTemplate
    from histodd_bench.stain_definitions import Definition

    image, template = only_fitting(image), StainTemplate()
    target = template.tensors(image.device)
    few = slice(min(len(image), _COMPARED))

    def reference(x: Tensor) -> Tensor:
        stain_matrix, top, status = macenko_fit_reference(x)
        affine = macenko_affine_reference(stain_matrix, top, *target)
        return stain_augment_reference(x, affine, valid=status == OK)

    def grey(out: Tensor) -> Tensor:
        return out[few].double() * 255

    def levels(definition: dict[str, Any], truncates: bool) -> Tensor:
        x = image[few]
        wide = x.double() / 255 if x.dtype == torch.uint8 else x.double()
        exact = MacenkoNormalizer(definition=Definition(**definition)).to(x.device).normalize(wide) * 255
        return (exact + 1e-6).floor() if truncates else exact

    limit = 0.03 if image.dtype in (torch.uint8, torch.float32) else 1.0
    common = {"read": grey, "limit": limit, "unit": "grey levels"}
    backends = [
        Backend(COMPILED, MacenkoNormalizer().to(image.device).normalize, **common),  # type: ignore[arg-type]
        Backend(REFERENCE, reference, **common),  # type: ignore[arg-type]
        Backend("torch.compile", _compile(reference), **common),  # type: ignore[arg-type]
        Backend("plain", lambda x: plain_normalise(x, *(t.float() for t in target)), **common),  # type: ignore[arg-type]
    ]
    if image.dtype == torch.uint8:  # what packages take
        for name, package in PACKAGES.items():
            if not package.installed or image.device.type not in package.devices:
                continue
            backends.append(
                Backend(
                    name,
                    package.make(),
                    read=lambda out: out[few].double(),
                    expected=lambda p=package: levels(p.definition, p.truncates),  # type: ignore[misc]
                    limit=package.limit,
                    unit="grey levels",
                )
            )
    size = image.numel() * (4 if image.dtype == torch.uint8 else image.element_size())
    yield Problem(
        "normalise",
        f"fit + normalise, {_title(image)}",
        (image,),
        (),
        None,
        _bytes(image) + size,
        0,
        lambda: [levels({"io": IO}, False)],
        lambda t: t,
        tuple(backends),
    )


def gradient_problems(device: torch.device) -> Iterator[Problem]:
    """Distances between gradients shaped like those of ResNet18 and ConvNet-D3; on CUDA also eight times ResNet18's."""
    from histodd_bench.models import build

    lists = {"ResNet18": ("resnet18", 64, 1), "ConvNet-D3": ("convnet-d3", 64, 1)}
    if device.type == "cuda":
        lists["8 x ResNet18"] = ("resnet18", 64, 8)
    for title, (name, side, times) in lists.items():
        network = build(name, num_classes=2, image_size=side, generator_seed=0)
        shapes = [p.shape for p in network.parameters()] * times
        yield gradient_problem(title, shapes, device)


def gradient_problem(title: str, shapes: Sequence[torch.Size], device: torch.device) -> Problem:
    """The L1 distance of two lists of float32 tensors of these shapes, differentiated in the second."""
    from histodd_bench.ops import gradient_distance, gradient_distance_reference

    generator = torch.Generator().manual_seed(0)
    real, synthetic = ([torch.randn(s, generator=generator).to(device) for s in shapes] for _ in range(2))
    for tensor in synthetic:
        tensor.requires_grad_()

    def expected() -> list[Tensor]:
        wide = [s.detach().double().requires_grad_() for s in synthetic]
        total = gradient_distance_reference([r.double() for r in real], wide)
        return [total.detach(), *torch.autograd.grad(total, wide)]

    size = _bytes(*real)
    return Problem(
        "gradient_distance",
        f"L1, {title}: {len(shapes)} tensors, {sum(s.numel() for s in shapes) / 1e6:.1f} M float32",
        (real, synthetic),
        tuple(synthetic),
        torch.ones((), device=device),
        2 * size,
        3 * size,
        expected,
        lambda t: t,
        (
            Backend(COMPILED, gradient_distance),
            Backend(REFERENCE, gradient_distance_reference),
            Backend("loop", loop_distance),
            Backend("torch.compile of loop", _compile(loop_distance)),
        ),
    )
