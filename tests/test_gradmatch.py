"""Patches whose gradients together are those of their class, and what the default distillation begins with."""

import itertools
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from small_sets import two_classes
from torch import Generator

from histodd_bench.baselines import gradmatch
from histodd_bench.baselines.gradmatch import GradMatch, closest_subset, gradient_matched
from histodd_bench.baselines.random import stratified_draw
from histodd_bench.distill.histodd import HistoDD
from histodd_bench.distill.networks import augment_model, draw_seed, matched_parameters
from histodd_bench.errors import UsageError
from histodd_bench.models import ModelPool, PoolRecipe, build
from histodd_bench.models.registry import MODELS
from histodd_bench.progress import Progress


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> ModelPool:
    recipe = PoolRecipe(arch="convnet-d3", width=4, networks=2, epochs=1, batch_size=16)
    return ModelPool(two_classes(), recipe, cache=tmp_path_factory.mktemp("pool"))


def distance(products: torch.Tensor, subset: torch.Tensor) -> float:
    """Squared distance between the mean of a subset and the mean of all, from inner products."""
    inside, across = products[subset][:, subset].mean(), products[subset].mean()
    return float(inside - 2 * across + products.mean())


def test_the_closest_subset_cannot_be_improved_by_an_exchange() -> None:
    for seed in range(20):
        vectors = torch.randn(12, 5, dtype=torch.float64, generator=Generator().manual_seed(seed)) + 1
        products = vectors @ vectors.T
        every = {c: distance(products, torch.tensor(c)) for c in itertools.combinations(range(12), 4)}
        found = tuple(closest_subset(products, 4).tolist())
        neighbours = [d for c, d in every.items() if len(set(c) & set(found)) == 3]
        assert len(set(found)) == 4 and every[found] <= min(neighbours) + 1e-9
        assert sorted(every.values()).index(every[found]) < 25  # of 495
        assert closest_subset(products, 12).tolist() == list(range(12))
        alone = (vectors - vectors.mean(0)).square().sum(1).argmin()
        assert closest_subset(products, 1).tolist() == [int(alone)]


def test_equal_patches_are_chosen_once_each() -> None:
    products = torch.ones(6, 6, dtype=torch.float64)  # every subset is as good as any other
    assert len(set(closest_subset(products, 4).tolist())) == 4
    assert closest_subset(torch.zeros(3, 3, dtype=torch.float64), 2).tolist() == [0, 1]


@pytest.mark.parametrize("match", ["weights", "all"])
@pytest.mark.parametrize("arch", list(MODELS))
def test_gradients_of_patches_that_share_a_batch_are_their_own(
    arch: str, match: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = Generator().manual_seed(0)
    width = {"densenet121": 2, "vit": 12}.get(arch, 4)
    network = build(arch, num_classes=3, image_size=17, width=width, generator_seed=0).double().eval()
    for buffer in network.buffers():  # batch norm of other statistics than 0 and 1
        if buffer.is_floating_point():
            buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator, dtype=torch.float64))
    x = torch.randn(5, 3, 17, 17, generator=generator, dtype=torch.float64)
    parameters = matched_parameters(network, match)
    own = []
    for patch in x:
        loss = F.cross_entropy(network(patch[None]), torch.tensor([2]))
        own.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]))
    for at_once in (1 << 26, 2 * len(own[0])):  # all five together, and two by two
        monkeypatch.setattr(gradmatch, "AT_ONCE", at_once)
        found = gradmatch._gradients(network, parameters, x, 2, None)
        torch.testing.assert_close(found, torch.stack(own), rtol=1e-7, atol=1e-11)
    kept = torch.tensor([3, 0])
    assert torch.equal(gradmatch._gradients(network, parameters, x, 2, kept), found[:, kept])
    assert not found.requires_grad


def mean_gradients(pool: ModelPool, networks: list[torch.nn.Module], indices: torch.Tensor) -> list[torch.Tensor]:
    """Of every network, over patches of one class."""
    x, y = pool.preprocessing(pool.train.images[indices]), pool.train.labels[indices]
    found = []
    for network in networks:
        gradients = torch.autograd.grad(F.cross_entropy(network(x), y), matched_parameters(network, "weights"))
        found.append(torch.cat([g.flatten() for g in gradients]))
    return found


@pytest.mark.parametrize("coordinates", [65536, 64])
def test_every_class_gets_patches_whose_gradients_are_close(
    pool: ModelPool, coordinates: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gradmatch, "COORDINATES", coordinates)
    monkeypatch.setattr(gradmatch, "VERSION", f"test {coordinates}")  # the pool keeps the products
    train, ipc = pool.train, 3
    chosen = gradient_matched(train, ipc, pool, 3, candidates=1000, alpha=0.1, match="weights")
    assert torch.equal(train.labels[chosen], torch.tensor([0, 0, 0, 1, 1, 1])) and len(chosen.unique()) == 6

    generator = Generator().manual_seed(3)
    stratified_draw(train, [len(train.class_indices(label)) for label in range(2)], generator)
    networks = [augment_model(pool.load(i), 0.1, generator) for i in range(2)]
    networks += [pool.new(draw_seed(generator)) for _ in range(2)]
    for label in range(2):
        members = train.class_indices(label)  # fewer than 1000: all are candidates
        wanted = mean_gradients(pool, networks, members)
        alone = [mean_gradients(pool, networks, i[None]) for i in members]
        scales = [torch.stack([own[n].square().sum() for own in alone]).mean() for n in range(len(networks))]
        generator = Generator().manual_seed(7)
        draws = [members[torch.randperm(len(members), generator=generator)[:ipc]] for _ in range(100)]
        far = []
        for subset in (chosen[train.labels[chosen] == label], *draws):
            found = mean_gradients(pool, networks, subset)
            far.append(sum(float((a - b).square().sum() / s) for a, b, s in zip(wanted, found, scales, strict=True)))
        assert sorted(far).index(far[0]) < (1 if coordinates == 65536 else 10)


