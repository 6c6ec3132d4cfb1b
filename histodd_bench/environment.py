"""Where results are computed: the device, its fixed settings, and generators that no other work can touch."""

import ctypes
import os
import platform
import random
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from histodd_bench import __version__
from histodd_bench.errors import UsageError


def configure(device: str, threads: int) -> torch.device:
    """Fix the thread count and deterministic kernels; the device as torch names it.

    Raises:
        UsageError: no such device here.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.device(device)
        torch.zeros(1, device=found)
    except (RuntimeError, AssertionError) as error:
        # Of other devices torch says nothing but what it was built for, at length.
        reason = f" ({str(error).splitlines()[0]})" if device.startswith("cuda") else ", as cpu or cuda may be"
        raise UsageError(f"--device {device}: not usable here{reason}: 'doctor' lists the devices") from None
    torch.set_num_threads(threads)
    keep_freed_memory()
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    if found.type == "cuda":
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    return found


def keep_freed_memory() -> None:
    """Have the C library keep memory that tensors gave back, up to 1 GiB, instead of returning it to the system.

    Every step of training frees tensors of many megabytes and asks for them again; the system hands each page out anew,
    zeroed, wherever such a tensor lay at the end of the heap. Does nothing where the library is not glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if platform.libc_ver()[0] == "glibc" else None
    if mallopt is not None:
        if not mallopt(-3, 1 << 30):  # M_MMAP_THRESHOLD: larger tensors come straight from the system and go back at once
            mallopt(-3, 1 << 25)  # older versions take no more
        mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD: free memory at the end of the heap that is kept


@contextmanager
def own_random(key: str) -> Iterator[None]:
    """Global generators that depend on ``key`` alone, put back afterwards: no cell can feel that another ran before it.

    Everything here draws from explicit generators; this is for dropout and for third-party methods.
    """
    seed = int(key[:8], 16)
    python, legacy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(legacy)


def device_name(device: torch.device) -> str:
    """The device as its vendor calls it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def commit() -> str | None:
    """The git commit this program runs from, with ``+`` where files differ from it.

    Outside its own repository, e.g. in a copy made for another machine, what ``HISTODD_COMMIT`` says; else None.
    """
    package = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(package), *arguments], capture_output=True, text=True, timeout=10, check=True
        )
        return done.stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != package.parent:
            return os.environ.get("HISTODD_COMMIT")
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return os.environ.get("HISTODD_COMMIT")


def describe(device: torch.device) -> dict[str, Any]:
    """Versions, device, threads and commit, as they stand in records."""
    return {
        "histodd-bench": __version__,
        "commit": commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
    }
