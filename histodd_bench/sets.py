"""Saved patch sets: a folder with ``images.safetensors``, PNG previews and ``card.json``; and plain folders of images."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from histodd_bench import __version__
from histodd_bench.data.patchset import PatchSet
from histodd_bench.errors import HistoddError
from histodd_bench.files import new_folder, sha256

FORMAT = 1
_TENSORS, _CARD, _HISTORY, _INITIAL = "images.safetensors", "card.json", "history.json", "initial.safetensors"


@dataclass(frozen=True)
class SavedSet:
    """A set read back: the patches, where they lie and how they were made (``card``)."""

    patches: PatchSet
    folder: Path
    card: Mapping[str, Any]

    @property
    def seconds(self) -> dict[str, float]:
        """Measured times: ``total`` of selection or distillation, over all restarts."""
        return dict(self.card["seconds"])

    @property
    def initial(self) -> Tensor | None:
        """The patches a distillation began with, ``[N,3,H,W]``, or None."""
        path = self.folder / _INITIAL
        if not path.is_file():
            return None
        from safetensors.torch import load_file

        tensors = load_file(path)
        return tensors.get("images", next(iter(tensors.values())))


def to_uint8(images: Tensor) -> Tensor:
    """``[N,3,H,W]`` float in [0, 1] rounded to uint8; uint8 as it is."""
    return images if images.dtype == torch.uint8 else (images.clamp(0, 1) * 255).round().to(torch.uint8)


def file_name(name: str) -> str:
    """A class or slide as a file name."""
    return re.sub(r"[^\w.-]+", "_", name).strip(".") or "class"


def save(patches: PatchSet, folder: Path, card: Mapping[str, Any], *, workdir: Path | None = None) -> SavedSet:
    """Write a set as a folder that appears complete or not at all.

    Args:
        patches: uint8 or float32; the tensors are kept as they are, the previews are rounded to uint8.
        folder: where; an older folder there is replaced.
        card: provenance; versions, sizes and checksums are added.
        workdir: where a distillation left its history and initial patches, to be kept beside the set.
    """
    from PIL import Image
    from safetensors.torch import save as to_bytes

    patches.validate()
    tensors = {"images": patches.images, "labels": patches.labels, "groups": patches.groups}
    if patches.centres is not None:
        tensors["centres"] = patches.centres
    # Only the groups in use: a set of 20 patches has no business listing every slide.
    used = sorted(set(patches.groups.tolist()))
    tensors["groups"] = torch.tensor([used.index(g) for g in patches.groups.tolist()], dtype=torch.int64)
    with new_folder(folder) as partial:
        (partial / _TENSORS).write_bytes(to_bytes({k: v.contiguous() for k, v in tensors.items()}))
        counts: dict[int, int] = {}
        names = [file_name(name) for name in patches.classes]
        names = names if len(set(names)) == len(names) else [f"{i}-{name}" for i, name in enumerate(names)]
        for image, label in zip(to_uint8(patches.images), patches.labels.tolist(), strict=True):
            place = partial / "patches" / names[label]
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).save(place / f"{counts.get(label, 0):04d}.png")
            counts[label] = counts.get(label, 0) + 1
        for name in (_HISTORY, _INITIAL):
            if workdir is not None and (workdir / name).is_file():
                (partial / name).write_bytes((workdir / name).read_bytes())
        full = {
            **card,
            "format": FORMAT,
            "classes": list(patches.classes),
            "group_names": [patches.group_names[g] for g in used],
            "centre_names": list(patches.centre_names),
            "shape": list(patches.images.shape),
            "dtype": str(patches.images.dtype).removeprefix("torch."),
            "versions": {"histodd-bench": __version__, "torch": torch.__version__},
            "checksums": {p.name: sha256(p) for p in sorted(partial.glob("*.safetensors"))},
        }
        (partial / _CARD).write_text(
            json.dumps(full, indent=1, sort_keys=True, allow_nan=False) + "\n", encoding="utf-8"
        )
    return SavedSet(patches, folder, full)


def load(folder: Path) -> SavedSet:
    """Read a saved set and verify it against its card.

    Raises:
        HistoddError: no set there, written by another version, or changed since.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = folder / _CARD
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
        version = card["format"]
    except FileNotFoundError:
        raise HistoddError(f"{folder} is not a saved set: {_CARD} is missing") from None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise HistoddError(f"{path} cannot be read ({error}): make the set again") from None
    if version != FORMAT:
        raise HistoddError(
            f"{folder} was written by another version (format {version}, this one reads {FORMAT}): make the set again"
        )
    try:
        for name, checksum in card["checksums"].items():
            if sha256(folder / Path(name).name) != checksum:
                raise HistoddError(f"{folder / name} has changed since it was written: make the set again")
        tensors = load_file(folder / _TENSORS)
        patches = PatchSet(
            tensors["images"],
            tensors["labels"],
            tensors["groups"],
            tuple(card["group_names"]),
            tuple(card["classes"]),
            tensors.get("centres"),
            tuple(card["centre_names"]),
        )
    except (OSError, KeyError, SafetensorError) as error:
        raise HistoddError(f"{folder} is damaged ({error}): make the set again") from None
    patches.validate()
    return SavedSet(patches, folder, card)


def load_any(folder: Path, classes: tuple[str, ...], image_size: int) -> PatchSet:
    """A saved set or a folder of images ``<class>/*``, with labels in the order of ``classes``.

    Args:
        folder: of a saved set (with ``card.json``) or with one sub-folder of images per class.
        classes: of the test data the set will be scored on.
        image_size: plain images are resized to it; a saved set must have it.

    Raises:
        HistoddError: nothing there, classes that the test data do not have, or a class without patches.
    """
    if not folder.is_dir():
        raise HistoddError(f"{folder} is not a folder: give a saved set or a folder of images <class>/*")
    if (folder / _CARD).exists():
        patches = load(folder).patches
        if patches.image_size != (image_size, image_size):
            raise HistoddError(
                f"{folder} holds {patches.image_size[0]} px patches: add --image-size {patches.image_size[0]}"
            )
    else:
        patches = _load_images(folder, image_size)
    wrong = sorted(set(patches.classes) - set(classes))
    if wrong:
        raise HistoddError(
            f"{folder} has class {wrong[0]!r}, which the test data lack: theirs are {', '.join(classes)}"
        )
    order = torch.tensor([classes.index(c) for c in patches.classes])
    patches = PatchSet(
        patches.images,
        order[patches.labels],
        patches.groups,
        patches.group_names,
        classes,
        patches.centres,
        patches.centre_names,
    )
    patches.require(1)
    return patches


def _load_images(folder: Path, image_size: int) -> PatchSet:
    from histodd_bench.data.images import UnreadableImage, read_rgb, resize, square

    images, labels, names = [], [], []
    classes = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    for label, name in enumerate(classes):
        for path in sorted(p for p in (folder / name).rglob("*") if p.is_file() and not p.name.startswith(".")):
            try:
                pixels = resize(square(read_rgb(path), "crop"), image_size, image_size)
            except UnreadableImage as error:
                raise HistoddError(f"{error}: remove it from the set") from None
            images.append(torch.from_numpy(pixels.copy()).permute(2, 0, 1))
            labels.append(label)
            names.append(str(path.relative_to(folder)))
    if not images:
        raise HistoddError(f"{folder} holds no images: expected <class>/<image files> or a saved set")
    kept = torch.tensor(labels, dtype=torch.int64)
    return PatchSet(torch.stack(images), kept, torch.arange(len(labels)), tuple(names), tuple(classes))
