"""UniToPatho: the official splits give the paper's counts, and a miniature of the real layout goes all the way."""

import csv
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from histodd_bench.data import load_dataset, unitopatho
from histodd_bench.data.facts import SUPPLEMENTARY_TABLE1
from histodd_bench.data.jobs import FilesJob
from histodd_bench.errors import HistoddError
from histodd_bench.progress import Progress

COLUMNS = "image_id,top_label_name,top_label,type_name,type,grade_name,grade,wsi,roi,mpp,x,y,w,h".split(",")
_LOCATION = re.compile(
    r"[^/]+/(?P<file>(?P<wsi>.+)_ROI__mpp(?P<mpp>[\d.]+)_reg(?P<roi>\d+)_crop_sk\d+_"
    r"\((?P<x>\d+),(?P<y>\d+),(?P<w>\d+),(?P<h>\d+)\)\.png)"
)


def official(path: Path) -> tuple[list[tuple[str, str]], dict[str, list[int]]]:
    """(class, location) of every image and the split of one of the official YAML files, read without a YAML library."""
    images, split, current = [], {}, None
    label = ""
    for line in path.read_text().splitlines():
        if line.startswith("- label: "):
            label = line[9:]
        elif line.startswith("  location: "):
            images.append((label, line[12:].strip("'\"")))
        elif re.fullmatch(r"  (test|training|validation):", line):
            current = split.setdefault(line.strip().rstrip(":"), [])
        elif current is not None and re.fullmatch(r"  - \d+", line):
            current.append(int(line[4:]))
    return images, split


def write_tables(root: Path, data: Path) -> None:
    """``train.csv`` and ``test.csv`` of both scales from the official splits; image files are empty."""
    for scale in unitopatho.SCALES:
        images, split = official(data / f"unitopath-public-{scale}.yml")
        for name, parts in (("train", ("training", "validation")), ("test", ("test",))):
            rows = []
            for index in (i for part in parts for i in split[part]):
                label, location = images[index]
                found = _LOCATION.fullmatch(location)
                assert found is not None, location
                kind, _, grade = label.partition(".")
                rows.append([found["file"], label, unitopatho.TYPES.index(label), kind, 0, grade, 0, found["wsi"], found["roi"],
                             found["mpp"], found["x"], found["y"], found["w"], found["h"]])  # fmt: skip
                target = root / scale / label / found["file"]
                target.parent.mkdir(parents=True, exist_ok=True)
                target.touch()
            with open(root / scale / f"{name}.csv", "w", newline="") as file:
                csv.writer(file).writerows([COLUMNS, *rows])


