"""Slides small enough to run slide-level tables on in seconds: folders of 16 px PNGs, two classes, two centres, a few slides."""

from pathlib import Path

import numpy as np
from PIL import Image
from tiny_project import without

# Every part at its smallest; table5 distils at patch level too, hence histodd's own fields.
FIELDS = ["pool.epochs=1", "pool.networks=2", "eval.epochs=2", "histodd.outer_steps=2", "histodd.inner_steps=2", "histodd.real_batch=4",
          "histodd.start_patches=10",
          "mil.epochs=2", "mil.width=16", "transfer.epochs=1",
          *[f"herding.{f}" for f in ("arch=convnet-d3", "width=8", "epochs=1")]]  # fmt: skip
OPTIONS = ["--image-size", "16", "--archs", "convnet-d3:8", "--distill-arch", "convnet-d3:8", "--threads", "1",
           "--stain", "off", "--device", "cpu", *[part for field in FIELDS for part in ("--set", field)]]  # fmt: skip


def write_slides(root: Path, *, train: int = 6, test: int = 4, per_class: int = 4, seed: int = 0) -> Path:
    """``imagefolder`` data: every third slide shows class 0 only; even slides are of centre A, odd ones of centre B."""
    rng = np.random.default_rng(seed)
    rows = ["path,group,centre"]
    for split, count in (("train", train), ("test", test)):
        for slide in range(count):
            for label in (0, 1):
                folder = root / split / f"class{label}"
                folder.mkdir(parents=True, exist_ok=True)
                for i in range(0 if label == 1 and slide % 3 == 2 else per_class):
                    colour = np.array([205 - 45 * label, 130 + 20 * label, 190 - 15 * label]) + rng.normal(0, 6, 3)
                    pixels = colour + rng.normal(0, 12 + 18 * label, (16, 16, 3))
                    name = f"{split}/class{label}/s{slide}-{i:02d}.png"
                    Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(root / name)
                    rows.append(f"{name},{split}-s{slide},{'AB'[slide % 2]}")
    (root / "groups.csv").write_text("\n".join(rows) + "\n")
    return root


def arguments(command: str, data: Path, out: Path, *more: str) -> list[str]:
    """A slide-level command on such data."""
    options = without(OPTIONS, "--archs") if command == "distill-slides" else OPTIONS
    return [*command.split(), "--dataset", "imagefolder", "--data-root", str(data), "--out", str(out), *options, *more]
