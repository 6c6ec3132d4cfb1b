"""Locks that hold whoever comes when, and places that are checked before anything is written there."""

import threading
from pathlib import Path

import pytest

from histodd_bench.errors import HistoddError
from histodd_bench.files import is_locked, locked, require_writable, write_text


def test_a_lock_that_somebody_waited_for_is_still_the_lock(tmp_path: Path) -> None:
    """Were the file removed by its first holder, the third to come would lock a new one while the second holds the old."""
    path = tmp_path / "a" / "x.lock"
    waiting, held, release = threading.Event(), threading.Event(), threading.Event()

    def second() -> None:
        with locked(path, waiting.set):
            held.set()
            release.wait(30)

    def refuse() -> None:
        raise HistoddError("busy")

    assert not is_locked(path)
    thread = threading.Thread(target=second)
    with locked(path):
        thread.start()
        assert waiting.wait(30) and not held.is_set() and is_locked(path)
    try:
        assert held.wait(30)
        with pytest.raises(HistoddError, match="busy"), locked(path, refuse):
            pass
    finally:
        release.set()
        thread.join()
    assert path.exists() and not is_locked(path)
    with locked(path, refuse):
        pass


def test_a_place_is_checked_and_nothing_is_left_there(tmp_path: Path) -> None:
    require_writable(tmp_path / "new" / "x.json")
    assert list((tmp_path / "new").iterdir()) == []
    write_text(tmp_path / "old.json", "{}")
    require_writable(tmp_path / "old.json")
    assert (tmp_path / "old.json").read_text() == "{}"
    with pytest.raises(HistoddError, match="free some space or choose another folder with --trace"):
        require_writable(tmp_path / "old.json" / "x", "--trace")


def test_what_cannot_be_written_into_the_cache_names_its_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("HISTODD_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(HistoddError, match="choose another folder with HISTODD_CACHE"):
        write_text(tmp_path / "file" / "cache" / "data" / "x", "")
    with pytest.raises(HistoddError, match="choose another folder with --out"):
        write_text(tmp_path / "file" / "x", "")
