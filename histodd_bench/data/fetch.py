"""Downloading what is openly downloadable: resumed where it broke off, checked against published checksums."""

import gzip
import os
import re
import shutil
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from histodd_bench.data import pcam
from histodd_bench.data.facts import where
from histodd_bench.errors import HistoddError
from histodd_bench.files import PARTIAL, writing

_CHUNK = 1 << 20
_TIMEOUT = 60  # seconds without a byte
_LARGEST_LIST = 1 << 24  # bytes; 200,000 files


@dataclass(frozen=True)
class Remote:
    """One file: its name under the target folder, where it is, and its checksum (``md5:...``), None where none is published."""

    name: str
    url: str
    checksum: str | None


_ZENODO = "https://zenodo.org/records"
_CAMELYON = "https://camelyon-dataset.s3.amazonaws.com/CAMELYON16"
_PCAM_MD5 = {  # of the packed files, as their authors publish them
    "train_x.h5": "1571f514728f59376b705fc836ff4b63",
    "train_y.h5": "35c2d7259d906cfc8143347bb8e05be7",
    "test_x.h5": "d8c2d60d490dbd479f8199bdfa0cf6ec",
    "test_y.h5": "60a7035772fbdb7f34eb86d4420cf66a",
}
_PATHMNIST_MD5 = {
    "pathmnist.npz": "a8b06965200029087d5bd730944a56c1",
    "pathmnist_64.npz": "55aa9c1e0525abe5a6b9d8343a507616",
    "pathmnist_128.npz": "ac42d08fb904d92c244187169d1fd1d9",
    "pathmnist_224.npz": "2c51a510bcdc9cf8ddb2af93af1eadec",
}
_CHECKSUM_LINE = re.compile(r"([0-9a-fA-F]{32})[ \t]+\*?(?:\./)?(\S+)")
_CAMELYON_FILES = re.compile(
    r"(images/(?:normal|tumor|test)_\d{3}\.tif|annotations/(?:tumor|test)_\d{3}\.xml|evaluation/reference\.csv)"
)


def _pcam_files(read: Callable[[str], str]) -> list[Remote]:
    found = []
    for split in ("train", "test"):
        for what in ("x.h5", "y.h5"):
            packed = f"{pcam.name(split, what)}.gz"
            found.append(Remote(packed, f"{_ZENODO}/2546921/files/{packed}", f"md5:{_PCAM_MD5[f'{split}_{what}']}"))
        meta = pcam.name(split, "meta.csv")
        found.append(Remote(meta, f"{_ZENODO}/2546921/files/{meta}", None))
    return found


def _pathmnist_files(read: Callable[[str], str]) -> list[Remote]:
    return [Remote(name, f"{_ZENODO}/10519652/files/{name}", f"md5:{md5}") for name, md5 in _PATHMNIST_MD5.items()]


def _camelyon_files(read: Callable[[str], str]) -> list[Remote]:
    """Slides, annotations and test labels that the bucket's own list of checksums names."""
    found = []
    for line in read(f"{_CAMELYON}/checksums.md5").splitlines():
        match = _CHECKSUM_LINE.fullmatch(line.strip())
        if match and _CAMELYON_FILES.fullmatch(match[2]):
            found.append(Remote(match[2], f"{_CAMELYON}/{match[2]}", f"md5:{match[1].lower()}"))
    if not found:
        raise HistoddError(f"{_CAMELYON}/checksums.md5 lists no slides: {where('camelyon16')}")
    return found


REMOTES: dict[str, Callable[[Callable[[str], str]], list[Remote]]] = {
    "camelyon16": _camelyon_files,
    "pathmnist": _pathmnist_files,
    "pcam": _pcam_files,
}


def fetch(files: list[Remote], out: Path, progress: Any) -> list[Path]:
    """Download what ``out`` lacks; packed ``.gz`` files are unpacked and removed.

    A file that is there and has the right checksum is kept, a partial one (``<name>.partial``) is continued.

    Raises:
        HistoddError: no connection, an error of the server, a wrong checksum, a full disk; the message names the file.
    """
    pooch = _pooch()
    done = []
    for number, remote in enumerate(files, start=1):
        target = out / remote.name
        if not target.resolve().is_relative_to(out.resolve()):
            raise HistoddError(f"{remote.name} would be written outside {out}")
        final = target.with_suffix("") if target.suffix == ".gz" else target
        if final != target and final.exists():
            done.append(final)
            continue
        with writing(target):
            target.parent.mkdir(parents=True, exist_ok=True)
        title = f"{remote.name} ({number} of {len(files)})"

        partial = target.with_name(target.name + PARTIAL)  # stays until the checksum was right

        def download(url: str, output: str, _: Any, partial: Path = partial, title: str = title) -> None:
            _resume(url, partial, title, progress)
            Path(output).unlink()
            try:
                os.link(partial, output)
            except OSError:  # a file system without links
                shutil.copyfile(partial, output)

        try:
            pooch.retrieve(
                remote.url, known_hash=remote.checksum, fname=target.name, path=target.parent, downloader=download
            )
        except ValueError as error:
            if "hash" not in str(error).lower():
                raise
            partial.unlink(missing_ok=True)
            raise HistoddError(
                f"{remote.name}: what {remote.url} sent has another checksum than published: try again later"
            ) from None
        partial.unlink(missing_ok=True)
        if final != target:
            _unpack(target, final)
        done.append(final)
    return done


