"""Group-disjoint splits: never a shared group, every class on both sides where that is possible, the same for the same seed."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from histodd_bench.data import split_groups
from histodd_bench.data.patchset import PatchSet
from histodd_bench.data.split import draw_groups
from histodd_bench.errors import HistoddError


def patches(labels, groups):
    labels, groups = torch.as_tensor(labels), torch.as_tensor(groups)
    names = tuple(f"g{i}" for i in range(int(groups.max()) + 1))
    return PatchSet(torch.zeros(len(labels), 3, 1, 1, dtype=torch.uint8), labels, groups, names, tuple("abcdefghi"))


@settings(max_examples=12)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9)), min_size=2, max_size=60),
    st.floats(0.1, 0.9),
    st.integers(0, 5),
)
def test_groups_are_never_shared(rows, fraction, seed):
    labels, groups = zip(*rows, strict=True)
    ps = patches(labels, groups)
    if len(set(groups)) < 2:
        with pytest.raises(HistoddError, match="at least two groups"):
            split_groups(ps, fraction, seed)
        return
    a, b = split_groups(ps, fraction, seed)
    assert sorted(torch.cat([a, b]).tolist()) == list(range(len(ps)))
    assert len(a) and len(b)
    assert not set(ps.groups[a].tolist()) & set(ps.groups[b].tolist())
    assert len(set(ps.groups[b].tolist())) == min(max(round(fraction * len(set(groups))), 1), len(set(groups)) - 1)


def test_every_class_gives_its_share():
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(100), rng.integers(5, 60, 100))
    tendency = rng.dirichlet([0.4] * 9, 100)  # most groups are mostly of one class
    labels = np.array([rng.choice(9, p=tendency[g]) for g in groups])
    drawn = draw_groups(labels, groups, 0.3, seed=1)[groups]
    for c in range(9):
        assert abs(drawn[labels == c].mean() - 0.3) < 0.15


def test_a_class_of_one_group_stays_in_the_first_part():
    labels, groups = [0, 0, 0, 0, 1, 1], [0, 1, 2, 3, 4, 4]
    for seed in range(10):
        a, _ = split_groups(patches(labels, groups), 0.4, seed)
        assert {0, 1} <= set(torch.tensor(labels)[a].tolist())


def test_rare_classes_are_on_both_sides_when_possible():
    labels, groups = np.repeat([0, 0, 0, 0, 0, 0, 1, 1], 5), np.repeat(np.arange(8), 5)
    for seed in range(10):
        drawn = draw_groups(labels, groups, 0.3, seed)
        assert drawn[6:].sum() == 1


def test_the_seed_decides():
    rng = np.random.default_rng(0)
    groups = np.arange(300) // 5
    ps = patches(rng.integers(0, 2, 300), groups)
    assert torch.equal(split_groups(ps, 0.3, 3)[1], split_groups(ps, 0.3, 3)[1])
    assert not torch.equal(split_groups(ps, 0.3, 3)[1], split_groups(ps, 0.3, 4)[1])


@pytest.mark.parametrize("fraction", [0, 1, -0.2, 1.5])
def test_a_fraction_is_between_zero_and_one(fraction):
    with pytest.raises(HistoddError, match="between 0 and 1"):
        split_groups(patches([0, 1], [0, 1]), fraction, 0)
