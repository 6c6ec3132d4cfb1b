"""Every table runs, shares its cells with the others, continues after an interruption and says what it shows."""

import csv
import dataclasses
import io
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from made_up_records import record
from tiny_project import OPTIONS

from histodd_bench import cli, experiment, layout, notes, options, placement, presets, render, results, sets
from histodd_bench.augment import OPERATIONS
from histodd_bench.continual import TaskSequence
from histodd_bench.progress import Progress
from histodd_bench.request import Cell, cells, changes_of
from histodd_bench.running import sequence_requests
from histodd_bench.tables import TABLES, Column, Times, declaration


@pytest.fixture(autouse=True)
def same_cache(all_tables: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HISTODD_CACHE", str(all_tables["cache"]))


def arguments(all_tables: dict[str, Path], table: str, *more: str) -> list[str]:
    return ["run", table, "--dataset", "imagefolder", "--data-root", str(all_tables["data"]), "--out", str(all_tables["out"]),
            "--ipc", "2", "--seeds", "1", "--eval-seeds", "2", *OPTIONS, "--archs", "convnet-d3:8,vit:8", *more]  # fmt: skip


def requests(all_tables: dict[str, Path], table: str, *more: str):
    args = options.make_parser(cli.COMMANDS).parse_args(arguments(all_tables, table, *more))
    return cli.make_requests(args, TABLES[table], all_tables["out"])


def grids(all_tables: dict[str, Path], table: str) -> list[layout.Grid]:
    records, ignored = results.read_records(all_tables["out"])
    plan = results.read_plan(all_tables["out"])
    assert not ignored
    return layout.grids(TABLES[table], records, plan[table], results.claimed(plan, but=table))


PATCH_LEVEL = [name for name, table in TABLES.items() if table.kind != "slides"]  # the others have tests of their own


def test_run_all_leaves_out_what_the_slides_do_not_allow(all_tables: dict[str, Path]) -> None:
    assert set(results.read_plan(all_tables["out"])) == set(PATCH_LEVEL)
    assert not list(all_tables["out"].glob("table4.*"))


@pytest.mark.parametrize("name", PATCH_LEVEL)
def test_no_cell_is_left_open(all_tables: dict[str, Path], name: str) -> None:
    made = grids(all_tables, name)
    assert made
    for grid in made:
        assert grid.rows and not [r for r in grid.rows if None in r.cells]
        assert (all_tables["out"] / f"{name}.md").read_text() == render.markdown(made)


def test_every_cell_was_asked_for_by_a_table_and_shared_ones_were_computed_once(all_tables: dict[str, Path]) -> None:
    records, _ = results.read_records(all_tables["out"])
    plan = results.read_plan(all_tables["out"])
    asked = {name: {k for d in part.values() for k in d.get("cells", ())} for name, part in plan.items()}
    assert set().union(*asked.values()) == {r["key"] for r in records}
    assert asked["table1"] == asked["fig1"]  # with the same networks and budgets
    assert asked["table3"] < asked["table1"] and len(asked["table1"] - asked["table3"]) == 4, "all but Forgetting"
    assert asked["table1"] & asked["fig2"], "the preset's own K, U and rate are those of Table 1"
    # 2 networks x 2 evaluation seeds: 4 methods and Full; 5 augmentations, one also as it was distilled; fig2: 12 places, of
    # which 3 are the preset; supp2: 6
    assert len(asked["table1"]) == 4 * 4 + 4
    assert len(asked["table2"]) == 4 * (6 + 5)
    assert len(asked["supp2"]) == 4 * 6
    assert len(asked["fig3"]) == 2 * 4 * 3


def test_a_second_run_computes_nothing(all_tables: dict[str, Path]) -> None:
    def times() -> dict[Path, int]:
        return {p: p.stat().st_mtime_ns for p in (all_tables["out"] / results.RECORDS).iterdir()}

    before = times()
    for name in ("table2", "fig3", "supp2"):
        assert cli.main(arguments(all_tables, name)) == 0
    assert times() == before


def test_tables_show_only_what_was_asked_of_them(all_tables: dict[str, Path]) -> None:
    for grid in grids(all_tables, "table1"):
        assert grid.columns == ["Random", "Herding", "Forgetting", "Histo-DD", "Full"]
    shown = grids(all_tables, "table2")
    assert len(shown) == 2  # one for each network, though the recipes of the columns differ
    assert shown[0].columns == ["None", "Stain Norm", "Rotate", "Flip", "Scale", "All"]
    assert [r.label for r in shown[0].rows[:2]] == ["trained on it with all", "trained on it with the same"]


def test_columns_fix_their_fields(all_tables: dict[str, Path]) -> None:
    assert declaration.OPERATIONS == OPERATIONS
    records = {r["key"]: r for r in results.read_records(all_tables["out"])[0]}
    placed = results.read_plan(all_tables["out"])["table2"]["imagefolder"]["cells"]
    for key, places in placed.items():
        config = records[key]["config"]
        for row, title in places:
            augment = config["set"]["fields"]["augment"]
            expected = {"None": [], "Stain Norm": ["stain"], "All": list(OPERATIONS)}.get(title, [title.lower()])
            assert augment == expected and config["set"]["fields"]["stain_probability"] == 1.0
            told = config["eval"]["augment"] + (["stain"] if config["eval"]["stain_train"] == 1.0 else [])
            assert sorted(told) == sorted(OPERATIONS if row.endswith("all") else expected)
            assert config["eval"]["stain_test"] == ("stain" in told)


def test_normalisation_beforehand_changes_the_training_data_and_nothing_else(all_tables: dict[str, Path]) -> None:
    records, _ = results.read_records(all_tables["out"])
    pre = [r for r in records if r["config"]["data"].get("stain_pre")]
    plain = [r for r in records if r["dataset"] == "imagefolder" and not r["config"]["data"].get("stain_pre")]
    assert len(pre) == 2 * 4
    assert {r["config"]["data"]["train"] for r in pre}.isdisjoint({r["config"]["data"]["train"] for r in plain})
    assert {r["config"]["data"]["test"] for r in pre} == {r["config"]["data"]["test"] for r in plain}
    assert all("stain" not in r["config"]["set"]["fields"]["augment"] for r in pre)


def test_the_normalised_set_is_what_a_normaliser_gives(all_tables: dict[str, Path]) -> None:
    from histodd_bench.stain import MacenkoNormalizer

    current = experiment.Experiment(requests(all_tables, "supp2")[0], Progress.silent())
    train, _ = current.training_data((("data", "stain_pre", True),))
    before = current.dataset.train
    expected = MacenkoNormalizer(current.preprocessing.template).normalize(before.images)
    assert (train.images.float() / 255 - expected).abs().max() <= 0.5 / 255 + 1e-6
    assert torch.equal(train.labels, before.labels) and train.class_counts() == before.class_counts()
    names = [train.group_names[g] for g in train.groups], [before.group_names[g] for g in before.groups]
    assert names[0] == names[1]


def test_relative_fields_follow_preset_and_command_line(all_tables: dict[str, Path]) -> None:
    column = Column(
        "x", "histodd", {"histodd": {"outer_steps": Times(0.5), "image_lr": Times(0.5)}}, "K = {outer_steps}"
    )
    asked = requests(all_tables, "fig2", "--set", "histodd.outer_steps=8", "--set", "histodd.image_lr=0.1")[0]
    current = experiment.Experiment(dataclasses.replace(asked, columns=(column,)), Progress.silent())
    method = current.method("histodd", 2, changes_of(column))
    assert (method.outer_steps, method.image_lr) == (4, 0.05) and isinstance(method.outer_steps, int)
    assert placement.rows(current) == ["K = 4"]
    assert Times(0.01).of(3) == 1, "never none at all"


def test_a_changed_field_touches_only_its_cells(all_tables: dict[str, Path]) -> None:
    known = {r["key"] for r in results.read_records(all_tables["out"])[0]}

    def new(table: str, *more: str) -> set[tuple[str, ...]]:
        current = experiment.Experiment(requests(all_tables, table, *more)[0], Progress.silent())
        return {c.method for c in cells(current.request) if results.key_of(current.cell_config(c)) not in known}

    assert new("table3") == set()
    assert new("table3", "--set", "histodd.alpha=0.7") == {"histodd"}
    assert new("table2", "--set", "herding.epochs=9") == set()
    # the column's own field wins over the command line
    assert new("table2", "--set", "histodd.augment=flip") == set()


def test_networks_side_by_side_with_the_speed_against_full(all_tables: dict[str, Path]) -> None:
    (grid,) = grids(all_tables, "table3")
    assert grid.columns == ["convnet-d3 (width 8)", "vit (width 8)"] and grid.head == "Method"
    labels = list(dict.fromkeys(r.label for r in grid.rows if r.block == "Accuracy %"))
    assert labels == ["Histo-DD", "Random", "Herding", "Full"]
    full = {r.block: r for r in grid.rows if r.label == "Full"}
    mine = {r.block: r for r in grid.rows if r.label == "Histo-DD"}
    seconds = "Training time per epoch, s"
    for whole, part in zip(full[seconds].cells, mine[seconds].cells, strict=True):
        assert isinstance(whole, layout.Value) and isinstance(part, layout.Value)
        assert part.times == pytest.approx(whole.mean / part.mean) and whole.times is None
    assert full["Accuracy %"].ratio == "100"
    interval = mine["Accuracy, points above the best coreset"].cells[0]
    assert isinstance(interval, layout.Interval) and interval.low <= interval.value <= interval.high
    accuracy = {r.label: r.cells[0] for r in grid.rows if r.block == "Accuracy %"}
    best = max((accuracy[n].mean, n) for n in ("Random", "Herding"))  # type: ignore[union-attr]
    assert accuracy[interval.against].mean == best[0]  # type: ignore[union-attr]
    assert interval.value == pytest.approx(accuracy["Histo-DD"].mean - best[0])  # type: ignore[union-attr]


def test_the_paper_stands_beside_table_3(all_tables: dict[str, Path]) -> None:
    asked = results.read_plan(all_tables["out"])["table3"]["imagefolder"]["cells"]
    records = [{**r, "dataset": "camelyon16", "arch": "resnet18"} for r in results.read_records(all_tables["out"])[0]
               if r["arch"] == "convnet-d3" and r["method"] in ("histodd", "full") and r["key"] in asked]  # fmt: skip
    for r in records:
        r["ipc"] = r["ipc"] and 10
    grid = max(layout.grids(TABLES["table3"], records), key=lambda g: len(g.rows))
    printed = [(r.block, r.label, r.ipc, render.number(r.cells[0])) for r in grid.rows if r.source == "paper"]
    assert printed == [
        ("Accuracy %", "Histo-DD", "10", "87.8 ± 0.1"),
        ("Accuracy %", "Full", "", "95.8 ± 0.1"),
        ("Training time per epoch, s", "Histo-DD", "10", "0.23 (x7043)"),
        ("Training time per epoch, s", "Full", "", "1620"),
    ]


def test_accounting_adds_up(all_tables: dict[str, Path]) -> None:
    records, _ = results.read_records(all_tables["out"])
    for r in records:
        s, m = r["seconds"], r["metrics"]
        assert 0 < s["loading"] < 1 and s["computing"] == pytest.approx(max(m["epoch_seconds"] - s["loading"], 0))
        assert r["memory"]["training"] is None or r["memory"]["training"] > 50 * 2**20
        assert r["environment"]["workers"] == 1


def test_a_set_has_paid_for_itself_after_what_it_cost_over_what_it_saves() -> None:
    made = [
        record(0.7, method="histodd"),
        record(0.7, method="random"),
        record(0.8, method="full"),
        record(0.7, arch="vit"),
    ]
    made[1]["metrics"]["epoch_seconds"] = 5.0  # slower than the whole set: never
    (grid,) = [g for g in layout.grids(TABLES["table1"], made) if g.arch.startswith("convnet")]
    rows = {r.block: dict(zip(grid.columns, r.cells, strict=True)) for r in grid.rows}
    pay = rows["Epochs after which it has paid for itself"]
    assert isinstance(pay["Histo-DD"], layout.Value) and pay["Histo-DD"].mean == pytest.approx(2.5 / (4.0 - 0.05))
    assert pay["Random"] == "" and pay["Full"] == ""


def test_csv_has_rows_and_intervals(all_tables: dict[str, Path]) -> None:
    rows = list(csv.DictReader(io.StringIO(render.as_csv(grids(all_tables, "table3")))))
    found = [r for r in rows if r["metric"].endswith("above the best coreset")]
    assert found and all(
        float(r["low"]) <= float(r["mean"]) <= float(r["high"]) and r["row"] == "Histo-DD" for r in found
    )


def test_statistics_count_patches_and_slides(all_tables: dict[str, Path]) -> None:
    (grid,) = grids(all_tables, "supp1")
    counts = {r.label: [c.mean for c in r.cells] for r in grid.rows}  # type: ignore[union-attr]
    assert counts == {"all": [24, 12, 4, 6], "class0": [12, 6, 4, 6], "class1": [12, 6, 4, 6]}
    facts = {"procedural": False, "notes": [], "counts": {"all": [1066988, 567510, 270, 129]}}
    made = layout.grids(TABLES["supp1"], [], {"camelyon16": {"facts": facts}})
    assert [(r.source, r.cells) for r in made[0].rows[1:]] == [("paper", ["1,066,988", "567,510", "270", "129"])]
    assert "*1,066,988*" in render.markdown(made)


def test_stages_are_parts_of_a_single_data_set_or_the_data_sets_named(all_tables: dict[str, Path]) -> None:
    one = requests(all_tables, "fig3")
    assert [r.dataset for r in sequence_requests(one)] == ["imagefolder@1of2", "imagefolder@2of2"]
    two = [one[0], dataclasses.replace(one[0], dataset="demo")]
    assert [r.dataset for r in sequence_requests(two)] == ["imagefolder", "demo"]
    experiments = [experiment.Experiment(r, Progress.silent()) for r in sequence_requests(one)]
    trains = [set(e.dataset.train.group_names) for e in experiments]
    assert trains[0].isdisjoint(trains[1]) and len(trains[0] | trains[1]) == 4
    assert TaskSequence(experiments).row(2) == "2. + imagefolder@2of2"


def test_the_memory_of_a_stage_is_the_sets_of_the_tables(all_tables: dict[str, Path]) -> None:
    folders = {p.name.split("-")[0] for p in (all_tables["out"] / "sets").iterdir() if "@" in p.name}
    assert folders == {"imagefolder@1of2", "imagefolder@2of2"}
    records = [r for r in results.read_records(all_tables["out"])[0] if ">" in r["dataset"]]
    second = next(r for r in records if r["config"]["set"]["stages"] == 2 and r["method"] == "random")
    assert second["data"]["classes"] == [f"imagefolder@{k}of2: class{c}" for k in (1, 2) for c in (0, 1)]
    assert second["storage"]["count"] == 2 * 2 * 2
    assert results.unpack(second["predictions"]["probabilities"]).shape == (12, 4)
    assert set(np.unique(results.unpack(second["predictions"]["labels"]))) == {0, 1, 2, 3}
    first = next(r for r in records if r["config"]["set"]["stages"] == 1 and r["method"] == "random")
    assert first["metrics"]["accuracy"] == first["metrics"]["masked_accuracy"], "one task: nothing to mask"
    for r in records:
        assert r["metrics"]["masked_accuracy"] >= r["metrics"]["accuracy"] - 1e-9


def test_several_tables_at_once_and_unknown_ones(
    capsys: pytest.CaptureFixture[str], all_tables: dict[str, Path]
) -> None:
    assert cli.main(["run", "table1,tabel2"]) == 2
    assert "unknown table 'tabel2': did you mean 'table2'" in capsys.readouterr().err
    assert cli.main(arguments(all_tables, "table1,supp1", "--dry-run")) == 0
    out = capsys.readouterr().out
    assert out.startswith("table1\n") and "supp1\n" in out and "nothing is computed but counts" in out


@pytest.mark.parametrize("preset", list(presets.PRESETS))
def test_what_tables_ask_instead_of_the_preset_is_known(preset: str) -> None:
    for table in TABLES.values():
        asked = table.options.get(preset, {})
        assert set(asked) <= {"archs", "ipc", "seeds", "eval_seeds", "stain", "threads"}
        for arch in asked.get("archs", ()):
            presets.parse_arch(arch, {})
        assert asked.get("stain", "auto") in presets.STAIN


def test_show_prints_other_tables(all_tables: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["show", "table2", "--format", "csv", "--out", str(all_tables["out"])]) == 0
    assert "trained on it with the same" in capsys.readouterr().out


def test_a_cell_of_another_table_alone_equals_the_cell(all_tables: dict[str, Path], tmp_path: Path) -> None:
    asked = dataclasses.replace(requests(all_tables, "table2")[0], out=tmp_path)
    current = experiment.Experiment(asked, Progress.silent())
    column = next(c for c in TABLES["table2"].columns if c.title == "Flip")
    made = current.cell(Cell("histodd", 2, "vit", 8, 0, 1, changes_of(column)))
    known = {r["key"]: r for r in results.read_records(all_tables["out"])[0]}[made["key"]]
    assert made["predictions"] == known["predictions"]
    (folder,) = (tmp_path / "sets").iterdir()
    assert json.loads((folder / "card.json").read_text())["config"]["set"]["fields"]["augment"] == ["flip"]
    assert torch.equal(
        sets.load(folder).patches.images, sets.load(all_tables["out"] / "sets" / folder.name).patches.images
    )


def test_what_an_epoch_costs_is_taken_apart() -> None:
    """Made-up times of 2 ms a step and 0.5 ms a patch are found again."""
    rows = []
    for ipc, patches in ((10, 20), (20, 40), (50, 100), (None, 6400)):
        steps = -(-patches // 64)
        rows.append({"title": "net", "ipc": ipc, "metrics.epoch_seconds": 0.002 * steps + 0.0005 * patches, "metrics.steps": 50 * steps,
                     "metrics.epochs": 50, "storage.count": patches})  # fmt: skip
    (line,) = notes.epoch_costs(pd.DataFrame(rows))
    assert "about 2 ms for each step and 0.5 ms for each patch" in line
    assert "20 patches are 283 times faster than 6400 (x320 patches)" in line
    assert notes.epoch_costs(pd.DataFrame(rows[:3])) == []


def test_data_sets_can_have_a_folder_each(all_tables: dict[str, Path]) -> None:
    def roots(*given: str) -> list[str]:
        line = ["run", "fig3", "--dataset", "imagefolder,idc,demo", *(t for g in given for t in ("--data-root", g))]
        made = cli.make_requests(options.make_parser(cli.COMMANDS).parse_args(line), TABLES["fig3"], Path("x"))
        return [str(r.data_root) for r in made]

    assert roots("/a") == ["/a", "/a", "None"], "the demo is drawn"
    assert roots("idc=/b", "/a") == ["/a", "/b", "None"]
    assert roots("demo=/c", "/a") == ["/a", "/a", "/c"], "a folder that 'data prepare demo' wrote"
    assert roots("/odd=name")[0] == "/odd=name"
    with pytest.raises(Exception, match="dataset 'imagefolder' reads your files: say where they are with --data-root"):
        roots("idc=/b")


@pytest.mark.parametrize("name", [n for n in PATCH_LEVEL if TABLES[n].kind != "statistics"])
def test_records_find_their_places_without_a_plan(all_tables: dict[str, Path], name: str) -> None:
    """A folder whose plan was lost still shows every number of the table that its declaration can tell apart."""

    def numbers(made: list[layout.Grid]) -> dict[tuple[str, ...], layout.Value]:
        found = {}
        for grid in made:
            for row in grid.rows:
                found.update(
                    {(grid.arch, row.block, row.label, t): c for t, c in zip(grid.columns, row.cells, strict=True)}
                )
        return {k: v for k, v in found.items() if isinstance(v, layout.Value)}

    records, _ = results.read_records(all_tables["out"])
    asked = results.read_plan(all_tables["out"])[name]
    mine = [r for r in records if any(r["key"] in d.get("cells", {}) for d in asked.values())]
    without, planned = numbers(layout.grids(TABLES[name], mine)), numbers(grids(all_tables, name))
    if name == "fig2":  # which of its fields a record varies, only the plan knows
        assert without
    else:
        assert {k: (v.mean, v.n) for k, v in without.items()} == {k: (v.mean, v.n) for k, v in planned.items()}
