"""Parts of one data set as data sets of their own, for studies in which data arrive one after the other."""

import re
from dataclasses import replace

import torch

from histodd_bench.data.patchset import PatchSet
from histodd_bench.data.store import Dataset
from histodd_bench.errors import HistoddError


def split_name(name: str) -> tuple[str, tuple[int, int] | None]:
    """``idc`` -> (idc, None); ``idc@1of2`` -> (idc, (1, 2))."""
    found = re.fullmatch(r"(.+)@(\d+)of(\d+)", name)
    return (found[1], (int(found[2]), int(found[3]))) if found else (name, None)


def part_of(dataset: Dataset, part: tuple[int, int]) -> Dataset:
    """Part ``k`` of ``n``: one scanning centre each where there are exactly ``n``, else every ``n``-th slide or patient.

    The patches of a part are copied into memory.

    Raises:
        HistoddError: the part lacks a class on one side.
    """
    k, n = part
    sides, told = {}, f"every {n}. slide or patient, from the {k}."
    for name, patches in (("train", dataset.train), ("test", dataset.test)):
        by_centre = patches.centres is not None and len(patches.centre_names) == n
        chosen = patches.centres == k - 1 if by_centre else patches.groups % n == k - 1  # type: ignore[operator]
        assert isinstance(chosen, torch.Tensor)
        sides[name] = _only_used(patches.subset(chosen.nonzero().flatten()))
        if by_centre:
            told = patches.centre_names[k - 1]
        if 0 in sides[name].class_counts():
            raise HistoddError(f"part {k} of {n} of {dataset.name} lacks a class among its {name} patches")
    note = f"part {k} of {n}: {told}"
    return Dataset(
        f"{dataset.name}@{k}of{n}", sides["train"], sides["test"], dataset.procedural, (*dataset.notes, note)
    )


def _only_used(patches: PatchSet) -> PatchSet:
    """The same without the names of slides that are not in it."""
    used, groups = patches.groups.unique(return_inverse=True)
    return replace(patches, groups=groups, group_names=tuple(patches.group_names[g] for g in used.tolist()))
