"""One Macenko fit for many patches, a slide say: exactly in memory, or by streaming with a stated error.

A matrix per slide is steadier than one per patch: a patch that holds one stain only cannot be fitted alone.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from histodd_bench.ops._extension import require_image, require_tensor
from histodd_bench.ops.macenko_fit import (
    DEGENERATE,
    LITTLE_TISSUE,
    OK,
    WEAK_STAIN,
    in_range,
    pinv,
    principal_plane,
    stain_vectors,
)
from histodd_bench.stain_definitions import Definition, StainFit, definition

MIN_TISSUE, MIN_CONCENTRATION = 0.01, 0.1  # the guards of macenko_fit
_BINS = 1 << 18
_DOUBLE: dict[str, Any] = {"dtype": torch.float64, "device": "cpu"}  # of everything that is kept between batches


def fit_pooled(images: Tensor, which: str | Definition = "torchstain") -> StainFit:
    """Exact fit of all pixels of ``[N,3,H,W]`` together, as if they were one image; its tensors have N = 1.

    One patch out of range spoils the pool (status 4); :class:`StreamingFit` leaves such patches out.
    """
    require_tensor("images", images)
    require_image(images)
    n, _, height, width = images.shape
    return definition(which).fit(images.detach().transpose(0, 1).reshape(1, 3, n * height, width))


class StreamingFit:
    """One fit for any number of patches that are never in memory together.

    Three passes over the data: moments give the plane of the stains, angles in it the stain vectors, concentrations
    their maxima. Each needs the result of the one before, so the data are gone through three times::

        fit = StreamingFit()
        for _ in fit.passes():
            for images in loader:
                fit.update(images)
        slide = fit.finish()

    Percentiles come from histograms of 2^18 bins, and are off by at most half a bin: beside :func:`fit_pooled` a stain
    vector turns by no more than ``angle_error`` radians (1.2e-5), and a maximum differs by no more than
    ``concentration_error`` (mostly a few 1e-4), in which the turned stain vectors have their part. So it is for every definition but
    those with a ``luminosity``, whose contrast stretch is each patch's own here and the whole pool's there. Memory does not
    grow with the data.

    Args:
        which: preset or definition.

    Attributes:
        patches, skipped: patches seen in the first pass, and those among them left out for being out of range.
        angle_error: largest error of the angles of the stain vectors, in radians.
        concentration_error: ``[2]`` float64, largest errors of the maxima, known after the last pass.
    """

    angle_error = torch.pi / _BINS

    def __init__(self, which: str | Definition = "torchstain") -> None:
        self.definition = definition(which)
        self._pass = 0
        self._begin()

    def _begin(self) -> None:
        self.patches = self.skipped = 0
        self.concentration_error = torch.zeros(2, **_DOUBLE)
        self._status = LITTLE_TISSUE  # as long as no pass has found any
        self._pixels = self._count = 0
        self._sum = torch.zeros(3, 1, **_DOUBLE)
        self._product = torch.zeros(3, 3, **_DOUBLE)
        self._histogram = torch.zeros(2, _BINS, dtype=torch.int64, device="cpu")
        self._plane = self._stain = torch.eye(3, 2, **_DOUBLE)
        self._top = torch.zeros(2, **_DOUBLE)

    def passes(self) -> Iterator[int]:
        """Numbers 1, 2, 3 of the passes, of a new fit; ends early when there is nothing to fit."""
        self._begin()
        for number in (1, 2, 3):
            self._pass = number
            yield number
            (self._end_moments, self._end_angles, self._end_concentrations)[number - 1]()
            if self._status != OK:
                break
        self._pass = 0

    def update(self, images: Tensor) -> None:
        """Take in a batch: ``[N,3,H,W]`` uint8 or float in [0, 1], on any device. The same patches in every pass."""
        if self._pass == 0:
            raise RuntimeError("update belongs into a loop over passes()")
        require_tensor("images", images)
        require_image(images)
        images = images.detach()
        if images.is_floating_point():
            good = in_range(images)
            self.skipped += int((~good).sum()) if self._pass == 1 else 0
            images = images[good]
            self.patches += len(good) if self._pass == 1 else 0
        else:
            self.patches += len(images) if self._pass == 1 else 0
        if images.numel() == 0:
            return
        od = self.definition.density(images).double().transpose(0, 1).flatten(1)
        if self._pass == 3:
            bound = self._concentration_bound().to(od.device)
            return self._count_into((pinv(self._stain).to(od.device) @ od) / bound[:, None])
        tissue = (od >= self.definition.beta).all(0)
        mask = self.definition.tissue_mask(images)
        if mask is not None:
            tissue = tissue & mask.flatten()
        od = od[:, tissue]
        if self._pass == 1:
            self._pixels += tissue.numel()
            self._count += od.shape[1]
            self._sum += od.sum(1, keepdim=True).cpu()
            self._product += (od @ od.T).cpu()
        else:
            projected = self._plane.T.to(od.device) @ od
            self._count_into(torch.atan2(projected[1], projected[0])[None] / torch.pi)

    def finish(self) -> StainFit:
        """The fit after the last pass, float64 with N = 1; its status says when it cannot be used."""
        if self._pass != 0:
            raise RuntimeError("finish comes after the loop over passes()")
        status = torch.tensor([self._status], dtype=torch.uint8, device="cpu")
        return StainFit(self._stain[None].clone(), self._top[None].clone(), status)

    def _count_into(self, scaled: Tensor) -> None:
        """Add rows of values in [-1, 1] to the histograms."""
        bins = ((scaled + 1) * (_BINS / 2)).long().clamp(0, _BINS - 1)
        for row, histogram in zip(bins, self._histogram, strict=False):
            histogram += torch.bincount(row, minlength=_BINS).cpu()

    def _percentile(self, row: int, q: float) -> float:
        """From a histogram, on the scale [-1, 1]: half a bin off at most, by either interpolation."""
        upto = self._histogram[row].cumsum(0)
        position = q * (int(upto[-1]) - 1) / 100
        linear = self.definition.interpolation == "linear"
        low = int(position) if linear else round(position)
        ranks = torch.tensor([low, min(low + 1, int(upto[-1]) - 1) if linear else low], device="cpu")
        first, second = ((torch.searchsorted(upto, ranks, right=True) + 0.5) / (_BINS / 2) - 1).tolist()
        return first + (second - first) * (position - low if linear else 0.0)

    def _end_moments(self) -> None:
        if self._count < max(3, MIN_TISSUE * self._pixels):
            self._status = LITTLE_TISSUE
            return
        mean = self._sum / self._count
        covariance = (self._product - self._sum @ mean.T) / (self._count - 1)
        plane, flat = principal_plane(covariance[None], mean[None], self.definition.sign)
        self._plane = plane[0]
        self._status = DEGENERATE if bool(flat) else OK

    def _check_seen(self, expected: int) -> None:
        seen = int(self._histogram[0].sum())
        if seen != expected:
            raise ValueError(
                f"pass {self._pass} saw {seen:,} pixels, the first one {expected:,}: every pass goes over the same patches "
                "(a generator is used up after the first)"
            )

    def _end_angles(self) -> None:
        self._check_seen(self._count)
        alpha = self.definition.alpha
        angles = torch.tensor([[self._percentile(0, q) * torch.pi for q in (alpha, 100 - alpha)]], **_DOUBLE)
        stain, alike = stain_vectors(self._plane[None], angles)
        if bool(alike):
            self._status = DEGENERATE
            return
        self._stain = stain[0]
        self._histogram.zero_()

    def _concentration_bound(self) -> Tensor:
        """No concentration is larger: black or white in every channel, whichever is further from zero density."""
        ends = torch.tensor([0.0, 1.001], **_DOUBLE)
        return pinv(self._stain).abs().sum(1) * self.definition.density(ends).abs().max()

    def _end_concentrations(self) -> None:
        self._check_seen(self._pixels)
        self._top = torch.tensor([self._percentile(row, 99.0) for row in (0, 1)], **_DOUBLE)
        bound = self._concentration_bound()
        self._top *= bound
        self.concentration_error = bound / _BINS + self._error_of_turned_stains(bound)
        if bool((self._top < MIN_CONCENTRATION).any()):
            self._status = WEAK_STAIN

    def _error_of_turned_stains(self, bound: Tensor) -> Tensor:
        """How far concentrations of any pixel are from those by stain vectors that are off by ``angle_error``."""
        # S c = S' c' in the plane, so |c - c'| <= |pinv(S)| |S' - S| |c'|, and the rows of pinv(S) are 1 / sin(angle) long.
        h, e = self._stain[:, 0], self._stain[:, 1]
        angle = torch.atan2(torch.linalg.cross(h, e).norm(), h @ e) - 2 * self.angle_error
        seen = [row.nonzero().flatten() for row in self._histogram]
        ends = torch.stack([torch.stack([s[0], s[-1] + 1]) for s in seen]).double() / (_BINS / 2) - 1
        largest = (ends.abs().amax(1) * bound).sum()
        return self.angle_error * largest / angle.sin().clamp(min=1e-12)


def fit_stream(batches: Iterable[Tensor], which: str | Definition = "torchstain") -> StainFit:
    """:class:`StreamingFit` of something that can be iterated over three times, a DataLoader or a list of batches."""
    fit = StreamingFit(which)
    for _ in fit.passes():
        for images in batches:
            fit.update(images)
    return fit.finish()
