"""Intervals: known answers, agreement with scikit-learn's accuracy and with the textbook standard error."""

import math

import numpy as np
import pytest
from made_up_records import record
from sklearn.metrics import balanced_accuracy_score

from histodd_bench import bootstrap, results
from histodd_bench.compare import _changes


def with_predictions(predicted, labels, groups, **named) -> results.Record:
    made = record(0.5, **named)
    probabilities = np.eye(int(labels.max()) + 1)[predicted]
    made["predictions"] = {
        "probabilities": results.pack(probabilities.astype(np.float16)),
        "labels": results.pack(labels.astype(np.int16)),
        "groups": results.pack(groups.astype(np.int32)),
    }
    return made


def noisy(rng, labels, right: float):
    """Predictions that are right with a probability."""
    return np.where(rng.random(len(labels)) < right, labels, 1 - labels)


def test_a_known_difference_and_an_interval_of_no_width() -> None:
    labels, groups = np.tile([0, 1], 20), np.arange(40) // 4
    a, b = with_predictions(labels, labels, groups), with_predictions(1 - labels, labels, groups)
    found = bootstrap.difference([a], [b])
    assert found is not None
    assert (found.value, found.low, found.high, found.groups, found.paired) == (1.0, 1.0, 1.0, 10, True)


def test_records_of_one_side_are_averaged() -> None:
    labels, groups = np.tile([0, 1], 20), np.arange(40) // 4
    right, wrong = (with_predictions(p, labels, groups) for p in (labels, 1 - labels))
    found = bootstrap.difference([right, wrong], [wrong])
    assert found is not None and found.value == 0.5


@pytest.mark.parametrize("metric", bootstrap.METRICS)
def test_the_value_is_the_difference_of_the_metrics(metric: str) -> None:
    rng = np.random.default_rng(0)
    labels, groups = (rng.random(200) < 0.2).astype(int), rng.integers(0, 12, 200)
    one, two = noisy(rng, labels, 0.9), noisy(rng, labels, 0.6)
    found = bootstrap.difference(
        [with_predictions(one, labels, groups)], [with_predictions(two, labels, groups)], metric
    )

    def score(p):
        return balanced_accuracy_score(labels, p) if metric == "balanced_accuracy" else (p == labels).mean()

    assert found is not None and found.value == pytest.approx(score(one) - score(two))
    assert found.low < found.value < found.high


def test_the_interval_is_that_of_the_textbook_where_groups_are_single_patches() -> None:
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 2, 4000)
    one, two = noisy(rng, labels, 0.8), noisy(rng, labels, 0.7)
    groups = np.arange(4000)
    found = bootstrap.difference([with_predictions(one, labels, groups)], [with_predictions(two, labels, groups)])
    d = (one == labels).astype(float) - (two == labels)
    half = 1.96 * d.std() / math.sqrt(len(d))
    assert found is not None
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.08)


def test_whole_slides_are_drawn_not_patches() -> None:
    """Patches of one slide that are all right or all wrong together widen the interval."""
    rng = np.random.default_rng(2)
    labels, groups = np.tile([0, 1], 1000), np.arange(2000) // 100
    slide_right = rng.random(20) < 0.7
    clustered = np.where(slide_right[groups], labels, 1 - labels)
    base = with_predictions(labels, labels, groups)
    wide = bootstrap.difference([with_predictions(clustered, labels, groups)], [base])
    narrow = bootstrap.difference([with_predictions(rng.permutation(clustered == labels) * 1, labels, np.arange(2000))], [
        with_predictions(labels, labels, np.arange(2000))])  # fmt: skip
    assert wide is not None and narrow is not None
    assert wide.high - wide.low > 3 * (narrow.high - narrow.low)


def test_the_same_draws_every_time_and_paired_where_the_test_set_is_shared() -> None:
    rng = np.random.default_rng(3)
    labels, groups = rng.integers(0, 2, 300), rng.integers(0, 15, 300)
    a = with_predictions(noisy(rng, labels, 0.8), labels, groups)
    once, again = bootstrap.difference([a], [a]), bootstrap.difference([a], [a])
    assert once == again and once is not None and (once.low, once.high) == (0.0, 0.0)
    other = {**a, "config": {**a["config"], "data": {**a["config"]["data"], "test": "another"}}}
    unpaired = bootstrap.difference([a], [other])
    assert unpaired is not None and not unpaired.paired and unpaired.low < 0 < unpaired.high


@pytest.mark.parametrize(
    ("labels", "groups", "why"),
    [
        ([0, 1] * 20, [0] * 40, "the number of test slides or patients, 1, is below 5"),
        ([0, 1] * 20, [0, 0, 1, 1, 2, 2, 3, 3] * 5, "the number of test slides or patients, 4, is below 5"),
        ([1, 1] + [0] * 38, [i // 4 for i in range(40)], "a class is in one of the 10 test slides or patients only"),
    ],
)
def test_a_few_test_slides_give_a_difference_without_an_interval(labels: list[int], groups: list[int], why: str) -> None:
    truth, slides = np.array(labels), np.array(groups)
    a, b = with_predictions(truth, truth, slides), with_predictions(1 - truth, truth, slides)
    found = bootstrap.difference([a], [b])
    assert found is not None and (found.value, found.groups) == (1.0, len(set(groups)))
    assert math.isnan(found.low) and math.isnan(found.high) and bootstrap.too_few(a) == why
    (change,) = [c for c in _changes("cell", [b], [a]) if c.metric == "accuracy, points"]
    assert math.isnan(change.low) and change.how == "" and not change.clear


def test_five_slides_with_every_class_in_two_have_an_interval() -> None:
    labels, groups = np.array([1, 1, *[0] * 8]), np.array([0, 1, 0, 1, 2, 2, 3, 3, 4, 4])
    a = with_predictions(labels, labels, groups)
    found = bootstrap.difference([a], [with_predictions(1 - labels, labels, groups)])
    assert found is not None and (found.low, found.high) == (1.0, 1.0) and bootstrap.too_few(a) == ""


def test_what_cannot_be_compared_has_no_interval() -> None:
    labels, groups = np.tile([0, 1], 20), np.arange(40) // 4
    good = with_predictions(labels, labels, groups)
    assert bootstrap.difference([record(0.5)], [good]) is None  # no labels in it
    shorter = with_predictions(labels[:20], labels[:20], groups[:20])
    assert bootstrap.difference([good, shorter], [good]) is None
    assert bootstrap.difference([], [good]) is None
