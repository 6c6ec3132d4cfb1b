"""Records and the frame made of them: known means, keys that follow the configuration, and records that must be refused."""

import copy
import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from made_up_records import record

from histodd_bench import results
from histodd_bench.errors import HistoddError


def test_aggregate_has_known_answers() -> None:
    mean, sd, n = results.aggregate([0.7, 0.8, 0.9])
    assert (round(mean, 12), round(sd, 12), n) == (0.8, 0.1, 3)
    mean, sd, n = results.aggregate([0.5])
    assert (mean, n) == (0.5, 1) and math.isnan(sd)
    mean, sd, n = results.aggregate([None, float("nan"), 2.0, 4.0])
    assert (mean, round(sd, 12), n) == (3.0, round(math.sqrt(2), 12), 2)
    assert results.aggregate([])[2] == 0 and math.isnan(results.aggregate([])[0])


@given(st.lists(st.floats(0, 1), min_size=2, max_size=8), st.randoms(use_true_random=False))
def test_the_order_of_records_changes_no_digit(values: list[float], random) -> None:
    shuffled = list(values)
    random.shuffle(shuffled)
    assert results.aggregate(values) == results.aggregate(shuffled)


@given(hnp.arrays(np.float16, hnp.array_shapes(max_dims=2, max_side=5), elements=st.floats(0, 1, width=16)))
def test_pack_and_unpack_give_the_array_back(array: np.ndarray) -> None:
    text = json.dumps(results.pack(array))
    back = results.unpack(json.loads(text))
    assert back.dtype == array.dtype and back.shape == array.shape and (back == array).all()


def test_a_record_survives_the_disk_and_nan_becomes_none(tmp_path: Path) -> None:
    written = record(0.8, metrics={"auc": float("nan")})
    path = results.write_record(tmp_path, written)
    read = results.read_record(path)
    assert read["metrics"]["auc"] is None and read["metrics"]["accuracy"] == 0.8
    assert read["config"] == written["config"] and read["key"] == written["key"]
    assert math.isnan(results.summary(results.to_frame([read]), "metrics.auc")["mean"].iloc[0])


def test_any_change_of_the_configuration_changes_the_key() -> None:
    config = record(0.8)["config"]
    keys = {results.key_of(config)}
    places = [(part, name) for part in ("data", "set", "eval") for name in config[part]]
    for part, name in places:
        changed = copy.deepcopy(config)
        changed[part][name] = "changed"
        keys.add(results.key_of(changed))
    for name in ("threads", "device"):
        keys.add(results.key_of({**config, name: "changed"}))
    assert len(keys) == 1 + len(places) + 2


def test_the_key_does_not_depend_on_the_order_of_fields() -> None:
    config = record(0.8)["config"]
    backwards = {k: config[k] for k in reversed(config)}
    assert results.key_of(backwards) == results.key_of(config)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda text: text.replace('"format": 1', '"format": 99'), "another version (record format 99"),
        (lambda text: text.replace('"format": 1,', ""), "another version (record format None"),
        (lambda text: text[: len(text) // 2], "cannot be read"),
        (lambda text: "", "cannot be read"),
        (lambda text: "[1, 2]", "is not a record"),
        (lambda text: text.replace('"metrics"', '"numbers"'), "no usable 'metrics'"),
        (
            lambda text: text.replace('"threads": 2,\n  "device"', '"threads": 3,\n  "device"'),
            "does not match its own configuration",
        ),
    ],
)
def test_a_record_that_cannot_be_trusted_is_named_and_left_out(tmp_path: Path, damage, says: str) -> None:
    good = results.write_record(tmp_path, record(0.7, seed=0))
    bad = results.write_record(tmp_path, record(0.9, seed=1))
    text = bad.read_text()
    assert damage(text) != text
    bad.write_text(damage(text))
    with pytest.raises(HistoddError, match=r"computes it again|is not a record: delete it"):
        results.read_record(bad)
    records, ignored = results.read_records(tmp_path)
    assert [r["metrics"]["accuracy"] for r in records] == [0.7]
    assert len(ignored) == 1 and says in ignored[0] and str(bad) in ignored[0] and "\n" not in ignored[0]
    assert good.exists()


def test_half_written_files_are_never_read(tmp_path: Path) -> None:
    results.write_record(tmp_path, record(0.7))
    leftover = tmp_path / results.RECORDS / "x.json.partial"
    leftover.write_text("{")
    records, ignored = results.read_records(tmp_path)
    assert len(records) == 1 and not ignored
    assert results.leftovers(tmp_path) == [leftover]


def test_frame_has_one_row_per_record_and_missing_ipc_for_the_whole_set() -> None:
    frame = results.to_frame([record(0.7), record(0.9, method="full", eval_seed=1)])
    assert frame["ipc"].tolist()[0] == 10 and frame["ipc"].isna().tolist() == [False, True]
    assert frame["metrics.accuracy"].tolist() == [0.7, 0.9]
    assert frame["storage.count"].tolist() == [20, 5000]


def test_summary_is_over_seeds_only() -> None:
    records = [record(0.6 + 0.1 * s, seed=s, eval_seed=e) for s in (0, 1) for e in (0, 1)]
    records += [
        record(0.9, seed=0, ipc=20),
        record(0.5, seed=0, method="herding"),
        record(0.4, seed=0, recipe={"epochs": 9}),
    ]
    summary = results.summary(results.to_frame(records), "metrics.accuracy")
    assert sorted(summary["n"]) == [1, 1, 1, 4]
    four = summary[summary["n"] == 4].iloc[0]
    assert (four["method"], four["ipc"], round(four["mean"], 12)) == ("random", 10, 0.65)
    assert round(four["sd"], 12) == round(math.sqrt(0.01 / 3), 12)


def test_plan_joins_what_was_asked_and_survives_damage(tmp_path: Path) -> None:
    results.write_plan(tmp_path, "table1", {"idc": {"ipc": (20, 10), "methods": ("random",)}})
    results.write_plan(tmp_path, "table1", {"idc": {"ipc": (50, 10), "methods": ("herding",)}, "demo": {"ipc": (10,)}})
    plan = results.read_plan(tmp_path)["table1"]
    assert plan["idc"] == {"ipc": [10, 20, 50], "methods": ["random", "herding"]} and plan["demo"]["ipc"] == [10]
    (tmp_path / results.PLAN).write_text("{")
    assert results.read_plan(tmp_path) == {}


def test_file_names_are_safe_and_tell_seeds_apart() -> None:
    names = {results.file_name(record(0.5, seed=s, eval_seed=e, dataset="a/../b c")) for s in (0, 1) for e in (0, 1)}
    assert len(names) == 4 and all("/" not in n and " " not in n for n in names)
