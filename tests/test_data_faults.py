"""What can go wrong while slides are extracted: one clear line each, nothing half-written, the rest goes on, a rerun completes."""

import os
import resource
import shutil
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tifffile
from slide_makers import project, slide
from tiny_project import environment

from histodd_bench import cli
from histodd_bench.data import load_dataset, slides, store
from histodd_bench.data.images import UnreadableImage, read_rgb
from histodd_bench.data.jobs import Tiling
from histodd_bench.data.prepared import prepare
from histodd_bench.data.workers import Failed, run_jobs
from histodd_bench.data.wsi import SlideError
from histodd_bench.errors import HistoddError
from histodd_bench.progress import Progress

TILING = Tiling(256, 1.0)


def prepared(root: Path, out: Path, **options: object):
    return prepare(slides.source(root, 0), TILING, 32, out, progress=Progress.silent(), **options)  # type: ignore[arg-type]


def command(root: Path, out: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "histodd_bench", "data", "prepare", "slides", "--root", str(root), "--out", str(out),
            "--image-size", "32", *more]  # fmt: skip


def damage_tiles(path: Path, tiles: tuple[int, ...]) -> None:
    with tifffile.TiffFile(path) as file:
        page = file.pages[0]
        places = [(page.dataoffsets[i], page.databytecounts[i]) for i in tiles]
    with open(path, "rb+") as file:
        for offset, count in places:
            file.seek(offset)
            file.write(b"\xab" * count)


def test_an_unreadable_tile_is_counted_and_the_others_are_right(tmp_path: Path) -> None:
    project(tmp_path / "p")
    prepared(tmp_path / "p", tmp_path / "whole")
    damage_tiles(tmp_path / "p" / "s2.tif", (1, 6))
    outcome = prepared(tmp_path / "p", tmp_path / "out")
    assert not outcome.failed
    notes = store.read_dataset(tmp_path / "out")["notes"]
    assert notes == ["2 patches could not be decoded, in 1 slides: s2.tif (2 at (256, 0), (512, 256))"]
    whole, part = (store.load(tmp_path / name / "train") for name in ("whole", "out"))
    columns = store.load_columns(tmp_path / "whole" / "train")
    names = store.slide_names(tmp_path / "whole" / "train")
    kept = [
        i
        for i in range(len(whole))
        if names[columns["slides"][i]] != "s2.tif" or (columns["x"][i], columns["y"][i]) not in ((256, 0), (512, 256))
    ]
    assert np.array_equal(whole.images.numpy()[kept], part.images.numpy())


def test_a_slide_of_which_nothing_can_be_decoded_has_failed(tmp_path: Path) -> None:
    project(tmp_path / "p")
    damage_tiles(tmp_path / "p" / "s0.tif", tuple(range(12)))
    outcome = prepared(tmp_path / "p", tmp_path / "out")
    assert outcome.failed == {"s0.tif": "not one of its 12 tiles can be decoded"}
    left = [p.name for p in (tmp_path / "out" / "slides").iterdir() if p.name.startswith("s0") or ".partial" in p.name]
    assert len(left) == 1 and left[0].endswith(".lock"), "locks stay: another process may wait for one"


@pytest.mark.parametrize("share", [0.02, 0.5, 0.97])
def test_truncated_real_slides_are_named_and_the_rest_goes_on(shared_data: Path, tmp_path: Path, share: float) -> None:
    root = project(tmp_path / "p")
    whole = (shared_data / "wsi" / "CMU-1-Small-Region.svs").read_bytes()
    (root / "cut.svs").write_bytes(whole[: int(len(whole) * share)])
    with open(root / "slides.csv", "a") as file:
        file.write("cut.svs,benign,train,p9,A\n")
    outcome = prepared(root, tmp_path / "out")
    assert list(outcome.failed) == ["cut.svs"] and "\n" not in outcome.failed["cut.svs"]
    assert "1 of 7 slides could not be used: cut.svs" in store.read_dataset(tmp_path / "out")["notes"][0]
    assert len(store.load(tmp_path / "out" / "train")) == 48
    (root / "cut.svs").write_bytes(whole)
    assert prepared(root, tmp_path / "out").new == 1
    assert "cut.svs" in store.slide_names(tmp_path / "out" / "train")


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_full_disk_is_one_line_and_a_rerun_completes(tmp_path: Path, workers: str) -> None:
    root = project(tmp_path / "p")

    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))  # a shard of 12 patches of 32 px has 37 kB

    done = subprocess.run(command(root, tmp_path / "out", "--workers", workers), env=environment(tmp_path / "c"),
                          capture_output=True, text=True, preexec_fn=small_files)  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("error: cannot write ") and "free some space" in done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "out" / "dataset.json").exists()
    assert not list((tmp_path / "out").rglob("meta.json"))
    outcome = prepared(root, tmp_path / "out")
    assert outcome.new == 6 and len(store.load(tmp_path / "out" / "train")) == 48
    assert not list((tmp_path / "out").rglob("*.partial"))


