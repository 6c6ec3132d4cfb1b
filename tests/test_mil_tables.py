"""Tables 4 and 5 on tiny slides: every cell once, nothing computed twice, and grids that say what they hold."""

import csv
import json
from functools import partial
from pathlib import Path

import pytest
import torch
from tiny_slides import arguments, write_slides

from histodd_bench import cli, compare, options, render, report, results
from histodd_bench.engines import Engine
from histodd_bench.grid import Value
from histodd_bench.mil.layout import table4_grids
from histodd_bench.mil.layout_transfer import GAIN, table5_grids
from histodd_bench.mil.table5 import Transfer, TransferCell, _make_patch_sets
from histodd_bench.mil.work import make_sets
from histodd_bench.progress import Progress
from histodd_bench.tables import TABLES

pytest.importorskip("nystrom_attention", reason="slide-level models need the group 'mil'")
MODELS = "clam-sb,transmil"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Data, a cache, and both tables run once; tests may read them but not change them."""
    base = tmp_path_factory.mktemp("tables")
    made = {"data": write_slides(base / "data"), "cache": base / "cache", "out": base / "out"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HISTODD_CACHE", str(made["cache"]))
        assert cli.main(command("table4", made, "--mil", MODELS)) == 0
        assert cli.main(command("table5", made)) == 0
    return made


@pytest.fixture(autouse=True)
def same_cache(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HISTODD_CACHE", str(folders["cache"]))


def command(table: str, folders: dict[str, Path], *more: str) -> list[str]:
    return arguments(f"run {table}", folders["data"], folders["out"], "--ipc", "2,5", "--seeds", "1", "--eval-seeds", "2",
                     "--workers", "1", *more)  # fmt: skip


def transfer(folders: dict[str, Path], out: Path) -> Transfer:
    line = command("table5", {**folders, "out": out})
    request = cli.make_requests(options.make_parser(cli.COMMANDS).parse_args(line), TABLES["table5"], out)[0]
    return Transfer(request, request.slides, Progress.silent())


def of(folders: dict[str, Path], level: str) -> list[results.Record]:
    records, ignored = results.read_records(folders["out"])
    assert ignored == []
    return [r for r in records if r["config"]["level"] == level]


def test_table4_has_one_record_per_cell(folders) -> None:
    records = of(folders, "slide")
    assert len(records) == 2 * (3 * 2 * 2 + 2)  # models x (sets x budgets x training seeds + Full)
    one = next(r for r in records if r["method"] == "histodd" and r["ipc"] == 5)
    assert one["storage"]["count"] == 4 * 8 + 2 * 4 and one["storage"]["capped_slides"] == 6, (
        "all a slide has, never more"
    )
    assert one["storage"]["slides"] == 6 and one["seconds"]["per_slide"] > 0
    assert one["data"]["train_slides"] == [2, 4] and one["data"]["bag_sizes"] == [4, 8, 8]
    assert "SimCLR: self-supervised" in one["config"]["eval"]["encoder"]["title"]
    probabilities = results.unpack(one["predictions"]["probabilities"])
    labels = results.unpack(one["predictions"]["labels"])
    assert probabilities.shape == (4, 2) and one["predictions"]["slides"] == [f"test-s{i}" for i in range(4)]
    assert one["metrics"]["accuracy"] == pytest.approx((probabilities.argmax(1) == labels).mean())
    assert labels.tolist() == [1, 1, 0, 1], "a slide with one tumour patch is positive"


def test_table4_grid(folders) -> None:
    (grid,) = table4_grids(TABLES["table4"], of(folders, "slide") + of(folders, "transfer"))
    assert grid.columns == ["CLAM-SB", "TransMIL"]
    accuracy = [(row.ipc, row.label) for row in grid.rows if row.block == "Accuracy %"]
    assert accuracy == [*((i, m) for i in "25" for m in ("Histo-DD", "Random", "Herding")), ("", "Full")]
    times = next(r for r in grid.rows if r.block == "Patches in all bags" and (r.ipc, r.label) == ("2", "Random"))
    assert [c.mean for c in times.cells] == [20, 20] and all(c.n == 2 for c in times.cells)
    notes = " ".join(grid.notes)
    assert "Encoder: convnet-d3 (width 8), SimCLR" in notes and "Never more than a slide has" in notes
    for text in (render.markdown([grid]), render.latex([grid]), render.as_csv([grid]), render.rich([grid])):
        assert "Histo-DD" in text and " nan" not in text.lower()


def test_table5_has_both_levels_and_both_directions(folders) -> None:
    records = of(folders, "transfer")
    assert len(records) == 2 * 2 * (2 + 3 * 2 * 2 + 2)  # directions x levels x (none + sets + Full)
    directions = {(r["config"]["source"], r["config"]["target"]) for r in records}
    assert directions == {("A", "B"), ("B", "A")}
    none = [r for r in records if r["method"] == "none"]
    assert all(r["metrics"]["epochs"] == 1 and r["storage"]["count"] == 0 for r in none), (
        "rehearsal on own slides alone"
    )
    moved = [r for r in records if r["method"] != "none"]
    assert all(r["metrics"]["epochs"] == 1 and r["metrics"]["pretrain_seconds"] > 0 for r in moved)
    made = next(r for r in moved if r["method"] == "histodd" and r["config"]["eval"]["at"] == "patch")
    assert made["config"]["set"]["fields"]["networks"] == "pool", "trained networks are matched"
    full = next(r for r in moved if r["method"] == "full" and r["config"]["source"] == "A")
    # A holds slides 0, 2, 4, of which slide 2 shows one class
    assert full["storage"]["count"] == 8 + 4 + 8 and full["data"]["train_patches"] == 8 + 8 + 4


def test_no_transfer_is_where_every_fine_tuning_starts(folders) -> None:
    """The same target model, whatever the source: without transfer both directions into a target agree by seed."""
    from histodd_bench.files import read_state

    states = set((folders["cache"] / "transfer").glob("*.pt"))
    assert len(states) == 2 * 2 * 2  # targets x levels x training seeds
    assert all("model" in read_state(p) for p in states)


def test_without_rehearsal_nothing_is_trained_where_nothing_is_shared(folders, tmp_path) -> None:
    """The paper's way: the target's model as it is, or fine-tuned on what was shared and on nothing else."""
    out = tmp_path / "out"
    alone = command(
        "table5", {**folders, "out": out}, "--set", "transfer.rehearsal=false", "--methods", "full",
        "--set", "eval.min_steps=10",  # of trainings from scratch: a fine-tuning stays transfer.epochs long
    )  # fmt: skip
    assert cli.main(alone) == 0
    records, _ = results.read_records(out)
    assert {(r["method"], r["metrics"]["epochs"]) for r in records} == {("none", 0), ("full", 1)}
    assert {r["key"] for r in records}.isdisjoint(r["key"] for r in of(folders, "transfer"))
    (grid, _) = table5_grids(TABLES["table5"], records)
    seconds = next(r for r in grid.rows if r.block.startswith("Fine-tuning time") and r.label == "No transfer")
    assert seconds.cells == ["", ""], "nothing is trained: empty, not missing"
    assert "('No transfer': not at all)" in " ".join(grid.notes)


def test_a_target_model_of_another_torch_is_trained_again(folders, tmp_path, monkeypatch) -> None:
    """Like the pool's networks and the SimCLR encoder: what another version trained is not read."""
    monkeypatch.setattr(torch, "__version__", "0.0-other")
    monkeypatch.setenv("HISTODD_CACHE", str(tmp_path / "cache"))
    current = transfer(folders, tmp_path)
    before = {p.name for p in (folders["cache"] / "transfer").glob("*.pt")}
    current.trained(TransferCell("patch", "A", "B", "none", None, None, 0, "convnet-d3"))
    (made,) = (tmp_path / "cache" / "transfer").glob("*.pt")
    assert made.name not in before


