"""Several processes give the records of one; failures and deaths of workers become one line; nothing outlives the parent."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tiny_project import SCORING, command, environment, program, without, write_imagefolder

from histodd_bench import results
from histodd_bench.notes import SIDE_BY_SIDE
from histodd_bench.parallel import pieces
from histodd_bench.request import Cell


def comparable(out: Path) -> dict[str, tuple[object, ...]]:
    records, ignored = results.read_records(out)
    assert not ignored
    return {r["key"]: (r["predictions"], r["metrics"]["balanced_accuracy"], r["storage"]) for r in records}


def test_two_workers_give_the_same_records_and_sets_as_one(tmp_path: Path) -> None:
    data = write_imagefolder(tmp_path / "data")
    for name, workers in (("one", "1"), ("two", "2")):
        done = program(*command(data, tmp_path / name), "--workers", workers, cache=tmp_path / f"cache-{name}")
        assert done.returncode == 0, done.stderr
    one, two = comparable(tmp_path / "one"), comparable(tmp_path / "two")
    assert len(one) == 18 and one == two
    for name, workers in (("one", 1), ("two", 2)):
        assert {r["environment"]["workers"] for r in results.read_records(tmp_path / name)[0]} == {workers}
        text = (tmp_path / name / "table1.md").read_text()
        assert (SIDE_BY_SIDE.partition(" (")[0] in text) == (workers == 2), "times of columns cannot be compared then"
    for path in (tmp_path / "one" / "sets").glob("*/images.safetensors"):
        assert path.read_bytes() == (tmp_path / "two" / "sets" / path.parent.name / path.name).read_bytes()


def test_a_cell_computed_alone_says_so_whatever_the_workers(tmp_path: Path) -> None:
    data, out, cache = write_imagefolder(tmp_path / "data"), tmp_path / "out", tmp_path / "cache"
    only = ("--workers", "2", "--methods", "random", "--eval-seeds", "1")
    done = program(*command(data, out, seeds="1"), *only, cache=cache)
    assert done.returncode == 0, done.stderr
    (made,) = results.read_records(out)[0]
    assert made["environment"]["workers"] == 1
    folder = str(next((out / "sets").iterdir()))
    scores = ("--dataset", "imagefolder", "--data-root", str(data), "--out", str(tmp_path / "scores"), "--format", "json")
    same = without(SCORING, "--workers")
    done = program("evaluate", folder, *scores, *same, "--eval-seeds", "2", "--workers", "2", cache=cache)
    assert done.returncode == 0, done.stderr
    assert [r["environment"]["workers"] for r in json.loads(done.stdout)] == [1, 1]


def test_work_is_cut_so_that_cells_sharing_a_set_or_a_network_stay_together() -> None:
    def cell(method: str, ipc: int | None, seed: int | None, eval_seed: int = 0) -> Cell:
        return Cell(method, ipc, "convnet-d3", 8, seed, eval_seed)

    cells = [cell(m, ipc, 0, e) for m in ("random", "herding", "histodd") for ipc in (2, 4) for e in (0, 1)]
    cells += [cell("full", None, None, e) for e in (0, 1)]
    networks, groups = pieces(cells, 3)[:3], pieces(cells, 3)[3:]
    assert networks == [0, 1, 2]
    assert sorted(len(g) for g in groups) == [1, 1, 2, 2, 8]  # type: ignore[arg-type]
    assert [g[0].method for g in groups[:2]] == ["full", "full"], "the longest first"  # type: ignore[index]
    assert sorted(map(str, (c for g in groups for c in g))) == sorted(map(str, cells))  # type: ignore[union-attr]
    assert not [p for p in pieces(cells[:4], 3) if isinstance(p, int)], "coresets alone need no pool"


def test_a_workers_error_is_one_line_and_finished_records_stay(tmp_path: Path) -> None:
    data, out = write_imagefolder(tmp_path / "data"), tmp_path / "out"
    wrong = ("--workers", "2", "--set", "pool.lr=1e30", "--methods", "random,histodd")
    done = program(*command(data, out), *wrong, cache=tmp_path / "cache")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "diverged" in done.stderr and "lower its learning rate" in done.stderr
    assert not [r for r in results.read_records(out)[0] if r["method"] == "histodd"]


def test_workers_die_with_their_parent_and_the_run_goes_on(tmp_path: Path) -> None:
    data, out, cache = write_imagefolder(tmp_path / "data"), tmp_path / "out", tmp_path / "cache"
    arguments = [*command(data, out), "--workers", "2"]
    child = subprocess.Popen([sys.executable, "-m", "histodd_bench", *arguments], env=environment(cache),
                             stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)  # fmt: skip
    while child.poll() is None and not list(out.glob("records/*.json")):
        time.sleep(0.02)
    child.kill()
    child.wait()
    deadline = time.monotonic() + 10
    while _members(child.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _members(child.pid), "a worker outlived its parent"
    again = program(*arguments, cache=cache)
    assert again.returncode == 0, again.stderr
    assert len(comparable(out)) == 18


def _members(session: int) -> list[int]:
    """Processes of a session that compute (the resource tracker of multiprocessing ends by itself)."""
    found = []
    for entry in Path("/proc").iterdir() if os.path.isdir("/proc/self") else []:
        if entry.name.isdigit():
            try:
                same = os.getsid(int(entry.name)) == session
                text = (entry / "cmdline").read_bytes()
            except (OSError, ProcessLookupError):
                continue
            if same and b"spawn_main" in text:
                found.append(int(entry.name))
    return found


def test_ctrl_c_stops_all_workers(tmp_path: Path) -> None:
    data, out, cache = write_imagefolder(tmp_path / "data"), tmp_path / "out", tmp_path / "cache"
    arguments = [*command(data, out), "--workers", "2"]
    child = subprocess.Popen([sys.executable, "-m", "histodd_bench", *arguments], env=environment(cache),
                             stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True)  # fmt: skip
    while child.poll() is None and not list(out.glob("records/*.json")):
        time.sleep(0.02)
    os.killpg(child.pid, signal.SIGINT)
    _, errors = child.communicate(timeout=30)
    assert child.returncode == 130 and "Traceback" not in errors
    assert not _members(child.pid)
