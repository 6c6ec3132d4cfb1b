"""data prepare again: finished slides are kept, through shards, interruptions, failed slides and other settings."""

import dataclasses
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from prepared_slides import fingerprints, prepared, silent
from tiny_project import environment

from histodd_bench import cli
from histodd_bench.data import load_dataset, slides, store
from histodd_bench.data.jobs import Tiling
from histodd_bench.data.prepared import prepare
from histodd_bench.errors import HistoddError, UsageError
from histodd_bench.files import move_folder


def test_shards_are_collected(slide_project: Path, prepared_project: Path, tmp_path: Path) -> None:
    for i in (1, 2, 3):
        outcome = prepared(slide_project, tmp_path / "out", share=(i, 3))
        assert outcome.new == 2
        assert not (tmp_path / "out" / "dataset.json").exists()
    outcome = prepared(slide_project, tmp_path / "out")
    assert outcome.new == 0 and fingerprints(tmp_path / "out") == fingerprints(prepared_project)
    assert not (tmp_path / "out" / "slides").exists()


def test_a_second_time_nothing_is_done(slide_project: Path, prepared_project: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in prepared_project.rglob("*")}
    assert prepared(slide_project, prepared_project).new == 0
    assert {p: p.stat().st_mtime_ns for p in prepared_project.rglob("*")} == before


def test_other_settings_need_another_folder(slide_project: Path, prepared_project: Path) -> None:
    with pytest.raises(UsageError, match="prepared with other settings: choose another --out"):
        prepared(slide_project, prepared_project, size=32)
    with pytest.raises(UsageError, match="prepared with other settings"):
        prepared(slide_project, prepared_project, tiling=Tiling(size=256, mpp=1.0, min_tissue=0.9))


def test_foreign_folders_are_left_alone(slide_project: Path, tmp_path: Path) -> None:
    (tmp_path / "out" / "train" / "class").mkdir(parents=True)
    (tmp_path / "out" / "train" / "class" / "precious.png").write_bytes(b"x")
    with pytest.raises(UsageError, match="not something that 'data prepare' wrote"):
        prepared(slide_project, tmp_path / "out")
    assert (tmp_path / "out" / "train" / "class" / "precious.png").exists()
    for out in (slide_project, slide_project.parent):
        assert cli.main(["data", "prepare", "slides", "--root", str(slide_project), "--out", str(out)]) == 2


