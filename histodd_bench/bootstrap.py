"""Intervals from the per-patch predictions in records: test slides are drawn again, with replacement. Needs no torch."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from histodd_bench.results import Record, unpack

DRAWS = 2000
FEWEST = 5  # test groups; of fewer, draws repeat each other and an interval would say more than there is to know
_CHUNK = 4_000_000  # weights drawn at once
METRICS = ("accuracy", "balanced_accuracy")


@dataclass(frozen=True)
class Difference:
    """Mean of one group of records less that of another.

    Attributes:
        value: as a fraction.
        low, high: 2.5th and 97.5th percentile over the draws; NaN where there are too few groups, see :func:`too_few`.
        groups: test slides or patients that were drawn from.
        paired: the same slides are drawn for both sides.
    """

    value: float
    low: float
    high: float
    groups: int
    paired: bool


@dataclass(frozen=True)
class _Sums:
    """Per test group and class ``[G,C]``: patches, and correct ones averaged over the records."""

    patches: np.ndarray
    correct: np.ndarray

    @property
    def too_few(self) -> str:
        """Why no interval can be given, in words; empty where one can."""
        groups, of_class = len(self.patches), (self.patches > 0).sum(0)
        if groups < FEWEST:
            return f"the number of test slides or patients, {groups}, is below {FEWEST}"
        if (of_class == 1).any():
            return f"a class is in one of the {groups} test slides or patients only"
        return ""

    def score(self, weights: np.ndarray, metric: str) -> np.ndarray:
        """The metric ``[B]`` under weights ``[B,G]``; NaN where a draw has no patches at all."""
        patches, correct = weights @ self.patches, weights @ self.correct
        with np.errstate(divide="ignore", invalid="ignore"):
            if metric == "accuracy":
                return correct.sum(1) / patches.sum(1)
            return np.nanmean(correct / patches, axis=1)  # classes that a draw lacks are left out


def difference(a: Sequence[Record], b: Sequence[Record], metric: str = "accuracy", seed: int = 0) -> Difference | None:
    """The difference of two groups of records with a 95 % percentile bootstrap interval over test groups (slides).

    Predictions are averaged over the records of a side first, so the interval tells what other slides would have given
    with these seeds. Both sides use the same draws of slides (paired) where all records share a test set; else each has
    its own.

    Args:
        a, b: records of one data set, that is with the same classes.
        metric: one of :data:`METRICS`.
        seed: of the draws.

    Returns:
        None where a side has no usable predictions, or its records do not share a test set.
    """
    left, right = _sums(a), _sums(b)
    if left is None or right is None:
        return None
    paired = a[0]["config"]["data"].get("test") == b[0]["config"]["data"].get("test")
    paired = paired and np.array_equal(left.patches, right.patches)
    low = high = math.nan
    if not left.too_few and not right.too_few:
        rng = np.random.default_rng(seed)
        draws_left = _draw(rng, left, metric)
        draws_right = _draw(np.random.default_rng(seed) if paired else rng, right, metric)
        with np.errstate(invalid="ignore"):
            low, high = np.nanpercentile(draws_left - draws_right, [2.5, 97.5])
    ones = [np.ones((1, len(s.patches))) for s in (left, right)]
    value = float(left.score(ones[0], metric)[0] - right.score(ones[1], metric)[0])
    return Difference(value, float(low), float(high), len(left.patches), paired)


def too_few(record: Record) -> str:
    """Why differences on the test set of a record have no interval, in words; empty where they have one."""
    sums = _sums([record])
    return "" if sums is None else sums.too_few


def _draw(rng: np.random.Generator, sums: _Sums, metric: str) -> np.ndarray:
    groups, scores = len(sums.patches), []
    step = max(1, _CHUNK // groups)
    for start in range(0, DRAWS, step):
        weights = rng.multinomial(groups, np.full(groups, 1 / groups), size=min(step, DRAWS - start))
        scores.append(sums.score(weights.astype(np.float64), metric))
    return np.concatenate(scores)


def _sums(records: Sequence[Record]) -> _Sums | None:
    if not records:
        return None
    try:
        parts = [{n: unpack(r["predictions"][n]) for n in ("probabilities", "labels", "groups")} for r in records]
    except (KeyError, ValueError):
        return None
    labels, groups = parts[0]["labels"].astype(int), parts[0]["groups"].astype(int)
    for part in parts:
        if not (np.array_equal(part["labels"], labels) and np.array_equal(part["groups"], groups)):
            return None
    if len(labels) == 0:
        return None
    correct = np.mean([part["probabilities"].argmax(1) == labels for part in parts], axis=0)
    _, rows = np.unique(groups, return_inverse=True)
    shape = rows.max() + 1, labels.max() + 1
    patches, right = np.zeros(shape), np.zeros(shape)
    np.add.at(patches, (rows, labels), 1)
    np.add.at(right, (rows, labels), correct)
    return _Sums(patches, right)
