"""Coresets: budgets, stratification over slides, herding against brute force, forgetting's order, and their networks."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Generator, Tensor

from histodd_bench.baselines.forgetting import Forgetting, most_forgettable
from histodd_bench.baselines.full import Full
from histodd_bench.baselines.herding import Herding, herd
from histodd_bench.baselines.random import Random, stratified_draw
from histodd_bench.data.patchset import PatchSet
from histodd_bench.errors import HistoddError
from histodd_bench.methods import METHODS
from histodd_bench.models import ModelPool, PoolRecipe
from histodd_bench.models.pool import ForgettingCounts
from histodd_bench.progress import Progress
from histodd_bench.training import predict

SMALL = {"arch": "convnet-d3", "width": 6, "epochs": 3}


def labelled(labels: list[int], groups: list[int], classes: int, images: Tensor | None = None) -> PatchSet:
    n = len(labels)
    if images is None:
        images = torch.zeros(n, 3, 1, 1, dtype=torch.uint8)
    names = tuple(f"slide{i}" for i in range(max(groups, default=0) + 1))
    return PatchSet(
        images, torch.tensor(labels), torch.tensor(groups), names, tuple(f"class{i}" for i in range(classes))
    )


@pytest.fixture
def train() -> PatchSet:
    generator = np.random.default_rng(0)
    images = generator.integers(60, 256, (90, 3, 16, 16), dtype=np.uint8)
    labels = np.repeat([0, 1, 2], [40, 30, 20])
    images[labels == 1, :, :, :8] -= 40
    images[labels == 2, :, 8:] -= 40
    images[:, 0, 0, 0] = np.arange(90)  # tells patches apart
    return labelled(labels.tolist(), generator.integers(0, 7, 90).tolist(), 3, torch.from_numpy(images))


@pytest.fixture
def pool(train, tmp_path) -> ModelPool:
    return ModelPool(train, PoolRecipe(arch="resnetap10", width=4, epochs=1, batch_size=16), cache=tmp_path / "pools")


def select(method, train: PatchSet, ipc: int, pool: ModelPool, seed: int) -> PatchSet:
    return method(train, ipc, pool, seed, device="cpu", workdir=Path("unused"), progress=Progress.silent())


def identities(patches: PatchSet) -> list[int]:
    return patches.images[:, 0, 0, 0].tolist()


# ---- what all of them promise -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [Random(), Herding(**SMALL), Forgetting(**SMALL)], ids=lambda m: type(m).__name__)
def test_budget_is_exact_and_seeds_decide(method, train, pool):
    chosen = select(method, train, 5, pool, 0)
    assert chosen.labels.tolist() == [0] * 5 + [1] * 5 + [2] * 5
    assert chosen.images.dtype == torch.uint8 and chosen.classes == train.classes
    members = identities(chosen)
    assert len(set(members)) == 15, "a patch was chosen twice"
    assert torch.equal(train.groups[members], chosen.groups) and torch.equal(train.images[members], chosen.images)
    assert members == identities(select(method, train, 5, pool, 0))
    assert members != identities(select(method, train, 5, pool, 1))
    with pytest.raises(HistoddError, match="'class2' has 20 patches, fewer than the 21 per class"):
        select(method, train, 21, pool, 0)


@pytest.mark.parametrize("name", ["random", "herding", "forgetting", "full"])
def test_registered_under_its_name(name):
    method = METHODS[name].cls()
    assert type(method).__name__.lower() == name
    if name in ("herding", "forgetting"):
        assert (method.arch, method.width) == ("resnet18", None)


def test_full_is_the_training_set_itself(train, pool):
    assert select(Full(), train, 10**9, pool, 0) is train
    empty = labelled([0, 0], [0, 0], 2)
    with pytest.raises(HistoddError, match="'class1' has 0 patches"):
        select(Full(), empty, 1, pool, 0)


# ---- Random -------------------------------------------------------------------------------------------------------------


@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 6)), min_size=1, max_size=120), st.integers(0, 5), st.data()
)
def test_slides_are_used_as_evenly_as_they_can_be(rows, seed, data):
    rows = rows + [(c, 0) for c in range(3)]  # no class is empty
    train = labelled([c for c, _ in rows], [g for _, g in rows], 3)
    ipc = data.draw(st.integers(1, min(train.class_counts())))
    chosen = stratified_draw(train, ipc, Generator().manual_seed(seed))
    assert chosen.unique().numel() == 3 * ipc
    for label in range(3):
        part = chosen[label * ipc : (label + 1) * ipc]
        assert (train.labels[part] == label).all()
        available = torch.bincount(train.groups[train.labels == label], minlength=7)
        used = torch.bincount(train.groups[part], minlength=7)
        most = used.max()
        assert ((used >= most - 1) | (used == available)).all(), (used, available)


def test_every_slide_and_every_patch_of_a_slide_is_equally_likely():
    groups = [0] * 6 + [1] * 3 + [2] + [3] * 2
    train = labelled([0] * 12 + [1] * 2, groups + [0, 1], 2)
    hits = torch.zeros(12)
    for seed in range(3000):
        chosen = stratified_draw(train, 2, Generator().manual_seed(seed))[:2]
        assert train.groups[chosen].unique().numel() == 2
        hits[chosen] += 1
    expected = 3000 * 2 / 4 / torch.bincount(torch.tensor(groups)).float()[groups]
    assert ((hits - expected).abs() < 4.5 * expected.sqrt()).all(), (hits, expected)


# ---- Herding ------------------------------------------------------------------------------------------------------------


def brute_force(features: np.ndarray, k: int) -> list[int]:
    chosen: list[int] = []
    for _ in range(k):
        rest = [i for i in range(len(features)) if i not in chosen]
        gaps = [np.linalg.norm(features.mean(0) - features[[*chosen, i]].mean(0)) for i in rest]
        chosen.append(rest[int(np.argmin(gaps))])
    return chosen


@given(st.integers(1, 40), st.integers(1, 6), st.integers(0, 1000), st.data())
def test_herding_is_the_brute_force_greedy_choice(n, dimensions, seed, data):
    features = np.random.default_rng(seed).gamma(1.0, size=(n, dimensions)) * 3 + 5
    k = data.draw(st.integers(1, n))
    expected = brute_force(features, min(k, n - 1))  # the last step has nothing to choose from
    found = herd(torch.from_numpy(features.copy()), k)
    if dimensions > 1:  # in one dimension two choices are often equally good but for rounding
        assert found[: len(expected)].tolist() == expected
    assert found.unique().numel() == k


def test_running_mean_converges_to_the_class_mean_faster_than_chance():
    generator = Generator().manual_seed(0)
    features = torch.rand(2000, 16, generator=generator) ** 3
    mean = features.double().mean(0)
    chosen = features[herd(features.clone(), 100)].double()
    gap = (chosen.mean(0) - mean).norm()
    chance = [
        (features[torch.randperm(2000, generator=generator)[:100]].double().mean(0) - mean).norm() for _ in range(20)
    ]
    assert gap < 0.1 * np.median(chance)  # Welling 2009: 1/k against 1/sqrt(k)


def test_duplicates_are_not_chosen_twice_and_ties_take_the_lowest_index():
    features = torch.tensor([[4.0, 0.0], [1.0, 1.0], [1.0, 1.0], [-2.0, 2.0]])  # mean (1, 1)
    assert herd(features, 2).tolist() == [1, 2]


def test_features_far_from_zero_lose_no_precision():
    features = torch.randn(500, 8, generator=Generator().manual_seed(1))
    assert herd(features.clone(), 20).tolist() == herd(features + 1024, 20).tolist()


def test_herding_uses_the_features_of_its_own_network(train, pool):
    chosen = identities(select(Herding(**SMALL), train, 4, pool, 1))
    own = pool.with_recipe(**SMALL, networks=2)
    features = predict(own.load(1), train, own.preprocessing, features=True)
    expected = []
    for label in range(3):
        members = train.class_indices(label)
        expected += members[herd(features[members].clone(), 4)].tolist()
    assert chosen == expected


# ---- Forgetting ---------------------------------------------------------------------------------------------------------


def test_order_never_learned_first_then_by_events():
    counts = ForgettingCounts(
        torch.tensor([0, 3, 1, 0, 2], dtype=torch.int32),
        torch.tensor([True, True, True, False, True]),
        torch.zeros(5, dtype=torch.bool),
    )
    assert most_forgettable(counts, Generator().manual_seed(0)).tolist() == [3, 1, 4, 2, 0]
    assert counts.forgotten.tolist() == [0, 3, 1, 0, 2], "the counts were changed"


def test_ties_are_broken_by_the_seed_and_without_favour():
    counts = ForgettingCounts.zeros(4)
    counts.learned[:] = True
    firsts = [int(most_forgettable(counts, Generator().manual_seed(s))[0]) for s in range(400)]
    assert min(np.bincount(firsts, minlength=4)) > 60  # 100 expected
    again = [most_forgettable(counts, Generator().manual_seed(3)).tolist() for _ in range(2)]
    assert again[0] == again[1]


def test_forgetting_takes_the_most_forgotten_of_each_class(train, pool):
    chosen = identities(select(Forgetting(**SMALL), train, 6, pool, 0))
    counts = pool.with_recipe(**SMALL).forgetting(0)
    events = counts.forgotten.masked_fill(~counts.learned, 10**6)
    assert events.max() > 0
    for label in range(3):
        members = set(train.class_indices(label).tolist())
        picked = [i for i in chosen if i in members]
        left = sorted(members - set(picked))
        assert events[picked].min() >= events[left].max()
        assert events[picked].tolist() == sorted(events[picked].tolist(), reverse=True)


def test_every_patch_is_presented_once_an_epoch_even_for_a_balanced_pool(train, pool):
    balanced = pool.with_recipe(balanced=True)
    one, two = (select(Forgetting(**SMALL), train, 6, p, 0) for p in (balanced, pool))
    assert identities(one) == identities(two)


def test_both_methods_share_one_training_and_all_budgets_do(train, pool):
    select(Herding(**SMALL), train, 2, pool, 0)
    spent = pool.spent.here
    assert spent > 0
    for ipc in (2, 5):
        select(Herding(**SMALL), train, ipc, pool, 0)
        select(Forgetting(**SMALL), train, ipc, pool, 0)
    assert pool.spent.here == spent
