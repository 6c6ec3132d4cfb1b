"""Presets, and fields set on the command line: typed by their owners, refused with the remedy, complete."""

from pathlib import Path

import pytest

from histodd_bench import cli, presets
from histodd_bench.errors import UsageError
from histodd_bench.models import MODELS
from histodd_bench.training import EvalRecipe, TrainRecipe


def test_fields_are_typed_by_their_owners() -> None:
    parsed = presets.parse_overrides(
        [
            "histodd.alpha=1",
            "pool.epochs=3",
            "eval.balanced=yes",
            "eval.augment=flip,rotate",
            "histodd.augment=none",
            "herding.width=none",
        ]
    )
    assert parsed == {
        "histodd": {"alpha": 1.0, "augment": ()},
        "pool": {"epochs": 3},
        "eval": {"balanced": True, "augment": ("flip", "rotate")},
        "herding": {"width": None},
    }
    assert isinstance(parsed["histodd"]["alpha"], float) and isinstance(parsed["pool"]["epochs"], int)


def test_a_section_may_be_left_out_where_only_one_fits() -> None:
    assert presets.parse_overrides(["outer_steps=7"]) == {"histodd": {"outer_steps": 7}}
    with pytest.raises(UsageError, match=r"several parts have that field, say which: .*eval\.lr"):
        presets.parse_overrides(["lr=0.1"])


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("histodd.alhpa=1", "unknown field of histodd 'alhpa' in --set: did you mean 'alpha'?"),
        ("histod.alpha=1", "did you mean 'histodd'?"),
        ("outer_step=1", "did you mean 'outer_steps'?"),
        ("histodd.alpha", "write it as section.field=value"),
        ("=3", "write it as section.field=value"),
        ("histodd.alpha=big", "must be a number, got 'big'"),
        ("histodd.alpha=nan", "must be a finite number"),
        ("pool.epochs=2.5", "must be a whole number, got '2.5'"),
        ("eval.balanced=maybe", "must be true or false, got 'maybe'"),
        ("histodd.distance=l3", "must be one of l1, l2, cosine, got 'l3'"),
        ("pool.arch=resnet18", "use --distill-arch"),
    ],
)
def test_wrong_fields_are_refused_with_the_remedy(setting: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", "table1", "--set", setting]) == 2
    err = capsys.readouterr().err
    assert says in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("eval.batch_size=0", "eval.batch_size must be at least 1, got 0"),
        ("pool.batch_size=-4", "pool.batch_size must be at least 1, got -4"),
        ("eval.epochs=-1", "eval.epochs must not be negative, got -1"),
        ("eval.steps=-3", "eval.steps must not be negative, got -3"),
        ("pool.epochs=-2", "pool.epochs must not be negative, got -2"),
        ("pool.networks=0", "pool.networks must be at least 1, got 0"),
        ("eval.momentum=2", "eval.momentum must be at least 0 and below 1, got 2.0"),
        ("pool.weight_decay=-1", "pool.weight_decay must not be negative, got -1.0"),
        ("eval.stain_train=2", "eval.stain_train must lie in [0, 1], got 2.0"),
        ("eval.augment=flips", "unknown augmentation in eval.augment 'flips': did you mean 'flip'?"),
        ("histodd.augment=spin", "unknown augmentation in histodd.augment 'spin'"),
        ("histodd.stain_probability=-1", "histodd.stain_probability must lie in [0, 1], got -1.0"),
        ("histodd.alpha=-1", "histodd.alpha must not be negative, got -1.0"),
        ("histodd.network_momentum=1", "histodd.network_momentum must be at least 0 and below 1"),
        ("gradmatch.alpha=-1", "gradmatch.alpha must not be negative, got -1.0"),
        ("herding.epochs=-1", "herding.epochs must not be negative, got -1"),
        ("herding.arch=resnet81", "unknown model 'resnet81': did you mean 'resnet18'?"),
        ("forgetting.epochs=0", "forgetting.epochs must be at least 1, got 0"),
        ("forgetting.width=0", "forgetting.width must be at least 1, got 0"),
    ],
)
def test_values_out_of_range_are_refused_before_anything_is_loaded(
    setting: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HISTODD_CACHE", str(tmp_path / "cache"))
    assert cli.main(["run", "table1", "--set", setting, "--out", str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert says in err and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_no_epochs_at_all_leave_networks_as_they_were_drawn() -> None:
    assert presets.build(EvalRecipe, {"epochs": 0}).steps_on(100) == 0
    presets.check_recipes({"pool": {"epochs": 0}, "herding": {"epochs": 0}, "histodd": {"outer_steps": 0}}, "convnet-d3")


def test_steps_and_epochs_replace_each_other() -> None:
    recipe = presets.build(TrainRecipe, {"epochs": 5}, {"steps": 100})
    assert (recipe.epochs, recipe.steps) == (None, 100)
    recipe = presets.build(TrainRecipe, {"steps": 100}, {"epochs": 5})
    assert (recipe.epochs, recipe.steps) == (5, None)


def test_who_names_epochs_gets_that_many() -> None:
    assert presets.build(EvalRecipe).min_steps == 300
    assert presets.build(EvalRecipe, {"lr": 0.02}).min_steps == 300
    assert presets.build(EvalRecipe, {}, {"epochs": 5}).min_steps == 0
    assert presets.build(EvalRecipe, {"epochs": 50}, {"min_steps": 100}).min_steps == 100
    assert presets.build(EvalRecipe, presets.get_preset("paper").eval).min_steps == 0


@pytest.mark.parametrize("name", list(presets.PRESETS))
def test_presets_are_complete(name: str) -> None:
    preset = presets.get_preset(name)
    classes = presets.section_classes()
    for ipc in preset.ipc:
        for method in classes.keys() - {"pool", "eval"}:
            presets.build(classes[method], preset.method_fields(method, ipc, "tcga-idh"))
    presets.build(classes["eval"], preset.eval)
    presets.build(classes["pool"], {"arch": preset.distill_arch}, preset.pool)
    for arch in (preset.distill_arch, *preset.archs):
        assert MODELS[presets.parse_arch(arch, preset.widths)[0]].min_size <= preset.image_size
