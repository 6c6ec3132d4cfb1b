"""Small slides for tests: real pyramidal TIFFs with glass, tissue and tumour, and the files that come with them."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from histodd_bench.data.pyramid import write_pyramid

Box = tuple[int, int, int, int]  # left, top, right, bottom in level-0 pixels

TISSUE, TUMOUR = (205, 130, 180), (130, 80, 160)


def draw(width: int, height: int, seed: int, tissue: Box | None = None, tumour: Box | None = None) -> np.ndarray:
    """Nearly white glass, textured eosin-pink tissue, darker haematoxylin-purple tumour; ``[H,W,3]`` uint8."""
    rng = np.random.default_rng(seed)
    pixels = np.full((height, width, 3), 243.0)
    for box, colour in ((tissue, TISSUE), (tumour, TUMOUR)):
        if box is not None:
            left, top, right, bottom = box
            coarse = rng.normal(0, 22, ((bottom - top) // 8 + 2, (right - left) // 8 + 2)).astype(np.float32)
            texture = np.asarray(Image.fromarray(coarse).resize((right - left, bottom - top), Image.Resampling.BICUBIC))
            shift = rng.normal(0, 4, 3)
            pixels[top:bottom, left:right] = np.array(colour) + shift + texture[..., None] * (1.0, 0.8, 0.6)
    return np.clip(pixels + rng.normal(0, 1.5, pixels.shape), 0, 255).astype(np.uint8)


def slide(
    path: Path, *, size: tuple[int, int] = (1024, 768), seed: int = 0, tissue: Box | None = None, tumour: Box | None = None,
    mpp: float = 1.0, levels: int = 2,
) -> Path:  # fmt: skip
    """Write a slide; all of it is tissue unless ``tissue`` says otherwise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_pyramid(path, draw(*size, seed, tissue or (0, 0, *size), tumour), mpp, levels=levels)
    return path


def corners(box: Box) -> list[tuple[int, int]]:
    left, top, right, bottom = box
    return [(left, top), (right, top), (right, bottom), (left, bottom)]


def asap(path: Path, *areas: tuple[str, list[tuple[int, int]]]) -> Path:
    """An ASAP file of (group, points) areas."""
    body = "".join(
        f'<Annotation Name="Annotation {n}" Type="Polygon" PartOfGroup="{group}" Color="#F4FA58"><Coordinates>'
        + "".join(f'<Coordinate Order="{i}" X="{x}" Y="{y}" />' for i, (x, y) in enumerate(points))
        + "</Coordinates></Annotation>"
        for n, (group, points) in enumerate(areas)
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'<?xml version="1.0"?><ASAP_Annotations><Annotations>{body}</Annotations></ASAP_Annotations>')
    return path


def qupath(path: Path, *areas: tuple[str, list[list[tuple[int, int]]]], **properties: object) -> Path:
    """A GeoJSON file as QuPath exports it, of (class, rings) polygons; rings are closed here."""
    features = [
        {
            "type": "Feature",
            "id": f"{n:08d}",
            "geometry": {"type": "Polygon", "coordinates": [[*map(list, r), list(r[0])] for r in rings]},
            "properties": {
                "objectType": "annotation",
                "classification": {"name": name, "color": [200, 0, 0]},
                **properties,
            },
        }
        for n, (name, rings) in enumerate(areas)
    ]
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    return path


def project(
    root: Path, *, train: int = 4, test: int = 2, header: str = "slide,label,split,patient,centre", seed: int = 0
) -> Path:
    """A folder for the dataset ``slides``: two labels in turn, 12 patches of 256 px at 10x each."""
    rows = [header]
    for index in range(train + test):
        split, label = ("train" if index < train else "test"), ("benign", "malignant")[index % 2]
        slide(root / f"s{index}.tif", seed=seed + index, tumour=(0, 0, 1024, 768) if index % 2 else None)
        rows.append(f"s{index}.tif,{label},{split},p{index},{'AB'[index // 2 % 2]}")
    (root / "slides.csv").write_text("\n".join(rows) + "\n")
    return root