def test_a_disk_that_fills_while_collecting_keeps_the_slides(tmp_path: Path) -> None:
    root = project(tmp_path / "p")

    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # shards fit, the store of 48 patches does not

    done = subprocess.run(command(root, tmp_path / "out", "--workers", "1"), env=environment(tmp_path / "c"),
                          capture_output=True, text=True, preexec_fn=small_files)  # fmt: skip
    assert done.returncode == 1 and "cannot write" in done.stderr and not (tmp_path / "out" / "dataset.json").exists()
    assert prepared(root, tmp_path / "out").new == 0, "every slide was extracted already"
    assert len(store.load(tmp_path / "out" / "train")) == 48


def test_two_processes_at_once_give_one_result(tmp_path: Path) -> None:
    root = project(tmp_path / "p")
    processes = [
        subprocess.Popen(
            command(root, tmp_path / "out", "--workers", "1"), env=environment(tmp_path / "c"), stderr=subprocess.PIPE
        )
        for _ in range(2)
    ]
    errors = [p.communicate(timeout=200)[1].decode() for p in processes]
    assert [p.returncode for p in processes] == [0, 0], errors
    prepared(root, tmp_path / "alone")
    for split in ("train", "test"):
        patches = store.load(tmp_path / "out" / split)
        read = replace(patches, _known_fingerprint=None).fingerprint()
        assert patches.fingerprint() == read == store.load(tmp_path / "alone" / split).fingerprint()


def test_names_never_lead_out_of_the_folder(tmp_path: Path) -> None:
    """Slides, labels and centres of a table are only names: what is written stays under --out."""
    outside = tmp_path / "elsewhere"
    for i in range(3):
        slide(outside / f"s{i}.tif", seed=i)
    root = tmp_path / "a" / "root"
    root.mkdir(parents=True)
    (root / "slides.csv").write_text(
        "slide,label,split,patient,centre\n"
        "../../elsewhere/s0.tif,../../../evil,train,../p0,../c\n"
        f"{outside}/s1.tif,/etc/passwd,train,/p1,..\n"
        f"{outside}/s2.tif,/etc/passwd,test,/p2,..\n"
    )
    before = set(tmp_path.rglob("*"))
    prepared(root, tmp_path / "a" / "out")
    assert (
        cli.main(
            ["data", "export", str(tmp_path / "a" / "out"), "--to", "imagefolder", "--out", str(tmp_path / "a" / "png")]
        )
        == 0
    )
    new = set(tmp_path.rglob("*")) - before
    assert all(p.is_relative_to(tmp_path / "a" / "out") or p.is_relative_to(tmp_path / "a" / "png") for p in new)
    assert sorted(p.name for p in (tmp_path / "a" / "png" / "train").iterdir()) == ["_.._.._evil", "_etc_passwd"]
    assert store.load(tmp_path / "a" / "out" / "train").classes == ("../../../evil", "/etc/passwd")


def test_classes_that_share_a_folder_name_are_refused_by_the_export(tmp_path: Path) -> None:
    project(tmp_path / "p")
    table = tmp_path / "p" / "slides.csv"
    table.write_text(table.read_text().replace("benign", "a b").replace("malignant", "a/b"))
    prepared(tmp_path / "p", tmp_path / "out")
    with pytest.raises(HistoddError, match="do not differ as folder names"):
        from histodd_bench.data.export import export_images

        export_images(tmp_path / "out", tmp_path / "png", Progress.silent())
    assert not (tmp_path / "png").exists()


