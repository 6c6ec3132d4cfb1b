"""Checks every backend of every problem, times them side by side, and makes one record of it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from histodd_bench.environment import describe
from histodd_bench.errors import UsageError
from histodd_bench.profile.measure import (
    Steps,
    copy_bandwidth,
    device_clock,
    peak_memory,
    spread,
    take_turns,
    wall_clock,
)
from histodd_bench.profile.problems import Backend, Problem, problems

FORMAT = 1  # of the record


@dataclass(frozen=True)
class Request:
    """What to measure, and how long.

    Attributes:
        operators: names of operators, and ``step`` for the distillation step.
        shapes: (patches, side) of the image operators.
        dtypes: of their images.
        backends: only these; none: all.
        seconds: for each backend of a problem, about, without compiling and checking.
        images: folder to take patches from instead of the procedural ones.
        command: the line that can be typed to do it again.
    """

    operators: tuple[str, ...]
    shapes: tuple[tuple[int, int], ...]
    dtypes: tuple[str, ...]
    device: torch.device
    backends: tuple[str, ...] = ()
    seconds: float = 1.0
    images: Path | None = None
    command: str = ""
    quick: bool = False


def measure(request: Request, log: Callable[[str], None]) -> dict[str, Any]:
    """The record of a request: environment, copy bandwidth, one entry per problem and backend, and the step."""
    device = request.device
    record: dict[str, Any] = {
        "format": FORMAT,
        "command": request.command,
        "environment": describe(device) | {"instruction_set": torch.backends.cpu.get_cpu_capability()},
        "device_type": device.type,
        "images": "procedural" if request.images is None else "own",
        "copy_bandwidth": copy_bandwidth(device),
        "measurements": [],
    }
    log(f"copy: {record['copy_bandwidth'] / 1e9:.1f} GB/s")
    operators = [o for o in request.operators if o != "step"]
    for problem in problems(operators, request.shapes, request.dtypes, device, request.images):
        log(f"{problem.operator}: {problem.title}")
        record["measurements"] += measure_problem(problem, device, request.seconds, request.backends, log)
    if operators and not record["measurements"]:
        raise UsageError(
            f"--backends {','.join(request.backends)}: nothing computes {' or '.join(operators)} by that name here"
        )
    if "step" in request.operators:
        from histodd_bench.profile.step import measure_step

        record["step"] = measure_step(device, quick=request.quick, seconds=request.seconds, log=log)
    return record


def measure_problem(
    problem: Problem,
    device: torch.device,
    seconds: float,
    chosen: Sequence[str] = (),
    log: Callable[[str], None] = lambda line: None,
) -> list[dict[str, Any]]:
    """One entry per backend; what fails, or computes something else, is reported and not timed."""
    rows: list[dict[str, Any]] = []
    good: dict[str, Steps] = {}
    for backend in problem.backends:
        if chosen and backend.name not in chosen:
            continue
        row: dict[str, Any] = {"operator": problem.operator, "problem": problem.title, "backend": backend.name}
        rows.append(row)
        try:
            row["difference"] = difference(problem, backend)
        except Exception as error:  # another package's, of any kind
            row["failed"] = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            log(f"  {backend.name}: failed: {row['failed']}")
            continue
        row |= {"unit": backend.unit, "limit": backend.limit}
        if not row["difference"] <= backend.limit:
            row["failed"] = f"computes something else: differs by {row['difference']:.2g} {backend.unit}"
            log(f"  {backend.name}: {row['failed']}")
            continue
        good[backend.name] = steps_of(problem, backend)
        row["peak_bytes"] = peak_memory(wall_clock(good[backend.name], device), device)
    samples = take_turns({name: wall_clock(steps, device) for name, steps in good.items()}, seconds)
    on_device: dict[str, list[list[float]]] = {}
    if device.type == "cuda":
        on_device = take_turns({name: device_clock(steps, device) for name, steps in good.items()}, seconds)
    for row in rows:
        if row["backend"] in samples:
            _fill(row, problem, samples[row["backend"]], on_device.get(row["backend"]))
    return rows


def _fill(
    row: dict[str, Any], problem: Problem, parts: list[list[float]], on_device: list[list[float]] | None
) -> None:
    """Adds ``forward``, and ``backward`` and ``both``; bandwidth is by the device's own clock where it has one."""
    sizes = {"forward": problem.forward_bytes}
    if len(parts) == 2:
        sizes |= {"backward": problem.backward_bytes, "both": problem.forward_bytes + problem.backward_bytes}
    device_times = _named(on_device) if on_device else {}
    for name, values in _named(parts).items():
        row[name] = spread(values) | {"bytes": sizes[name]}
        seconds = row[name]["median"]
        if name in device_times:
            row[name]["device"] = spread(device_times[name])
            seconds = row[name]["device"]["median"]
        row[name]["bandwidth"] = sizes[name] / seconds