def remote_files(name: str) -> list[Remote]:
    """Files of a dataset.

    Raises:
        HistoddError: it is not openly downloadable; the message says where to get it.
    """
    if name not in REMOTES:
        raise HistoddError(f"{name} cannot be downloaded by a program: {where(name)}")
    _pooch()  # says what to install before a server is asked
    return REMOTES[name](_read_text)


def _pooch() -> Any:
    try:
        import pooch
    except ImportError:
        raise HistoddError("downloading needs pooch: pip install 'histodd-bench[data]'") from None
    pooch.get_logger().setLevel("WARNING")
    return pooch


def _request(url: str, first: int = 0) -> Any:
    import requests

    headers = {"Range": f"bytes={first}-", "Accept-Encoding": "identity"} if first else {"Accept-Encoding": "identity"}
    try:
        answer = requests.get(url, headers=headers, stream=True, timeout=_TIMEOUT)
    except requests.RequestException as error:
        raise HistoddError(
            f"{url} cannot be reached ({type(error).__name__}): check the connection and try again"
        ) from None
    if answer.status_code == 416:  # nothing is left to send
        answer.close()
        return None
    if answer.status_code not in (200, 206):
        answer.close()
        raise HistoddError(f"{url} answers {answer.status_code} {answer.reason}: try again later")
    return answer


def _read_text(url: str) -> str:
    """A list of checksums; nothing is kept of one that does not end."""
    import requests

    content = b""
    with _request(url) as answer:
        try:
            for chunk in answer.iter_content(1 << 16):
                content += chunk
                if len(content) > _LARGEST_LIST:
                    raise HistoddError(f"{url} is larger than any list of checksums: try again later")
        except requests.RequestException as error:
            raise HistoddError(f"{url} broke off ({type(error).__name__}): try again") from None
    return content.decode("utf-8", "replace")


def _resume(url: str, partial: Path, title: str, progress: Any) -> None:
    """Download into ``partial``, from where it ends if the server can do that."""
    import requests

    first = partial.stat().st_size if partial.exists() else 0
    answer = _request(url, first)
    if answer is None:
        return
    with answer:
        if answer.status_code == 200:
            first = 0
        length = answer.headers.get("Content-Length", "")
        total = first + int(length) if length.isdecimal() else 0
        mega = 1 << 20
        with writing(partial):
            file = open(partial, "ab" if first else "wb")
        with file, progress.task(f"{title}: MB", max(total // mega, 1), done=first // mega) as task:
            written = first
            try:
                for chunk in answer.iter_content(_CHUNK):
                    with writing(partial):
                        file.write(chunk)
                    task.advance((written + len(chunk)) // mega - written // mega)
                    written += len(chunk)
            except requests.RequestException as error:
                raise HistoddError(
                    f"{url} broke off after {written:,} bytes ({type(error).__name__}): the same command continues there"
                ) from None
    if total and written < total:
        raise HistoddError(f"{url} broke off after {written:,} of {total:,} bytes: the same command continues there")


def _unpack(packed: Path, target: Path) -> None:
    partial = target.with_name(target.name + PARTIAL)
    try:
        with writing(target):
            file = open(partial, "wb")
        with file, gzip.open(packed, "rb") as source:
            while chunk := _read(source, packed):
                with writing(target):
                    file.write(chunk)
        with writing(target):
            partial.replace(target)
            packed.unlink()
    finally:
        partial.unlink(missing_ok=True)


def _read(source: gzip.GzipFile, packed: Path) -> bytes:
    try:
        return source.read(_CHUNK)
    except (EOFError, OSError, zlib.error) as error:
        raise HistoddError(f"{packed} is damaged ({error}): delete it and fetch it again") from None
