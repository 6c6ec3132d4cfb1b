"""data prepare: the same patches whatever the workers, shards and interruptions; what is stored; exports; estimates."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from slide_makers import project
from tiny_project import OPTIONS, environment, program

from histodd_bench import cli
from histodd_bench.data import load_dataset, slides, store
from histodd_bench.data.extract import estimate, extract, safe_name
from histodd_bench.data.jobs import Tiling
from histodd_bench.data.prepared import prepare
from histodd_bench.data.wsi import Slide
from histodd_bench.errors import HistoddError, UsageError
from histodd_bench.progress import Progress
from histodd_bench.stain import describe

SMALL = Tiling(size=256, mpp=1.0)


def silent() -> Progress:
    return Progress.silent()


def prepared(root: Path, out: Path, size: int = 64, tiling: Tiling = SMALL, **options: object):
    return prepare(slides.source(root, 0), tiling, size, out, progress=silent(), **options)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return project(tmp_path_factory.mktemp("project"))


@pytest.fixture(scope="module")
def whole(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("prepared") / "out"
    prepared(root, out)
    return out


def fingerprints(out: Path) -> list[str]:
    return [store.load(out / split).fingerprint() for split in ("train", "test")]


def test_every_patch_is_the_slide_at_its_place(root: Path, whole: Path) -> None:
    for split, count in (("train", 4 * 12), ("test", 2 * 12)):
        patches, columns = store.load(whole / split), store.load_columns(whole / split)
        names = store.slide_names(whole / split)
        assert len(patches) == count and patches.classes == ("benign", "malignant")
        assert set(columns) == {"labels", "groups", "centres", "slides", "x", "y", "level", "mpp"}
        assert set(columns["mpp"]) == {4.0} and set(columns["level"]) == {0}
        for i in range(0, count, 7):
            name = names[columns["slides"][i]]
            with Slide(root / name) as opened:
                seen = opened.read(int(columns["x"][i]), int(columns["y"][i]), 64, 64, 4.0)
            assert np.abs(patches.images[i].permute(1, 2, 0).numpy().astype(int) - seen).mean() < 2
            index = int(name[1])
            assert patches.classes[patches.labels[i]] == ("benign", "malignant")[index % 2]
            assert patches.group_names[patches.groups[i]] == f"p{index}"
            assert patches.centre_names[patches.centres[i]] == "AB"[index // 2 % 2]


def test_patches_are_ordered_by_class_slide_and_place(whole: Path) -> None:
    columns, names = store.load_columns(whole / "train"), store.slide_names(whole / "train")
    rows = list(zip(columns["labels"], [names[i] for i in columns["slides"]], columns["y"], columns["x"], strict=True))
    assert rows == sorted(rows)


@pytest.mark.parametrize("workers", [2, 3])
def test_workers_do_not_change_a_byte(root: Path, whole: Path, tmp_path: Path, workers: int) -> None:
    outcome = prepared(root, tmp_path / "out", workers=workers)
    assert outcome.patches == 72 and outcome.new == 6 and not outcome.failed
    assert fingerprints(tmp_path / "out") == fingerprints(whole)


def test_shards_are_collected(root: Path, whole: Path, tmp_path: Path) -> None:
    for i in (1, 2, 3):
        outcome = prepared(root, tmp_path / "out", share=(i, 3))
        assert outcome.new == 2
        assert not (tmp_path / "out" / "dataset.json").exists()
    outcome = prepared(root, tmp_path / "out")
    assert outcome.new == 0 and fingerprints(tmp_path / "out") == fingerprints(whole)
    assert not (tmp_path / "out" / "slides").exists()


def test_a_second_time_nothing_is_done(root: Path, whole: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in whole.rglob("*")}
    assert prepared(root, whole).new == 0
    assert {p: p.stat().st_mtime_ns for p in whole.rglob("*")} == before


def test_other_settings_need_another_folder(root: Path, whole: Path) -> None:
    with pytest.raises(UsageError, match="prepared with other settings: choose another --out"):
        prepared(root, whole, size=32)
    with pytest.raises(UsageError, match="prepared with other settings"):
        prepared(root, whole, tiling=Tiling(size=256, mpp=1.0, min_tissue=0.9))


def test_foreign_folders_are_left_alone(root: Path, tmp_path: Path) -> None:
    (tmp_path / "out" / "train" / "class").mkdir(parents=True)
    (tmp_path / "out" / "train" / "class" / "precious.png").write_bytes(b"x")
    with pytest.raises(UsageError, match="not something that 'data prepare' wrote"):
        prepared(root, tmp_path / "out")
    assert (tmp_path / "out" / "train" / "class" / "precious.png").exists()
    for out in (root, root.parent):
        assert cli.main(["data", "prepare", "slides", "--root", str(root), "--out", str(out)]) == 2


def test_somebody_elses_dataset_json_is_not_ours(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root, tmp_path / "p")
    (tmp_path / "p" / "dataset.json").write_text('{"name": "my slides"}')
    data = load_dataset("slides", root=tmp_path / "p", image_size=16, cache=tmp_path / "c", progress=silent())
    assert len(data.train) == 48


def test_a_changed_slide_is_read_again_and_no_other(root: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    shutil.copytree(root, mine)
    prepared(mine, tmp_path / "out")
    before = fingerprints(tmp_path / "out")
    (mine / "s1.tif").write_bytes(b"II*\0 not a slide any more")
    outcome = prepared(mine, tmp_path / "out")
    assert outcome.failed == {"s1.tif": "not a slide that OpenSlide reads"}
    notes = store.read_dataset(tmp_path / "out")["notes"]
    assert notes == ["1 of 6 slides could not be used: s1.tif (not a slide that OpenSlide reads)"]
    assert len(store.load(tmp_path / "out" / "train")) == 36
    shutil.copy2(root / "s1.tif", mine / "s1.tif")
    outcome = prepared(mine, tmp_path / "out")
    assert outcome.new == 1, "the others were kept, since one had failed"
    assert fingerprints(tmp_path / "out") == before


def test_a_killed_extraction_goes_on(root: Path, whole: Path, tmp_path: Path) -> None:
    big = tmp_path / "big"
    shutil.copytree(root, big)
    out = tmp_path / "out"
    command = [sys.executable, "-m", "histodd_bench", "data", "prepare", "slides", "--root", str(big), "--out", str(out),
               "--image-size", "64", "--workers", "1"]  # fmt: skip
    process = subprocess.Popen(
        command, env=environment(tmp_path / "cache"), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not list(out.glob("slides/*/meta.json")):
        time.sleep(0.002)
    process.kill()
    process.wait()
    finished = len([p for p in out.glob("slides/*/meta.json") if ".partial" not in str(p)])
    assert finished >= 1 and not (out / "dataset.json").exists(), "killed in the middle"
    outcome = prepared(big, out)
    assert outcome.new == 6 - finished
    assert fingerprints(out) == fingerprints(whole)
    assert not list(out.rglob("*.partial")) and not list(out.rglob("*.lock"))[1:]


def test_ctrl_c_ends_all_workers(root: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "histodd_bench", "data", "prepare", "slides", "--root", str(root), "--out",
               str(tmp_path / "out"), "--workers", "2"]  # fmt: skip
    process = subprocess.Popen(command, env=environment(tmp_path / "cache"), stderr=subprocess.PIPE, text=True)
    time.sleep(1.0)
    process.send_signal(signal.SIGINT)
    _, text = process.communicate(timeout=60)
    assert process.returncode == 130 or "ready" in text
    assert process.returncode != 130 or "interrupted: nothing is lost" in text


def test_the_template_is_stored_with_the_dataset(whole: Path, tmp_path: Path) -> None:
    train = store.load(whole / "train")
    kept = json.loads((whole / "template.json").read_text())
    expected = describe(train)
    assert kept["index"] == expected.template_index and kept["train"] == train.fingerprint()
    x = train.images.double() / 255
    # By hand: the patch whose channel means and standard deviations are nearest to the set's, among those that can be fitted.
    ours = torch.cat([x.mean((2, 3)), x.std((2, 3), correction=0)], 1)
    sets = torch.cat([x.mean((0, 2, 3)), x.transpose(0, 1).flatten(1).std(1, correction=0)])
    order = (ours - sets).square().sum(1).argsort()
    assert kept["index"] in order[:8].tolist()
    names, columns = store.slide_names(whole / "train"), store.load_columns(whole / "train")
    assert kept["slide"] == names[columns["slides"][kept["index"]]] and kept["x"] == columns["x"][kept["index"]]
    data = load_dataset("slides", root=whole, image_size=64, cache=tmp_path, progress=silent())
    assert data.preprocessing == expected, "what is stored is what would be found, bit for bit"


def test_a_template_of_other_patches_is_not_used(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "copy")
    kept = json.loads((tmp_path / "copy" / "template.json").read_text())
    (tmp_path / "copy" / "template.json").write_text(json.dumps({**kept, "train": "0" * 64}))
    assert (
        load_dataset("slides", root=tmp_path / "copy", image_size=64, cache=tmp_path, progress=silent()).preprocessing
        is None
    )
    (tmp_path / "copy" / "template.json").write_text("{")
    assert (
        load_dataset("slides", root=tmp_path / "copy", image_size=64, cache=tmp_path, progress=silent()).preprocessing
        is None
    )


def test_a_prepared_set_opens_at_any_size_and_under_its_own_name_only(whole: Path, tmp_path: Path) -> None:
    data = load_dataset("slides", root=whole, image_size=64, cache=tmp_path, progress=silent())
    assert [data.train.fingerprint(), data.test.fingerprint()] == fingerprints(whole) and not list(tmp_path.iterdir())
    small = load_dataset("slides", root=whole, image_size=32, cache=tmp_path, workers=2, progress=silent())
    box = data.train.images.float().unfold(2, 2, 2).unfold(3, 2, 2).mean((4, 5))
    assert (small.train.images.float() - box).abs().max() <= 0.51
    assert torch.equal(small.train.groups, data.train.groups) and small.train.centre_names == ("A", "B")
    larger = load_dataset("slides", root=whole, image_size=96, cache=tmp_path, progress=silent())
    assert "patches are enlarged from 64 to 96 px" in larger.notes
    with pytest.raises(UsageError, match="prepared from 'slides': use --dataset slides"):
        load_dataset("camelyon16", root=whole, image_size=64, cache=tmp_path, progress=silent())


def test_dry_run_counts_what_extraction_gives(
    root: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    counts, failed = estimate(slides.source(root, 0), SMALL, progress=silent())
    assert not failed and {name: sum(values) for name, values in counts.items()} == {f"s{i}.tif": 12 for i in range(6)}
    out = tmp_path / "none"
    assert cli.main(["data", "prepare", "slides", "--root", str(root), "--out", str(out), "--image-size", "64",
                     "--workers", "1", "--dry-run"]) == 0  # fmt: skip
    text = capsys.readouterr().out
    assert "train: 4 slides, 48 patches (benign 24, malignant 24)" in text and "72 patches of 64 px: 889 kB" in text
    assert not out.exists()
    actual = sum(p.stat().st_size for split in ("train", "test") for p in (whole / split).iterdir())
    assert actual == pytest.approx(889_000, rel=0.03)


def test_the_command_reports_and_info_describes(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["data", "prepare", "slides", "--root", str(root), "--out", str(tmp_path / "o"), "--workers", "1"]
    assert cli.main([*arguments, "--magnification", "10", "--size", "128", "--stride", "256", "--shard", "2/2"]) == 0
    assert "part 2/2 is done" in capsys.readouterr().out
    assert cli.main([*arguments, "--magnification", "10", "--size", "128", "--stride", "256"]) == 0
    text = capsys.readouterr().out
    assert (
        "3 slides read in" in text and "patches/s" in text and "ready: run table1 --dataset slides --data-root" in text
    )
    assert cli.main(["data", "info", "slides", "--root", str(tmp_path / "o")]) == 0
    text = capsys.readouterr().out
    assert "patches of malignant" in text and "stain template: training patch" in text
    assert cli.main(["data", "info", "slides", "--root", str(root)]) == 0
    rows = dict(
        line.strip().rsplit(None, 2)[:2]
        for line in capsys.readouterr().out.splitlines()
        if line.rstrip().endswith((" 2", " 1"))
    )
    assert rows["slides"] == "4" and rows["slides with benign"] == "2" and rows["slides of A"] == "2"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--shard", "3/2"], "--shard must be i/n"),
        (["--shard", "x"], "--shard must be i/n"),
        (["--magnification", "20", "--target-mpp", "0.5"], "say the same"),
        (["--magnification", "0"], "must be above 0"),
        (["--magnification", "900"], "not a microscope's"),
        (["--mpp", "352.9"], "--mpp: 352.9 microns per pixel is not a microscope's"),
        (["--size", "0"], "--size must be"),
        (["--size", "9000"], "--size must be 1 to 4096"),
        (["--min-tissue", "1.5"], "--min-tissue must be"),
        (["--positive", "0.1", "--negative", "0.2"], "0 <= negative < positive <= 1"),
        (["--coords", "/nowhere"], "--coords /nowhere is not a folder"),
        (["--image-size", "-3"], "--image-size must be"),
    ],
)
def test_wrong_options_are_one_line(
    root: Path, tmp_path: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["data", "prepare", "slides", "--root", str(root), "--out", str(tmp_path / "o"), *options]) == 2
    line = capsys.readouterr().err.strip()
    assert message in line and "\n" not in line and not (tmp_path / "o").exists()


def test_names_and_roots_are_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--out", str(tmp_path / "o")]
    assert cli.main(["data", "prepare", "camelion16", *out]) == 2
    assert "did you mean 'camelyon16'?" in capsys.readouterr().err
    assert cli.main(["data", "prepare", "camelyon16", *out]) == 2
    assert "say where they are with --root" in capsys.readouterr().err
    assert cli.main(["data", "prepare", "camelyon16", "--root", str(tmp_path / "x"), *out]) == 2
    assert "is not a folder" in capsys.readouterr().err
    assert cli.main(["data", "prepare", "imagefolder", "--root", str(tmp_path), *out, "--size", "3"]) == 2
    assert "--size is for data sets that consist of slides" in capsys.readouterr().err
    assert cli.main(["data", "export", str(tmp_path), "--to", "imagefolder", *out]) == 2
    assert "not a prepared data set" in capsys.readouterr().err


def test_a_dataset_of_files_is_prepared_too(
    shared_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for patient in sorted(os.listdir(shared_data / "idc"))[:6]:
        shutil.copytree(shared_data / "idc" / patient, tmp_path / "idc" / patient)
    arguments = [
        "data",
        "prepare",
        "idc",
        "--root",
        str(tmp_path / "idc"),
        "--out",
        str(tmp_path / "o"),
        "--workers",
        "1",
    ]
    assert cli.main(arguments) == 0
    direct = load_dataset("idc", root=tmp_path / "idc", image_size=50, cache=tmp_path / "c", progress=silent())
    data = load_dataset("idc", root=tmp_path / "o", image_size=50, cache=tmp_path / "c", progress=silent())
    assert data.train.fingerprint() == direct.train.fingerprint() and data.notes == direct.notes
    assert data.preprocessing == describe(direct.train)
    assert not (tmp_path / "o" / "work").exists()
    assert cli.main(arguments) == 0 and "already prepared" in capsys.readouterr().err


# ---- exports ---------------------------------------------------------------------------------------------------------


def test_exported_images_make_the_same_patch_sets(whole: Path, tmp_path: Path) -> None:
    assert cli.main(["data", "export", str(whole), "--to", "imagefolder", "--out", str(tmp_path / "png")]) == 0
    data = load_dataset("imagefolder", root=tmp_path / "png", image_size=64, cache=tmp_path / "c", progress=silent())
    assert [data.train.fingerprint(), data.test.fingerprint()] == fingerprints(whole)
    with open(tmp_path / "png" / "groups.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 72 and {row["centre"] for row in rows} == {"A", "B"}
    first = Image.open(tmp_path / "png" / rows[0]["path"])
    assert np.array_equal(np.asarray(first).transpose(2, 0, 1), store.load(whole / "train").images[0])
    assert cli.main(["data", "export", str(whole), "--to", "imagefolder", "--out", str(tmp_path / "png")]) == 2, (
        "exists"
    )


def test_training_from_slides_gives_the_same_table_as_from_their_patches(
    root: Path, whole: Path, tmp_path: Path
) -> None:
    cli.main(["data", "export", str(whole), "--to", "imagefolder", "--out", str(tmp_path / "png")])
    scores = []
    options = [o if o != "16" else "64" for o in OPTIONS]
    for name, data in (("slides", root), ("slides", whole), ("imagefolder", tmp_path / "png")):
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


def test_coordinates_go_out_to_clam_and_come_back(root: Path, whole: Path, tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    assert cli.main(["data", "export", str(whole), "--to", "clam", "--out", str(tmp_path / "h5")]) == 0
    with h5py.File(tmp_path / "h5" / "s0.h5") as file:
        coords = file["coords"]
        assert coords.shape == (12, 2) and coords.dtype == np.int64
        assert {k: coords.attrs[k] for k in ("patch_size", "patch_level")} == {"patch_size": 256, "patch_level": 0}
        assert coords.attrs["name"] == "s0.tif" and tuple(coords.attrs["level_dim"]) == (1024, 768)
        assert tuple(coords.attrs["downsample"]) == (1.0, 1.0)
        # As CLAM crops: read_region(corner, patch_level, (patch_size, patch_size)).
        with Slide(root / "s0.tif") as opened:
            seen = opened._handle.read_region(tuple(map(int, coords[5])), 0, (256, 256)).convert("RGB")
        columns = store.load_columns(whole / "train")
        rows = np.flatnonzero(
            (columns["slides"] == 0) & (columns["x"] == coords[5][0]) & (columns["y"] == coords[5][1])
        )
    patch = store.load(whole / "train").images[rows[0]].permute(1, 2, 0).numpy().astype(float)
    assert np.abs(np.asarray(seen).reshape(64, 4, 64, 4, 3).mean((1, 3)) - patch).mean() < 1
    back = Tiling(size=256, mpp=1.0, coordinates=str(tmp_path / "h5"))
    outcome = prepared(root, tmp_path / "again", tiling=back)
    assert not outcome.failed and fingerprints(tmp_path / "again") == fingerprints(whole)


def test_foreign_coordinates_are_refused_with_the_reason(root: Path, whole: Path, tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    cli.main(["data", "export", str(whole), "--to", "clam", "--out", str(tmp_path / "h5")])
    (tmp_path / "h5" / "s0.h5").unlink()
    (tmp_path / "h5" / "s1.h5").write_bytes(b"no HDF5")
    with h5py.File(tmp_path / "h5" / "s2.h5", "r+") as file:
        file["coords"][0] = (5000, 10)
    with h5py.File(tmp_path / "h5" / "s3.h5", "r+") as file:
        file["coords"].attrs["patch_size"] = 512
    tiling = Tiling(size=256, mpp=1.0, coordinates=str(tmp_path / "h5"))
    with pytest.raises(HistoddError, match="class 'benign' has no training patch; 4 slides could not be used"):
        prepared(root, tmp_path / "o", tiling=tiling)
    source = slides.source(root, 0)
    outcome = extract(source, tiling, 64, tmp_path / "shards", progress=silent())
    assert outcome.failed["s0.tif"] == "no coordinates for this slide"
    assert outcome.failed["s1.tif"].startswith("no CLAM coordinates")
    assert "outside the slide" in outcome.failed["s2.tif"]
    assert "512 level-0 pixels wide (512 microns), 256" in outcome.failed["s3.tif"]


@pytest.mark.parametrize("name", ["../../etc/passwd", "a/b", ".hidden", "", "x" * 300, "ä ö", "..", "-rf"])
def test_safe_names_stay_in_their_folder(tmp_path: Path, name: str) -> None:
    safe = safe_name(name)
    assert (
        safe
        and (tmp_path / safe).resolve().parent == tmp_path.resolve()
        and len(safe) <= 80
        and not safe.startswith((".", "-"))
    )
