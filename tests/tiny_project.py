"""A real data set small enough to run whole tables on in seconds: folders of 16 px PNGs, two classes, two groups of slides."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

REPOSITORY = Path(__file__).resolve().parents[1]

# Every part of Table 1 at its smallest: 2 methods with networks, a distillation of 3 outer steps, 2 x 2 seeds.
FIELDS = [
    "pool.epochs=2",
    "pool.networks=2",
    "eval.epochs=2",
    "histodd.outer_steps=3",
    "histodd.inner_steps=2",
    "histodd.start_patches=10",
    *[f"{m}.{f}" for m in ("herding", "forgetting") for f in ("arch=convnet-d3", "width=8", "epochs=1")],
]
SETTINGS = [part for field in FIELDS for part in ("--set", field)]
OPTIONS = ["--image-size", "16", "--archs", "convnet-d3:8", "--distill-arch", "convnet-d3:8", "--threads", "1",
           "--stain", "half", "--device", "cpu", "--workers", "1", *SETTINGS]  # fmt: skip


def without(options: list[str], *names: str) -> list[str]:
    """Options, each with its value, but for those named."""
    pairs = zip(options[::2], options[1::2], strict=True)
    return [text for name, value in pairs if name not in names for text in (name, value)]


# The same for 'evaluate', which makes no set.
SCORING = [*without(OPTIONS, "--distill-arch", "--set"), "--set", "eval.epochs=2"]


def write_imagefolder(
    root: Path, *, train: tuple[int, ...] = (12, 12), test: int = 6, size: int = 16, seed: int = 0
) -> Path:
    """``train/<class>/*.png`` and ``test/<class>/*.png`` with ``groups.csv``; classes differ in colour and texture."""
    rng = np.random.default_rng(seed)
    rows = ["path,group"]
    for label, count in enumerate(train):
        for split, n in (("train", count), ("test", test)):
            folder = root / split / f"class{label}"
            folder.mkdir(parents=True, exist_ok=True)
            for i in range(n):
                colour = np.array([205 - 45 * label, 130 + 20 * label, 190 - 15 * label]) + rng.normal(0, 6, 3)
                pixels = colour + rng.normal(0, 12 + 18 * label, (size, size, 3))
                Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(folder / f"{i:03d}.png")
                slide = i % (4 if split == "train" else 6)
                rows.append(f"{split}/class{label}/{i:03d}.png,{split}-slide{slide}")
    (root / "groups.csv").write_text("\n".join(rows) + "\n")
    return root


def command(data: Path, out: Path, *more: str, ipc: str = "2", seeds: str = "2") -> list[str]:
    """Arguments of a tiny ``run table1``."""
    return ["run", "table1", "--dataset", "imagefolder", "--data-root", str(data), "--out", str(out),
            "--ipc", ipc, "--seeds", seeds, "--eval-seeds", "2", *OPTIONS, *more]  # fmt: skip


def environment(cache: Path) -> dict[str, str]:
    """For subprocesses: this checkout, this cache, one thread; no bytecode, which a limit on file sizes would cut short."""
    path = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    own = {"PYTHONPATH": path, "HISTODD_CACHE": str(cache), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    return {**os.environ, **own}


def program(*arguments: str, cache: Path, **options: object) -> "subprocess.CompletedProcess[str]":
    """Run the program as a user would."""
    return subprocess.run([sys.executable, "-m", "histodd_bench", *arguments], env=environment(cache),
                          capture_output=True, text=True, **options)  # type: ignore[call-overload]  # fmt: skip
