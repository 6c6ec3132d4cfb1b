"""Running a table: cells and their order, sets made once, records never recomputed and never reused wrongly."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_project import command, write_imagefolder

from histodd_bench import cli, environment, experiment, options, presets, results, sets
from histodd_bench.progress import Progress
from histodd_bench.request import Cell, Request, cells
from histodd_bench.running import run_cells
from histodd_bench.stain_policy import STAIN_POLICIES, StainPolicy
from histodd_bench.tables import TABLES


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Data, a cache, and one finished tiny table that tests may read but not change."""
    base = tmp_path_factory.mktemp("experiment")
    made = {"data": write_imagefolder(base / "data"), "cache": base / "cache", "out": base / "out"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HISTODD_CACHE", str(made["cache"]))
        assert cli.main(command(made["data"], made["out"])) == 0
    return made


@pytest.fixture(autouse=True)
def same_cache(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HISTODD_CACHE", str(folders["cache"]))


def request(folders: dict[str, Path], out: Path, *more: str, **options_: str) -> Request:
    args = options.make_parser(cli.COMMANDS).parse_args(command(folders["data"], out, *more, **options_))
    return cli.make_requests(args, TABLES["table1"], out)[0]


def images(out: Path) -> dict[str, bytes]:
    return {p.parent.name: p.read_bytes() for p in sorted((out / experiment.SETS).glob("*/images.safetensors"))}


def test_every_cell_once_and_the_whole_set_neither_per_ipc_nor_per_seed(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    asked = request(folders, tmp_path, ipc="2,3")
    made = cells(asked)
    assert len(made) == len(set(made)) == 4 * 2 * 2 * 2 + 2
    whole = [c for c in made if c.method == "full"]
    assert [(c.ipc, c.distill_seed, c.eval_seed) for c in whole] == [(None, None, 0), (None, None, 1)]
    # every method has its first numbers before any method has its second seed
    first_second = next(i for i, c in enumerate(made) if c.distill_seed == 1)
    assert {c.method for c in made[:first_second]} == {"random", "herding", "forgetting", "histodd", "full"}


def test_more_evaluation_seeds_than_distillation_seeds(folders: dict[str, Path], tmp_path: Path) -> None:
    asked = dataclasses.replace(request(folders, tmp_path), seeds=1, eval_seeds=3)
    made = cells(asked)
    assert len(made) == len(set(made)) == 4 * 3 + 3


def test_a_finished_run_left_one_record_per_cell_and_one_set_per_seed(folders: dict[str, Path]) -> None:
    records, ignored = results.read_records(folders["out"])
    assert not ignored and len(records) == 4 * 2 * 2 + 2
    assert len(images(folders["out"])) == 4 * 2
    assert len(list((folders["out"] / experiment.SHEETS).glob("*.png"))) == 4 * 2
    assert not list((folders["out"] / experiment.WORK).iterdir())
    for name in ("table1.md", "table1.tex", "table1.csv"):
        assert (folders["out"] / name).stat().st_size > 200


def test_records_hold_what_they_promise(folders: dict[str, Path]) -> None:
    records, _ = results.read_records(folders["out"])
    distilled = next(r for r in records if r["method"] == "histodd")
    assert distilled["ipc"] == 2 and distilled["arch"] == "convnet-d3" and distilled["dataset"] == "imagefolder"
    assert {"accuracy", "balanced_accuracy", "auc", "epoch_seconds"} <= set(distilled["metrics"])
    assert distilled["storage"]["count"] == 4 and distilled["storage"]["raw_uint8_bytes"] == 4 * 3 * 16 * 16
    assert distilled["config"]["set"]["fields"]["outer_steps"] == 3 and distilled["config"]["threads"] == 1
    assert distilled["seconds"]["method"] > 0 and distilled["seconds"]["networks"] > 0
    assert distilled["environment"]["torch"] == torch.__version__ and distilled["environment"]["threads"] == 1
    assert next(r for r in records if r["method"] == "random")["seconds"]["networks"] == 0


def test_predictions_reproduce_the_metrics(folders: dict[str, Path]) -> None:
    records, _ = results.read_records(folders["out"])
    for record in records:
        packed = record["predictions"]
        probabilities, labels = results.unpack(packed["probabilities"]), results.unpack(packed["labels"])
        assert (
            probabilities.shape == (12, 2)
            and probabilities.dtype == np.float16
            and len(results.unpack(packed["groups"])) == 12
        )
        correct = probabilities.argmax(1) == labels
        assert record["metrics"]["accuracy"] == pytest.approx(correct.mean())
        recalls = [correct[labels == c].mean() for c in (0, 1)]
        assert record["metrics"]["balanced_accuracy"] == pytest.approx(np.mean(recalls))


def test_the_stain_policy_is_the_same_for_every_method_and_in_the_records(folders: dict[str, Path]) -> None:
    records, _ = results.read_records(folders["out"])
    assert {(r["config"]["eval"]["stain_train"], r["config"]["eval"]["stain_test"]) for r in records} == {(0.5, False)}
    distilled = next(r for r in records if r["method"] == "histodd")["config"]["set"]
    assert distilled["fields"]["stain_probability"] == 0.5 and distilled["pool"]["stain_train"] == 0.5
    assert all(r["stain"]["chosen"] for r in records)


def test_a_second_run_computes_nothing_and_changes_nothing(folders: dict[str, Path]) -> None:
    before = {p: p.stat().st_mtime_ns for p in (folders["out"] / results.RECORDS).iterdir()}
    asked = request(folders, folders["out"])
    assert run_cells(experiment.Experiment(asked, Progress.silent()), cells(asked)) == 0
    assert {p: p.stat().st_mtime_ns for p in (folders["out"] / results.RECORDS).iterdir()} == before


def test_one_cell_alone_equals_that_cell_within_the_table(folders: dict[str, Path], tmp_path: Path) -> None:
    asked = dataclasses.replace(request(folders, tmp_path), cache=tmp_path / "cache")
    torch.manual_seed(123)  # whatever happened before must not matter
    np.random.seed(5)
    alone = experiment.Experiment(asked, Progress.silent())
    known = {r["key"]: r for r in results.read_records(folders["out"])[0]}
    for cell in (
        Cell("histodd", 2, "convnet-d3", 8, 1, 1),
        Cell("forgetting", 2, "convnet-d3", 8, 1, 0),
        Cell("full", None, "convnet-d3", 8, None, 1),
    ):
        record = alone.cell(cell)
        within = known[record["key"]]
        assert record["predictions"] == within["predictions"] and record["set"] == within["set"]
    made = images(tmp_path)
    assert len(made) == 2 and all(images(folders["out"])[name] == data for name, data in made.items())


@pytest.mark.parametrize(
    ("more", "changed"),
    [
        (("--set", "histodd.alpha=0.5"), {"histodd"}),
        (("--set", "eval.lr=0.02"), {"random", "histodd", "full"}),
        (("--set", "pool.lr=0.02"), {"histodd"}),
        (("--threads", "2"), {"random", "histodd", "full"}),
        (("--stain", "off"), {"random", "histodd", "full"}),
        (("--archs", "convnet-d3:9"), {"random", "histodd", "full"}),
        (("--distill-arch", "convnet-d3:9"), {"histodd"}),
        (("--workers", "2"), set()),
    ],
)
def test_a_changed_option_makes_new_keys_where_it_matters(
    folders: dict[str, Path], tmp_path: Path, more: tuple[str, ...], changed: set[str]
) -> None:
    known = {r["key"] for r in results.read_records(folders["out"])[0]}
    asked = request(folders, tmp_path, *more)
    try:
        current = experiment.Experiment(asked, Progress.silent())
        for cell in cells(asked):
            if cell.method in ("random", "histodd", "full"):
                assert (results.key_of(current.cell_config(cell)) not in known) == (cell.method in changed)
    finally:
        torch.set_num_threads(1)


def test_other_data_make_new_keys(folders: dict[str, Path], tmp_path: Path) -> None:
    known = {r["key"] for r in results.read_records(folders["out"])[0]}
    other = write_imagefolder(tmp_path / "data", seed=1)
    asked = dataclasses.replace(request(folders, tmp_path), data_root=other)
    current = experiment.Experiment(asked, Progress.silent())
    assert not known & {results.key_of(current.cell_config(c)) for c in cells(asked)}


def test_a_saved_set_tells_where_it_comes_from(folders: dict[str, Path]) -> None:
    folder = next((folders["out"] / experiment.SETS).glob("*histodd*-s0-*"))
    saved = sets.load(folder)
    card = saved.card
    assert saved.patches.class_counts() == [2, 2] and saved.patches.images.dtype == torch.float32
    assert (card["dataset"], card["method"], card["ipc"], card["seed"], card["procedural"]) == (
        "imagefolder",
        "histodd",
        2,
        0,
        False,
    )
    assert len(card["preprocessing"]["mean"]) == 3 and card["preprocessing"]["template"]["stain_matrix"]
    assert card["config"]["set"]["fields"]["inner_steps"] == 2 and len(card["key"]) == 64
    assert len(json.loads((folder / "history.json").read_text())) == 3


def test_a_damaged_set_is_made_again_with_the_same_bytes(folders: dict[str, Path], tmp_path: Path) -> None:
    asked = request(folders, tmp_path)
    current = experiment.Experiment(asked, Progress.silent())
    current.make("random", 2, 0)
    (path,) = (tmp_path / experiment.SETS).glob("*/images.safetensors")
    good = path.read_bytes()
    path.write_bytes(good[:-3])
    current.make("random", 2, 0)
    assert path.read_bytes() == good


def test_a_method_that_breaks_its_budget_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    @dataclasses.dataclass(frozen=True)
    class Greedy:
        def __call__(self, train, ipc, pool, seed, *, device, workdir, progress):
            return train.subset(range(ipc + 1))

    current = experiment.Experiment(request(folders, tmp_path), Progress.silent())
    current._methods["random", 2] = Greedy()
    with pytest.raises(Exception, match=r"'random' returned \[3, 0\] patches per class instead of 2 each"):
        current.make("random", 2, 0)
    assert not list((tmp_path / experiment.SETS).glob("*"))


def test_global_generators_are_given_and_taken_back() -> None:
    torch.manual_seed(1)
    np.random.seed(1)
    expected = torch.rand(1).item(), np.random.rand()
    drawn = []
    for before in (3, 4):
        torch.manual_seed(before)
        with environment.own_random("ab" * 32):
            drawn.append((torch.rand(1).item(), np.random.rand()))
    assert drawn[0] == drawn[1]
    torch.manual_seed(1)
    np.random.seed(1)
    with environment.own_random("ab" * 32):
        torch.rand(7)
        np.random.rand(7)
    assert (torch.rand(1).item(), np.random.rand()) == expected


def test_times_add_up_over_restarts(tmp_path: Path) -> None:
    from histodd_bench.stopwatch import stopwatch

    (tmp_path / "seconds").write_text("100.0")
    with stopwatch(tmp_path, lambda: 0.0) as seconds:
        pass
    assert 100.0 <= seconds[0] < 160.0
    apart = [0.0]
    with stopwatch(tmp_path / "b", lambda: apart[0]) as seconds:
        apart[0] = 50.0
    assert seconds[0] < 0


def test_the_paper_preset_is_the_papers() -> None:
    paper = presets.get_preset("paper")
    assert (paper.image_size, paper.distill_arch, paper.archs, paper.seeds) == (256, "resnetap10", ("resnet18",), 5)
    assert paper.eval["epochs"] == 50 and paper.stain == "on" and paper.pool == {"epochs": 10, "networks": 5}
    for ipc, outer in ((10, 200), (20, 500), (50, 1000)):
        fields = paper.method_fields("histodd", ipc, "camelyon16")
        assert (fields["outer_steps"], fields["inner_steps"], fields["image_lr"], fields["alpha"]) == (
            outer,
            100,
            0.5,
            1.0,
        )
    assert paper.method_fields("histodd", 10, "tcga-idh")["image_lr"] == 5e-3
    assert paper.method_fields("histodd", 10, "unitopatho-pt")["image_lr"] == 0.5


def test_auto_is_decided_once_and_the_same_for_a_part_of_the_table(folders: dict[str, Path], tmp_path: Path) -> None:
    def policy(*more: str, **asked: str) -> StainPolicy:
        current = request(folders, tmp_path, "--stain", "auto", *more, **asked)
        small = dataclasses.replace(current.preset, widths={"convnet-d3": 8}, ipc=(2,))
        return experiment.Experiment(dataclasses.replace(current, preset=small), Progress.silent()).stain

    first = policy(ipc="2,3")
    assert set(first.scores) == set(STAIN_POLICIES)
    assert first.chosen.startswith("auto: chosen on training slides only")
    assert (first.train, first.test) in STAIN_POLICIES.values()
    assert policy("--methods", "full", "--archs", "convnet-d3:9", ipc="4") == first
    assert policy("--set", "eval.stain_train=0.25").train == 0.25
    named = policy("--set", "eval.stain_train=0.25", "--set", "eval.stain_test=true")
    assert (named.train, named.test, named.scores) == (0.25, True, {})