def test_budgets_of_one_seed_share_what_was_computed_and_every_set_counts_it(tmp_path: Path) -> None:
    recipe = PoolRecipe(arch="convnet-d3", width=4, networks=2, epochs=1, batch_size=16)

    def choose(ipc: int, seed: int, cache: str) -> tuple[torch.Tensor, ModelPool]:
        pool = ModelPool(two_classes(), recipe, cache=tmp_path / cache)
        return gradient_matched(pool.train, ipc, pool, seed, candidates=9, alpha=0.1, match="weights"), pool

    three, first = choose(3, 0, "a")
    (kept,) = (tmp_path / "a").rglob("gradients-*.pt")
    stamp = kept.stat().st_mtime_ns
    five, second = choose(5, 0, "a")
    assert kept.stat().st_mtime_ns == stamp and len(list((tmp_path / "a").rglob("gradients-*.pt"))) == 1
    assert torch.equal(five, choose(5, 0, "b")[0]), "the same as alone"
    assert len(three) == 6 and len(five.unique()) == 10
    training = ModelPool(two_classes(), recipe, cache=tmp_path / "a")
    training.prepare()
    assert first.spent.total == second.spent.total > training.spent.total, "shared work counts for every set"
    assert first.spent.here > first.spent.total > second.spent.here
    choose(5, 1, "a")
    assert len(list((tmp_path / "a").rglob("gradients-*.pt"))) == 2


def test_the_coreset_is_where_distillation_starts(pool: ModelPool, tmp_path: Path) -> None:
    coreset = GradMatch(candidates=12)(pool.train, 3, pool, 0, workdir=tmp_path, progress=Progress.silent())
    assert coreset.images.dtype == torch.uint8 and coreset.class_counts() == [3, 3]
    started = _initial(HistoDD(outer_steps=0, start_patches=12), pool, tmp_path / "a")
    assert torch.equal(started, coreset.float_batch(slice(None)))
    with pytest.raises(UsageError, match="candidates must be at least 1"):
        GradMatch(candidates=0)


def _initial(method: HistoDD, pool: ModelPool, folder: Path, seed: int = 0) -> torch.Tensor:
    method(pool.train, 3, pool, seed, workdir=folder, progress=Progress.silent())
    return safetensors.torch.load_file(folder / "initial.safetensors")["images"]


def test_the_start_follows_the_field_and_the_seed(pool: ModelPool, tmp_path: Path) -> None:
    matched = HistoDD(outer_steps=0, start_patches=12)
    real = HistoDD(outer_steps=0, initial="real")
    first = _initial(matched, pool, tmp_path / "a")
    assert torch.equal(first, _initial(matched, pool, tmp_path / "b"))
    assert not torch.equal(first, _initial(matched, pool, tmp_path / "c", seed=1))
    expected = pool.train.float_batch(stratified_draw(pool.train, 3, Generator().manual_seed(0)))
    assert torch.equal(_initial(real, pool, tmp_path / "d"), expected)
    assert not torch.equal(first, expected)


def test_random_networks_never_train_the_pool(tmp_path: Path) -> None:
    recipe = PoolRecipe(arch="convnet-d3", width=4, networks=2, epochs=1, batch_size=16)
    pool = ModelPool(two_classes(), recipe, cache=tmp_path / "pool")
    method = HistoDD(outer_steps=1, inner_steps=1, real_batch=8, networks="random", initial="real")
    method(pool.train, 2, pool, 0, workdir=tmp_path / "work", progress=Progress.silent())
    assert not list((tmp_path / "pool").rglob("network-*.pt")) and pool.spent.total == 0


def test_networks_are_new_ones_or_those_of_the_pool(pool: ModelPool, tmp_path: Path) -> None:
    from histodd_bench.distill import histodd

    def weights(networks: str) -> list[torch.Tensor]:
        method = HistoDD(networks=networks, initial="real", alpha=0.0)  # type: ignore[arg-type]
        run = histodd._Run(method, pool.train, 2, pool, 0, torch.device("cpu"), tmp_path / networks)
        return [run.draw_network().classifier.weight.detach() for _ in range(8)]  # type: ignore[union-attr]

    of_the_pool = [pool.load(i).classifier.weight for i in range(2)]  # type: ignore[union-attr]
    assert all(any(torch.equal(w, p) for p in of_the_pool) for w in weights("pool"))
    new = weights("random")
    assert not any(torch.equal(a, b) for i, a in enumerate(new) for b in [*new[:i], *of_the_pool])
