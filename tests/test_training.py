"""The training loop: budgets, sampling, determinism, resuming, prediction."""

import pytest
import torch
from small_sets import two_classes

from histodd_bench.errors import HistoddError, UsageError
from histodd_bench.models import build
from histodd_bench.stain import describe
from histodd_bench.training import Trainer, TrainRecipe, predict


def trainer(recipe: TrainRecipe, seed: int = 0, **options: object) -> Trainer:
    train = two_classes(per_class=10)
    model = build("convnet-d3", num_classes=2, image_size=16, width=8, generator_seed=5)
    return Trainer(model, train, recipe, describe(train), seed=seed, **options)  # type: ignore[arg-type]


def run(t: Trainer) -> dict[str, torch.Tensor]:
    while not t.done:
        t.run_epoch()
    return t.model.state_dict()


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[k], b[k]) for k in a)


def test_epochs_and_steps() -> None:
    t = trainer(TrainRecipe(epochs=3, batch_size=8))
    run(t)
    assert (t.epoch, t.step, len(t.epoch_seconds)) == (3, 9, 3)
    t = trainer(TrainRecipe(epochs=None, steps=7, batch_size=8))
    run(t)
    assert (t.epoch, t.step) == (3, 7)


def test_a_recipe_needs_exactly_one_budget() -> None:
    with pytest.raises(UsageError):
        TrainRecipe(epochs=3, steps=3)
    with pytest.raises(UsageError):
        TrainRecipe(epochs=None)


@pytest.mark.parametrize("stain", [0.0, 0.5, 1.0])
def test_same_seed_same_network_and_another_seed_another(stain: float) -> None:
    recipe = TrainRecipe(epochs=2, batch_size=8, stain_train=stain)
    assert same(run(trainer(recipe)), run(trainer(recipe)))
    assert not same(run(trainer(recipe)), run(trainer(recipe, seed=1)))


def test_going_on_from_a_saved_state_gives_the_unbroken_network() -> None:
    recipe = TrainRecipe(epochs=4, batch_size=8, stain_train=0.5)
    first = trainer(recipe)
    first.run_epoch()
    first.run_epoch()
    second = trainer(recipe, seed=99)
    second.load_state_dict(first.state_dict())
    assert same(run(second), run(trainer(recipe)))
    assert len(second.epoch_seconds) == 4


def test_every_patch_once_an_epoch_and_balanced_draws_even_out_classes() -> None:
    seen: list[int] = []
    t = trainer(TrainRecipe(epochs=1, batch_size=8), on_batch=lambda i, logits, y: seen.extend(i.tolist()))
    run(t)
    assert sorted(seen) == list(range(20))

    train = two_classes(per_class=40).subset([*range(40), *range(40, 44)])
    labels: list[int] = []
    model = build("convnet-d3", num_classes=2, image_size=16, width=8, generator_seed=0)
    recipe = TrainRecipe(epochs=20, balanced=True)
    run(Trainer(model, train, recipe, describe(train), 0, on_batch=lambda i, logits, y: labels.extend(y.tolist())))
    assert 0.42 < sum(labels) / len(labels) < 0.58


def test_the_network_learns_an_easy_set_and_prediction_is_batch_independent() -> None:
    t = trainer(TrainRecipe(epochs=30, batch_size=8))
    run(t)
    test = two_classes(per_class=15, seed=7)
    logits = predict(t.model, test, t.preprocessing, batch_size=64)
    assert (logits.argmax(1) == test.labels).float().mean() > 0.9
    torch.testing.assert_close(predict(t.model, test, t.preprocessing, batch_size=7), logits, rtol=1e-4, atol=1e-5)
    assert predict(t.model, test, t.preprocessing, features=True).shape == (30, 8 * 2 * 2)
    assert not torch.allclose(predict(t.model, test, t.preprocessing, stain=True), logits)


def test_float_and_uint8_patches_train_alike() -> None:
    recipe = TrainRecipe(epochs=1, batch_size=8, augment=())
    a = trainer(recipe)
    b = trainer(recipe)
    b.train = type(b.train)(b.train.images.float() / 255, b.train.labels, b.train.groups, b.train.group_names, b.train.classes)
    x, y = run(a), run(b)
    assert all(torch.allclose(x[k], y[k], atol=1e-5) for k in x)


def test_an_empty_set_is_refused() -> None:
    train = two_classes()
    model = build("convnet-d3", num_classes=2, image_size=16, width=8, generator_seed=0)
    with pytest.raises(HistoddError, match="empty"):
        Trainer(model, train.subset([]), TrainRecipe(), describe(train), 0)
