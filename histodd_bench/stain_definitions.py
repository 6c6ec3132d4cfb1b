"""Which Macenko: the choices in which packages differ, and presets with the definitions of the widely used ones."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from histodd_bench.errors import unknown_name
from histodd_bench.ops import macenko_fit, stain_augment
from histodd_bench.ops._extension import require_image, require_tensor
from histodd_bench.ops.macenko_fit import check_options


class StainFit(NamedTuple):
    """Fits of N patches, or of one pool of patches (N = 1).

    Attributes:
        stain_matrix: ``[N,3,2]``, unit columns: haematoxylin, eosin.
        max_concentration: ``[N,2]``, robust maxima of the two concentrations.
        status: ``[N]`` uint8, 0 where the fit can be used (see ``macenko_fit``).
    """

    stain_matrix: Tensor
    max_concentration: Tensor
    status: Tensor


@dataclass(frozen=True)
class Definition:
    """One definition of Macenko's method.

    Attributes:
        io: transmitted light in grey levels.
        beta: optical density from which a pixel is tissue, in all three channels.
        alpha: the extremes of the angle are its alpha-th and (100 - alpha)-th percentile.
        interpolation: of percentiles, ``nearest`` or ``linear``.
        plus_one: optical density is ``-ln((I + 1) / io)``; if false ``-ln(clamp(I, 1, io) / io)``.
        sign: eigenvectors point along the ``mean`` density, or to a positive ``first`` (red) component.
        luminosity: pixels count as tissue only where their lightness, after a contrast stretch, is below this; or None.
        rounding: how grey levels become integers, ``floor`` or ``nearest``.
    """

    io: float = 240.0
    beta: float = 0.15
    alpha: float = 1.0
    interpolation: str = "nearest"
    plus_one: bool = True
    sign: str = "mean"
    luminosity: float | None = None
    rounding: str = "floor"

    def __post_init__(self) -> None:
        check_options(self.io, self.beta, self.alpha, interpolation=self.interpolation, sign=self.sign)
        if self.rounding not in ("floor", "nearest"):
            raise ValueError(f"rounding must be one of ('floor', 'nearest'), got {self.rounding!r}")

    def fit(self, images: Tensor, check: bool = False) -> StainFit:
        """Detached fit of every patch of ``[N,3,H,W]`` uint8 or float in [0, 1]."""
        return StainFit(
            *macenko_fit(
                images,
                io=self.io,
                beta=self.beta,
                alpha=self.alpha,
                interpolation=self.interpolation,
                plus_one=self.plus_one,
                sign=self.sign,
                tissue_mask=self.tissue_mask(images),
                check=check,
            )
        )

    def apply(self, images: Tensor, affine: Tensor, valid: Tensor, warp: Tensor | None = None) -> Tensor:
        """Patches moved by ``[A|b]`` ``[N,3,4]`` in optical density, float in [0, 1]; untouched where not ``valid [N]``.

        In one pass, with a ``warp [N,2,3]`` too, if ``plus_one``; else through intermediate images.
        """
        if self.plus_one:
            return stain_augment(images, affine, warp, valid=valid, io=self.io)
        dtype = images.dtype if images.is_floating_point() else torch.float32
        wide = torch.promote_types(dtype, torch.float32)
        if warp is not None:
            x = stain_augment(images, warp=warp, dtype=wide)
        else:
            x = images.to(wide) if images.is_floating_point() else images.float() / 255
        # The operator's density has the +1: what goes in is one grey level less, and what is not valid is put back.
        moved = stain_augment((x * 255).clamp(1, self.io).sub(1) / 255, affine, valid=valid, io=self.io)
        return torch.where(valid[:, None, None, None], moved, x).to(dtype)

    def density(self, images: Tensor) -> Tensor:
        """Optical densities, in float32 or float64."""
        x = images.to(torch.float64 if images.dtype == torch.float64 else torch.float32)
        if images.is_floating_point():
            x = x * 255
        return -torch.log((x + 1) / self.io) if self.plus_one else -torch.log(x.clamp(1, self.io) / self.io)

    def tissue_mask(self, images: Tensor) -> Tensor | None:
        """``[N,H,W]`` bool where the lightness admits tissue, or None where lightness does not matter."""
        return None if self.luminosity is None else luminosity_mask(images, self.luminosity)

    def to_uint8(self, images: Tensor) -> Tensor:
        """Float images in [0, 1] as the package would return them: uint8 by its rounding rule."""
        levels = images.detach().double() * 255
        # 5e-4: what went through float32 as a whole grey level (glass, above all) stays that level.
        return (levels.round() if self.rounding == "nearest" else (levels + 5e-4).floor()).clamp(0, 255).to(torch.uint8)


# torchstain leaves the signs of the eigenvectors to chance; where they matter, "mean" is what it means. Guards against
# patches without tissue are ours: the packages raise an error or return NaN.
DEFINITIONS = {
    "torchstain": Definition(),  # its torch backend, 1.4.1
    "torchstain-numpy": Definition(interpolation="linear"),
    "cucim": Definition(beta=0.345, interpolation="linear", plus_one=False, sign="first", rounding="nearest"),
    "tiatoolbox": Definition(
        io=255.0, beta=0.0, interpolation="linear", plus_one=False, sign="first", luminosity=0.8, rounding="floor"
    ),
}


def definition(which: str | Definition) -> Definition:
    """A definition by the name of a preset, or itself."""
    if isinstance(which, Definition):
        return which
    if which not in DEFINITIONS:
        raise unknown_name("stain definition", which, DEFINITIONS)
    return DEFINITIONS[which]


def luminosity_mask(images: Tensor, threshold: float) -> Tensor:
    """Pixels darker than a lightness, after a contrast stretch: TIAToolbox's rule for what is tissue.

    Args:
        images: ``[N,3,H,W]`` uint8 or float in [0, 1] (rounded to grey levels).
        threshold: of the lightness L* of CIELAB (D65, from sRGB) rounded to 256 levels, on the scale [0, 1].

    Returns:
        ``[N,H,W]`` bool. The stretch takes the 2nd percentile of all values of an image to 0 and the 98th to 255.
    """
    require_tensor("images", images)
    require_image(images)
    n, height, width = images.shape[0], images.shape[2], images.shape[3]
    device = images.device
    if images.numel() == 0:
        return torch.zeros(n, height, width, dtype=torch.bool, device=device)
    x = images.detach()
    levels = (x if x.dtype == torch.uint8 else (x.nan_to_num(1.0) * 255).round().clamp(0, 255)).long().flatten(2)
    # Everything that depends on one grey level is worked out once for each of the 256.
    offset = 256 * torch.arange(n, device=device)[:, None]
    upto = torch.bincount((levels.flatten(1) + offset).flatten(), minlength=256 * n).view(n, 256).cumsum(1)
    low, high = (_histogram_percentile(upto, q) for q in (2.0, 98.0))
    ends = _histogram_percentile(upto, 0.0), _histogram_percentile(upto, 100.0)
    low, high = torch.where(low < high, low, ends[0]), torch.where(low < high, high, ends[1])
    grey = torch.arange(256, device=device, dtype=torch.float64).expand(n, 256)
    share = (torch.minimum(torch.maximum(grey, low), high) - low) / (high - low).clamp(min=1e-12)
    stretched = torch.where(high > low, (share * 255 + 1e-9).floor(), grey) / 255
    linear = torch.where(stretched <= 0.04045, stretched / 12.92, ((stretched + 0.055) / 1.055) ** 2.4)
    channels = linear.gather(1, levels.flatten(1)).view(n, 3, -1)
    y = 0.212671 * channels[:, 0] + 0.715160 * channels[:, 1] + 0.072169 * channels[:, 2]
    lightness = torch.where(y > 0.008856, 116 * y ** (1 / 3) - 16, 903.3 * y)
    return ((lightness * 2.55).round() / 255 < threshold).view(n, height, width)


def _histogram_percentile(upto: Tensor, q: float) -> Tensor:
    """Linear percentile ``[N,1]`` of grey levels from their cumulative counts ``[N,256]``."""
    last = upto[:, -1:] - 1
    position = q / 100 * last.double()
    low = position.floor().long()
    first, second = (
        torch.searchsorted(upto, rank, right=True).double() for rank in (low, torch.minimum(low + 1, last))
    )
    return first + (second - first) * (position - low)