def test_copied_slides_are_used_once(tmp_path: Path) -> None:
    root = project(tmp_path / "p")
    shutil.copy(root / "s1.tif", root / "s5.tif")
    prepared(root, tmp_path / "out")
    assert store.read_dataset(tmp_path / "out")["notes"] == [
        "1 slides are copies of others and were left out: s5.tif (the same picture as s1.tif)",
        "WARNING: the test set has no patch of class malignant: balanced accuracy covers only the class that is there, and AUC "
        "is left out",
    ]
    assert len(store.load(tmp_path / "out" / "test")) == 12


def png_claiming(path: Path, width: int, height: int) -> Path:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")
    )
    return path


def test_an_image_with_absurd_dimensions_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    bomb = png_claiming(tmp_path / "bomb.png", 60_000, 60_000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for limit in (None, 300_000_000):
        with pytest.raises(UnreadableImage, match="exceeds limit"):
            read_rgb(bomb, max_pixels=limit)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000


def test_a_damaged_dataset_description_is_named(tmp_path: Path) -> None:
    root = project(tmp_path / "p")
    prepared(root, tmp_path / "out")
    (tmp_path / "out" / "dataset.json").write_text("{")
    with pytest.raises(HistoddError, match=r"dataset.json cannot be read"):
        load_dataset("slides", root=tmp_path / "out", image_size=32, cache=tmp_path / "c", progress=Progress.silent())
    with pytest.raises(HistoddError, match=r"dataset.json cannot be read"):
        prepared(root, tmp_path / "out")


def test_a_damaged_shard_is_extracted_again(tmp_path: Path) -> None:
    root = project(tmp_path / "p")
    prepared(root, tmp_path / "out", share=(1, 2))
    (shard,) = (p.parent for p in (tmp_path / "out" / "slides").glob("s0*/meta.json"))
    os.truncate(shard / "images.npy", 1000)
    assert prepared(root, tmp_path / "out").new == 4
    prepared(root, tmp_path / "alone")
    assert (
        store.load(tmp_path / "out" / "train").fingerprint() == store.load(tmp_path / "alone" / "train").fingerprint()
    )


# ---- workers -----------------------------------------------------------------------------------------------------------


def work(job: int, report: Callable[[int], object]) -> int:
    report(1)
    if job == 3:
        os.kill(os.getpid(), 11)  # as a decoder might on hostile input
    if job == 4:
        raise SlideError(Path("x"), "no slide")
    if job == 5:
        raise ZeroDivisionError("oh\nno")
    if job == 6:
        raise HistoddError("the disk is full")
    return job * job


@pytest.mark.parametrize("workers", [2, 3])
def test_a_job_that_kills_its_process_has_failed_and_the_others_are_done(workers: int) -> None:
    counted: list[int] = []
    got = dict(run_jobs(work, [0, 1, 2, 3, 4, 5, 7, 8], workers, counted.append))
    failed = {index: result.reason for index, result in got.items() if isinstance(result, Failed)}
    assert {index: result for index, result in got.items() if index not in failed} == {0: 0, 1: 1, 2: 4, 6: 49, 7: 64}
    assert failed == {3: "the process reading it died (exit code -11)", 4: "no slide", 5: "ZeroDivisionError: oh"}
    assert sum(counted) >= 7


@pytest.mark.parametrize("workers", [1, 2])
def test_what_concerns_all_jobs_ends_them(workers: int) -> None:
    with pytest.raises(HistoddError, match="the disk is full"):
        list(run_jobs(work, [0, 6, 1], workers, lambda n: None))


def test_one_process_does_the_same(tmp_path: Path) -> None:
    got = dict(run_jobs(work, [2, 4, 7], 1, lambda n: None))
    assert got[0] == 4 and got[2] == 49 and isinstance(got[1], Failed) and got[1].reason == "no slide"
