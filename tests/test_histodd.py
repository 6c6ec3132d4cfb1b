"""The distiller: model augmentation, matching gradients, step rules, resuming, determinism."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from small_sets import two_classes
from torch import nn

from histodd_bench.augment import Draw
from histodd_bench.distill import histodd
from histodd_bench.distill.histodd import HistoDD, augment_model, matched_parameters
from histodd_bench.errors import HistoddError, UsageError
from histodd_bench.models import ModelPool, PoolRecipe, build
from histodd_bench.ops import gradient_distance
from histodd_bench.progress import Progress

TINY = HistoDD(outer_steps=3, inner_steps=2, real_batch=8, start_patches=12)


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> ModelPool:
    recipe = PoolRecipe(arch="convnet-d3", width=4, networks=2, epochs=1, batch_size=16)
    return ModelPool(two_classes(), recipe, cache=tmp_path_factory.mktemp("pool"))


def distil(method: HistoDD, pool: ModelPool, workdir: Path, seed: int = 0, ipc: int = 3) -> torch.Tensor:
    return method(pool.train, ipc, pool, seed, workdir=workdir, progress=Progress.silent()).images


def test_result_is_a_balanced_float_set_that_moved_away_from_its_start(pool: ModelPool, tmp_path: Path) -> None:
    start = TINY(pool.train, 3, pool, 0, workdir=tmp_path / "a", progress=Progress.silent())
    before = distil(dataclasses.replace(TINY, outer_steps=0), pool, tmp_path / "b")
    assert start.images.dtype == torch.float32 and start.class_counts() == [3, 3] and start.classes == pool.train.classes
    start.validate()
    assert (start.images - before).abs().mean() > 1e-4
    real = pool.train.images.float() / 255
    assert all((real == patch).flatten(1).all(1).any() for patch in before)


@pytest.mark.parametrize("arch", ["convnet-d3", "vit", "resnetap10"])
def test_every_filter_moves_by_alpha_times_its_norm(arch: str) -> None:
    network = build(arch, num_classes=2, image_size=32, width=16, generator_seed=0)
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    weights = {id(p) for p in matched_parameters(network, "weights")}
    augment_model(network, 0.3, torch.Generator().manual_seed(0))
    moved = 0
    for name, p in network.named_parameters():
        change = (p - before[name]).detach().flatten(1) if p.ndim > 1 else (p - before[name]).detach()[:, None]
        if id(p) in weights:
            torch.testing.assert_close(change.norm(dim=1), 0.3 * before[name].flatten(1).norm(dim=1), rtol=1e-4, atol=1e-6)
            moved += 1
        else:
            assert (change == 0).all(), name
    assert moved >= 4


def test_which_parameters_are_matched() -> None:
    network = build("convnet-d3", num_classes=2, image_size=16, width=4, generator_seed=0)
    shapes = [tuple(p.shape) for p in matched_parameters(network, "weights")]
    assert shapes == [(4, 3, 3, 3), (4, 4, 3, 3), (4, 4, 3, 3), (2, 16)]
    assert [tuple(p.shape) for p in matched_parameters(network, "features")] == shapes[:-1]
    assert len(matched_parameters(network, "all")) == len(list(network.parameters()))


@pytest.mark.parametrize("stain", [False, True])
def test_gradient_of_the_matching_loss_against_finite_differences(stain: bool, pool: ModelPool, tmp_path: Path) -> None:
    """Eq. 4, through the augmentation and the network's own gradient, in float64."""

    class Smooth(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.GroupNorm(3, 3), nn.Softplus(), nn.AvgPool2d(4))
            self.classifier = nn.Linear(3 * 16, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.classifier(self.body(x).flatten(1))

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = Smooth().double()
    run = histodd._Run(TINY, pool.train, 2, pool, 0, torch.device("cpu"), tmp_path)
    draw = Draw(torch.tensor([[[0.9, 0.1, 0.0], [-0.1, 1.1, 0.0]]], dtype=torch.float64), torch.tensor([stain]))
    parameters = matched_parameters(network, "weights")
    labels = torch.zeros(2, dtype=torch.int64)
    g = torch.Generator().manual_seed(1)
    target = [torch.randn(p.shape, generator=g, dtype=torch.float64) for p in parameters]
    start = 0.2 + 0.6 * torch.rand(2, 3, 16, 16, generator=g, dtype=torch.float64)
    fit = histodd.fit_affine(start, pool.preprocessing.template)  # the fit is detached: held fixed on both sides
    run_fit = histodd.fit_affine
    histodd.fit_affine = lambda images, template: fit
    try:

        def loss(images: torch.Tensor) -> torch.Tensor:
            view = run._view_synthetic(images, draw)
            value = torch.nn.functional.cross_entropy(network(view), labels)
            gradients = torch.autograd.grad(value, parameters, create_graph=True)
            return gradient_distance(target, gradients, "l2")

        images = start.clone().requires_grad_(True)
        (exact,) = torch.autograd.grad(loss(images), images)
        direction = torch.randn(start.shape, generator=g, dtype=torch.float64)
        step = 1e-5
        numeric = (loss(start + step * direction) - loss(start - step * direction)) / (2 * step)
        torch.testing.assert_close((exact * direction).sum(), numeric, rtol=1e-5, atol=1e-8)
    finally:
        histodd.fit_affine = run_fit


def test_both_batches_share_one_draw(pool: ModelPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, Draw]] = []
    for name in ("_view_real", "_view_synthetic"):
        original = getattr(histodd._Run, name)

        def spy(self: object, images: torch.Tensor, draw: Draw, name: str = name, original: object = original) -> torch.Tensor:
            seen.append((name, draw))
            return original(self, images, draw)  # type: ignore[operator]

        monkeypatch.setattr(histodd._Run, name, spy)
    run = histodd._Run(TINY, pool.train, 3, pool, 0, torch.device("cpu"), tmp_path)
    run.matching_loss(pool.load(0), 1)
    (first, a), (second, b) = seen
    assert (first, second) == ("_view_real", "_view_synthetic") and a is b and len(a.stain) == 1