def test_a_target_model_that_diverges_is_neither_kept_nor_scored(folders, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("HISTODD_CACHE", str(tmp_path / "cache"))
    line = arguments("run table5", folders["data"], tmp_path / "out", "--ipc", "2", "--seeds", "1", "--eval-seeds", "1",
                     "--workers", "1", "--methods", "full", "--set", "eval.lr=1e8", "--set", "eval.epochs=20")  # fmt: skip
    assert cli.main(line) == 1
    assert "training convnet-d3 diverged" in (errors := capsys.readouterr().err) and "(eval.lr=1e+08)" in errors
    assert {r["arch"] for r in results.read_records(tmp_path / "out")[0]} == {"clam-sb"}, "all others are done"


def test_sets_that_are_there_start_no_worker(folders, tmp_path, monkeypatch) -> None:
    current = transfer(folders, folders["out"])
    engine = Engine("local", 2, "cpu", tmp_path / "work")
    refuse = partial(pytest.fail, "a worker was started")
    _make_patch_sets(current, ("A", "B"), engine, refuse)
    make_sets(current.slides("A", "A").distiller("histodd"), (2, 5), (0,), engine, Progress.silent())


def test_table5_grids(folders) -> None:
    grids = table5_grids(TABLES["table5"], of(folders, "transfer") + of(folders, "slide"))
    assert [g.title.rpartition(", ")[2] for g in grids] in (["A => B", "B => A"], ["B => A", "A => B"])
    for grid in grids:
        assert grid.columns == ["Patches, convnet-d3 (width 8)", "Slides, CLAM-SB"]
        rows = [(row.ipc, row.label) for row in grid.rows if row.block == "Accuracy %"]
        sets = [(i, m) for i in "25" for m in ("Histo-DD", "Random", "Herding")]
        assert rows == [("", "No transfer"), *sets, ("", "Full")]
        assert "paper's text" in " ".join(grid.notes)
        seconds = next(r for r in grid.rows if r.block.startswith("Fine-tuning time") and r.label == "No transfer")
        assert all(c.n == 2 for c in seconds.cells)
        assert "on those alone, for as many epochs" in " ".join(grid.notes)
        gains = [c for row in grid.rows if row.block == GAIN for c in row.cells]
        assert gains and set(gains) == {"undefined"}, "of two test slides nothing can be told"
        assert not [r for r in grid.rows if None in r.cells]


def test_a_second_run_computes_nothing(folders, capsys) -> None:
    stamps = {p: p.stat().st_mtime_ns for p in folders["out"].rglob("records/*.json")}
    stamps |= {p: p.stat().st_mtime_ns for p in folders["out"].rglob("slides/*/*.safetensors")}
    assert cli.main(command("table4", folders, "--mil", MODELS)) == 0
    assert "all 28 cells are finished already" in capsys.readouterr().err
    assert {p: p.stat().st_mtime_ns for p in stamps} == stamps


def test_a_lost_record_is_computed_again_to_the_same_predictions(folders) -> None:
    lost = next(r for r in of(folders, "slide") if r["method"] == "herding")
    path = folders["out"] / "records" / results.file_name(lost)
    path.unlink()
    assert cli.main(command("table4", folders, "--mil", MODELS)) == 0
    again = results.read_record(path)
    assert again["predictions"] == lost["predictions"]
    for name in ("accuracy", "balanced_accuracy", "final_loss"):
        assert again["metrics"][name] == lost["metrics"][name]


def changed(records: list[results.Record], **fields) -> list[results.Record]:
    """The same records as if their training had been another: ``eval__epochs=9`` or ``eval__model__lr=0.01``."""
    made = json.loads(json.dumps(records))
    for record in made:
        for name, value in fields.items():
            *path, leaf = name.split("__")
            part = record["config"]
            for step in path:
                part = part[step]
            assert part[leaf] != value
            part[leaf] = value
        record["key"] = results.key_of(record["config"])
    return made


def numbers(grid) -> list[int]:
    return [c.n for row in grid.rows if row.block == "Accuracy %" for c in row.cells if isinstance(c, Value)]


def test_trainings_that_differ_stand_apart_in_table4(folders) -> None:
    records = of(folders, "slide")
    clam = [r for r in records if r["arch"] == "clam-sb"]
    (grid,) = table4_grids(TABLES["table4"], records + changed(clam, eval__model__lr=0.01))
    assert grid.columns == ["CLAM-SB (lr=0.0002)", "CLAM-SB (lr=0.01)", "TransMIL"]
    assert set(numbers(grid)) == {2}, "never a mean over both"
    assert "CLAM-SB (lr=0.01): adam 0.01, width 16" in " ".join(grid.notes)
    both = records + changed(clam, eval__epochs=9, eval__cosine=True)
    titles = [g.title.removeprefix("Table 4: slide classification with multiple instance learning: ")
              for g in table4_grids(TABLES["table4"], both)]  # fmt: skip
    assert titles == ["imagefolder (cosine=False, epochs=2)", "imagefolder (cosine=True, epochs=9)"]
    other = changed(records, eval__encoder__key="f" * 64)  # another file of weights by the same name
    titles = [g.title for g in table4_grids(TABLES["table4"], records + other)]
    assert len(set(titles)) == 2 and titles[1].endswith("(encoder.key=ffffffff)")


def test_trainings_that_differ_stand_apart_in_table5(folders) -> None:
    records = of(folders, "transfer")
    patches = [r for r in records if r["config"]["eval"]["at"] == "patch"]
    for grid in table5_grids(TABLES["table5"], records + changed(patches, eval__epochs=9)):
        name = "Patches, convnet-d3 (width 8)"
        assert grid.columns == [f"{name} (epochs=2)", f"{name} (epochs=9)", "Slides, CLAM-SB"]
        assert set(numbers(grid)) == {2}
    (grid, *_) = table5_grids(TABLES["table5"], records + changed(patches, eval__fine_lr=0.5))
    assert grid.columns[:2] == [f"{name} (fine_lr=0.001)", f"{name} (fine_lr=0.5)"]
    longer = changed(records, transfer__epochs=7)
    titles = [g.title.partition(" => ")[2] for g in table5_grids(TABLES["table5"], records + longer)]
    assert sorted(titles) == [f"{t} (transfer.epochs={n})" for t in "AB" for n in (1, 7)]


def test_changed_options_make_new_records(folders, tmp_path) -> None:
    line = arguments("run table4", folders["data"], tmp_path / "out", "--ipc", "2", "--seeds", "1", "--eval-seeds", "1", "--workers", "1",
                     "--methods", "random", "--mil", "abmil")  # fmt: skip
    assert cli.main(line) == 0
    assert cli.main([*line, "--set", "mil.lr=0.01"]) == 0
    assert cli.main([*line, "--encoder", "resnet50", "--encoder-weights", "random", "--image-size", "32"]) == 0
    records, _ = results.read_records(tmp_path / "out")
    assert len(records) == 3 and len({r["key"] for r in records}) == 3
    assert {r["config"]["eval"]["encoder"]["title"] for r in records} >= {"ResNet50 to its third stage, random weights"}


@pytest.mark.parametrize("form", cli.FORMATS)
def test_show_prints_both_tables_without_computing(folders, capsys, form) -> None:
    for table, word in (("table4", "CLAM-SB"), ("table5", "Patches shared")):
        assert cli.main(["show", table, "--out", str(folders["out"]), "--format", form]) == 0
        text = capsys.readouterr().out
        if form == "json":
            assert json.loads(text)
        else:
            assert word in text and "Histo-DD" in text and " nan" not in text.lower()
    assert cli.main(["show", "table1", "--out", str(folders["out"])]) == 0
    assert "no results" in capsys.readouterr().err, "slide-level records are not patch-level results"


def test_csv_has_budgets_and_sets_in_columns_of_their_own(folders) -> None:
    rows = list(csv.DictReader((folders["out"] / "table4.csv").open()))
    assert {(r["ipc"], r["row"]) for r in rows} >= {("2", "Histo-DD"), ("5", "Herding"), ("", "Full")}


def test_the_report_has_both_tables(folders, tmp_path) -> None:
    text = report.write_report(folders["out"], tmp_path / "page.html").read_text()
    for words in ("TransMIL", "imagefolder, A =&gt; B", "22.0 (x1.07)", "1e-3 GB", "87.5 ± 0.6", "No transfer"):
        assert words in text, words
    assert (tmp_path / "table5.tex").is_file() and "Table 1:" not in text
    assert "cells. <progress" not in text, "all are finished"


def test_compare_matches_slide_level_cells(folders, tmp_path) -> None:
    same = compare.compare(folders["out"], folders["out"])
    assert same.changes and not same.only_a and not same.only_b and all(c.difference == 0 for c in same.changes)
    assert {c.how for c in same.changes if c.metric.startswith("accuracy")} == {"seeds"}, "four test slides are too few to draw from"
    directions = {
        c.cell.partition("(table5: ")[2]
        for c in same.changes
        if c.cell.startswith("imagefolder, clam-sb (width 16), full")
    }
    assert {"A => B, Slides)", "B => A, Slides)"} <= directions
    changed = arguments("run table4", folders["data"], tmp_path / "out", "--ipc", "2", "--seeds", "1", "--eval-seeds", "2",
                        "--workers", "1", "--methods", "random,full", "--mil", "clam-sb", "--set", "mil.lr=0.01")  # fmt: skip
    assert cli.main(changed) == 0
    found = compare.compare(folders["out"], tmp_path / "out")
    assert ("0.0002", "0.01") in found.configuration["eval.model.lr"] and not found.only_b
    for text in (form(found) for form in compare.FORMATS.values()):
        assert "clam-sb" in text


def test_every_cell_was_asked_for(folders) -> None:
    plan, (records, _) = results.read_plan(folders["out"]), results.read_records(folders["out"])
    assert {k for table in plan.values() for k in table["imagefolder"]["cells"]} == {r["key"] for r in records}


def test_a_dry_run_of_a_slide_level_table_says_that_it_projects_nothing(folders, tmp_path, capsys) -> None:
    line = arguments("run table4", folders["data"], tmp_path / "out", "--dry-run")
    assert cli.main(line) == 0 and "distill-slides --slides" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--mil", "clam"), "unknown slide-level model 'clam'"),
        (("--encoder", "resnet-50"), "unknown encoder 'resnet-50': did you mean 'resnet50'?"),
        (("--set", "mil.epoch=3"), "did you mean 'epochs'?"),
        (("--set", "transfer.epochs=0"), "transfer.epochs must be at least 1"),
        (("--set", "transfer.lr=0"), "transfer.lr must be above 0, got 0"),
        (("--set", "transfer.slide_lr=-1"), "transfer.slide_lr must be above 0, got -1"),
        (("--set", "mil.lr=0"), "mil.lr must be above 0"),
        (("--set", "mil.weight_decay=-1"), "mil.weight_decay must not be negative"),
        (("--set", "mil.dropout=1"), "mil.dropout must be at least 0 and below 1"),
        (("--set", "mil.width=0"), "mil.width must be above 0"),
        (("--set", "eval.lr=0"), "eval.lr must be above 0, got 0"),
        (("--set", "pool.lr=-0.1"), "pool.lr must be above 0, got -0.1"),
        (("--encoder", "pool", "--encoder-weights", "random"), "leave out --encoder-weights"),
        (("--encoder", "resnet50", "--encoder-weights", "absent.pth"), "absent.pth: no such file"),
        (("--encoder", "torchvision:vit_b_16", "--encoder-weights", "random"), "cannot read patches of 16 px"),
        (("--engine", "lokal"), "unknown engine 'lokal': did you mean 'local'?"),
        (("--engine-option", "a=1"), "the local engine has no option 'a'"),
        (("--engine", "slurm", "--engine-option", "cluster=nowhere"), "executor named nowhere"),
    ],
)
def test_impossible_requests(folders, tmp_path, capsys, monkeypatch, more, says) -> None:
    """Refused with one line, before anything is read or written."""
    monkeypatch.setenv("HISTODD_CACHE", str(tmp_path / "cache"))
    table = "table5" if "transfer" in more[-1] else "table4"
    line = arguments(
        f"run {table}",
        folders["data"],
        tmp_path,
        "--ipc",
        "2",
        "--seeds",
        "1",
        "--methods",
        "full",
        "--workers",
        "1",
        *more,
    )
    assert cli.main(line) == 2
    captured = capsys.readouterr()
    assert says in captured.err and captured.out == "" and len(captured.err.splitlines()) == 1
    assert not list(tmp_path.iterdir())