@pytest.fixture(scope="module")
def real(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("unitopatho") / "unitopath-public"
    write_tables(root, shared_data / "unitopatho")
    return root


@pytest.mark.parametrize("kind", ["dg", "pt"])
def test_the_official_splits_give_the_paper_s_patches(real: Path, kind: str) -> None:
    found = unitopatho.source(kind)(real.parent, 0)
    counts = {
        s: sum(len(j.files) for j in found.jobs if isinstance(j, FilesJob) and j.split == s) for s in ("train", "test")
    }
    slides = Counter(job.split for job in found.jobs)
    printed = SUPPLEMENTARY_TABLE1[f"unitopatho-{kind}"]
    assert (counts["train"], counts["test"]) == printed[:2]
    assert counts == unitopatho.PATCHES[kind] and dict(slides) == unitopatho.SLIDES[kind]
    assert slides["test"] == printed[3]
    assert slides["train"] == (printed[2] if kind == "dg" else 204), "the paper prints 208 for PT, 204 are distributed"
    assert found.notes == ()


def test_slides_per_class_are_the_paper_s(real: Path) -> None:
    found = unitopatho.source("pt")(real, 0)
    per_class = {
        split: Counter(
            unitopatho.TYPES[j.files[0][1]] for j in found.jobs if isinstance(j, FilesJob) and j.split == split
        )
        for split in ("train", "test")
    }
    # Paper 4.1; it has 16 training slides of TA.HG, 17 are distributed.
    assert per_class["train"] == {"NORM": 13, "HP": 31, "TA.HG": 17, "TA.LG": 100, "TVA.HG": 13, "TVA.LG": 30}
    assert per_class["test"] == {"NORM": 8, "HP": 10, "TA.HG": 9, "TA.LG": 46, "TVA.HG": 7, "TVA.LG": 8}
    grades = unitopatho.source("dg")(real, 0)
    assert grades.classes == ("HG", "LG")
    by_grade = Counter((grades.classes[j.files[0][1]], j.split) for j in grades.jobs if isinstance(j, FilesJob))
    assert by_grade == {("LG", "train"): 130, ("HG", "train"): 30, ("LG", "test"): 54, ("HG", "test"): 16}


def miniature(root: Path, *, sides: dict[str, int] | None = None) -> Path:
    """Every class once per split and scale, with the real columns; 800 um are 60 px here, 7000 um 525 px."""
    for scale, side in (sides or {"800": 60, "7000": 525}).items():
        for split in ("train", "test"):
            rows = []
            for index, label in enumerate(unitopatho.TYPES):
                wsi = f"{split}-{index}.ndpi"
                name = f"{wsi}_ROI__mpp0.44_reg000_crop_sk00000_({100 * index},{index},{side},{side}).png"
                (root / scale / label).mkdir(parents=True, exist_ok=True)
                rng = np.random.default_rng(index)
                pixels = np.clip((190 - 12 * index, 120, 170) + rng.normal(0, 25, (side, side, 3)), 0, 255).astype(
                    np.uint8
                )
                Image.fromarray(pixels).save(root / scale / label / name)
                rows.append(
                    [name, label, index, label[:2], 0, label[-2:], 0, wsi, 0, 0.4415, 100 * index, index, side, side]
                )
            with open(root / scale / f"{split}.csv", "w", newline="") as file:
                csv.writer(file).writerows([COLUMNS, *rows])
    return root


@pytest.mark.parametrize(("kind", "counts"), [("pt", [2] * 6), ("dg", [4, 4])])
def test_a_miniature_from_files_to_patches(tmp_path: Path, kind: str, counts: list[int]) -> None:
    root = miniature(tmp_path / "u")
    data = load_dataset(
        f"unitopatho-{kind}", root=root, image_size=20, cache=tmp_path / "c", progress=Progress.silent()
    )
    assert data.train.class_counts() == counts == data.test.class_counts()
    assert not {data.train.group_names[g] for g in data.train.groups} & {
        data.test.group_names[g] for g in data.test.groups
    }
    if kind == "pt":
        full = np.asarray(Image.open(next((root / "800" / "HP").glob("train-0*.png")))).astype(float)
        expected = full.reshape(20, 3, 20, 3, 3).mean((1, 3)).transpose(2, 0, 1)
        assert min(np.abs(p.numpy() - expected).max() for p in data.train.images[data.train.labels == 0]) <= 0.5


def test_images_beyond_pillow_s_limit_are_read_by_this_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = miniature(tmp_path / "u")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50_000)  # twice this is refused: the 525 px patches have 275,625
    data = load_dataset("unitopatho-pt", root=root, image_size=20, cache=tmp_path / "c", progress=Progress.silent())
    assert len(data.train) == 12 and not data.notes
    data = load_dataset("unitopatho-pt", root=root, image_size=61, cache=tmp_path / "c", progress=Progress.silent())
    assert data.notes == ("12 of 24 patches are enlarged from 60 to 61 px",)
    assert Image.MAX_IMAGE_PIXELS == 50_000, "the limit of everything else is what it was"
    with pytest.raises(HistoddError, match="has no readable training image"):
        load_dataset("imagefolder", root=root / "7000", image_size=20, cache=tmp_path / "c", progress=Progress.silent())


def test_one_scale_and_missing_or_broken_images_are_said(tmp_path: Path) -> None:
    root = miniature(tmp_path / "u", sides={"800": 60})
    next((root / "800" / "HP").glob("train-0*.png")).unlink()
    next((root / "800" / "NORM").glob("test-1*.png")).write_bytes(b"")
    with pytest.raises(HistoddError, match="class 'HP' has no training patch"):
        load_dataset("unitopatho-pt", root=root, image_size=20, cache=tmp_path / "c", progress=Progress.silent())
    data = load_dataset("unitopatho-dg", root=root, image_size=20, cache=tmp_path / "c", progress=Progress.silent())
    assert data.notes[0] == f"no folder 7000 in {root}: the paper uses both scales"
    notes = unitopatho.source("pt")(root, 0).notes
    assert notes[1].startswith("1 images of the tables are not there: 800/HP/train-0.ndpi")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("TA.HG", "TA.XX"), "unknown class 'TA.XX'"),
        (("train-2.ndpi,", "test-2.ndpi,"), "slide test-2.ndpi is in train and in test"),
        (("train-2.ndpi_ROI", "../../../../etc/train-2.ndpi_ROI"), r"leaves .*800"),
        (("image_id", "file"), "has no column 'image_id'"),
        ((",200,2,", ",left,2,"), "x must be a number, got 'left'"),
        ((",200,2,", ",inf,2,"), "x must be a number, got 'inf'"),
        ((",200,2,", ",nan,2,"), "x must be a number, got 'nan'"),
    ],
)
def test_tables_that_cannot_be_used(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    root = miniature(tmp_path / "u", sides={"800": 60})
    table = root / "800" / "train.csv"
    text = table.read_text()
    table.write_text(text.replace(*change))
    assert table.read_text() != text
    with pytest.raises(HistoddError, match=message):
        unitopatho.source("pt")(root, 0)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(HistoddError, match="no folder 800 or 7000"):
        unitopatho.source("pt")(tmp_path, 0)
    (tmp_path / "800").mkdir()
    with pytest.raises(HistoddError, match=r"train.csv is missing: .*the columns image_id"):
        unitopatho.source("pt")(tmp_path, 0)
