"""data stains: fits per slide that find the stains drawn, and less spread after normalisation."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_sets import render

from histodd_bench import cli
from histodd_bench.data.prepared import load_prepared
from histodd_bench.data.stain_report import spread, stain_rows
from histodd_bench.data.store import StoreWriter, write_dataset
from histodd_bench.data.template import write_template
from histodd_bench.progress import Progress
from histodd_bench.stain import REFERENCE_STAIN

SLIDES = 6


def unit(matrix: np.ndarray) -> np.ndarray:
    return matrix / np.linalg.norm(matrix, axis=0, keepdims=True)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, np.ndarray]]:
    """Slides of two centres, each with stain vectors and amounts of its own, and one blank slide."""
    folder = tmp_path_factory.mktemp("stains") / "set"
    folder.mkdir()
    truth = {}
    for split, count in (("train", SLIDES), ("test", 2)):
        with StoreWriter(folder / split, (32, 32), ("a", "b"), ("A", "B")) as writer:
            for i in range(count):
                rng = np.random.default_rng([i, count])
                name = f"{split}{i}.svs"
                moved = (
                    np.array(REFERENCE_STAIN)
                    + (0.08 if i % 2 else -0.08) * np.array([[1, 0], [0, 0], [-1, 1]])
                    + rng.normal(0, 0.01, (3, 2))
                )
                truth[name] = unit(np.abs(moved))
                g = torch.Generator().manual_seed(i)
                h = torch.rand(8, 32, 32, generator=g) ** 3 * (1.5 + 0.2 * i)
                e = torch.rand(8, 32, 32, generator=g) * (1.0 - 0.05 * i) * (h < 0.3)
                images = render(h, e, torch.tensor(truth[name], dtype=torch.float32)).numpy()
                n = len(images)
                writer.append(
                    images,
                    [j % 2 for j in range(n)],
                    [name] * n,
                    slides=[name] * n,
                    centres=[i % 2] * n,
                    x=list(range(n)),
                    y=[0] * n,
                )
            if split == "train":
                blank = np.full((2, 3, 32, 32), 243, dtype=np.uint8)
                writer.append(
                    blank, [0, 1], ["blank.svs"] * 2, slides=["blank.svs"] * 2, centres=[0, 0], x=[0, 1], y=[0, 0]
                )
            writer.finish()
    write_template(folder, Progress.silent())
    write_dataset(folder, [], dataset="slides", settings={"image_size": 32})
    return folder, truth


def test_the_stains_drawn_are_found(drawn: tuple[Path, dict[str, np.ndarray]], tmp_path: Path) -> None:
    folder, truth = drawn
    rows = stain_rows(load_prepared(folder, "slides", 32, tmp_path, 1, Progress.silent()), Progress.silent())
    assert {row.slide for row in rows} == {*truth, "blank.svs"} and len(rows) == SLIDES + 3
    for row in rows:
        if row.slide == "blank.svs":
            assert row.before.stain is None and row.before.status != "ok"
            continue
        assert row.before.stain is not None
        cosine = (unit(row.before.stain) * truth[row.slide]).sum(0)
        assert np.degrees(np.arccos(np.clip(cosine, -1, 1))).max() < 6, row.slide
        assert row.centre == "AB"[int(row.slide[-5]) % 2] and row.patches == 8


def test_normalisation_brings_slides_together(drawn: tuple[Path, dict[str, np.ndarray]], tmp_path: Path) -> None:
    rows = stain_rows(load_prepared(drawn[0], "slides", 32, tmp_path, 1, Progress.silent()), Progress.silent())
    before, after = spread(rows, False), spread(rows, True)
    assert before[0] > 2 and all(b < 0.5 * a for a, b in zip(before, after, strict=True))


def test_the_command_writes_a_table_and_a_picture(
    drawn: tuple[Path, dict[str, np.ndarray]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("HISTODD_CACHE", str(tmp_path / "cache"))
    assert (
        cli.main(["data", "stains", "slides", "--root", str(drawn[0]), "--out", str(tmp_path / "r"), "--workers", "1"])
        == 0
    )
    text = capsys.readouterr().out
    assert "9 slides, up to 64 patches each" in text and "1 slides could not be fitted, e.g. blank.svs" in text
    assert text.count("before normalisation") == text.count("after normalisation") == 3
    with open(tmp_path / "r" / "stains.csv", newline="") as file:
        rows = {row["slide"]: row for row in csv.DictReader(file)}
    assert len(rows) == 9 and rows["blank.svs"]["before_h_red"] == ""
    kept = json.loads((drawn[0] / "template.json").read_text())
    target = unit(np.array(kept["stain_matrix"]))
    after = [float(rows["test0.svs"][f"after_h_{c}"]) for c in ("red", "green", "blue")]
    assert np.dot(after, target[:, 0]) / np.linalg.norm(after) > 0.995, "moved onto the template"
    with Image.open(tmp_path / "r" / "stains.png") as picture:
        assert picture.width > 9 * 24


def test_where_nothing_can_be_fitted_there_is_a_dash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HISTODD_CACHE", str(tmp_path / "cache"))
    for split in ("train", "test"):
        for name, value in (("a", 200), ("b", 243)):
            (tmp_path / "grey" / split / name).mkdir(parents=True)
            for i in range(2):
                Image.new("RGB", (32, 32), (value + i,) * 3).save(tmp_path / "grey" / split / name / f"{i}.png")
    arguments = ["--root", str(tmp_path / "grey"), "--out", str(tmp_path / "r"), "--image-size", "32", "--workers", "1"]
    assert cli.main(["data", "stains", "imagefolder", *arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines if "normalisation" in line] == [
        ["all", "slides", "-", "-", "before", "normalisation"], ["all", "slides", "-", "-", "after", "normalisation"]
    ]  # fmt: skip
    assert "nan" not in "".join(lines)


def test_a_report_that_cannot_be_written_is_refused_before_anything_is_read(
    drawn: tuple[Path, dict[str, np.ndarray]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(drawn[0], tmp_path / "copy")
    (tmp_path / "copy" / "train" / "images.npy").write_bytes(b"damaged, if anybody looks")
    (tmp_path / "file").touch()
    options = ["data", "stains", "slides", "--root", str(tmp_path / "copy"), "--out", str(tmp_path / "file" / "r")]
    assert cli.main(options) == 1
    line = capsys.readouterr().err.strip()
    assert line.startswith("error: cannot write ") and "\n" not in line
