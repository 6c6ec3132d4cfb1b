"""Splits that never put one slide or patient on both sides."""

import numpy as np
import torch
from torch import Tensor

from histodd_bench.data.patchset import PatchSet
from histodd_bench.errors import HistoddError

_DRAWS = 1000  # random draws of groups of which the best-balanced one is kept
_GOOD_ENOUGH = 0.01  # a draw whose class fractions are all this close to the fraction asked for ends the search


def draw_groups(labels: np.ndarray, groups: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Choose about ``fraction`` of the groups so that every class gives about that fraction of its patches.

    The best of 1,000 random draws: a class missing from the remainder counts most, one missing from the draw next,
    then the largest distance between a class's fraction and the one asked for.

    Args:
        labels: ``[N]`` integers >= 0.
        groups: ``[N]`` integers 0..G-1.
        fraction: between 0 and 1, both excluded; at least one group lands on either side.
        seed: of the draw.

    Returns:
        ``[G]`` bool, True for the groups drawn.

    Raises:
        HistoddError: fewer than two groups.
    """
    if not 0 < fraction < 1:
        raise HistoddError(f"the fraction of a split must lie between 0 and 1, got {fraction}")
    present = np.unique(groups)
    if len(present) < 2:
        raise HistoddError(f"a split needs at least two groups (slides or patients), got {len(present)}")
    num_groups = int(groups.max()) + 1
    used, columns = np.unique(labels, return_inverse=True)
    counts = np.zeros((num_groups, len(used)))
    np.add.at(counts, (groups, columns), 1)
    counts /= counts.sum(0)
    take = min(max(round(fraction * len(present)), 1), len(present) - 1)
    rng = np.random.default_rng(seed)
    best, best_cost = present[:take], np.inf
    for _ in range(_DRAWS):
        drawn = rng.permutation(present)[:take]
        share = counts[drawn].sum(0)
        cost = np.abs(share - fraction).max() + 100.0 * (share > 1 - 1e-9).sum() + 10.0 * (share < 1e-9).sum()
        if cost < best_cost:
            best, best_cost = drawn, cost
        if best_cost < _GOOD_ENOUGH:
            break
    chosen = np.zeros(num_groups, dtype=bool)
    chosen[best] = True
    return chosen


def split_groups(ps: PatchSet, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Split a set in two without sharing a group, stratified by class as far as the groups allow.

    Args:
        ps: the set to split.
        fraction: of the groups (and, as nearly as possible, of every class's patches) in the second part.
        seed: of the draw; the same seed gives the same split.

    Returns:
        Indices of the first part (``1 - fraction``) and of the second part, ascending, int64.

    Raises:
        HistoddError: fewer than two groups, or a fraction outside (0, 1).
    """
    chosen = draw_groups(ps.labels.numpy(), ps.groups.numpy(), fraction, seed)
    second = torch.from_numpy(chosen)[ps.groups]
    return (~second).nonzero().flatten(), second.nonzero().flatten()
