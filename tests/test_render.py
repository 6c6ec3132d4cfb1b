"""Tables from records with known numbers, in every format."""

import csv
import io
import json
import re

import numpy as np
import pytest
from made_up_records import record

from histodd_bench import layout, render, results
from histodd_bench.tables import TABLES

TABLE = TABLES["table1"]


def some_records(dataset: str = "idc", **more) -> list:
    made = []
    for seed in (0, 1, 2):
        made.append(record(0.60 + 0.02 * seed, method="random", seed=seed, dataset=dataset, **more))
        made.append(record(0.70 + 0.02 * seed, method="histodd", seed=seed, dataset=dataset, **more))
        made.append(record(0.80 + 0.02 * seed, method="full", eval_seed=seed, dataset=dataset, **more))
    made.append(record(0.75, method="random", seed=0, ipc=20, dataset=dataset, **more))
    return made


def rows(records: list, **options) -> dict[tuple[str, str, str, str], dict[str, str]]:
    """CSV rows by (metric, ipc, column, source)."""
    text = render.as_csv(layout.grids(TABLE, records, **options))
    return {(r["metric"], r["ipc"], r["column"], r["source"]): r for r in csv.DictReader(io.StringIO(text))}


def test_numbers_are_percent_with_sd_and_n() -> None:
    found = rows(some_records())
    row = found["Accuracy %", "10", "Histo-DD", "ours"]
    assert (float(row["mean"]), float(row["sd"]), row["n"]) == (pytest.approx(72.0), pytest.approx(2.0), "3")
    assert float(found["Balanced accuracy %", "10", "Histo-DD", "ours"]["mean"]) == pytest.approx(62.0)
    assert found["Accuracy %", "20", "Random", "ours"]["sd"] == ""
    assert found["Accuracy %", "", "Full", "ours"]["n"] == "3"
    # 10 per class of 2 classes among 5000 training patches
    assert found["Accuracy %", "10", "Random", "ours"]["ratio_percent"] == "0.4"


def test_missing_cells_are_dashes_and_are_not_invented() -> None:
    found = rows(some_records())
    assert found["Accuracy %", "10", "Herding", "ours"]["n"] == "0"
    assert found["Accuracy %", "20", "Histo-DD", "ours"]["mean"] == ""
    line = next(x for x in render.markdown(layout.grids(TABLE, some_records())).splitlines() if "| 20 |" in x)
    assert line == "|  | 20 | 0.8 | 75.0 (1) | - | - | - |  |"


def test_what_was_asked_but_is_not_there_yet_has_a_row() -> None:
    text = render.markdown(layout.grids(TABLE, some_records(), {"idc": {"ipc": [10, 20, 50]}}))
    assert "|  | 50 | 2.0 | - | - | - | - |  |" in text


def test_best_is_bold_with_ties_and_without_the_whole_set() -> None:
    tied = [*some_records(), record(0.7001, method="herding", seed=0), record(0.6, method="forgetting", seed=0)]
    line = next(x for x in render.markdown(layout.grids(TABLE, tied)).splitlines() if x.startswith("| Accuracy"))
    assert re.findall(r"\*\*(.+?)\*\*", line) == ["72.0 ± 2.0 (3)"]
    tied.append(record(0.72 * 2 - 0.7001, method="herding", seed=1))
    line = next(x for x in render.markdown(layout.grids(TABLE, tied)).splitlines() if x.startswith("| Accuracy"))
    assert len(re.findall(r"\*\*(.+?)\*\*", line)) == 2


def test_speed_and_storage_say_how_many_times_less_than_full() -> None:
    text = render.markdown(layout.grids(TABLE, some_records()))
    assert "0.050 (x80)" in text
    assert "60.0 (x250)" in text


