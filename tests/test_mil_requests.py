"""Slide-level requests without running any: what makes one impossible, workers, centres, shares of a gain, the paper's numbers."""

import dataclasses
from pathlib import Path

import pytest
import torch

from histodd_bench import cli, options
from histodd_bench.data import PatchSet
from histodd_bench.data.centres import centre_part, centres_of
from histodd_bench.data.store import Dataset
from histodd_bench.errors import HistoddError
from histodd_bench.mil.layout_transfer import share
from histodd_bench.mil.requirements import obstacle
from histodd_bench.progress import Progress
from histodd_bench.slides_cli import workers_of
from histodd_bench.tables import TABLES

pytest.importorskip("nystrom_attention", reason="slide-level models need the group 'mil'")


def request_for(table: str, *methods: str):
    line = ["run", table, "--methods", ",".join(methods or ("random", "full"))]
    return cli.make_requests(options.make_parser(cli.COMMANDS).parse_args(line), TABLES[table], Path("x"))[0]


def test_what_makes_a_slide_level_table_impossible() -> None:
    def why(table: str, some: Dataset, *methods: str) -> str:
        return obstacle(TABLES[table], request_for(table, *methods), some)

    good = dataset([0, 0, 1, 1, 0, 0, 1, 1], labels=[0, 0, 0, 1, 0, 0, 1, 1])
    assert why("table4", good) == "" and why("table5", good) == ""
    assert "does not say which centre" in why("table5", dataset(None, labels=[0, 0, 0, 1, 0, 0, 1, 1]))
    assert "training slides of some are all of class 't'" in why("table4", dataset(None))
    single = dataclasses.replace(good.train, groups=torch.arange(8), group_names=tuple("abcdefgh"))
    assert "does not say which slide its training patches come from" in why(
        "table4", Dataset("some", single, single, False)
    )
    assert "'forgetting' cannot be applied slide by slide" in why("table4", good, "random", "forgetting")


def test_fields_of_table5_give_way_to_the_command_line() -> None:
    def fields(*more: str) -> dict:
        line = options.make_parser(cli.COMMANDS).parse_args(["run", "table5", *more])
        made = cli.make_requests(line, TABLES["table5"], Path("x"))[0]
        return {"stain": made.stain, **made.overrides}

    assert fields() == {
        "stain": "on",
        "histodd": {"networks": "pool"},
        "pool": {"epochs": 10},
        "transfer": {"rehearsal": True},
    }
    said = fields("--stain", "off", "--set", "pool.steps=7", "--set", "histodd.networks=random")
    assert (said["stain"], said["histodd"], said["pool"]) == ("off", {"networks": "random"}, {"steps": 7})
    assert fields("--preset", "paper") == {"stain": "on"}, "the paper's own"


def test_workers_are_as_many_as_the_command_line_says(monkeypatch) -> None:
    """Also where there are GPUs, of which there is one worker each by default."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)

    def workers(*more: str) -> int:
        line = options.make_parser(cli.COMMANDS).parse_args(["run", "table4", *more])
        return workers_of(cli.make_requests(line, TABLES["table4"], Path("x"))[0])

    assert (workers(), workers("--workers", "3"), workers("--device", "cuda:1")) == (4, 3, 1)
    assert workers("--device", "cuda:1", "--workers", "2") == 2 and workers("--device", "cpu", "--workers", "5") == 5


@pytest.mark.parametrize(
    ("none", "full", "own", "expected"),
    [
        ([0.5, 0.5], [0.9, 0.9], [0.82, 0.82], "80"),
        ([0.5, 0.6], [0.9, 0.8], [0.5, 0.6], "0"),
        ([0.5, 0.6], [0.6, 0.5], [0.9, 0.9], "undefined"),  # no gain
        ([0.5, 0.6], [0.7, 0.61], [0.9, 0.9], "333"),  # gains 0.2 and 0.01: mean 0.105, standard error 0.095
        ([0.5, 0.6], [0.7, 0.59], [0.9, 0.9], "undefined"),  # gains 0.2 and -0.01: mean 0.095, standard error 0.105
        ([0.5], [0.9], [0.9], "undefined"),  # one seed: the standard error is unknown
        ([], [], [], None),
    ],
)
def test_share_of_the_gain(none, full, own, expected) -> None:
    assert share(none, full, own) == expected


def test_a_gain_that_other_test_slides_might_not_show_has_no_share() -> None:
    pairs = ([0.5, 0.5], [0.54, 0.54], [0.52, 0.52])
    assert share(*pairs, 0.03) == "50" and share(*pairs, 0.05) == "undefined"


def test_the_papers_numbers() -> None:
    table4, table5 = TABLES["table4"], TABLES["table5"]
    assert len(table4.paper_accuracy) == 4 * 4 * 3 and len(table5.paper_accuracy) == 2 * 4 * 2
    cell = table4.paper_accuracy["camelyon16", 50, "dsmil"]
    assert (cell.mean, cell.sd) == ("87.5", "0.6")
    assert table4.paper_seconds["tcga-idh", 10, "transmil"] == "22.0 (x1.07)"
    assert table4.paper_storage["unitopatho-pt", None, "clam-sb"] == "34.60 GB"
    cell = table5.paper_accuracy["C2", 20, "slide"]
    assert (cell.mean, cell.sd) == ("96.8", "0.6")
    assert table5.paper_seconds["C1", None, "patch"] == "1640" and table5.paper_epochs["C1", None, "slide"] == "10"
    assert table5.paper_storage["C1", 10, "patch"] == "1e-3 GB"


def dataset(centres: list[int] | None, names: tuple[str, ...] = ("A", "B"), labels: list[int] | None = None) -> Dataset:
    n = 8
    images = torch.randint(0, 256, (n, 3, 4, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    wanted = torch.tensor(labels or [0, 1] * 4)
    c = None if centres is None else torch.tensor(centres)
    some = PatchSet(images, wanted, torch.arange(n) // 2, tuple("wxyz"), ("n", "t"), c, names if centres else ())
    return Dataset("some", some, some, False)


def test_a_centre_is_a_data_set_of_its_own(tmp_path) -> None:
    whole = dataset([0, 0, 1, 1, 0, 0, 1, 1])
    assert centres_of(whole) == ("A", "B")
    part = centre_part(whole, "B", cache=tmp_path, progress=Progress.silent())
    rows = [2, 3, 6, 7]
    assert torch.equal(part.train.images, whole.train.images[rows]) and torch.equal(
        part.test.labels, whole.test.labels[rows]
    )
    assert [part.train.group_names[g] for g in part.train.groups] == ["x", "x", "z", "z"]
    assert part.train.centre_names == ("B",) and "only the slides of B" in part.notes


def test_transfers_that_cannot_be(tmp_path) -> None:
    with pytest.raises(HistoddError, match="does not say which centre"):
        centres_of(dataset(None))
    with pytest.raises(HistoddError, match="has 1 centres with training and test patches"):
        centres_of(dataset([0] * 8))
    lacking = dataset([0, 0, 0, 0, 1, 1, 1, 1], labels=[0, 1, 0, 1, 0, 0, 0, 0])
    with pytest.raises(HistoddError, match="B has no training patches of class 't'"):
        centre_part(lacking, "B", cache=tmp_path, progress=Progress.silent())