def test_a_changed_slide_is_read_again_and_no_other(slide_project: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    shutil.copytree(slide_project, mine)
    prepared(mine, tmp_path / "out")
    before = fingerprints(tmp_path / "out")
    (mine / "s1.tif").write_bytes(b"II*\0 not a slide any more")
    outcome = prepared(mine, tmp_path / "out")
    assert outcome.failed == {"s1.tif": "not a slide that OpenSlide reads"}
    notes = store.read_dataset(tmp_path / "out")["notes"]
    assert notes == ["1 of 6 slides could not be used: s1.tif (not a slide that OpenSlide reads)"]
    assert len(store.load(tmp_path / "out" / "train")) == 36
    shutil.copy2(slide_project / "s1.tif", mine / "s1.tif")
    outcome = prepared(mine, tmp_path / "out")
    assert outcome.new == 1, "the others were kept, since one had failed"
    assert fingerprints(tmp_path / "out") == before


KILLED = """
import os, signal, sys
from histodd_bench import cli

left, replace = int(sys.argv.pop(1)), os.replace

def kill_at_call(made, path):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(made, path)

os.replace = kill_at_call
sys.exit(cli.main(sys.argv[1:]))
"""


def test_an_extraction_killed_at_any_moment_goes_on(
    slide_project: Path, prepared_project: Path, tmp_path: Path
) -> None:
    """Killed before a file or folder takes its name: in the second slide, in the last, and while the shards are joined."""
    out, finished = tmp_path / "out", []
    command = ["data", "prepare", "slides", "--root", str(slide_project), "--out", str(out), "--image-size", "64"]
    for moment in ("5", "9", "6"):  # every process goes on where the one before it was killed
        killed = subprocess.run([sys.executable, "-c", KILLED, moment, *command, "--workers", "1"],
                                env=environment(tmp_path / "cache"), capture_output=True, text=True)  # fmt: skip
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        assert not (out / "dataset.json").exists()
        finished.append(len([p for p in out.glob("slides/*/meta.json") if ".partial" not in str(p)]))
    assert finished == [1, 5, 6]
    assert prepared(slide_project, out).new == 0
    assert fingerprints(out) == fingerprints(prepared_project)
    assert not list(out.rglob("*.partial")) and not list(out.rglob("*.lock"))[1:]


def test_ctrl_c_ends_all_workers(slide_project: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "histodd_bench", "data", "prepare", "slides", "--root", str(slide_project), "--out",
               str(tmp_path / "out"), "--workers", "2"]  # fmt: skip
    process = subprocess.Popen(command, env=environment(tmp_path / "cache"), stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not (tmp_path / "out").exists():
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, text = process.communicate(timeout=60)
    assert process.returncode == 130 or "ready" in text
    assert process.returncode != 130 or "interrupted: nothing is lost" in text


@pytest.mark.parametrize("slides_left", [True, False])
def test_a_slide_that_fails_again_leaves_the_set_as_it_is_and_is_told_again(
    slide_project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], slides_left: bool
) -> None:
    mine, out = tmp_path / "mine", tmp_path / "out"
    shutil.copytree(slide_project, mine)
    (mine / "s5.tif").write_bytes(b"II*\0 no slide")
    command = ["data", "prepare", "slides", "--root", str(mine), "--out", str(out), "--image-size", "64"]
    assert cli.main([*command, "--workers", "1"]) == 0
    capsys.readouterr()
    if not slides_left:
        shutil.rmtree(out / "slides")  # a user who has given the slide up
    kept = [out / "dataset.json", out / "template.json", *(out / "train").iterdir(), *(out / "test").iterdir()]
    before = {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in kept}
    assert cli.main([*command, "--workers", "1"]) == 0
    text = capsys.readouterr()
    assert {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in kept} == before
    assert "1 slides read in" in text.out and "ready: run table1" in text.out
    assert "not used: s5.tif: not a slide that OpenSlide reads" in text.err
    assert "already prepared; 1 slides still cannot be used" in text.err


def test_slides_of_other_settings_or_another_data_set_are_not_mixed_and_not_lost(slide_project: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepared(slide_project, out, share=(1, 2))
    there = sorted(out.rglob("meta.json"))
    assert len(there) == 3
    for other in ({"tiling": Tiling(size=128, mpp=1.0)}, {"size": 32}):
        for share in ((2, 2), (1, 1)):
            with pytest.raises(UsageError, match="extracted for another data set or with other settings"):
                prepared(slide_project, out, share=share, **other)
    source = dataclasses.replace(slides.source(slide_project, 0), name="tcga-idh")
    with pytest.raises(UsageError, match="extracted for another data set"):
        prepare(source, Tiling(size=256, mpp=1.0), 64, out, progress=silent())
    assert sorted(out.rglob("meta.json")) == there
    assert prepared(slide_project, out).new == 3


def test_a_store_is_whole_at_any_moment_while_it_is_replaced(
    prepared_project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What deletes files is stopped half-way, as a power failure would: the new store is there, and a rerun is not refused."""
    out = tmp_path / "out"
    shutil.copytree(prepared_project, out)
    shutil.copytree(prepared_project / "test", tmp_path / "new")

    def stopped(path: Path, **options: object) -> None:
        if Path(path).exists():
            (Path(path) / "meta.json").unlink()
            raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", stopped)
    with pytest.raises(KeyboardInterrupt):
        move_folder(tmp_path / "new", out / "train")
    assert store.load(out / "train").fingerprint() == fingerprints(prepared_project)[1]


def test_one_side_of_the_split_is_refused_before_anything_is_read(
    slide_project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = tmp_path / "mine"
    shutil.copytree(slide_project, mine)
    table = (mine / "slides.csv").read_text()
    for there, absent in (("train", "test"), ("test", "train")):
        (mine / "slides.csv").write_text(table.replace(f",{absent},", f",{there},"))
        with pytest.raises(HistoddError, match=f"none of 6 slides is in the {absent} set"):
            load_dataset("slides", root=mine, image_size=32, cache=tmp_path / "c", progress=silent())
    for more in ([], ["--dry-run"], ["--shard", "1/2"]):  # nothing to learn from
        code = cli.main(["data", "prepare", "slides", "--root", str(mine), "--out", str(tmp_path / "o"), *more])
        line = capsys.readouterr().err.strip()
        assert code == 1 and "slides: none of 6 slides is in the train set" in line and "\n" not in line
    assert not (tmp_path / "o").exists()


def test_without_test_slides_a_set_can_be_prepared_and_not_scored(
    slide_project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HISTODD_CACHE", str(tmp_path / "cache"))
    mine, out = tmp_path / "mine", tmp_path / "out"
    shutil.copytree(slide_project, mine)
    table = (mine / "slides.csv").read_text()
    (mine / "slides.csv").write_text(table.replace(",test,", ",train,"))
    assert not prepared(mine, out).failed and len(store.load(out / "train")) and not len(store.load(out / "test"))
    capsys.readouterr()
    assert cli.main(["run", "table1", "--dataset", "slides", "--data-root", str(out), "--out", str(tmp_path / "r")]) == 1
    assert "slides: there is no test patch: nothing could be scored; add some" in capsys.readouterr().err


def test_test_slides_that_give_no_patch_are_an_error(slide_project: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    shutil.copytree(slide_project, mine)
    for name in ("s4.tif", "s5.tif"):
        (mine / name).write_bytes(b"II*\0 no slide")
    with pytest.raises(HistoddError, match=r"slides: there is no test patch; 2 slides could not be used: s4.tif"):
        prepared(mine, tmp_path / "out")
    assert not (tmp_path / "out" / "dataset.json").exists()
    shutil.copy(slide_project / "s4.tif", mine / "s4.tif")
    assert prepared(mine, tmp_path / "out").new == 2
