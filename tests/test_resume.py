"""``kill -9`` at random moments, twenty times and more: the same command goes on to the same bytes."""

import csv
import io
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest
from tiny_project import command, program, write_imagefolder

from histodd_bench import results
from histodd_bench.files import PARTIAL

KILLS = 20
TIMES = ("Training time per epoch, s", "of which", "Peak memory", "Epochs after", "Selection / distillation time, s",
         "Networks behind it")  # fmt: skip


def run_here(arguments: list[str], cache: str, folder: str) -> None:
    """In a child: the command line, with nothing shared with the test but files."""
    os.environ["HISTODD_CACHE"] = cache
    log = os.open(os.path.join(folder, "log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    from histodd_bench import cli

    os._exit(cli.main(arguments))


def sets_of(out: Path) -> dict[str, bytes]:
    return {p.parent.name: p.read_bytes() for p in sorted(out.glob("sets/*/images.safetensors"))}


def table_of(out: Path) -> list[list[str]]:
    rows = list(csv.reader(io.StringIO((out / "table1.csv").read_text())))
    return [row for row in rows if not row[2].startswith(TIMES)]


def records_of(out: Path) -> dict[str, dict]:
    records, ignored = results.read_records(out)
    assert not ignored
    timed = ("epoch_seconds", "train_seconds")
    for record in records:
        del record["seconds"], record["memory"]
        record["metrics"] = {k: v for k, v in record["metrics"].items() if k not in timed}
    return {r["key"]: r for r in records}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a fork server")
def test_killed_runs_give_the_bytes_of_an_unbroken_one(tmp_path: Path) -> None:
    data = write_imagefolder(tmp_path / "data")
    # Torch is imported once, in the fork server; every child starts from there in no time.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["histodd_bench.experiment", "histodd_bench.render", "histodd_bench.layout", __name__]
    )
    rng = random.Random(0)

    def start(name: str) -> "multiprocessing.process.BaseProcess":
        (tmp_path / name).mkdir(exist_ok=True)
        arguments = command(data, tmp_path / name / "out", "--set", "histodd.outer_steps=6")
        child = context.Process(target=run_here, args=(arguments, str(tmp_path / name / "cache"), str(tmp_path / name)))
        child.start()
        return child

    began = time.monotonic()
    unbroken = start("unbroken")
    unbroken.join()
    assert unbroken.exitcode == 0, (tmp_path / "unbroken" / "log").read_text()
    whole = time.monotonic() - began

    kills, attempt, finished = 0, 0, []
    while kills < KILLS or not finished:
        name = f"killed{attempt}"
        attempt += 1
        longest = whole / 8  # grows, so that a step slower than the first choice is got through in the end
        while True:
            child = start(name)
            if kills < KILLS:
                child.join(rng.uniform(0.0, longest))
                longest *= 1.15
            else:
                child.join()
            if child.exitcode is None:
                os.kill(child.pid, signal.SIGKILL)
                child.join()
                kills += 1
                continue
            assert child.exitcode == 0, (tmp_path / name / "log").read_text()
            finished.append(name)
            break
    assert kills >= KILLS

    expected = tmp_path / "unbroken" / "out"
    assert len(sets_of(expected)) == 8 and len(records_of(expected)) == 18
    for name in finished:
        out = tmp_path / name / "out"
        assert sets_of(out) == sets_of(expected)
        assert records_of(out) == records_of(expected)
        assert table_of(out) == table_of(expected)
        assert not list(out.rglob(f"*{PARTIAL}"))


def test_a_real_process_killed_and_started_again(tmp_path: Path) -> None:
    """Once with the program itself, and ``show`` on what the dead run left."""
    import subprocess
    import sys

    from tiny_project import environment

    data, out, cache = write_imagefolder(tmp_path / "data"), tmp_path / "out", tmp_path / "cache"
    arguments = command(data, out, seeds="1")
    child = subprocess.Popen([sys.executable, "-m", "histodd_bench", *arguments], env=environment(cache),
                             stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    while child.poll() is None and not list(out.glob("records/*.json")):
        time.sleep(0.02)
    child.kill()
    child.wait()
    shown = program("show", "table1", "--out", str(out), "--format", "csv", cache=cache)
    assert shown.returncode == 0 and "Random" in shown.stdout
    again = program(*arguments, cache=cache)
    assert again.returncode == 0, again.stderr
    assert "cells are finished already" in again.stderr and len(records_of(out)) == 4 * 2 + 2
