"""A cache that cannot be written: what is there is enough, and what is missing is one line that names the cache."""

import ctypes
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_project import command, program, write_imagefolder

_DROP, _OVERRIDE = 24, 1  # PR_CAPBSET_DROP, CAP_DAC_OVERRIDE


def bound_by_permissions() -> None:
    """Root loses the right to write where permissions say no; anybody else never had it."""
    ctypes.CDLL(None).prctl(_DROP, _OVERRIDE, 0, 0, 0)


def arguments(data: Path, out: Path) -> list[str]:
    """A table that needs the data set, trained networks, and patches that are normalised beforehand."""
    table1 = command(data, out, seeds="1")
    return ["run", "supp2", *table1[2:]]


@pytest.fixture
def folders(tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """Data, and the cache of a run over them, with all permissions to write taken away."""
    if sys.platform != "linux":
        pytest.skip("capabilities are Linux's")
    data, cache = write_imagefolder(tmp_path / "data"), tmp_path / "cache"
    done = program(*arguments(data, tmp_path / "first"), cache=cache)
    assert done.returncode == 0, done.stderr
    for path in [cache, *cache.rglob("*")]:
        path.chmod(path.stat().st_mode & 0o555)
    yield data, cache
    for path in [cache, *(p for p in cache.rglob("*") if p.is_dir())]:
        path.chmod(0o755)


def run(cache: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return program(*arguments, cache=cache, preexec_fn=bound_by_permissions)


def test_what_is_there_is_enough_and_what_is_missing_is_one_line(folders: tuple[Path, Path], tmp_path: Path) -> None:
    data, cache = folders
    before = {path: path.stat().st_mtime_ns for path in cache.rglob("*")}
    done = run(cache, *arguments(data, tmp_path / "second"))
    assert done.returncode == 0, done.stderr
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*")} == before
    assert any(path.name.startswith("normalised-") for path in before) and list(cache.rglob("network-0.pt"))
    done = run(cache, *arguments(data, tmp_path / "third"), "--image-size", "24")
    assert done.returncode == 1
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith(f"error: cannot write {cache}/data/") and "Permission denied" in line
    assert line.endswith("choose another folder with HISTODD_CACHE") and "Traceback" not in done.stderr
