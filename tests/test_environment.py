"""What records say about where they were made."""

import platform
import subprocess
import sys

import pytest

from histodd_bench import environment


def test_commit_outside_a_repository_is_what_the_environment_says(monkeypatch) -> None:
    monkeypatch.setenv("PATH", "")  # no git
    monkeypatch.setenv("HISTODD_COMMIT", "0123abc")
    assert environment.commit() == "0123abc"
    monkeypatch.delenv("HISTODD_COMMIT")
    assert environment.commit() is None


def test_commit_inside_the_repository_is_its_own(monkeypatch) -> None:
    monkeypatch.setenv("HISTODD_COMMIT", "0123abc")
    found = environment.commit()
    if found == "0123abc":  # installed, or a copy without .git
        pytest.skip("installed, or a copy without its repository")
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    assert found is not None and found.rstrip("+") == head


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="memory is the C library's to keep: glibc only")
def test_large_tensors_lie_on_the_heap_where_their_memory_is_kept() -> None:
    program = """
import sys, torch
from histodd_bench.environment import configure
if sys.argv[1] == "configured":
    configure("cpu", 1)
place = torch.empty(100 << 20, dtype=torch.uint8).data_ptr()
(heap,) = [line.split()[0].split("-") for line in open("/proc/self/maps") if line.rstrip().endswith("[heap]")]
print(int(heap[0], 16) <= place < int(heap[1], 16))
"""

    def on_the_heap(which: str) -> str:
        return subprocess.run([sys.executable, "-c", program, which], capture_output=True, text=True, check=True).stdout

    assert on_the_heap("plain") == "False\n"
    assert on_the_heap("configured") == "True\n"
