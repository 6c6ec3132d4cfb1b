"""Engines: every job once, failures by job, and a worker that dies costs what it had in hand and nothing else."""

import importlib.util
import os
import shutil
import signal
from functools import partial
from pathlib import Path

import pytest

from histodd_bench.engines import Engine, device_of
from histodd_bench.errors import HistoddError, UsageError


def opener(folder: Path, device: str):
    """Jobs are names: ``bad`` fails, ``deadly`` kills its worker; all others leave a file that names the worker."""

    def do(job: str) -> None:
        if job == "deadly":
            os.kill(os.getpid(), signal.SIGKILL)
        if job == "bad":
            raise ValueError("it is bad\nand more")
        (folder / job).write_text(f"{os.getpid()} {device}")

    return do


def broken(device: str):
    raise HistoddError("the data are not there")


def deadly_start(device: str):
    os.kill(os.getpid(), signal.SIGKILL)


def engine(tmp_path: Path, name: str, workers: int) -> Engine:
    if name != "local":
        pytest.importorskip({"slurm": "submitit", "ray": "ray"}[name], reason=f"engine {name}: package not installed")
    where = {} if os.environ.get("HISTODD_TEST_SLURM") == "1" else {"cluster": "local"}  # 1: jobs may go to the cluster
    return Engine(name, workers, "cpu", tmp_path / "work", where if name == "slurm" else {})


@pytest.mark.parametrize(("name", "workers"), [("local", 1), ("local", 3), ("ray", 2)])
def test_failures_are_told_by_job_and_dead_workers_are_replaced(tmp_path: Path, name: str, workers: int) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    done: list[int] = []
    jobs = ["a", "bad", "b", "deadly", "c", "d"]
    failures = engine(tmp_path, name, workers).run(partial(opener, folder), jobs, lambda: done.append(1))
    assert set(failures) == {"bad", "deadly"} and len(done) == 6
    assert failures["bad"] == "ValueError: it is bad" and "ended" in failures["deadly"]
    assert sorted(p.name for p in folder.iterdir()) == ["a", "b", "c", "d"]
    used = {p.read_text() for p in folder.iterdir()}
    assert all(text.endswith(" cpu") for text in used)
    if workers == 1:
        assert len(used) == 2, "one before the deadly job, one after"


def test_slurm_jobs_fail_by_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two jobs of an array on submitit's local executor: one dies with the slides it had, the other finishes its own."""
    folder = tmp_path / "out"
    folder.mkdir()
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])]))
    failures = engine(tmp_path, "slurm", 2).run(partial(opener, folder), ["a", "deadly", "bad", "x"], lambda: None)
    assert failures["bad"] == "ValueError: it is bad"
    assert set(failures) == {"bad", "deadly", "x"} and "its job" in failures["deadly"]
    assert [p.name for p in folder.iterdir()] == ["a"]


@pytest.mark.parametrize("name", ["local", "ray"])
def test_a_worker_that_cannot_start_is_an_error(tmp_path: Path, name: str) -> None:
    with pytest.raises(HistoddError, match="the data are not there"):
        engine(tmp_path, name, 1).run(broken, ["a"], lambda: None)
    with pytest.raises(HistoddError, match="ended while starting"):
        engine(tmp_path, name, 1).run(deadly_start, ["a"], lambda: None)


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("lokal", {}, "did you mean 'local'"),
        ("local", {"address": "x"}, "the local engine has no option 'address'"),
        ("slurm", {"cluster": "nowhere"}, "executor named nowhere"),
        ("slurm", {"cluster": "local", "foo": "1"}, "'foo'"),
    ],
)
def test_unusable_engines_are_refused_and_leave_nothing(tmp_path: Path, name: str, options: dict, says: str) -> None:
    if name == "slurm":
        pytest.importorskip("submitit", reason="engine slurm: package not installed")
    with pytest.raises(UsageError, match=says):
        Engine(name, 1, "cpu", tmp_path / "work", options).check()
    assert not list(tmp_path.iterdir())


def test_engines_that_this_machine_does_not_have(tmp_path: Path) -> None:
    pytest.importorskip("submitit", reason="engine slurm: package not installed")
    if shutil.which("srun") is None:
        with pytest.raises(HistoddError, match="this machine has no srun"):
            Engine("slurm", 1, "cpu", tmp_path, {}).check()
    if importlib.util.find_spec("ray") is None:
        with pytest.raises(HistoddError, match="pip install ray"):
            Engine("ray", 1, "cpu", tmp_path, {}).check()


def test_no_jobs_start_nothing(tmp_path: Path) -> None:
    assert engine(tmp_path, "local", 2).run(deadly_start, [], lambda: None) == {}


def test_devices_are_taken_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    assert [device_of(i, "cpu") for i in range(2)] == ["cpu", "cpu"]
    assert [device_of(i, "cuda:3") for i in range(2)] == ["cuda:3", "cuda:3"]
    assert device_of(1, "cuda") == "cuda", "no GPU, or one"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [device_of(i, "cuda") for i in range(4)] == ["cuda:0", "cuda:1", "cuda:0", "cuda:1"]