def test_the_papers_numbers_stand_beside_ours_as_printed() -> None:
    made = some_records("camelyon16")
    found = rows(made)
    row = found["Accuracy %", "10", "Herding", "paper"]
    assert (row["mean"], row["sd"], row["ratio_percent"]) == ("72.7", "0.40", "9e-4")
    assert found["Accuracy %", "", "Full", "paper"]["mean"] == "95.8"
    assert ("Balanced accuracy %", "10", "Herding", "paper") not in found
    text = render.markdown(layout.grids(TABLE, made))
    assert "| *paper* | 10 | 9e-4 | *68.2 ± 0.11* | *72.7 ± 0.40* |" in text
    assert "as printed in the paper for Camelyon16, on ResNet18" in text
    assert "paper" not in render.markdown(layout.grids(TABLE, some_records("idc")))


def test_procedural_data_are_labelled_in_every_format() -> None:
    made = layout.grids(TABLE, some_records("demo", procedural=True))
    for name in ("rich", "markdown", "latex"):
        text = render.FORMATS[name](made)
        assert "procedural data" in text and "nothing here is about patients" in text
    lines = list(csv.DictReader(io.StringIO(render.as_csv(made))))
    assert lines and {line["dataset"] for line in lines} == {"demo (procedural data)"}


def test_notes_tell_the_protocol() -> None:
    notes = "\n".join(layout.grids(TABLE, some_records(notes=("3 files skipped",)))[0].notes)
    for part in (
        "convnet-d3 (width 64) at 32 px: 50 epochs for every method, Full included",
        "class sampling natural",
        "5 networks, pre-trained for 10 epochs",
        "training probability 0.5, at test no, the same for every method (auto: chosen on training data: off 0.710, half 0.740)",
        "at most 3 selection or distillation seeds x 3 evaluation seeds",
        "A CPU, 2 threads",
        "5000 training patches of 140 slides or patients",
        "idc: 3 files skipped",
    ):
        assert part in notes


def test_variants_of_a_method_stand_side_by_side_and_are_never_mixed() -> None:
    made = [record(0.7, method="histodd", fields={"alpha": 1.0}), record(0.8, method="histodd", fields={"alpha": 0.05})]
    made.append(record(0.6, method="histodd", fields={"alpha": 0.05}, ipc=20))
    found = rows(made)
    assert found["Accuracy %", "10", "Histo-DD (alpha=1.0)", "ours"]["n"] == "1"
    assert float(found["Accuracy %", "10", "Histo-DD (alpha=0.05)", "ours"]["mean"]) == pytest.approx(80.0)
    assert float(found["Accuracy %", "20", "Histo-DD", "ours"]["mean"]) == pytest.approx(60.0)


def test_fields_that_follow_images_per_class_are_not_variants() -> None:
    made = [record(0.7, method="histodd", ipc=i, fields={"outer_steps": k}) for i, k in ((10, 200), (20, 500))]
    assert layout.grids(TABLE, made)[0].columns == ["Random", "Herding", "Forgetting", "Histo-DD", "Full"]


def test_other_recipes_and_networks_make_tables_of_their_own() -> None:
    made = [record(0.7), record(0.8, recipe={"epochs": 10}), record(0.9, arch="resnet18"), record(0.5, dataset="demo")]
    titles = [grid.title.rpartition(": ")[2] for grid in layout.grids(TABLE, made)]
    assert sorted(titles) == [
        "demo, convnet-d3 (width 64)",
        "idc, convnet-d3 (width 64) (epochs=10)",
        "idc, convnet-d3 (width 64) (epochs=50)",
        "idc, resnet18 (width 64)",
    ]


def test_alike_titles_name_the_folders_of_the_data_or_else_their_fingerprints() -> None:
    def titles(*folders: str | None) -> list[str]:
        made = [record(0.7 + i / 10) for i in range(2)]
        for r, folder, mark in zip(made, folders, "ab", strict=True):
            r["config"]["data"]["train"] = mark * 64
            r["key"] = results.key_of(r["config"])
            r["data"] = {**r["data"], **({"folder": folder} if folder else {})}
        return [grid.title.partition("(width 64)")[2] for grid in layout.grids(TABLE, made)]

    assert sorted(titles("first", "second")) == [" (folder=first)", " (folder=second)"]
    assert sorted(titles("data", "data")) == sorted(titles(None, None)) == [" (data.train=aaaaaaaa)", " (data.train=bbbbbbbb)"]


