"""Macenko stain normalisation: from a batched fit to one optical-density affine per patch, and the template (paper 3.1)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from histodd_bench.data.patchset import PatchSet
from histodd_bench.ops import macenko_affine, macenko_fit, stain_augment
from histodd_bench.ops._extension import require_tensor
from histodd_bench.ops.macenko_fit import OK, OUT_OF_RANGE, STATUS_NAMES, in_range, refuse_out_of_range
from histodd_bench.stain_definitions import Definition, StainFit
from histodd_bench.stain_definitions import definition as find_definition

REFERENCE_STAIN = ((0.5626, 0.2159), (0.7201, 0.8012), (0.4062, 0.5581))  # Macenko et al. 2009, columns H and E
REFERENCE_MAX_CONCENTRATION = (1.9705, 1.0308)
_CHUNK = 1024
_VALUES = 1 << 24  # held in double precision at once


@dataclass(frozen=True)
class StainTemplate:
    """What patches are normalised to: a stain matrix (3 rows of haematoxylin, eosin) and maximum concentrations."""

    stain_matrix: tuple[tuple[float, float], ...] = REFERENCE_STAIN
    max_concentration: tuple[float, float] = REFERENCE_MAX_CONCENTRATION

    def affine(self, stain_matrix: Tensor, max_concentration: Tensor) -> Tensor:
        """``[A|b]`` ``[N,3,4]`` that moves patches with these fits (``[N,3,2]``, ``[N,2]``) onto the template."""
        return macenko_affine(stain_matrix, max_concentration, *self.tensors(stain_matrix.device))

    def tensors(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The stain matrix ``[3,2]`` and maximum concentrations ``[2]``, float64."""
        double = torch.float64
        return (
            torch.tensor(self.stain_matrix, dtype=double, device=device),
            torch.tensor(self.max_concentration, dtype=double, device=device),
        )


def fit_affine(images: Tensor, template: StainTemplate) -> tuple[Tensor, Tensor]:
    """Detached Macenko fit of a batch: ``[A|b]`` ``[N,3,4]`` float onto the template and ``valid [N]`` bool.

    Args:
        images: ``[N,3,H,W]`` uint8 or float in [0, 1].
        template: what to normalise to.
    """
    stain_matrix, max_concentration, status = macenko_fit(images.detach())
    return template.affine(stain_matrix, max_concentration), status == OK


def fit_set(patches: PatchSet, template: StainTemplate) -> tuple[Tensor, Tensor]:
    """:func:`fit_affine` of a whole set, in chunks, on the CPU: ``[N,3,4]`` float32 and ``[N]`` bool."""
    parts = [fit_affine(patches.images[i : i + _CHUNK], template) for i in range(0, len(patches), _CHUNK)]
    if not parts:
        return torch.zeros(0, 3, 4), torch.zeros(0, dtype=torch.bool)
    return torch.cat([p[0] for p in parts]).float(), torch.cat([p[1] for p in parts])


@dataclass(frozen=True)
class Preprocessing:
    """Channel statistics and stain template of a training set; every network sees patches through them.

    Attributes:
        mean, std: per channel, of all training pixels, on the [0, 1] scale.
        template: fit of the training patch whose mean and standard deviation are closest to the set's (paper 3.1).
        template_index: which training patch that was; -1 when no patch could be fitted (reference constants).
    """

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    template: StainTemplate = StainTemplate()
    template_index: int = -1

    def __call__(
        self,
        images: Tensor,
        *,
        warp: Tensor | None = None,
        stain: Tensor | None = None,
        valid: Tensor | None = None,
    ) -> Tensor:
        """Patches as a network sees them: warp, stain affine where ``valid``, channel normalisation. ``[N,3,H,W]`` float32."""
        device = images.device
        mean, std = (torch.tensor(v, dtype=torch.float32, device=device) for v in (self.mean, self.std))
        stain = None if stain is None else stain.to(device)
        valid = None if valid is None else valid.to(device)
        return stain_augment(images, stain, warp, mean, std, valid=valid)


