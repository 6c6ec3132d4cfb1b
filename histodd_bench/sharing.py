"""Handing a set to others: a folder with nothing in it that says whose slides it came from, and taking one in."""

import json
from pathlib import Path
from typing import Any

import torch

from histodd_bench import sets
from histodd_bench.data.patchset import PatchSet
from histodd_bench.errors import HistoddError

INDEX = "slides.json"  # of a folder that 'distill-slides' wrote
# What a shared card keeps of a saved one. Measured times and the configuration go along, names of slides do not.
KEPT = ("dataset", "procedural", "method", "ipc", "seed", "key", "config", "stain", "preprocessing", "seconds", "source")


def export_set(folder: Path, out: Path) -> sets.SavedSet:
    """Write a set so that it can be given away: patches, previews, and a card of how they were made.

    Slides become ``slide-1``, ``slide-2``, ...; scanning centres, the patches that a distillation began with (they are
    real ones) and its losses stay behind.

    Args:
        folder: a saved set, or a folder ``slides/<set>`` that ``distill-slides`` wrote, whose slides become one set.
        out: folder to write; must not exist.

    Raises:
        HistoddError: no set there, a damaged one, or one that lacks slides; ``out`` exists.
    """
    if out.exists():
        raise HistoddError(f"{out} exists: choose another folder with --out")
    patches, card = _slides(folder) if (folder / INDEX).is_file() else _one(folder)
    order = {group: i for i, group in enumerate(dict.fromkeys(patches.groups.tolist()))}
    groups = torch.tensor([order[g] for g in patches.groups.tolist()], dtype=torch.int64)
    names = tuple(f"slide-{i + 1}" for i in range(len(order)))
    anonymous = PatchSet(patches.images, patches.labels, groups, names, patches.classes)
    kept = {name: card[name] for name in KEPT if name in card}
    return sets.save(anonymous, out, {**kept, "shared": {"real_patches": _real(patches)}})


def _real(patches: PatchSet) -> bool:
    return patches.images.dtype == torch.uint8


def _one(folder: Path) -> tuple[PatchSet, dict[str, Any]]:
    saved = sets.load(folder)
    return saved.patches, dict(saved.card)


def _slides(folder: Path) -> tuple[PatchSet, dict[str, Any]]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        rows, missing = index["slides"], index["missing"]
        classes = tuple(str(c) for c in index["classes"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise HistoddError(f"{folder / INDEX} cannot be read ({error}): run 'distill-slides' again") from None
    if missing:
        raise HistoddError(f"{folder} lacks {len(missing)} slides, {missing[0]} first: run 'distill-slides' to the end")
    images, labels, groups = [], [], []
    for number, row in enumerate(rows.values()):
        path = folder / Path(row["file"]).name
        try:
            tensors = load_file(path)
            images.append(tensors["images"])
            labels.append(tensors["labels"])
        except (OSError, KeyError, SafetensorError) as error:
            raise HistoddError(f"{path} is damaged ({error}): delete it and run 'distill-slides' again") from None
        groups += [number] * len(tensors["labels"])
    if not groups:
        raise HistoddError(f"{folder} holds no patches")
    patches = PatchSet(
        torch.cat(images), torch.cat(labels), torch.tensor(groups), tuple(str(n) for n in range(len(rows))), classes
    )
    source = {"patches": sum(sum(row["had"]) for row in rows.values()), "slides": len(rows)}
    seconds = {"total": sum(row["seconds"] for row in rows.values())}
    return patches, {**index, "source": source, "seconds": seconds}


def import_set(folder: Path, out: Path) -> sets.SavedSet:
    """Take in a set that someone else made: verified against its card, and written anew.

    Only tensors and the card are read; the previews are made again from the tensors. Nothing else in the folder is
    looked at, and no code is run (safetensors, JSON).

    Args:
        folder: what ``export`` wrote, elsewhere.
        out: folder to write; must not exist.

    Raises:
        HistoddError: not a set, changed on the way, not readable by this version, or patches that no set can hold.
    """
    if not folder.is_dir():
        raise HistoddError(f"{folder} is not a folder: unpack the set and give its folder, with card.json in it")
    if out.exists():
        raise HistoddError(f"{out} exists: it is imported already, or choose another folder with --out")
    saved = sets.load(folder)
    patches, card = saved.patches, dict(saved.card)
    if "images.safetensors" not in card["checksums"]:
        raise HistoddError(f"{folder}: its card has no checksum of images.safetensors: ask for the set again")
    if list(card.get("shape", ())) != list(patches.images.shape):
        raise HistoddError(f"{folder}: its card says {card.get('shape')}, the patches are {list(patches.images.shape)}")
    if not len(patches):
        raise HistoddError(f"{folder} holds no patches")
    kept = {name: card[name] for name in (*KEPT, "shared") if name in card}
    origin = {"versions": card.get("versions", {}), "checksum": card["checksums"]["images.safetensors"]}
    return sets.save(patches, out, {**kept, "imported": origin})


def describe(saved: sets.SavedSet) -> list[str]:
    """What a set is, in lines for a person."""
    card, patches = saved.card, saved.patches
    counts = ", ".join(f"{n} {name}" for name, n in zip(patches.classes, patches.class_counts(), strict=True))
    source = card.get("source", {})
    lines = [
        f"{len(patches)} patches of {patches.image_size[0]} x {patches.image_size[1]} px: {counts}",
        f"made by {card.get('method', 'an unknown method')} from {card.get('dataset', 'an unknown data set')}"
        + (f", {source['patches']:,} patches of {source['slides']:,} slides" if source else ""),
    ]
    if card.get("procedural"):
        lines.append("procedural: computer-drawn, no real tissue")
    elif _real(patches):
        lines.append("these are real patches of the slides")
    else:
        lines.append("'leakage' measures how close the patches are to those they were made from")
    return lines
