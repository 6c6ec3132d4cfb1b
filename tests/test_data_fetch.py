"""data fetch against a local HTTP server: resumed, checked, unpacked; and every way a download goes wrong."""

import gzip
import hashlib
import http.server
import resource
import signal
import threading
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from slide_makers import project

from histodd_bench import cli
from histodd_bench.data import DATASETS
from histodd_bench.data import fetch as fetching
from histodd_bench.data.facts import FACTS, SUPPLEMENTARY_TABLE1
from histodd_bench.data.fetch import REMOTES, Remote, fetch
from histodd_bench.errors import HistoddError
from histodd_bench.progress import Progress

pytest.importorskip("pooch")

CONTENT = bytes(range(256)) * 20_000  # 5 MB


class Server(http.server.ThreadingHTTPServer):
    """Serves ``files`` with ranges; ``cut`` breaks the connection after so many bytes, once; ``log`` holds (path, range)."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.cut: int | None = None
        self.ranges = True
        self.log: list[tuple[str, str | None]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        self.server.log.append((self.path, wanted))
        content = self.server.files.get(self.path)
        if content is None:
            self.send_error(404, "Not Found")
            return
        first = int(wanted.split("=")[1].split("-")[0]) if wanted and self.server.ranges else 0
        if first >= len(content) and first:
            self.send_error(416)
            return
        self.send_response(206 if first else 200)
        self.send_header("Content-Length", str(len(content) - first))
        self.end_headers()
        body = content[first:]
        if self.server.cut is not None:
            body, self.server.cut = body[: self.server.cut], None
            self.wfile.write(body)
            self.wfile.flush()
            self.close_connection = True
            self.connection.close()
            return
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    running = Server()
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield running
    running.shutdown()
    running.server_close()


def md5(content: bytes) -> str:
    return f"md5:{hashlib.md5(content).hexdigest()}"


def get(files: list[Remote], out: Path) -> list[Path]:
    return fetch(files, out, Progress.silent())


def test_files_arrive_and_are_not_fetched_again(server: Server, tmp_path: Path) -> None:
    server.files["/a.bin"] = CONTENT
    remote = Remote("sub/a.bin", f"{server.url}/a.bin", md5(CONTENT))
    assert get([remote], tmp_path) == [tmp_path / "sub/a.bin"]
    assert (tmp_path / "sub/a.bin").read_bytes() == CONTENT
    get([remote], tmp_path)
    assert len(server.log) == 1
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["a.bin"]


def test_a_broken_download_goes_on_where_it_ended(server: Server, tmp_path: Path) -> None:
    server.files["/a.bin"], server.cut = CONTENT, 3_000_000
    remote = Remote("a.bin", f"{server.url}/a.bin", md5(CONTENT))
    with pytest.raises(HistoddError, match=r"a.bin broke off after .*the same command continues there"):
        get([remote], tmp_path)
    have = (tmp_path / "a.bin.partial").stat().st_size
    assert 1_000_000 < have <= 3_000_000 and not (tmp_path / "a.bin").exists()
    get([remote], tmp_path)
    assert server.log[1] == ("/a.bin", f"bytes={have}-") and (tmp_path / "a.bin").read_bytes() == CONTENT
    assert not list(tmp_path.glob("*.partial"))


def test_a_server_without_ranges_starts_over(server: Server, tmp_path: Path) -> None:
    server.files["/a.bin"], server.ranges = CONTENT, False
    (tmp_path / "a.bin.partial").write_bytes(CONTENT[:1000])
    get([Remote("a.bin", f"{server.url}/a.bin", md5(CONTENT))], tmp_path)
    assert (tmp_path / "a.bin").read_bytes() == CONTENT


def test_a_complete_partial_file_is_only_checked(server: Server, tmp_path: Path) -> None:
    server.files["/a.bin"] = CONTENT
    (tmp_path / "a.bin.partial").write_bytes(CONTENT)
    get([Remote("a.bin", f"{server.url}/a.bin", md5(CONTENT))], tmp_path)
    assert (tmp_path / "a.bin").read_bytes() == CONTENT


def test_a_wrong_checksum_leaves_nothing(server: Server, tmp_path: Path) -> None:
    server.files["/a.bin"] = CONTENT[:-1] + b"!"
    with pytest.raises(HistoddError, match=r"a.bin: what http.* sent has another checksum than published"):
        get([Remote("a.bin", f"{server.url}/a.bin", md5(CONTENT))], tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_packed_files_are_unpacked(server: Server, tmp_path: Path) -> None:
    packed = gzip.compress(CONTENT)
    server.files["/x.h5.gz"] = packed
    remote = Remote("x.h5.gz", f"{server.url}/x.h5.gz", md5(packed))
    assert get([remote], tmp_path) == [tmp_path / "x.h5"] and (tmp_path / "x.h5").read_bytes() == CONTENT
    assert [p.name for p in tmp_path.iterdir()] == ["x.h5"]
    get([remote], tmp_path)
    assert len(server.log) == 1


PACKED = gzip.compress(np.random.default_rng(0).bytes(3_000_000))


@pytest.mark.parametrize(
    "damaged",
    [
        PACKED[:-200],
        PACKED[:-8] + b"\0" * 8,
        b"no gzip file at all",
        gzip.compress(CONTENT)[:10] + b"\xff" * 3000,
    ],
    ids=["short", "checksum", "other", "deflate"],
)
def test_a_damaged_packed_file_is_named_and_nothing_half_unpacked_stays(
    server: Server, tmp_path: Path, damaged: bytes
) -> None:
    server.files["/x.h5.gz"] = damaged
    with pytest.raises(HistoddError, match=r"x.h5.gz is damaged .*: delete it and fetch it again") as error:
        get([Remote("x.h5.gz", f"{server.url}/x.h5.gz", None)], tmp_path)
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["x.h5.gz"]


def test_a_disk_that_fills_while_unpacking_is_not_called_damage(server: Server, tmp_path: Path) -> None:
    server.files["/x.h5.gz"] = gzip.compress(b"\0" * 3_000_000)
    remote = Remote("x.h5.gz", f"{server.url}/x.h5.gz", None)
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_500_000, before[1]))
    try:
        with pytest.raises(HistoddError, match=r"cannot write .*x.h5: File too large: free some space"):
            get([remote], tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert [path.name for path in tmp_path.iterdir()] == ["x.h5.gz"]
    assert get([remote], tmp_path) == [tmp_path / "x.h5"]


def test_a_list_of_checksums_without_end_or_cut_short_is_one_line(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fetching, "_CAMELYON", server.url)
    server.files["/checksums.md5"] = b"0" * 60_000_000
    tracemalloc.start()
    try:
        assert cli.main(["data", "fetch", "camelyon16", "--out", str(tmp_path / "c")]) == 1
        assert tracemalloc.get_traced_memory()[1] < 50_000_000, "it is not held as a whole"
    finally:
        tracemalloc.stop()
    assert "larger than any list of checksums" in capsys.readouterr().err
    server.files["/checksums.md5"], server.cut = b"0" * 5_000_000, 100_000
    assert cli.main(["data", "fetch", "camelyon16", "--out", str(tmp_path / "c")]) == 1
    assert "error: http://127.0.0.1:" in (line := capsys.readouterr().err.strip().splitlines()[-1])
    assert "checksums.md5 broke off" in line and not (tmp_path / "c").exists()


def test_absent_files_and_absent_servers(server: Server, tmp_path: Path) -> None:
    with pytest.raises(HistoddError, match="answers 404 Not Found"):
        get([Remote("a", f"{server.url}/a", None)], tmp_path)
    with pytest.raises(HistoddError, match=r"cannot be reached \(ConnectionError\)"):
        get([Remote("a", "http://127.0.0.1:9/a", None)], tmp_path)


@pytest.mark.parametrize("name", ["../a", "/tmp/a", "sub/../../a"])
def test_nothing_is_written_outside(server: Server, tmp_path: Path, name: str) -> None:
    server.files["/a"] = b"x"
    with pytest.raises(HistoddError, match="would be written outside"):
        get([Remote(name, f"{server.url}/a", None)], tmp_path / "out")
    assert not list(tmp_path.rglob("a"))


def test_an_unwritable_folder_is_one_line(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(HistoddError, match="cannot write"):
        get([Remote("a", f"{server.url}/a", None)], tmp_path / "file")


def test_the_command_fetches_camelyon16_by_its_own_checksums(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {
        "images/normal_001.tif": b"slide",
        "annotations/tumor_001.xml": b"<x/>",
        "evaluation/reference.csv": b"test_001,Normal",
    }
    lines = [f"{hashlib.md5(c).hexdigest()}  {n}" for n, c in files.items()]
    lines += [f"{'0' * 32}  masks/tumor_001_mask.tif", f"{'0' * 32}  images/../../../etc/passwd", "# a comment"]
    server.files = {f"/{n}": c for n, c in files.items()} | {"/checksums.md5": "\n".join(lines).encode()}
    monkeypatch.setattr(fetching, "_CAMELYON", server.url)
    assert cli.main(["data", "fetch", "camelyon16", "--out", str(tmp_path / "c")]) == 0
    assert {
        str(p.relative_to(tmp_path / "c")): p.read_bytes() for p in (tmp_path / "c").rglob("*") if p.is_file()
    } == files


def test_what_is_not_open_is_explained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, word in (("tcga-idh", "GDC portal"), ("unitopatho-pt", "IEEE DataPort"), ("idc", "Kaggle")):
        assert cli.main(["data", "fetch", name, "--out", str(tmp_path / "x")]) == 0
        assert word in capsys.readouterr().out
    assert not (tmp_path / "x").exists()
    assert cli.main(["data", "fetch", "pcam"]) == 2
    assert "--out" in capsys.readouterr().err


def test_every_dataset_has_facts_and_every_open_one_a_source() -> None:
    assert FACTS.keys() <= DATASETS.keys() and REMOTES.keys() <= DATASETS.keys()
    names = [r.name for name in ("pcam", "pathmnist") for r in REMOTES[name](lambda url: "")]
    assert len(names) == len(set(names)) == 10
    for name in ("pcam", "pathmnist"):
        for remote in REMOTES[name](lambda url: ""):
            assert remote.url.startswith("https://") and remote.url.endswith(remote.name)


def test_the_paper_s_supplementary_table() -> None:
    assert SUPPLEMENTARY_TABLE1 == {
        "tcga-idh": (17686, 2310, 1191, 149),
        "camelyon16": (1066988, 567510, 270, 129),
        "unitopatho-dg": (5631, 2277, 160, 70),
        "unitopatho-pt": (6889, 2647, 208, 88),
    }


def test_a_dataset_without_facts_is_described_by_its_own_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(DATASETS, "mine", replace(DATASETS["slides"], description="skin, two classes"))
    project(tmp_path / "p")
    for options in ([], ["--root", str(tmp_path / "p")]):
        assert cli.main(["data", "info", "mine", *options]) == 0
        text = capsys.readouterr().out
        assert text.startswith("mine: skin, two classes\n  there are no published facts to compare with\n")
        assert ("slides with benign" in text) == bool(options)
    assert cli.main(["data", "fetch", "mine", "--out", str(tmp_path / "x")]) == 0
    assert "mine is not downloaded by this program" in capsys.readouterr().out
    with pytest.raises(HistoddError, match="mine cannot be downloaded by a program: no published place is known"):
        fetching.remote_files("mine")


def test_info_prints_it_beside_what_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["data", "info", "tcga-idh"]) == 0
    text = capsys.readouterr().out
    assert "17,686" in text and "1,191" in text and "149" in text and "where:" in text


def test_ctrl_c_while_the_checksum_is_computed_loses_nothing(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.files["/a.bin"] = CONTENT
    remote = Remote("a.bin", f"{server.url}/a.bin", md5(CONTENT))

    def interrupted(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("pooch.core.hash_matches", interrupted)
        get([remote], tmp_path)
    assert get([remote], tmp_path) == [tmp_path / "a.bin"] and (tmp_path / "a.bin").read_bytes() == CONTENT
    assert server.log == [("/a.bin", None), ("/a.bin", f"bytes={len(CONTENT)}-")], "it was not sent again"
    assert [f.name for f in tmp_path.iterdir()] == ["a.bin"]