def test_lines_of_the_csv_tell_configurations_apart_as_titles_do() -> None:
    made = layout.grids(TABLE, [record(0.7), record(0.8, recipe={"epochs": 10}), record(0.9, dataset="demo")])
    lines = list(csv.DictReader(io.StringIO(render.as_csv(made))))
    told = {(r["dataset"], r["configuration"], r["mean"]) for r in lines if (r["metric"], r["n"]) == ("Accuracy %", "1")}
    assert told == {("idc", "epochs=50", "70.0"), ("idc", "epochs=10", "80.0"), ("demo", "", "90.0")}


def with_labels(made: dict, right: int, groups: list[int]) -> dict:
    """A record of 10 test patches, of which the first are told right."""
    labels = np.arange(10) % 2
    told = np.where(np.arange(10) < right, labels, 1 - labels)
    made["predictions"] = {
        "probabilities": results.pack(np.eye(2)[told].astype(np.float16)),
        "labels": results.pack(labels.astype(np.int16)),
        "groups": results.pack(np.array(groups, np.int32)),
    }
    return made


def distilled_and_coreset(groups: list[int]) -> list[layout.Grid]:
    made = [record(0.9004, method="histodd"), record(0.7, method="herding"), record(0.6)]
    return layout.grids(TABLE, [with_labels(r, n, groups) for r, n in zip(made, (9, 7, 6), strict=True)])


def test_a_difference_is_that_of_the_means_and_its_interval_that_of_test_slides() -> None:
    """Predictions are kept rounded: what they give can differ in the last digit from what is printed above it."""
    (grid,) = distilled_and_coreset(list(range(10)))
    (row,) = [r for r in grid.rows if r.block == "Accuracy, points above the best coreset"]
    found = row.cells[3]
    assert isinstance(found, layout.Interval) and found.value == pytest.approx(20.04) and found.low < 20 < found.high
    assert "[95 % interval: test slides or patients drawn again" in "".join(grid.notes)


def test_with_few_test_slides_a_difference_has_no_interval_and_the_notes_say_why() -> None:
    grids = distilled_and_coreset([0, 0, 1, 1] + [2] * 6)
    row = next(x for x in render.markdown(grids).splitlines() if x.startswith("| Accuracy, points above"))
    assert row.split(" | ")[6] == "+20.0 to Herding"
    assert "difference of the means, without an interval: the number of test slides or patients, 3, is below 5." in "".join(
        grids[0].notes
    )
    (line,) = [r for r in csv.DictReader(io.StringIO(render.as_csv(grids))) if r["metric"].startswith("Accuracy, points")]
    assert float(line["mean"]) == pytest.approx(20.04) and (line["low"], line["high"]) == ("", "")


def test_a_class_without_test_patches_is_warned_of() -> None:
    def notes(classes: tuple[str, ...]) -> list[str]:
        (grid,) = layout.grids(TABLE, [with_labels(record(0.7, classes=classes), 7, [*range(10)])])
        return [note for note in grid.notes if "WARNING" in note]

    assert notes(("normal", "tumour")) == []
    (warning,) = notes(("normal", "tumour", "other"))
    assert warning.endswith("no patch of class other: balanced accuracy and AUC cover only the classes that are there")
    one = with_labels(record(0.7), 7, [*range(10)])
    one["predictions"]["labels"] = results.pack(np.zeros(10, np.int16))
    assert "of class tumour" in (text := "".join(layout.grids(TABLE, [one])[0].notes)) and "AUC is left out" in text
    assert "WARNING" not in "".join(layout.grids(TABLE, [record(0.7)])[0].notes), "records without labels say nothing"


