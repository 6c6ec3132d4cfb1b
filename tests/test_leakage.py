"""What a set gives away, on sets whose leakage is known."""

import json
from pathlib import Path

import pytest
import torch
from test_sets import CLASSES
from tiny_project import OPTIONS, without, write_imagefolder

from histodd_bench import cli
from histodd_bench.data.patchset import PatchSet
from histodd_bench.errors import HistoddError
from histodd_bench.leakage import identical, measure


def noise(n: int, seed: int, size: int = 16) -> PatchSet:
    images = torch.randint(0, 256, (n, 3, size, size), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return PatchSet(images, torch.arange(n) % 2, torch.zeros(n, dtype=torch.int64), ("a",), CLASSES)


def as_float(patches: PatchSet, rows: list[int], change) -> PatchSet:
    some = patches.subset(rows)
    return PatchSet(change(some.images.float() / 255).clamp(0, 1), some.labels, some.groups, some.group_names, CLASSES)


TRAINING, HELD_OUT = noise(80, 0), noise(40, 1)


def test_copies_are_found_also_turned_and_stained_anew() -> None:
    rows = [3, 50, 7, 20]
    copies = as_float(TRAINING, rows, lambda x: 0.6 * x.rot90(1, (2, 3)).flip(3) + 0.2)
    colours, structure = measure(copies, TRAINING, HELD_OUT, TRAINING.images[rows].float() / 255)
    assert (structure.copies, structure.begun, structure.beginnings) == (1.0, 1.0, 1.0)
    assert structure.to_training < 0.01 < structure.held_out
    assert colours.to_training > 0.05, "their colours are others"
    assert colours.begun == 1.0, "and still nothing is nearer"


def test_identical_patches_are_counted_exactly() -> None:
    mixed = [*HELD_OUT.images[[5, 5, 11]], *TRAINING.images[:4]]
    made = PatchSet(torch.stack(mixed), torch.tensor([0, 1] * 3 + [0]), torch.zeros(7, dtype=torch.int64), ("a",), CLASSES)
    assert identical(made, HELD_OUT) == 3, "whatever their labels"
    assert identical(as_float(made, list(range(7)), lambda x: x), HELD_OUT) == 3, "as floats too"
    one_off = as_float(HELD_OUT, [0, 1], lambda x: x + (torch.arange(16) == 0) * 1.01 / 255)
    assert identical(one_off, HELD_OUT) == 0 and identical(TRAINING, HELD_OUT) == 0


def test_patches_of_others_give_nothing_away() -> None:
    strangers = as_float(noise(12, 2), list(range(12)), lambda x: x)
    for view in measure(strangers, TRAINING, HELD_OUT):
        assert view.begun is None and view.beginnings is None
        assert view.copies <= 0.2 and abs(view.membership - 0.5) < 0.15 and view.caught < 0.15
        assert view.to_training == pytest.approx(view.held_out, rel=0.05)


def test_a_set_of_everything_tells_every_member() -> None:
    for view in measure(TRAINING, TRAINING, HELD_OUT):
        assert (view.membership, view.caught, view.begun, view.beginnings) == (1.0, 1.0, 1.0, 1.0)
        assert view.to_training == pytest.approx(0, abs=2e-3)


def test_a_set_that_began_with_noise_has_no_beginning_to_give_away() -> None:
    started = torch.rand(12, 3, 16, 16, generator=torch.Generator().manual_seed(5))
    for view in measure(as_float(noise(12, 2), list(range(12)), lambda x: x), TRAINING, HELD_OUT, started):
        assert view.begun is None and view.beginnings is None


def test_equal_training_patches_do_not_hide_a_beginning() -> None:
    images = torch.cat([TRAINING.images, TRAINING.images[:5]])
    twice = PatchSet(images, torch.arange(85) % 2, torch.zeros(85, dtype=torch.int64), ("a",), CLASSES)
    assert measure(twice.subset([80, 81, 82]), twice, HELD_OUT)[0].begun == 1.0


def test_one_patch_of_each_side_is_enough() -> None:
    assert measure(TRAINING.subset([1]), TRAINING, HELD_OUT, most=1)[0].begun == 1.0


def test_sets_and_data_that_do_not_fit_are_refused() -> None:
    with pytest.raises(HistoddError, match="16 px patches, the data 8 px"):
        measure(TRAINING, noise(4, 0, 8), HELD_OUT)
    with pytest.raises(HistoddError, match="no held-out patches"):
        measure(TRAINING, TRAINING, HELD_OUT.subset([]))
    with pytest.raises(HistoddError, match="began with 3"):
        measure(as_float(TRAINING, [1, 2], lambda x: x), TRAINING, HELD_OUT, torch.zeros(3, 3, 16, 16))


def test_the_command_measures_a_set_beside_the_data_it_was_made_from(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("HISTODD_CACHE", str(tmp_path / "cache"))
    root = tmp_path / "data"
    write_imagefolder(root)
    options = without(OPTIONS, "--archs", "--eval-seeds")
    made = ["select", "random", "--dataset", "imagefolder", "--data-root", str(root), *options]
    assert cli.main([*made, "--ipc", "3", "--seeds", "1", "--out", str(tmp_path / "sets")]) == 0
    folder = capsys.readouterr().out.split()[0]
    measured = ["leakage", folder, "--dataset", "imagefolder", "--data-root", str(root), "--threads", "1"]
    assert cli.main([*measured, "--out", str(tmp_path / "leak.json")]) == 0
    assert "nearest to the training patch it began as" in capsys.readouterr().out
    views = json.loads((tmp_path / "leak.json").read_text())["views"]
    assert [v["view"] for v in views] == ["colours", "structure"] and views[0]["begun"] == 1.0
    other = write_imagefolder(tmp_path / "other", seed=1)
    assert cli.main(["leakage", folder, "--dataset", "imagefolder", "--data-root", str(other)]) == 2
    assert "was not made from these training patches" in capsys.readouterr().err
