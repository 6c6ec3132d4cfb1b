"""Writing files so that nothing half-written ever looks finished: temporary name, fsync, rename."""

import fcntl
import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from histodd_bench.errors import HistoddError

PARTIAL = ".partial"  # suffix of what is being written; such files and folders are never read


def cache_folder() -> Path:
    """Where data and networks are kept between runs: ``HISTODD_CACHE``, or ``histodd-bench`` in the user's cache folder."""
    named = os.environ.get("HISTODD_CACHE")
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "histodd-bench"


@contextmanager
def writing(path: Path, option: str = "--out") -> Iterator[None]:
    """Turn a failed write (disk full, read-only, no permission) into one clear line. Wrap writes only.

    Args:
        option: what names another place; for a path in the cache folder it is HISTODD_CACHE.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        how = "HISTODD_CACHE" if path.absolute().is_relative_to(cache_folder().absolute()) else option
        raise HistoddError(
            f"cannot write {path}: {reason}: free some space or choose another folder with {how}"
        ) from error


def require_writable(path: Path, option: str = "--out") -> None:
    """Make sure that a file can be written, before what is to be written is computed; leaves nothing but its folder.

    Raises:
        HistoddError: it cannot.
    """
    new = not path.exists()
    with writing(path, option):
        path.parent.mkdir(parents=True, exist_ok=True)
        open(path, "ab").close()
        if new:
            path.unlink()


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file so that ``path`` holds either what it held before or all of ``data``."""
    partial = path.with_name(path.name + PARTIAL)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)


def write_text(path: Path, text: str) -> None:
    """:func:`write_bytes` of UTF-8 text."""
    write_bytes(path, text.encode())


def save_state(path: Path, state: Mapping[str, Any]) -> None:
    """:func:`write_bytes` of tensors, numbers, strings, lists and dicts of them, as ``torch.save`` puts them."""
    import torch

    buffer = io.BytesIO()  # not a file: torch.save puts its name into the archive
    torch.save(dict(state), buffer)
    write_bytes(path, buffer.getvalue())


def read_state(path: Path) -> dict[str, Any]:
    """What :func:`save_state` wrote, on the CPU. Nothing is unpickled.

    Raises:
        HistoddError: the file is damaged.
    """
    import torch

    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a different type for every kind of damage
        raise HistoddError(
            f"{path} is damaged ({type(error).__name__}): delete it, and it will be made again"
        ) from error
    return state


def canonical(value: Any) -> str:
    """JSON with sorted keys and no spaces: equal values, equal text. NaN and infinities are refused."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def plain(value: Any) -> Any:
    """A JSON value as reading it back gives it: tuples as lists, keys as text."""
    return json.loads(json.dumps(value))


def digest(value: Any) -> str:
    """SHA-256 (hex) of a JSON value."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()


def sha256(path: Path) -> str:
    """SHA-256 (hex) of a file, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty folder beside ``folder``; on leaving without an error it is synced and takes that name."""
    partial = folder.with_name(folder.name + PARTIAL)
    with writing(folder):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            yield partial
            for path in [p for p in partial.rglob("*") if p.is_file()]:
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
            move_folder(partial, folder)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def move_folder(made: Path, folder: Path) -> None:
    """Give a finished folder its name. One that has the name is there until then, whole, and removed afterwards."""
    old = folder.with_name(folder.name + ".old" + PARTIAL)
    with writing(folder):
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            os.rename(folder, old)
        try:
            os.replace(made, folder)
        except OSError:
            if old.exists():
                os.rename(old, folder)
            raise
        parent = os.open(folder.parent, os.O_RDONLY)
        try:
            os.fsync(parent)
        finally:
            os.close(parent)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def locked(path: Path, busy: Callable[[], object] = lambda: None) -> Iterator[None]:
    """Hold a lock on the file ``path``, which is made. Released when the process dies, however it does.

    The file stays: another process may have opened it and wait for it, while a third would make a new file of that name
    and lock that.

    Args:
        busy: called where another process holds the lock, before waiting for it; may raise instead.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            busy()
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            pass  # file systems without locks: the renames still keep every file whole
        yield


def is_locked(path: Path) -> bool:
    """Whether another process holds the lock of a file; False where there is no such file."""
    try:
        with open(path) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


@contextmanager
def only_writer(out: Path) -> Iterator[None]:
    """Make ``out``, check that it can be written, and hold it against a second run."""

    def refuse() -> None:
        raise HistoddError(f"another run is writing in {out}: wait for it or choose another folder with --out")

    with locked(out / ".lock", refuse):
        yield
