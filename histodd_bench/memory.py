"""Peak memory of a piece of work: what the device's allocator held, or what the process held in RAM."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


@contextmanager
def peak_memory(device: torch.device) -> Iterator[list[int | None]]:
    """Bytes at the peak of the block, in a one-element list that is final when the block ends.

    On CUDA what torch allocated; on a CPU the resident memory of the whole process, Python and torch included (Linux). None
    where the system does not tell. Blocks must not be nested: the peak is reset on entry.
    """
    peak: list[int | None] = [None]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        peak[0] = torch.cuda.max_memory_allocated(device)
        return
    try:
        _CLEAR.write_text("5")  # sets the high-water mark to what is resident now
        known = True
    except OSError:
        known = False
    yield peak
    peak[0] = _high_water() if known else None


def _high_water() -> int | None:
    try:
        lines = _STATUS.read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration, ValueError):
        return None
