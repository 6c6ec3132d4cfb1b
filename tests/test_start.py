"""The matched start: it is the closest of the draws, class by class, and what the default distillation begins with."""

from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from small_sets import two_classes
from torch import Generator

from histodd_bench.baselines.random import stratified_draw
from histodd_bench.distill.histodd import HistoDD
from histodd_bench.distill.networks import matched_parameters
from histodd_bench.distill.start import matched_start
from histodd_bench.models import ModelPool, PoolRecipe, build
from histodd_bench.progress import Progress


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> ModelPool:
    recipe = PoolRecipe(arch="convnet-d3", width=4, networks=2, epochs=1, batch_size=16)
    return ModelPool(two_classes(), recipe, cache=tmp_path_factory.mktemp("pool"))


def test_every_class_gets_its_closest_draw(pool: ModelPool) -> None:
    train, candidates, ipc = pool.train, 6, 3
    size = train.image_size[0]
    networks = [build("convnet-d3", num_classes=2, image_size=size, width=4, generator_seed=s) for s in (5, 6)]
    chosen = matched_start(
        train, ipc, networks, Generator().manual_seed(3), preprocessing=pool.preprocessing, candidates=candidates,
        match="weights", distance="l1",
    )  # fmt: skip

    # The same draws again, scored by hand; a class has fewer than 256 patches, so all of them are its real batch.
    generator = Generator().manual_seed(3)
    draws = [stratified_draw(train, ipc, generator) for _ in range(candidates)]
    for label in range(2):

        def mean_gradient(indices: torch.Tensor, network: torch.nn.Module) -> torch.Tensor:
            x, y = pool.preprocessing(train.images[indices]), train.labels[indices]
            return torch.cat([g.flatten() for g in torch.autograd.grad(F.cross_entropy(network(x), y), matched_parameters(network, "weights"))])  # fmt: skip # noqa: E501

        scores = torch.zeros(candidates)
        for network in networks:
            wanted = mean_gradient(train.class_indices(label), network)
            own = torch.stack(
                [(wanted - mean_gradient(d[train.labels[d] == label], network)).abs().sum() for d in draws]
            )
            scores += own / own.mean()
        best = draws[int(scores.argmin())]
        mine = chosen[train.labels[chosen] == label]
        assert torch.equal(mine, best[train.labels[best] == label])
        assert scores.max() > 1.02 * scores.min()  # the draws do differ
    assert torch.equal(train.labels[chosen], torch.tensor([0, 0, 0, 1, 1, 1]))


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
