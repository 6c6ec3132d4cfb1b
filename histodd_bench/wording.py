"""Sentences that are said in several places."""

from collections.abc import Sequence


def counted(n: int, noun: str) -> str:
    """``1 thread``, ``2 threads``."""
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def absent_classes(split: str, classes: Sequence[str], counts: Sequence[int], of: str = "patch") -> list[str]:
    """A warning where a split, ``train`` or ``test``, has patches (or what ``of`` names), but none of a class; else empty."""
    absent = [name for name, count in zip(classes, counts, strict=True) if not count]
    if not absent or len(absent) == len(classes):
        return []
    side = f"the {'training' if split == 'train' else 'test'} set has no {of} of class {', '.join(absent)}"
    if split == "train":
        return [f"WARNING: {side}: no set can be made of it"]
    if len(classes) - len(absent) == 1:
        return [f"WARNING: {side}: balanced accuracy covers only the class that is there, and AUC is left out"]
    return [f"WARNING: {side}: balanced accuracy and AUC cover only the classes that are there"]
