"""Continual learning from memories: classes of different data sets side by side, masked and unmasked scores."""

import pytest
import torch
from small_sets import two_classes

from histodd_bench.continual import joint_preprocessing, joint_set, train_and_score
from histodd_bench.errors import HistoddError
from histodd_bench.stain import describe
from histodd_bench.training import TrainRecipe


def test_classes_and_slides_of_data_sets_never_mix() -> None:
    first, second = two_classes(per_class=4, classes=2), two_classes(per_class=3, classes=3, seed=1)
    joint = joint_set([first, second], ["a", "b"])
    assert joint.class_counts() == [4, 4, 3, 3, 3]
    assert joint.classes == ("a: class-0", "a: class-1", "b: class-0", "b: class-1", "b: class-2")
    assert set(joint.groups[:8].tolist()).isdisjoint(joint.groups[8:].tolist())
    assert torch.equal(joint.images[8:], second.images)
    joint.validate()


def test_channel_statistics_are_those_of_all_data_sets_together() -> None:
    first, second = two_classes(per_class=6), two_classes(per_class=6, seed=4)
    both = joint_set([first, second], ["a", "b"])
    found = joint_preprocessing([describe(first), describe(second)])
    expected = describe(both)
    torch.testing.assert_close(torch.tensor(found.mean), torch.tensor(expected.mean), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.tensor(found.std), torch.tensor(expected.std), rtol=1e-4, atol=1e-4)
    assert found.template == describe(first).template


def test_tasks_with_two_and_three_classes_are_learned_and_masking_helps() -> None:
    sets = [two_classes(per_class=16, classes=2), two_classes(per_class=16, classes=3, seed=1)]
    tests = [two_classes(per_class=10, classes=2, seed=2), two_classes(per_class=10, classes=3, seed=3)]

    def scores(k: int):
        return train_and_score(
            sets[:k], tests[:k], ["a", "b"][:k], arch="convnet-d3", width=16, recipe=TrainRecipe(epochs=None, steps=150),
            preprocessing=joint_preprocessing([describe(s) for s in sets[:k]]), seed=0,
        )  # fmt: skip

    one, two = scores(1), scores(2)
    assert one.metrics["accuracy"] == one.metrics["masked_accuracy"] > 0.9
    assert one.probabilities.shape == (20, 2) and two.probabilities.shape == (50, 5)
    # both tasks show the same pictures, so that only the mask can tell them apart
    assert two.metrics["masked_accuracy"] > 0.8 > two.metrics["accuracy"] + 0.1
    per_task = [two.metrics[f"task_{i}_masked_accuracy"] for i in (1, 2)]
    assert two.metrics["masked_accuracy"] == sum(per_task) / 2
    own = two.probabilities[20:, 2:].argmax(1) == tests[1].labels
    assert two.metrics["task_2_masked_accuracy"] == own.double().mean().item()
    assert torch.equal(two.labels[20:], tests[1].labels + 2)


def test_a_training_that_diverges_is_no_score() -> None:
    train, test = two_classes(per_class=8), two_classes(per_class=8, seed=2)
    recipe = TrainRecipe(epochs=None, steps=20, lr=1e8)
    with pytest.raises(HistoddError, match=r"training convnet-d3 diverged, .* lower its learning rate \(eval\.lr=1e\+08\)"):
        train_and_score([train], [test], ["a"], arch="convnet-d3", width=8, recipe=recipe,
                        preprocessing=describe(train), seed=0)  # fmt: skip
