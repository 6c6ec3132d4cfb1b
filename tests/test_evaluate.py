"""Metrics against hand-made cases and scikit-learn, storage, and one whole evaluation."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import balanced_accuracy_score, roc_auc_score
from small_sets import two_classes

from histodd_bench.evaluate import compute_metrics, evaluate, storage
from histodd_bench.sets import to_uint8
from histodd_bench.stain import describe
from histodd_bench.training import EvalRecipe, TrainRecipe


def test_metrics_by_hand() -> None:
    probabilities = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.4, 0.6], [0.3, 0.7]])
    found = compute_metrics(probabilities, torch.tensor([0, 0, 0, 1]))
    assert found["accuracy"] == 0.75
    assert found["balanced_accuracy"] == pytest.approx((2 / 3 + 1) / 2)
    assert found["auc"] == 1.0


@given(seed=st.integers(0, 1000), classes=st.integers(2, 5), levels=st.integers(2, 50))
def test_metrics_agree_with_scikit_learn_ties_included(seed: int, classes: int, levels: int) -> None:
    g = torch.Generator().manual_seed(seed)
    labels = torch.cat([torch.arange(classes), torch.randint(classes, (40,), generator=g)])
    scores = torch.randint(1, levels + 1, (len(labels), classes), generator=g).double()
    probabilities = scores / scores.sum(1, keepdim=True)
    found = compute_metrics(probabilities, labels)
    assert found["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(labels, probabilities.argmax(1)))
    expected = sum(roc_auc_score(labels == c, probabilities[:, c]) for c in range(classes)) / classes
    assert found["auc"] == pytest.approx(expected)


def test_metrics_where_the_test_set_lacks_classes() -> None:
    only_one = compute_metrics(torch.tensor([[0.9, 0.1], [0.2, 0.8]]), torch.tensor([0, 0]))
    assert only_one["balanced_accuracy"] == 0.5 and math.isnan(only_one["auc"])
    assert math.isnan(compute_metrics(torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64))["accuracy"])


def test_storage_counts_one_codec_and_labels() -> None:
    patches = two_classes(per_class=5)
    found = storage(patches)
    assert found["count"] == 10 and found["shape"] == [3, 16, 16] and found["raw_uint8_bytes"] == 10 * 3 * 16 * 16
    assert found["estimated"] is False and 80 < found["disk_bytes"] < 10 * (3 * 16 * 16 + 200)  # type: ignore[operator]
    as_float = type(patches)(
        patches.images.float() / 255, patches.labels, patches.groups, patches.group_names, patches.classes
    )
    assert storage(as_float) == found
    assert torch.equal(to_uint8(as_float.images), patches.images)


def test_an_evaluation_is_reproducible_and_reports_its_budget() -> None:
    train, test = two_classes(per_class=10), two_classes(per_class=12, seed=3)
    steps: list[tuple[int, int]] = []

    def once() -> tuple[torch.Tensor, dict[str, float]]:
        found = evaluate(
            train, test, arch="convnet-d3", width=8, recipe=TrainRecipe(epochs=None, steps=40), seed=1,
            preprocessing=describe(train), on_epoch=lambda done, total, loss: steps.append((done, total)),
        )  # fmt: skip
        return found.probabilities, found.metrics

    (a, metrics), (b, _) = once(), once()
    assert torch.equal(a, b) and a.shape == (24, 2)
    torch.testing.assert_close(a.sum(1), torch.ones(24))
    assert metrics["steps"] == 40 and metrics["epochs"] == 40 and metrics["epoch_seconds"] > 0
    assert metrics["balanced_accuracy"] > 0.8 and steps[39] == (40, 40)


@pytest.mark.parametrize(
    ("patches", "fields", "steps"),
    [
        (20, {}, 300),  # a step an epoch
        (20, {"min_steps": 0}, 50),  # the paper's 50 epochs
        (100, {}, 300),
        (192, {"min_steps": 100}, 150),  # 50 epochs of three steps are enough already
        (192, {"min_steps": 151}, 153),  # whole epochs
        (5000, {}, 50 * 79),  # the whole set is trained as the paper does
        (20, {"epochs": None, "steps": 7}, 7),
    ],
)
def test_small_sets_are_gone_through_more_often(patches: int, fields: dict, steps: int) -> None:
    assert EvalRecipe(**fields).steps_on(patches) == steps


def test_the_least_number_of_steps_is_made() -> None:
    train, test = two_classes(per_class=10), two_classes(per_class=12, seed=3)
    recipe = EvalRecipe(epochs=2, batch_size=8, min_steps=10)
    metrics = evaluate(
        train, test, arch="convnet-d3", width=8, recipe=recipe, seed=1, preprocessing=describe(train)
    ).metrics
    assert (metrics["steps"], metrics["epochs"]) == (12, 4)


def test_an_interrupted_evaluation_continues_to_the_same_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("histodd_bench.evaluate._CHECKPOINT_SECONDS", -1.0)
    train, test = two_classes(per_class=10), two_classes(per_class=12, seed=3)
    path = tmp_path / "evaluation.pt"

    def once(stop_after: int | None = None) -> torch.Tensor:
        def on_epoch(done: int, total: int, loss: float) -> None:
            if done == stop_after:
                raise KeyboardInterrupt

        return evaluate(
            train, test, arch="convnet-d3", width=8, recipe=TrainRecipe(epochs=6), seed=1,
            preprocessing=describe(train), checkpoint=path, on_epoch=on_epoch,
        ).probabilities  # fmt: skip

    whole = once()
    assert not path.exists()
    with pytest.raises(KeyboardInterrupt):
        once(stop_after=4)
    assert path.exists()
    assert torch.equal(once(), whole) and not path.exists()
