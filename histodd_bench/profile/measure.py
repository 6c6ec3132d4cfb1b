"""The clocks: medians and spread of repeated calls, the memory they take, and what a plain copy reaches here."""

import ctypes
import gc
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

MOST_CALLS = 500
ROUNDS = 5  # backends take turns, so that a machine that slows down slows all of them


def synchronise(device: torch.device) -> None:
    """Wait for a CUDA device; nothing to wait for on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def spread(seconds: Sequence[float]) -> dict[str, float | int]:
    """Median, 20th and 80th percentile (linear) in seconds, and how many calls they are of."""
    values = torch.tensor(list(seconds), dtype=torch.float64)
    low, middle, high = values.quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)).tolist()
    return {"median": middle, "p20": low, "p80": high, "calls": len(values)}


# Work in parts, e.g. forward and backward: calls what it is given before the first part and after every one.
Steps = Callable[[Callable[[], None]], object]
# One call, timed: the seconds of each of its parts.
Timed = Callable[[], list[float]]

_CYCLES = 2e9  # per second, at least: more than any GPU's clock
_LONGEST_SLEEP = 0.05  # seconds


def wall_clock(steps: Steps, device: torch.device) -> Timed:
    """Seconds as a user would wait for them: a CUDA device is waited for before and after every part."""

    def run() -> list[float]:
        marks: list[float] = []

        def mark() -> None:
            synchronise(device)
            marks.append(time.perf_counter())

        steps(mark)
        return [b - a for a, b in pairwise(marks)]

    return run


def device_clock(steps: Steps, device: torch.device) -> Timed:
    """Seconds on a CUDA device's own clock, without what it takes to launch: the device sleeps until all is launched.

    Work that waits for the device in between, or takes more than 25 ms to launch, is timed with the gaps this leaves.
    """
    steps(lambda: None)
    synchronise(device)
    start = time.perf_counter()
    steps(lambda: None)
    launching = time.perf_counter() - start
    cycles = int(_CYCLES * min(2 * launching + 1e-4, _LONGEST_SLEEP))

    def run() -> list[float]:
        events: list[torch.cuda.Event] = []

        def mark() -> None:
            events.append(torch.cuda.Event(enable_timing=True))
            events[-1].record()

        synchronise(device)
        torch.cuda._sleep(cycles)  # type: ignore[no-untyped-call]
        steps(mark)
        synchronise(device)
        return [a.elapsed_time(b) / 1e3 for a, b in pairwise(events)]

    return run


def take_turns(runs: dict[str, Timed], seconds: float) -> dict[str, list[list[float]]]:
    """Call every run again and again, about ``seconds`` each in all, in rounds; per run, one list per part."""
    counts = {}
    for name, run in runs.items():
        run()
        once = sum(run())
        counts[name] = min(max(int(seconds / max(once, 1e-7) / ROUNDS), 1), MOST_CALLS // ROUNDS)
    samples: dict[str, list[list[float]]] = {name: [] for name in runs}
    for _ in range(ROUNDS):
        for name, run in runs.items():
            samples[name] += [run() for _ in range(counts[name])]
    return {name: [list(part) for part in zip(*calls, strict=True)] for name, calls in samples.items()}


def copy_bandwidth(device: torch.device, seconds: float = 0.5, megabytes: int = 256) -> float:
    """Bytes per second, read and written, of copying one large buffer to another: the machine's limit for one pass."""
    source = torch.zeros(megabytes * 2**18, device=device)
    target = torch.ones_like(source)

    def steps(mark: Callable[[], None]) -> None:
        mark()
        target.copy_(source)
        mark()

    clock = device_clock if device.type == "cuda" else wall_clock
    times = take_turns({"copy": clock(steps, device)}, seconds)["copy"][0]
    return 2 * source.numel() * 4 / float(spread(times)["median"])


def peak_memory(run: Callable[[], Any], device: torch.device) -> int | None:
    """Bytes that a call takes on top of its inputs, at the worst moment; None where the system does not tell.

    On CUDA what torch's allocator hands out. On a CPU the growth of the resident set: it includes what operators take
    beside tensors, and is coarse (pages, and memory that the C library had kept is not seen).
    """
    run()
    gc.collect()
    if device.type == "cuda":
        synchronise(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        synchronise(device)
        return torch.cuda.max_memory_allocated(device) - before
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
        run()
        return max(_status("VmHWM") - before, 0)
    except (OSError, AttributeError, ValueError):
        return None


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"no {field} in /proc/self/status")
