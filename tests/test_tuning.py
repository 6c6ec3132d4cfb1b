"""The stain policy is chosen on training slides only, kept unless another is clearly better, and remembered."""

from pathlib import Path

import pytest
import torch
from small_sets import two_classes

from histodd_bench import tuning
from histodd_bench.progress import Progress
from histodd_bench.stain import describe
from histodd_bench.training import TrainRecipe
from histodd_bench.tuning import Choice, choose_stain, decide


def test_the_default_stays_unless_another_is_better_by_two_standard_errors() -> None:
    off = [0.60, 0.62, 0.58, 0.60]
    assert decide({"off": off, "on": [x + 0.01 for x in off]}).name == "on"
    assert decide({"off": off, "on": [0.70, 0.55, 0.66, 0.52]}).name == "off"
    assert decide({"off": off, "on": [x - 0.1 for x in off]}).name == "off"
    best = decide({"off": off, "half": [x + 0.02 for x in off], "on": [x + 0.05 for x in off]})
    assert best.name == "on" and best.scores["on"] == pytest.approx(0.65) and best.n == 4


def test_the_choice_sees_training_slides_only_is_paired_and_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train = two_classes(per_class=40, slides=8)
    seen: list[tuple[set[int], set[int], int, float]] = []
    original = tuning.evaluate

    def spy(small, held_out, **options):
        recipe = options["recipe"]
        seen.append((set(small.groups.tolist()), set(held_out.groups.tolist()), options["seed"], recipe.stain_train))
        assert len(small) == 6
        return original(small, held_out, **options)

    monkeypatch.setattr(tuning, "evaluate", spy)

    def choose() -> Choice:
        return choose_stain(
            train, {"off": (0.0, False), "on": (1.0, True)}, ipc=3, arch="convnet-d3", width=4, repeats=2,
            recipe=TrainRecipe(epochs=2), preprocessing=describe(train), cache=tmp_path, progress=Progress.silent(),
        )  # fmt: skip

    first = choose()
    assert len(seen) == 4 and all(not small & held for small, held, _, _ in seen)
    assert [(s[2], s[3]) for s in seen] == [(0, 0.0), (0, 1.0), (1, 0.0), (1, 1.0)]
    assert seen[0][:2] == seen[1][:2] and seen[0][1] != seen[2][1]
    assert choose() == first and len(seen) == 4
    assert torch.tensor(list(first.scores.values())).isfinite().all()
