"""Patches to measure on: crops of procedural H&E, or of the user's own images."""

from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from histodd_bench.errors import UsageError

_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")


@lru_cache(maxsize=1)
def _slides() -> np.ndarray:
    """Two procedural slides of different stain, ``[2,1024,1024,3]`` uint8."""
    from histodd_bench.data.demo_render import draw_stain, render_slide

    rng = np.random.default_rng(0)
    return np.stack([render_slide(rng, 512.0, draw_stain(rng, centre, 1.0), 0.3)[0] for centre in (0, 1)])


def procedural(n: int, side: int) -> Tensor:
    """``n`` random crops ``[n,3,side,side]`` uint8 of the middle of the two slides; always the same ones."""
    slides, rng = _slides(), np.random.default_rng([n, side])
    low, high = 192, 832 - side  # tissue lies in the middle
    if high <= low:
        low, high = 0, slides.shape[1] - side
    if high < low:
        raise UsageError(f"procedural patches are at most {slides.shape[1]} px wide, got {side}: give --images")
    crops = []
    for i in range(n):
        y, x = rng.integers(low, high + 1, 2)
        crops.append(slides[i % 2, y : y + side, x : x + side])
    return torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).contiguous()


def from_folder(folder: Path, n: int, side: int) -> Tensor:
    """``n`` patches ``[n,3,side,side]`` uint8 from a folder's images (searched deeply): resized, and repeated if too few.

    Raises:
        UsageError: no images there.
    """
    from PIL import Image

    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in _SUFFIXES)
    if not files:
        raise UsageError(f"--images {folder}: no images there (looked for {', '.join(_SUFFIXES)})")
    chosen = [files[i * len(files) // n] for i in range(n)] if len(files) >= n else files
    patches = []
    for path in chosen:
        with Image.open(path) as image:
            resized = image.convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
        patches.append(torch.from_numpy(np.asarray(resized).copy()).permute(2, 0, 1))
    return torch.stack([patches[i % len(patches)] for i in range(n)]).contiguous()
