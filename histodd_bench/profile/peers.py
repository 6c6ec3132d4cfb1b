"""What else computes the same as the operators: plain PyTorch, and public packages where they are installed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

IO = 240.0


def plain_stain_augment(image: Tensor, stain: Tensor, warp: Tensor | None, mean: Tensor, std: Tensor) -> Tensor:
    """``stain_augment`` as one would write it in PyTorch, with as few passes over memory as possible.

    ``image [N,3,H,W]`` uint8 or float in [0, 1], ``stain [N,3,4]``, ``warp [N,2,3]`` or None, ``mean`` and ``std``
    ``[3]``; float32 ``[N,3,H,W]``.
    """
    n, _, h, w = image.shape
    if not image.is_floating_point():
        image = image.float() / 255
    if warp is not None:
        grid = F.affine_grid(warp, [n, 3, h, w], align_corners=False)
        image = 1 - F.grid_sample(1 - image, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    log = torch.log(image * (255 / IO) + 1 / IO).reshape(n, 3, -1)
    shift = torch.log(torch.full_like(stain[:, :, 3:], IO / 255)) - stain[:, :, 3:]
    moved = torch.baddbmm(shift, stain[:, :, :3], log).exp().clamp(max=1).view(n, 3, h, w)
    return torch.addcmul((-mean / std)[:, None, None], moved, (1 / std)[:, None, None])


def plain_normalise(image: Tensor, target: Tensor, top: Tensor) -> Tensor:
    """Macenko's fit and normalisation as one would write them for a batch in PyTorch; no care is taken of blank patches.

    ``image [N,3,H,W]`` uint8 or float in [0, 1], ``target [3,2]`` and ``top [2]``; float32 ``[N,3,H,W]`` in [0, 1].
    """
    n, _, h, w = image.shape
    x = image.float() if image.dtype == torch.uint8 else image.float() * 255
    od = torch.log(IO / (x + 1)).view(n, 3, -1)
    tissue = (od >= 0.15).all(1)
    count = tissue.sum(1)
    kept = od * tissue[:, None]
    mean = kept.sum(2) / count[:, None]
    covariance = (kept @ kept.mT - count[:, None, None] * mean[:, :, None] * mean[:, None]) / (count - 1)[:, None, None]
    plane = torch.linalg.eigh(covariance)[1][:, :, [2, 1]]
    plane = plane * (mean[:, None] @ plane).sign()
    along, across = (plane.mT @ od).unbind(1)
    angles = torch.atan2(across, along).masked_fill(~tissue, torch.inf).sort(1)[0]
    ranks = torch.stack([count - 1, 99 * (count - 1)], 1).div(100).round().long()
    ends = angles.gather(1, ranks)
    stain = plane @ torch.stack([ends.cos(), ends.sin()], 1)
    stain = torch.where((stain[:, :1, :1] < stain[:, :1, 1:]), stain.flip(2), stain)
    inverse = torch.linalg.pinv(stain)
    most = torch.kthvalue(inverse @ od, round(0.99 * (h * w - 1)) + 1)[0]
    moved = (target * (top / most)[:, None]) @ inverse @ od
    return ((IO / 255) * torch.exp(-moved)).clamp(max=1).view(n, 3, h, w)


def loop_distance(real: Sequence[Tensor], synthetic: Sequence[Tensor]) -> Tensor:
    """The layer-wise L1 distance as public distillation code has it: a loop over layers."""
    total = torch.zeros((), device=real[0].device)
    for r, s in zip(real, synthetic, strict=True):
        total = total + (r - s).abs().sum()
    return total


# Packages that fit and normalise. Each takes uint8 ``[N,3,H,W]`` and gives grey levels, 0..255 as the package returns
# them, ``[N,3,H,W]``. The definition (of histodd_bench.stain_definitions, or one of our own) is what it must agree with.
Normalise = Callable[[Tensor], Tensor]


def _torchstain() -> Normalise:
    import torchstain

    normaliser = torchstain.normalizers.MacenkoNormalizer(backend="torch")

    def run(images: Tensor) -> Tensor:
        normaliser.HERef, normaliser.maxCRef = (t.to(images.device) for t in (normaliser.HERef, normaliser.maxCRef))
        return torch.stack([normaliser.normalize(i, stains=False)[0] for i in images]).permute(0, 3, 1, 2)

    return run


def _torchstain_numpy() -> Normalise:
    import numpy as np
    import torchstain

    normaliser = torchstain.normalizers.MacenkoNormalizer(backend="numpy")

    def run(images: Tensor) -> Tensor:
        arrays = images.permute(0, 2, 3, 1).numpy()
        return torch.from_numpy(np.stack([normaliser.normalize(a, stains=False)[0] for a in arrays])).permute(
            0, 3, 1, 2
        )

    return run


def _stainx() -> Normalise:
    from stainx import Macenko

    from histodd_bench.stain import REFERENCE_MAX_CONCENTRATION, REFERENCE_STAIN

    normalisers: dict[torch.device, Macenko] = {}

    def run(images: Tensor) -> Tensor:
        device = images.device
        if device not in normalisers:
            made = Macenko(device=device)
            made._stain_matrix = torch.tensor(REFERENCE_STAIN, device=device)
            made._target_max_conc = torch.tensor(REFERENCE_MAX_CONCENTRATION, device=device)
            made._is_fitted = True
            normalisers[device] = made
        return normalisers[device].transform(images)

    return run


def _torch_staintools() -> Normalise:
    from torch_staintools.constants import PARAM
    from torch_staintools.normalizer.factory import NormalizerBuilder

    from histodd_bench.stain import REFERENCE_MAX_CONCENTRATION, REFERENCE_STAIN

    PARAM.MAX_CONCENTRATION_PERC = 99  # 95 by default: with it, nothing else here computes the same
    normaliser = NormalizerBuilder.build("macenko", concentration_solver="ls", luminosity_threshold=None)
    normaliser.register_buffer("stain_matrix_target", torch.tensor(REFERENCE_STAIN).T[None].contiguous())
    normaliser.register_buffer("maxC_target", torch.tensor(REFERENCE_MAX_CONCENTRATION)[None])

    def run(images: Tensor) -> Tensor:
        return normaliser.to(images.device).transform(images.float() / 255) * 255

    return run


@dataclass(frozen=True)
class Package:
    """A public package: how it is called, and what it must agree with.

    Attributes:
        module: importable where it is installed.
        distribution: its name on the package index.
        make: gives its function; imports it.
        definition: fields of the :class:`~histodd_bench.stain_definitions.Definition` it implements.
        devices: kinds of device it runs on.
        truncates: it returns whole grey levels, rounded down.
        limit: largest mean difference in grey levels that counts as the same.
    """

    module: str
    distribution: str
    make: Callable[[], Normalise]
    definition: dict[str, Any]
    devices: tuple[str, ...] = ("cpu", "cuda")
    truncates: bool = False
    limit: float = 0.03

    @property
    def installed(self) -> bool:
        """Whether it can be imported here."""
        return find_spec(self.module) is not None


PACKAGES = {
    "torchstain": Package("torchstain", "torchstain", _torchstain, {}, truncates=True),
    "torchstain (NumPy)": Package(
        "torchstain", "torchstain", _torchstain_numpy, {"interpolation": "linear"}, devices=("cpu",), truncates=True
    ),
    "stainx": Package("stainx", "stainx", _stainx, {}, truncates=True),
    "torch-staintools": Package(
        "torch_staintools",
        "torch-staintools",
        _torch_staintools,
        {"io": 255.0, "beta": -1.0, "interpolation": "linear", "plus_one": False, "sign": "mean"},
        limit=0.1,  # percentiles of the angle are rounded down to a rank, negative concentrations are set to 0
    ),
}