def _named(parts: list[list[float]]) -> dict[str, list[float]]:
    if len(parts) == 1:
        return {"forward": parts[0]}
    return {"forward": parts[0], "backward": parts[1], "both": [a + b for a, b in zip(*parts, strict=True)]}


def run_once(problem: Problem, backend: Backend) -> tuple[Any, tuple[torch.Tensor, ...]]:
    """Result and gradients (none where nothing is differentiated)."""
    if not problem.leaves:
        with torch.no_grad():
            return backend.function(*problem.inputs), ()
    out = backend.function(*problem.inputs)
    return out, torch.autograd.grad(out, problem.leaves, problem.upstream)


def steps_of(problem: Problem, backend: Backend) -> Steps:
    """The forward pass and, where there are leaves, the backward pass."""

    def forward(mark: Callable[[], None]) -> None:
        with torch.no_grad():
            mark()
            out = backend.function(*problem.inputs)
            mark()
        del out

    def both(mark: Callable[[], None]) -> None:
        mark()
        out = backend.function(*problem.inputs)
        mark()
        torch.autograd.grad(out, problem.leaves, problem.upstream)
        mark()

    return both if problem.leaves else forward


def difference(problem: Problem, backend: Backend) -> float:
    """How far a backend is from the float64 reference: the value and, where there are any, its gradients."""
    out, gradients = run_once(problem, backend)
    if backend.expected is not None:
        return float((backend.read(out).double() - backend.expected().double()).abs().mean())
    exact = problem.expected()
    found = [problem.compared(backend.read(out)), *(problem.compared(g) for g in gradients)]
    if backend.unit == "grey levels":
        return float((found[0].double() - exact[0]).abs().mean())
    worst = 0.0
    for a, e in zip(found, exact, strict=True):
        worst = max(worst, float((a.detach().double() - e).abs().max() / e.abs().max().clamp(min=1e-30)))
    return worst


def trace(request: Request, path: Path, log: Callable[[str], None]) -> None:
    """A Chrome trace (chrome://tracing, Perfetto) of one call of every backend of the request, after a warm-up."""
    from torch.profiler import ProfilerActivity, profile, record_function

    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if request.device.type == "cuda" else [])
    operators = [o for o in request.operators if o != "step"]
    calls: list[tuple[str, Callable[[], Any]]] = []
    for problem in problems(operators, request.shapes[:1], request.dtypes, request.device, request.images):
        for backend in problem.backends:
            if not request.backends or backend.name in request.backends:
                calls.append(
                    (
                        f"{problem.operator} {problem.title}: {backend.name}",
                        wall_clock(steps_of(problem, backend), request.device),
                    )
                )
    if "step" in request.operators:
        from histodd_bench.profile.step import step_calls

        calls += step_calls(request.device, quick=request.quick)
    usable = []
    for name, call in calls:
        try:
            call()
            usable.append((name, call))
        except Exception as error:
            log(f"not in the trace: {name}: {type(error).__name__}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with profile(activities=activities, record_shapes=True) as profiler:
        for name, call in usable:
            with record_function(name):
                call()
    profiler.export_chrome_trace(str(path))