def describe(train: PatchSet) -> Preprocessing:
    """Channel statistics and template of a training set, in one streaming pass over its pixels.

    Distances are Euclidean over the three channel means and three channel standard deviations. Candidates are tried
    from the closest on, until the Macenko fit of one is valid.
    """
    sums, squares = [], []
    step = max(min(_CHUNK, _VALUES // train.images.shape[1:].numel()), 1)
    for start in range(0, len(train), step):
        x = train.float_batch(slice(start, start + step)).double().flatten(2)
        sums.append(x.mean(2))
        squares.append(x.square().mean(2))
    first, second = torch.cat(sums), torch.cat(squares)
    mean = first.mean(0)
    std = (second.mean(0) - mean.square()).clamp(min=1e-12).sqrt()
    patch_std = (second - first.square()).clamp(min=0).sqrt()
    distance = (torch.cat([first, patch_std], 1) - torch.cat([mean, std])).square().sum(1)
    channel_mean, channel_std = tuple(mean.tolist()), tuple(std.clamp(min=1e-3).tolist())
    order = distance.argsort(stable=True)[:256]
    for some in order.split(step):
        stain_matrix, max_concentration, status = macenko_fit(train.images[some])
        for rank in (status == OK).nonzero().flatten()[:1].tolist():
            template = StainTemplate(
                tuple((float(h), float(e)) for h, e in stain_matrix[rank]),
                (float(max_concentration[rank, 0]), float(max_concentration[rank, 1])),
            )
            return Preprocessing(channel_mean, channel_std, template, int(some[rank]))  # type: ignore[arg-type]
    return Preprocessing(channel_mean, channel_std)  # type: ignore[arg-type]


def _batch(images: Tensor) -> Tensor:
    require_tensor("images", images)
    return images[None] if images.ndim == 3 else images


class MacenkoNormalizer(nn.Module):
    """The familiar ``fit(target)`` / ``normalize(images)`` pair, batched, differentiable, and usable as a module.

    The target is part of ``state_dict`` (the definition is not) and moves with ``to(device)``; it stays float64 when a model is
    cast, by ``half()`` say, since rounding it would shift the colours of everything that is normalised. Gradients pass through the
    map that is applied to every pixel, exactly, and not through the fits (see :mod:`histodd_bench.ops.macenko_fit`).

    Args:
        template: normalise to this instead of calling :meth:`fit`; the Macenko reference by default.
        definition: name of a preset (``torchstain``, ``torchstain-numpy``, ``cucim``, ``tiatoolbox``) or a
            :class:`~histodd_bench.stain_definitions.Definition`.
    """

    def __init__(self, template: StainTemplate | None = None, definition: str | Definition = "torchstain") -> None:
        super().__init__()
        self.definition = find_definition(definition)
        template = template or StainTemplate()
        self.target_stain: Tensor
        self.target_concentration: Tensor
        self.register_buffer("target_stain", torch.tensor(template.stain_matrix, dtype=torch.float64))
        self.register_buffer("target_concentration", torch.tensor(template.max_concentration, dtype=torch.float64))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = self.target_stain, self.target_concentration
        super()._apply(fn, recurse)  # what half(), to() and their like call, also those of a model this is a part of
        self.target_stain, self.target_concentration = (
            now if now.dtype == old.dtype else old.to(now.device)
            for old, now in zip(before, (self.target_stain, self.target_concentration), strict=True)
        )
        return self

    @property
    def template(self) -> StainTemplate:
        """The target as plain numbers."""
        rows, top = self.target_stain.tolist(), self.target_concentration.tolist()
        return StainTemplate(tuple((r[0], r[1]) for r in rows), (top[0], top[1]))

    def fit(self, target: Tensor | StainFit) -> "MacenkoNormalizer":
        """Take the stains of a target image, or those of a fit, e.g. of a whole slide.

        Args:
            target: ``[3,H,W]`` or ``[1,3,H,W]``, uint8 or float in [0, 1]; or a fit of one image or pool.

        Raises:
            ValueError: the target's stains cannot be fitted (blank, one stain only, wrong scale).
        """
        if isinstance(target, StainFit):
            found = target
        else:
            found = self.definition.fit(_batch(target))
        if len(found.status) != 1:
            raise ValueError(f"the target is one image or one pool of patches, got {len(found.status)}")
        if int(found.status[0]) != OK:
            scale = "; images are uint8, or float in [0, 1]" if int(found.status[0]) == OUT_OF_RANGE else ""
            raise ValueError(f"the target image cannot be fitted: {STATUS_NAMES[int(found.status[0])]}{scale}")
        self.target_stain.copy_(found.stain_matrix[0])
        self.target_concentration.copy_(found.max_concentration[0])
        return self

    def estimate(self, images: Tensor, check: bool = False) -> StainFit:
        """Detached fits of ``[N,3,H,W]``, to be kept and given to :meth:`normalize`; ``check`` raises on a wrong scale."""
        return self.definition.fit(_batch(images), check)

    def normalize(
        self,
        images: Tensor,
        fit: StainFit | None = None,
        *,
        check: bool = False,
        warp: Tensor | None = None,
        where: Tensor | None = None,
    ) -> Tensor:
        """``[N,3,H,W]`` uint8 or float -> float in [0, 1]; patches that cannot be fitted come back as they are.

        Args:
            images: patches, or one patch ``[3,H,W]``, whose result is ``[3,H,W]`` too.
            fit: use these stains instead of fitting every patch: one fit per patch, or one (of a slide) for all.
            check: synchronise and raise if a patch is on the wrong scale, such as floats up to 255.
            warp: ``[N,2,3]``, turns patches in the same pass, see :func:`~histodd_bench.ops.stain_augment`.
            where: ``[N]`` or ``[1]`` bool: which patches to normalise; the others keep their stains.

        Raises:
            ValueError: another number of fits or of ``where`` than of patches; with ``check``, images out of range.
            TypeError: images that are no tensor.
        """
        one, images = images, _batch(images)
        if fit is None:
            fit = self.estimate(images, check)
        else:
            fit = StainFit(*(t.to(images.device) for t in fit))
            if check:
                refuse_out_of_range(~in_range(images))
        n = images.shape[0]
        if fit.status.shape[0] not in (1, n):
            raise ValueError(f"one fit for all or one per patch: got {len(fit.status)} fits for {len(images)} patches")
        if where is not None and (where.dtype != torch.bool or where.ndim != 1 or where.shape[0] not in (1, n)):
            raise ValueError(f"where must be bool, [N] or [1], got {list(where.shape)} {where.dtype} for {n} patches")
        affine = macenko_affine(fit.stain_matrix, fit.max_concentration, self.target_stain, self.target_concentration)
        valid = fit.status == OK if where is None else (fit.status == OK) & where
        result = self.definition.apply(images, affine.expand(n, 3, 4), valid.expand(n), warp)
        return result if one.ndim == 4 else result[0]

    forward = normalize