def test_same_seed_same_images_and_other_seeds_others(pool: ModelPool, tmp_path: Path) -> None:
    a, b = distil(TINY, pool, tmp_path / "a"), distil(TINY, pool, tmp_path / "b")
    assert torch.equal(a, b)
    assert not torch.equal(a, distil(TINY, pool, tmp_path / "c", seed=1))


@pytest.mark.parametrize("broken_after", [1, 2])
def test_an_interrupted_distillation_continues_to_the_same_bytes(
    broken_after: int, pool: ModelPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = distil(TINY, pool, tmp_path / "whole")
    original, done = histodd._Run.finish_outer_step, []

    def interrupted(self: object, *args: object) -> None:
        original(self, *args)  # type: ignore[arg-type]
        done.append(1)
        if len(done) == broken_after:
            raise KeyboardInterrupt

    monkeypatch.setattr(histodd._Run, "finish_outer_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        distil(TINY, pool, tmp_path / "broken")
    monkeypatch.setattr(histodd._Run, "finish_outer_step", original)
    assert torch.equal(distil(TINY, pool, tmp_path / "broken"), whole)
    history = json.loads((tmp_path / "broken" / "history.json").read_text())
    assert [h["outer_step"] for h in history] == [1, 2, 3] and all(h["seconds"] > 0 for h in history)


def test_a_damaged_checkpoint_is_named(pool: ModelPool, tmp_path: Path) -> None:
    (tmp_path / "checkpoint.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(HistoddError, match=r"checkpoint\.pt is damaged"):
        distil(TINY, pool, tmp_path)


def test_switched_off_operations_never_normalise_stains(pool: ModelPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError("stains were fitted")

    monkeypatch.setattr(histodd, "fit_affine", refuse)
    distil(dataclasses.replace(TINY, augment=("flip", "rotate", "scale")), pool, tmp_path / "a")
    distil(dataclasses.replace(TINY, stain_probability=0.0), pool, tmp_path / "b")
    with pytest.raises(AssertionError, match="fitted"):
        distil(TINY, pool, tmp_path / "c")


def test_too_few_patches_name_the_class(pool: ModelPool, tmp_path: Path) -> None:
    with pytest.raises(HistoddError, match="class 'class-0' has 24 patches, fewer than the 25"):
        distil(TINY, pool, tmp_path, ipc=25)


@pytest.mark.parametrize("bad", [{"image_lr": 0.0}, {"inner_steps": -1}, {"real_batch": 0}, {"augment": ("shear",)}])
def test_impossible_fields_are_refused(bad: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        dataclasses.replace(TINY, **bad)


def test_the_adaptive_step_does_not_know_the_size_of_the_gradients(pool: ModelPool, tmp_path: Path) -> None:
    """Scaling every gradient by a constant leaves the images alone; under the plain rule it is a learning rate."""

    def final(step: str, factor: float) -> torch.Tensor:
        run = histodd._Run(dataclasses.replace(TINY, step=step), pool.train, 2, pool, 0, torch.device("cpu"), tmp_path)  # type: ignore[arg-type]
        g = torch.Generator().manual_seed(0)
        for _ in range(3):
            for label in range(2):
                rows = (run.labels == label).nonzero().flatten()
                run.update_images(rows, factor * torch.randn(run.images[rows].shape, generator=g))
        return run.images

    torch.testing.assert_close(final("adaptive", 1e-3), final("adaptive", 1e3))
    assert (final("plain", 1.0) - final("plain", 0.1)).abs().max() > 1e-3


@pytest.mark.parametrize(("ipc", "size"), [(2, 0.01), ((10, 2), 0.01), ((16, 2), 0.01 / 1.6**0.5)])
def test_the_first_adaptive_step_has_the_size_of_its_learning_rate(
    ipc: int | tuple[int, ...], size: float, pool: ModelPool, tmp_path: Path
) -> None:
    method = dataclasses.replace(TINY, image_lr=0.01, image_decay=False)
    run = histodd._Run(method, pool.train, ipc, pool, 0, torch.device("cpu"), tmp_path)
    run.images.fill_(0.5)
    rows = (run.labels == 0).nonzero().flatten()
    run.update_images(rows, 37 * torch.randn(run.images[rows].shape, generator=torch.Generator().manual_seed(0)))
    assert (run.images[rows] - 0.5).square().mean().sqrt() == pytest.approx(size, rel=1e-4)
    assert (run.images[run.labels == 1] == 0.5).all()


@pytest.mark.parametrize(("balanced", "expected"), [(True, 0.5), (False, 0.2)])
def test_the_networks_minibatch_is_balanced_or_natural(
    balanced: bool, expected: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = two_classes(per_class=40).subset([*range(40), *range(40, 50)])
    pool = ModelPool(train, PoolRecipe(arch="convnet-d3", width=4, networks=1, epochs=1), cache=tmp_path / "pool")
    method = dataclasses.replace(TINY, balanced=balanced, real_batch=64)
    run = histodd._Run(method, train, 2, pool, 0, torch.device("cpu"), tmp_path)
    drawn: list[int] = []
    original = run._view_real
    monkeypatch.setattr(run, "_view_real", lambda i, draw: (drawn.extend(i.tolist()), original(i, draw))[1])
    network = pool.load(0)
    before = network.classifier.weight.clone()
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    for _ in range(10):
        run.update_network(network, optimizer)
    assert (network.classifier.weight != before).any()
    share = sum(train.labels[i].item() for i in drawn) / len(drawn)
    assert abs(share - expected) < 0.08 and set(drawn) == set(range(50))


def test_patches_in_any_memory_layout_give_the_same_images(pool: ModelPool, tmp_path: Path) -> None:
    method = dataclasses.replace(TINY, outer_steps=1)
    train = pool.train
    strided = dataclasses.replace(train, images=train.images.contiguous(memory_format=torch.channels_last))
    assert not strided.images.is_contiguous()
    run = method(strided, 3, pool, 0, workdir=tmp_path / "strided", progress=Progress.silent())
    torch.testing.assert_close(run.images, distil(method, pool, tmp_path / "plain"), rtol=1e-4, atol=1e-4)
