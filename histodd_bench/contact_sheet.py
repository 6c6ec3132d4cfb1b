"""Contact sheets: every patch of a set in one PNG, and for distilled sets what each was before."""

import io
from pathlib import Path

from torch import Tensor

from histodd_bench.data.patchset import PatchSet
from histodd_bench.files import write_bytes

COLUMNS = 10  # patches side by side
PER_CLASS = 50  # patches shown of each class
_GAP, _TEXT = 2, 14


def contact_sheet(patches: PatchSet, path: Path, *, before: Tensor | None = None, tile: int = 64) -> None:
    """Write a PNG with the patches of each class below the class's name.

    Args:
        patches: uint8 or float32.
        path: where to write it, atomically.
        before: ``[N,3,H,W]`` patches the distillation began with, shown above what became of them.
        tile: small patches are enlarged by a whole factor up to this many pixels.
    """
    from PIL import Image, ImageDraw

    from histodd_bench.sets import to_uint8

    size = patches.image_size[0]
    factor = max(1, tile // size)
    step = size * factor + _GAP

    def picture(image: Tensor) -> Image.Image:
        pixels = to_uint8(image[None])[0].permute(1, 2, 0).contiguous().numpy()
        return Image.fromarray(pixels).resize((size * factor, size * factor), Image.Resampling.NEAREST)

    strips: list[tuple[str, list[Tensor]]] = []
    for label, name in enumerate(patches.classes):
        chosen = patches.class_indices(label)[:PER_CLASS]
        for start in range(0, len(chosen), COLUMNS):
            row = chosen[start : start + COLUMNS]
            first = start == 0
            if before is not None and before.shape == patches.images.shape:
                strips.append((f"{name}, before" if first else "before", list(before[row])))
                strips.append((f"{name}, after" if first else "after", list(patches.images[row])))
            else:
                strips.append((name if first else "", list(patches.images[row])))
    width = max((len(s) for _, s in strips), default=1) * step + _GAP
    height = sum(step + (_TEXT if text else 0) for text, _ in strips) + _GAP
    sheet = Image.new("RGB", (max(width, 160), height), "white")
    draw, y = ImageDraw.Draw(sheet), _GAP
    for text, images in strips:
        if text:
            draw.text((_GAP, y), text, fill="black")
            y += _TEXT
        for i, image in enumerate(images):
            sheet.paste(picture(image), (_GAP + i * step, y))
        y += step
    buffer = io.BytesIO()
    sheet.save(buffer, format="PNG")
    write_bytes(path, buffer.getvalue())
