"""compare: configurations field by field, matched cells, intervals."""

import csv
import io
import json
from pathlib import Path

import pytest
from made_up_records import record

from histodd_bench import cli, compare, results


def folder(path: Path, records) -> Path:
    for r in records:
        results.write_record(path, r)
    return path


def test_a_changed_field_is_named_with_the_cells_it_touches(tmp_path: Path) -> None:
    a = folder(tmp_path / "a", [record(0.6, seed=s, method=m) for s in (0, 1) for m in ("random", "histodd")])
    b = folder(tmp_path / "b", [record(0.6, seed=s) for s in (0, 1)]
               + [record(0.7 + 0.02 * s, seed=s, method="histodd", fields={"alpha": 0.5}) for s in (0, 1)])  # fmt: skip
    made = compare.compare(a, b)
    assert made.configuration == {"set.fields.alpha": {("null", "0.5"): 1}} and made.same == 1
    changes = {(c.cell, c.metric): c for c in made.changes}
    mine = changes["idc, convnet-d3 (width 64), histodd, 10 per class", "accuracy, points"]
    assert mine.difference == pytest.approx(11.0) and (mine.n_a, mine.n_b) == (2, 2)
    assert mine.how == "seeds" and mine.low == pytest.approx(11 - 1.96 * 100 * (2e-4**0.5) / 2**0.5) and mine.clear
    same = changes["idc, convnet-d3 (width 64), random, 10 per class", "accuracy, points"]
    assert same.difference == 0 and not same.clear


def test_cells_of_one_run_alone_are_listed(tmp_path: Path) -> None:
    a = folder(tmp_path / "a", [record(0.6), record(0.6, ipc=20)])
    b = folder(tmp_path / "b", [record(0.6), record(0.6, method="full")])
    made = compare.compare(a, b)
    assert made.only_a == ["idc, convnet-d3 (width 64), random, 20 per class"]
    assert made.only_b == ["idc, convnet-d3 (width 64), full"]


def test_several_variants_are_matched_by_likeness(tmp_path: Path) -> None:
    fields = [{"augment": [op], "alpha": 0.1} for op in ("flip", "rotate")]
    a = folder(tmp_path / "a", [record(0.6 + 0.1 * i, method="histodd", fields=f) for i, f in enumerate(fields)])
    b = folder(
        tmp_path / "b",
        [record(0.6 + 0.1 * i, method="histodd", fields={**f, "alpha": 0.2}) for i, f in enumerate(fields)],
    )
    made = compare.compare(a, b)
    assert set(made.configuration) == {"set.fields.alpha"}
    assert [c.difference for c in made.changes if c.metric.startswith("accuracy")] == [
        pytest.approx(0),
        pytest.approx(0),
    ]
    assert any('"flip"' in c.cell for c in made.changes)


def test_a_run_against_itself_has_no_difference(
    all_tables: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(all_tables["out"])
    made = compare.compare(all_tables["out"], all_tables["out"])
    assert not made.configuration and not made.only_a and not made.only_b and made.same > 10
    drawn = [c for c in made.changes if c.how.startswith("slides")]
    assert drawn and all((c.difference, c.low, c.high, c.how) == (0, 0, 0, "slides, paired") for c in drawn)
    for name in compare.FORMATS:
        assert cli.main(["compare", out, out, "--format", name]) == 0
        text = capsys.readouterr().out
        if name == "json":
            assert len(json.loads(text)["changes"]) == len(made.changes)
        elif name == "csv":
            assert len(list(csv.DictReader(io.StringIO(text)))) == len(made.changes)
        else:
            assert "(table2: trained on it with the same, Flip)" in text


def test_missing_runs_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["compare", str(tmp_path / "x"), str(tmp_path)]) == 1
    assert "no results in" in capsys.readouterr().err
    assert cli.main(["compare", str(tmp_path), str(tmp_path), "--format", "latex"]) == 2