def test_only_distilled_sets_are_said_to_be_distilled() -> None:
    """A coreset can be chosen with the pool's networks."""
    made = [record(0.7, method="histodd", fields={"networks": "random"}), record(0.6, method="gradmatch")]
    for r in made:
        r["config"]["set"]["pool"] = {"arch": "convnet-d3", "width": 32, "networks": 1, "epochs": 1}
        r["key"] = results.key_of(r["config"])
    both, coreset = (layout.grids(TABLE, part)[0].notes for part in (made, made[1:]))
    assert [n for n in both if "istilled on" in n] == [
        "Distilled on convnet-d3 (width 32): a newly initialised network in every outer step."
    ]
    assert not [n for n in coreset if "istilled on" in n]
    made[0]["config"]["set"]["fields"] = {"networks": "pool"}
    (line,) = [n for n in layout.grids(TABLE, made)[0].notes if "istilled on" in n]
    assert line == "Distilled on convnet-d3 (width 32): 1 network, pre-trained for 1 epoch."


def test_footnotes_are_of_rows_that_are_there() -> None:
    made = some_records()
    paid = "Epochs after which it has paid for itself:"
    assert paid in "".join(layout.grids(TABLE, made)[0].notes)
    notes = "".join(layout.grids(TABLE, [r for r in made if r["method"] != "full"])[0].notes)
    assert paid not in notes and "Loading is timed alone" in notes


def test_methods_that_the_table_does_not_name_get_a_column() -> None:
    columns = layout.grids(TABLE, [record(0.7, method="my-method")])[0].columns
    assert columns[-2:] == ["my-method", "Full"], "the whole set stays last"


NASTY = ("a_b & 50% {x} ~^\\", "<script>|*`$#")


def test_user_text_is_escaped() -> None:
    made = layout.grids(TABLE, some_records(classes=NASTY))
    tex = render.latex(made)
    assert r"a\_b \& 50\% \{x\} \textasciitilde{}\textasciicircum{}\textbackslash{}" in tex
    assert r"\textless{}script\textgreater{}|*`\$\#" in tex
    body = re.sub(r"\\[&%$#_{}]", "", tex)
    assert "$" not in body.replace(r"$\pm$", "") and "#" not in body
    md = render.markdown(made)
    assert "<script>" not in md and r"&lt;script&gt;\|\*\`$#" in md
    assert "[/nothing]" in render.rich(layout.grids(TABLE, some_records(classes=("[/nothing]", "b"))))


def test_latex_tables_are_well_formed() -> None:
    tex = render.latex(layout.grids(TABLE, [*some_records("camelyon16"), *some_records("demo", procedural=True)]))
    assert tex.count(r"\begin{tabular}{lrrrrrrr}") == tex.count(r"\end{tabular}") == 2
    lines = [line for line in tex.splitlines() if line.endswith(r" \\")]
    assert lines and all(len(re.findall(r"(?<!\\)&", line)) == 7 for line in lines)
    assert r"\textbf{72.0 $\pm$ 2.0 (3)}" in tex and r"\textit{72.7 $\pm$ 0.40}" in tex


def test_rich_is_not_cut_off_away_from_a_terminal() -> None:
    text = render.rich(layout.grids(TABLE, some_records()))
    assert "72.0 ± 2.0 (3)" in text and "…" not in text
    narrow = render.rich(layout.grids(TABLE, some_records()), width=80)
    assert max(map(len, narrow.splitlines())) <= 80


def test_json_keeps_every_named_field_and_leaves_predictions_out() -> None:
    named = {
        "dataset",
        "method",
        "ipc",
        "arch",
        "distill_seed",
        "eval_seed",
        "config",
        "metrics",
        "storage",
        "environment",
    }
    made = [record(0.7, metrics={"auc": float("nan")})]
    parsed = json.loads(render.as_json(made))[0]
    assert named <= set(parsed) and "predictions" not in parsed and parsed["metrics"]["auc"] is None
    assert {"accuracy", "balanced_accuracy", "auc", "epoch_seconds"} <= set(parsed["metrics"])
    assert "predictions" in json.loads(render.as_json(made, predictions=True))[0]


def test_csv_cannot_become_a_formula() -> None:
    text = render.as_csv(layout.grids(TABLE, [record(0.7, dataset="=1+1")]))
    assert "\n'=1+1," in text
