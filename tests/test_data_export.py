"""data export: PNG folders that are the same patches, and coordinates that go out to CLAM and come back."""

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from prepared_slides import SMALL, fingerprints, prepared, silent
from slide_makers import slide
from tiny_project import OPTIONS, program

from histodd_bench import cli
from histodd_bench.data import load_dataset, slides, store
from histodd_bench.data.export import export_coordinates
from histodd_bench.data.extract import extract, safe_name
from histodd_bench.data.jobs import SlideJob, Source, Tiling
from histodd_bench.data.prepared import prepare
from histodd_bench.data.wsi import Slide
from histodd_bench.errors import HistoddError


def test_exported_images_make_the_same_patch_sets(prepared_project: Path, tmp_path: Path) -> None:
    assert cli.main(["data", "export", str(prepared_project), "--to", "imagefolder", "--out", str(tmp_path / "png")]) == 0
    data = load_dataset("imagefolder", root=tmp_path / "png", image_size=64, cache=tmp_path / "c", progress=silent())
    assert [data.train.fingerprint(), data.test.fingerprint()] == fingerprints(prepared_project)
    with open(tmp_path / "png" / "groups.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 72 and {row["centre"] for row in rows} == {"A", "B"}
    first = Image.open(tmp_path / "png" / rows[0]["path"])
    assert np.array_equal(np.asarray(first).transpose(2, 0, 1), store.load(prepared_project / "train").images[0])
    assert cli.main(["data", "export", str(prepared_project), "--to", "imagefolder", "--out", str(tmp_path / "png")]) == 2, (
        "exists"
    )


def test_training_from_slides_gives_the_same_table_as_from_their_patches(
    slide_project: Path, prepared_project: Path, tmp_path: Path
) -> None:
    cli.main(["data", "export", str(prepared_project), "--to", "imagefolder", "--out", str(tmp_path / "png")])
    scores = []
    options = [o if o != "16" else "64" for o in OPTIONS]
    for name, data in (("slides", slide_project), ("slides", prepared_project), ("imagefolder", tmp_path / "png")):
        out = tmp_path / f"run{len(scores)}"
        done = program("run", "table1", "--dataset", name, "--data-root", str(data), "--out", str(out), "--ipc", "2", "--seeds",
                       "1", "--eval-seeds", "1", "--methods", "random,histodd,full", *options, cache=tmp_path / "cache")  # fmt: skip
        assert done.returncode == 0, done.stderr
        records = [json.loads(p.read_text()) for p in sorted((out / "records").glob("*.json"))]
        timeless = [{k: v for k, v in r["metrics"].items() if not k.endswith("seconds")} for r in records]
        scores.append(
            {r["method"]: (m, r["predictions"]["probabilities"]) for r, m in zip(records, timeless, strict=True)}
        )
    assert set(scores[0]) == {"random", "histodd", "full"}
    assert scores[0] == scores[1] == scores[2]


def test_coordinates_go_out_to_clam_and_come_back(slide_project: Path, prepared_project: Path, tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    assert cli.main(["data", "export", str(prepared_project), "--to", "clam", "--out", str(tmp_path / "h5")]) == 0
    with h5py.File(tmp_path / "h5" / "s0.h5") as file:
        coords = file["coords"]
        assert coords.shape == (12, 2) and coords.dtype == np.int64
        assert {k: coords.attrs[k] for k in ("patch_size", "patch_level")} == {"patch_size": 256, "patch_level": 0}
        assert coords.attrs["name"] == "s0.tif" and tuple(coords.attrs["level_dim"]) == (1024, 768)
        assert tuple(coords.attrs["downsample"]) == (1.0, 1.0)
        # As CLAM crops: read_region(corner, patch_level, (patch_size, patch_size)).
        with Slide(slide_project / "s0.tif") as opened:
            seen = opened._handle.read_region(tuple(map(int, coords[5])), 0, (256, 256)).convert("RGB")
        columns = store.load_columns(prepared_project / "train")
        rows = np.flatnonzero(
            (columns["slides"] == 0) & (columns["x"] == coords[5][0]) & (columns["y"] == coords[5][1])
        )
    patch = store.load(prepared_project / "train").images[rows[0]].permute(1, 2, 0).numpy().astype(float)
    assert np.abs(np.asarray(seen).reshape(64, 4, 64, 4, 3).mean((1, 3)) - patch).mean() < 1
    back = Tiling(size=256, mpp=1.0, coordinates=str(tmp_path / "h5"))
    outcome = prepared(slide_project, tmp_path / "again", tiling=back)
    assert not outcome.failed and fingerprints(tmp_path / "again") == fingerprints(prepared_project)


def test_coordinates_are_found_again_whatever_the_slide_is_called(tmp_path: Path) -> None:
    pytest.importorskip("h5py")
    names = {"test aé.tif": "test aé.tif", "normal_001": "Normal_001.tif", "TCGA-06-0001.0f2b.cafe": "TCGA-06-0001.0f2b.cafe.svs",
             "old/TCGA-06-0001.17aa.svs": "TCGA-06-0001.17aa.svs", "x" * 100: "long.tif", "raw.weird": "raw.weird"}  # fmt: skip
    jobs = tuple(
        SlideJob(name, slide(tmp_path / file, seed=i), name, "test" if i == 5 else "train", label=i % 2)
        for i, (name, file) in enumerate(names.items())
    )
    source = Source("slides", ("a", "b"), jobs)
    prepare(source, SMALL, 64, tmp_path / "out", progress=silent())
    assert export_coordinates(tmp_path / "out", tmp_path / "h5") == 6
    assert {"test aé.h5", "TCGA-06-0001.0f2b.cafe.h5"} <= {path.name for path in (tmp_path / "h5").iterdir()}, "as CLAM"
    again = replace(SMALL, coordinates=str(tmp_path / "h5"))
    outcome = prepare(source, again, 64, tmp_path / "again", progress=silent())
    assert not outcome.failed and fingerprints(tmp_path / "again") == fingerprints(tmp_path / "out")


def test_foreign_coordinates_are_refused_with_the_reason(slide_project: Path, prepared_project: Path, tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    cli.main(["data", "export", str(prepared_project), "--to", "clam", "--out", str(tmp_path / "h5")])
    (tmp_path / "h5" / "s0.h5").unlink()
    (tmp_path / "h5" / "s1.h5").write_bytes(b"no HDF5")
    with h5py.File(tmp_path / "h5" / "s2.h5", "r+") as file:
        file["coords"][0] = (5000, 10)
    with h5py.File(tmp_path / "h5" / "s3.h5", "r+") as file:
        file["coords"].attrs["patch_size"] = 512
    tiling = Tiling(size=256, mpp=1.0, coordinates=str(tmp_path / "h5"))
    with pytest.raises(HistoddError, match="class 'benign' has no training patch; 4 slides could not be used"):
        prepared(slide_project, tmp_path / "o", tiling=tiling)
    source = slides.source(slide_project, 0)
    outcome = extract(source, tiling, 64, tmp_path / "shards", progress=silent())
    assert outcome.failed["s0.tif"] == "no coordinates for this slide"
    assert outcome.failed["s1.tif"].startswith("no CLAM coordinates")
    assert "outside the slide" in outcome.failed["s2.tif"]
    assert "512 level-0 pixels wide (512 microns), 256" in outcome.failed["s3.tif"]


def test_damaged_descriptions_are_one_line(prepared_project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "copy"
    shutil.copytree(prepared_project, out)
    for text in ("{", "[]", '{"index": 3, "slide": "s0.tif"}'):
        (out / "template.json").write_text(text)
        assert cli.main(["data", "info", "slides", "--root", str(out)]) == 0
        assert "template.json is damaged and not used" in capsys.readouterr().out
    described = json.loads((out / "dataset.json").read_text())
    for wrong in ({"settings": None}, {"slides": {"s0.tif": {"levels": [], "mpp": 1}, "s1.tif": {"levels": [1]}}}):
        (out / "dataset.json").write_text(json.dumps({**described, **wrong}))
        assert cli.main(["data", "export", str(out), "--to", "clam", "--out", str(tmp_path / "h5")]) == 1
        line = capsys.readouterr().err.strip()
        assert "dataset.json is damaged" in line and "\n" not in line


@pytest.mark.parametrize("name", ["../../etc/passwd", "a/b", ".hidden", "", "x" * 300, "ä ö", "..", "-rf"])
def test_safe_names_stay_in_their_folder(tmp_path: Path, name: str) -> None:
    safe = safe_name(name)
    assert (
        safe
        and (tmp_path / safe).resolve().parent == tmp_path.resolve()
        and len(safe) <= 80
        and not safe.startswith((".", "-"))
    )
