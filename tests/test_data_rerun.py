"""data prepare again: finished slides are kept, through shards, interruptions, failed slides and other settings."""

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from prepared_slides import fingerprints, prepared
from slide_makers import project
from tiny_project import environment

from histodd_bench import cli
from histodd_bench.data import store
from histodd_bench.data.jobs import Tiling
from histodd_bench.errors import UsageError


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return project(tmp_path_factory.mktemp("project"))


@pytest.fixture(scope="module")
def whole(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("prepared") / "out"
    prepared(root, out)
    return out


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
