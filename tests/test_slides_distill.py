"""Per-slide distillation: what a slide's set holds, that jobs are idempotent, that engines agree, and that kills cost little."""

import csv
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_project import environment
from tiny_slides import arguments, write_slides

from histodd_bench import cli, options
from histodd_bench.baselines.herding import herd
from histodd_bench.data.centres import open_experiment
from histodd_bench.engines import Engine
from histodd_bench.errors import HistoddError, UsageError
from histodd_bench.progress import Progress
from histodd_bench.slides_distill import SlideDistiller, SlideJob
from histodd_bench.slides_run import distill_slides, shard
from histodd_bench.training import predict


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("slides")
    return {"data": write_slides(base / "data"), "cache": base / "cache"}


@pytest.fixture(autouse=True)
def same_cache(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HISTODD_CACHE", str(folders["cache"]))


def distiller(
    folders: dict[str, Path], out: Path, method: str = "histodd", *more: str, data: Path | None = None
) -> SlideDistiller:
    line = arguments("distill-slides", data or folders["data"], out, "--ipc", "3", *more)
    args = options.make_parser(cli.COMMANDS).parse_args(line)
    request = dataclasses.replace(cli.make_requests(args, None, out)[0], methods=(method,))
    return SlideDistiller(open_experiment(request, Progress.silent()), method)


def made(folder: Path) -> dict[str, bytes]:
    """Every slide's tensors; measured seconds are in the files' headers and may differ."""
    from safetensors.torch import load_file

    found = {}
    for path in sorted(folder.glob("slides/*/*.safetensors")):
        tensors = load_file(path)
        found[f"{path.parent.name}/{path.stem}"] = b"".join(tensors[k].numpy().tobytes() for k in sorted(tensors))
    return found


def local(tmp_path: Path, workers: int = 1, name: str = "local", **options_: str) -> Engine:
    return Engine(name, workers, "cpu", tmp_path / "work", options_)


# ---- what a set holds -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["histodd", "random", "herding"])
def test_a_set_has_m_patches_of_every_class_the_slide_shows(folders, tmp_path, method) -> None:
    d = distiller(folders, tmp_path, method)
    for slide, expected in (("train-s0", [3, 3]), ("train-s2", [3, 0])):  # train-s2 shows class 0 only
        job = SlideJob(slide, 3, 0)
        d.make(job)
        found = d.load(job)
        assert found.patches.class_counts() == expected and found.patches.group_names == (slide,)
        assert found.had == ((4, 4) if expected[1] else (4, 0)) and found.capped == {} and found.seconds > 0
        assert found.patches.images.dtype == (torch.float32 if method == "histodd" else torch.uint8)


def test_new_networks_and_a_matched_start_work_for_slides_of_any_class(folders, tmp_path) -> None:
    fields = ("networks=random", "initial=matched", "start_patches=9", "outer_steps=0")
    d = distiller(folders, tmp_path, "histodd", *(part for f in fields for part in ("--set", f"histodd.{f}")))
    assert distiller(folders, tmp_path).method(3).networks == "pool"
    for slide, expected in (("train-s0", [3, 3]), ("train-s2", [3, 0])):
        d.make(SlideJob(slide, 3, 0))
        found = d.load(SlideJob(slide, 3, 0)).patches
        assert found.class_counts() == expected
        real = d._patches(slide).float_batch(slice(None)).flatten(1)
        assert torch.cdist(found.images.flatten(1), real).amin(1).max() < 1e-4, (
            "no step was taken: patches of the slide"
        )
    moved = distiller(folders, tmp_path, "histodd", *(part for f in fields[:3] for part in ("--set", f"histodd.{f}")))
    moved.make(SlideJob("train-s2", 3, 0))
    assert moved.load(SlideJob("train-s2", 3, 0)).patches.class_counts() == [3, 0]


def test_never_more_than_the_slide_has(folders, tmp_path) -> None:
    d = distiller(folders, tmp_path, "random")
    d.make(SlideJob("train-s0", 10, 0))
    found = d.load(SlideJob("train-s0", 10, 0))
    assert found.patches.class_counts() == [4, 4] and found.capped == {"class0": 4, "class1": 4}
    whole = d._patches("train-s0")
    assert sorted(i.numpy().tobytes() for i in found.patches.images) == sorted(
        i.numpy().tobytes() for i in whole.images
    )


def test_distillation_moves_the_patches_of_this_slide_and_stays_in_range(folders, tmp_path) -> None:
    d = distiller(folders, tmp_path)
    d.make(SlideJob("train-s1", 3, 0))
    images = d.load(SlideJob("train-s1", 3, 0)).patches.images
    assert 0 <= float(images.min()) and float(images.max()) <= 1
    real = d._patches("train-s1").float_batch(slice(None))
    distance = torch.cdist(images.flatten(1), real.flatten(1)).amin(1)
    others = torch.cdist(images.flatten(1), d._patches("train-s3").float_batch(slice(None)).flatten(1)).amin(1)
    assert (distance > 0).all() and (distance < others).all(), (
        "each began as a patch of the slide and is still nearest to one"
    )


def test_one_class_trains_no_network_and_a_single_patch_is_enough(folders, tmp_path) -> None:
    """A slide of one patch is distilled: one class, one real patch in every batch."""
    data = write_slides(tmp_path / "data", per_class=1)
    d = distiller(folders, tmp_path / "out", data=data)
    d.make(SlideJob("train-s2", 3, 0))
    found = d.load(SlideJob("train-s2", 3, 0))
    assert found.patches.class_counts() == [1, 0] and found.capped == {"class0": 1}
    assert torch.isfinite(found.patches.images).all()


def test_one_number_and_the_same_number_for_each_class_are_the_same(folders, tmp_path) -> None:
    d = distiller(folders, tmp_path)
    slide, pool = d._patches("train-s0"), d._pool
    results = [
        d.method(2)(slide, ipc, pool.of(slide), 5, workdir=tmp_path / str(i), progress=Progress.silent()).images
        for i, ipc in enumerate((2, (2, 2)))
    ]
    assert torch.equal(*results)


def test_a_slide_sees_its_own_stain_fits(folders, tmp_path) -> None:
    d = distiller(folders, tmp_path)
    slide = d._patches("train-s1")
    stain, valid = d._pool.of(slide).fits()
    whole, whole_valid = d.experiment.pool().fits()
    rows = (d.train.groups == d.train.group_names.index("train-s1")).nonzero().flatten()
    assert torch.equal(valid, whole_valid[rows])
    torch.testing.assert_close(stain[valid], whole[rows][valid])


def test_herding_per_slide_follows_each_slides_own_mean(folders, tmp_path) -> None:
    d = distiller(folders, tmp_path, "herding")
    d.make(SlideJob("train-s0", 3, 0))
    network, stain = d._herding(SlideJob("train-s0", 3, 0))
    whole = d._patches("train-s0")
    expected = []
    for label in (0, 1):
        members = whole.class_indices(label)
        features = predict(network, whole.subset(members), d.experiment.preprocessing, stain=stain, features=True)
        expected.append(members[herd(features, 3)])
    assert torch.equal(d.load(SlideJob("train-s0", 3, 0)).patches.images, whole.images[torch.cat(expected)])


def test_slides_seeds_and_budgets_give_sets_of_their_own(folders, tmp_path) -> None:
    d = distiller(folders, tmp_path, "random")
    jobs = [
        SlideJob("train-s0", 2, 0),
        SlideJob("train-s0", 2, 1),
        SlideJob("train-s0", 3, 0),
        SlideJob("train-s1", 2, 0),
    ]
    for job in jobs:
        d.make(job)
    sets = [d.load(job).patches.images for job in jobs]
    assert len({s.numpy().tobytes() for s in sets}) == 4


def test_all_slides_as_one_set(folders, tmp_path) -> None:
    d = distiller(folders, tmp_path, "random")
    for name in d.slides:
        d.make(SlideJob(name, 2, 0))
    patches, sets = d.load_all(2, 0)
    assert len(sets) == 6 and patches.group_names == d.slides and len(patches) == 4 * 4 + 2 * 2
    assert torch.bincount(patches.groups).tolist() == [4, 4, 2, 4, 4, 2]


# ---- jobs -------------------------------------------------------------------------------------------------------------


def test_shards_are_disjoint_and_together_all() -> None:
    slides = [f"s{i}" for i in range(11)]
    parts = [shard(slides, (i, 4)) for i in (1, 2, 3, 4)]
    assert sorted(s for p in parts for s in p) == sorted(slides) and {len(p) for p in parts} == {2, 3}


def test_a_finished_slide_is_not_touched_and_a_damaged_one_is_made_again(folders, tmp_path) -> None:
    d = distiller(folders, tmp_path)
    job = SlideJob("train-s0", 3, 0)
    d.make(job)
    before, content = d.path(job).stat().st_mtime_ns, made(tmp_path)
    d.make(job)
    assert d.path(job).stat().st_mtime_ns == before and d.finished(job)
    os.truncate(d.path(job), 100)
    assert not d.finished(job)
    with pytest.raises(HistoddError, match="missing or damaged"):
        d.load(job)
    d.make(job)
    assert made(tmp_path) == content


def test_another_configuration_never_reuses_a_file(folders, tmp_path) -> None:
    first, second = distiller(folders, tmp_path), distiller(folders, tmp_path, "histodd", "--set", "histodd.alpha=0.2")
    first.make(SlideJob("train-s0", 3, 0))
    assert first.finished(SlideJob("train-s0", 3, 0)) and not second.finished(SlideJob("train-s0", 3, 0))


def test_coresets_and_distillation_only() -> None:
    with pytest.raises(UsageError, match="cannot be applied slide by slide: choose from histodd"):
        SlideDistiller(None, "forgetting")  # type: ignore[arg-type]


# ---- engines ------------------------------------------------------------------------------------------------------------


def run(d: SlideDistiller, engine: Engine, **more) -> dict:
    return distill_slides(d, [2], [0], engine, Progress.silent(), **more)


def engines() -> list[tuple[str, dict[str, str]]]:
    """SLURM is submitit's stand-in on this machine; the cluster's own where HISTODD_TEST_SLURM=1 says that jobs may be sent."""
    where = {} if os.environ.get("HISTODD_TEST_SLURM") == "1" else {"cluster": "local"}
    return [("local", {}), ("slurm", {**where, "timeout_min": "5"}), ("ray", {})]


@pytest.mark.parametrize(("name", "options_"), engines())
def test_every_engine_gives_what_one_process_gives(folders, tmp_path, name, options_) -> None:
    pytest.importorskip(
        {"slurm": "submitit", "ray": "ray"}.get(name, "torch"), reason=f"engine {name}: package not installed"
    )
    alone = distiller(folders, tmp_path / "alone")
    for slide in alone.slides:
        alone.make(SlideJob(slide, 2, 0))
    d = distiller(folders, tmp_path / name)
    assert run(d, local(tmp_path / name, 2, name, **options_)) == {}
    assert made(tmp_path / name) == made(tmp_path / "alone") and len(made(tmp_path / name)) == 6
    index = json.loads(next((tmp_path / name).glob("slides/*/slides.json")).read_text())
    assert len(index["slides"]) == 6 and index["missing"] == [] and index["failed"] == {} and not index["procedural"]
    assert index["slides"]["train-s0"]["kept"] == [2, 2] and index["slides"]["train-s0"]["seconds"] > 0


def test_shards_on_their_own_give_the_whole(folders, tmp_path) -> None:
    whole = distiller(folders, tmp_path / "whole")
    assert run(whole, local(tmp_path, 2)) == {}
    d = distiller(folders, tmp_path / "parts")
    for i in (2, 1):
        assert run(d, local(tmp_path, 1), part=(i, 2)) == {}
    assert made(tmp_path / "parts") == made(tmp_path / "whole")


def test_a_slide_that_fails_twice_is_reported_and_the_others_are_done(folders, tmp_path, capsys) -> None:
    """Learning rates that diverge; a slide whose file cannot be written fails, the rest go on."""
    line = arguments(
        "distill-slides", folders["data"], tmp_path / "out", "--ipc", "2", "--seeds", "1", "--workers", "1"
    )
    d = distiller(folders, tmp_path / "out")
    blocked = d.path(SlideJob("train-s3", 2, 0))
    blocked.mkdir(parents=True)  # a folder is in the way of the file
    assert cli.main(line) == 1
    captured = capsys.readouterr()
    errors = [x for x in captured.err.splitlines() if x.startswith("error:")]
    assert len(errors) == 1 and "1 slides failed twice" in errors[0] and "train-s3" in errors[0]
    assert captured.err.count("trying again") == 1
    index = json.loads((blocked.parent / "slides.json").read_text())
    assert index["missing"] == ["train-s3"] and list(index["failed"]) == ["train-s3"] and len(index["slides"]) == 5
    blocked.rmdir()
    assert cli.main(line) == 0
    assert len(made(tmp_path / "out")) == 6


def test_a_killed_run_goes_on_and_repeats_no_finished_slide(folders, tmp_path) -> None:
    whole = distiller(folders, tmp_path / "whole")
    assert run(whole, local(tmp_path, 1)) == {}
    line = arguments(
        "distill-slides", folders["data"], tmp_path / "out", "--ipc", "2", "--seeds", "1", "--workers", "2"
    )
    child = subprocess.Popen([sys.executable, "-m", "histodd_bench", *line], env=environment(folders["cache"]),
                             stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)  # fmt: skip
    deadline = time.monotonic() + 120
    while (
        child.poll() is None
        and len(list(tmp_path.glob("out/slides/*/*.safetensors"))) < 2
        and time.monotonic() < deadline
    ):
        time.sleep(0.01)
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    kept = {p: p.stat().st_mtime_ns for p in tmp_path.glob("out/slides/*/*.safetensors")}
    assert len(kept) >= 2
    d = distiller(folders, tmp_path / "out")
    assert run(d, local(tmp_path / "out", 1)) == {}
    assert made(tmp_path / "out") == made(tmp_path / "whole")
    assert all(p.stat().st_mtime_ns == stamp for p, stamp in kept.items())
    left = [p for p in tmp_path.glob("out/work/slides/*/*") if p.is_dir()]
    assert not left, "nothing is left of interrupted slides"


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--engine", "lokal"), "unknown engine 'lokal': did you mean 'local'?"),
        (("--shard", "0/3"), "must be I/N with I from 1 to N"),
        (("--shard", "4/3"), "must be I/N"),
        (("--engine-option", "x"), "must be NAME=VALUE"),
        (("--engine-option", "x=1"), "the local engine has no option 'x'"),
        (("--slides", "nowhere"), "has no training slide 'nowhere'"),
    ],
)
def test_impossible_requests(folders, tmp_path, capsys, more, says) -> None:
    code = cli.main(arguments("distill-slides", folders["data"], tmp_path, "--ipc", "2", *more))
    error = capsys.readouterr().err.splitlines()[-1]
    assert code == 2 and says in error


def test_pictures_of_slides_without_a_class_are_no_problem_for_the_data_set(folders) -> None:
    """The tiny data are what the tests above take them for."""
    with open(folders["data"] / "groups.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {r["group"] for r in rows if "train/class1" in r["path"]} == {f"train-s{i}" for i in (0, 1, 3, 4)}
    with Image.open(folders["data"] / rows[0]["path"]) as image:
        assert np.asarray(image).shape == (16, 16, 3)
