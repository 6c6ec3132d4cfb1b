"""What lies in a folder, in a fixed order, and whether it has changed."""

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from histodd_bench.errors import HistoddError


@dataclass(frozen=True)
class Counts:
    """Patches per class of each split, as the files say without being read, and what else there is to say."""

    classes: Sequence[str]
    train: list[int]
    test: list[int]
    notes: tuple[str, ...] = ()


def subfolders(folder: Path) -> list[Path]:
    """Folders directly inside, sorted by name, hidden ones left out; links to folders count."""
    try:
        return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    except OSError as error:
        raise HistoddError(f"cannot list {folder}: {error.strerror or error}") from None


def image_files(folder: Path, leave_out: Callable[[Path, list[str]], bool] = lambda folder, files: False) -> list[Path]:
    """Files inside, at any depth, sorted by path; hidden files and folders (``.DS_Store``, ``._x.png``) are left out.

    Links to folders are followed, but for those that lead to a folder they lie in; a folder that is reached in several ways
    is read once, and not by a link where there is a way without.

    Args:
        leave_out: called with every folder and the names of its files; True leaves out the folder and all that is in it.
    """
    found: list[str] = []
    seen: set[str] = set()
    starts = [str(folder)]
    while starts:
        links: list[str] = []
        for start in starts:
            for parent, folders, files in os.walk(start):
                place = os.path.realpath(parent)
                if place in seen or leave_out(Path(parent), files):
                    folders[:] = []
                    continue
                seen.add(place)
                folders[:] = [name for name in folders if not name.startswith(".")]
                links += [
                    path for name in folders if os.path.islink(path := os.path.join(parent, name)) and not _loops(path)
                ]
                found += [os.path.join(parent, name) for name in files if not name.startswith(".")]
        starts = sorted(links)
    return [Path(path) for path in sorted(found)]


def _loops(link: str) -> bool:
    target = os.path.realpath(link)
    return os.path.commonpath([target, os.path.realpath(os.path.dirname(link))]) == target


def fingerprint(paths: Iterable[Path], root: Path) -> str:
    """A hash of names, sizes and modification times: another one as soon as a file is added, removed or changed."""
    digest = hashlib.sha256()
    for path in paths:
        try:
            status = os.stat(path)
            state = f"{status.st_size} {status.st_mtime_ns}"
        except OSError as error:  # a dangling link: read later, and then counted and named
            state = str(error.errno)
        digest.update(os.fsencode(os.path.relpath(path, root)) + f"\0{state}\n".encode())
    return digest.hexdigest()
