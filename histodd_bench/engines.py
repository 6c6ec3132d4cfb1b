"""Engines: independent jobs on local processes, on SLURM through submitit, or on Ray. Jobs leave files; engines only run them.

An engine gets an *opener*, a picklable function that is called once per worker with the device's name and returns the function
that does one job, and a list of picklable jobs. It returns what went wrong, by job. A worker that dies costs the job it was
doing, nothing else.
"""

import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from histodd_bench.errors import HistoddError, UsageError, unknown_name
from histodd_bench.workers import Report, run_workers

Job = Hashable
Opener = Callable[[str], Callable[[Any], None]]
Failures = dict[Any, str]

_POLL = 0.5  # seconds between looks at jobs of a cluster
_QUEUE_SECONDS = 15  # between looks at the queue, for jobs that died


@dataclass(frozen=True)
class Engine:
    """Where jobs run.

    Attributes:
        name: a key of :data:`ENGINES`.
        workers: processes (local), jobs of a job array (slurm) or actors (ray) at once.
        device: ``cpu``, ``cuda`` (spread over all GPUs of the machine, one after the other) or ``cuda:N``.
        options: of the engine, as text: submitit's parameters (``slurm_partition=gpu``, ``timeout_min=600``,
            ``cluster=local`` to try it without SLURM), or Ray's ``address``.
        folder: for the engine's own files.
    """

    name: str
    workers: int
    device: str
    folder: Path
    options: Mapping[str, str] = field(default_factory=dict)

    def check(self) -> None:
        """Refuse an engine that cannot run jobs: unknown, not installed, or with options that it does not have.

        Raises:
            UsageError, HistoddError: as :meth:`run`.
        """
        if self.name not in ENGINES:
            raise unknown_name("engine", self.name, ENGINES)
        if self.name == "local" and self.options:
            raise UsageError(f"the local engine has no option {next(iter(self.options))!r}")
        if self.name == "ray":
            _ray_package()
            wrong = set(self.options) - {"address"}
            if wrong:
                raise UsageError(f"the ray engine has no option {min(wrong)!r}: it has address")
        if self.name == "slurm":
            with TemporaryDirectory() as folder:  # submitit makes the one it is given
                _slurm_executor(replace(self, folder=Path(folder)))

    def run(self, opener: Opener, jobs: Sequence[Any], on_done: Callable[[], None]) -> Failures:
        """Run every job once; ``on_done`` is called as each ends. Returns the failed jobs and why.

        Raises:
            UsageError: no such engine, or an option it does not have.
            HistoddError: a worker cannot start, or the engine's package is not installed.
        """
        self.check()
        return ENGINES[self.name](self, opener, list(jobs), on_done) if jobs else {}


def device_of(worker: int, device: str) -> str:
    """The device of worker number ``worker``: GPUs in turn where there are several and none is named."""
    if device != "cuda":
        return device
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return f"cuda:{worker % gpus}" if gpus > 1 else device


def default_workers(device: str, cores: int) -> int:
    """One worker per GPU where GPUs are used, otherwise one per core."""
    import torch

    if device.startswith("cuda:") or device == "cpu" or not torch.cuda.is_available():
        return 1 if device.startswith("cuda:") else cores
    return torch.cuda.device_count()


def _attempt(do: Callable[[Any], None], job: Any) -> str | None:
    """Do a job; what went wrong in one line, or None."""
    try:
        do(job)
    except Exception as error:
        text = str(error).splitlines()[0] if str(error) else "no details"
        return text if isinstance(error, HistoddError) else f"{type(error).__name__}: {text}"
    return None


# ---- local processes ---------------------------------------------------------------------------------------------------


def _local(engine: Engine, opener: Opener, jobs: list[Any], on_done: Callable[[], None]) -> Failures:
    failures = Failures()
    events = run_workers(
        _opened, jobs, engine.workers, arguments=lambda number: (opener, device_of(number, engine.device))
    )
    with closing(events):
        for kind, index, value in events:
            if kind == "died":
                value = f"its worker process ended (exit code {value})"
            if value is not None:
                failures[jobs[index]] = value
            on_done()
    return failures


def _opened(opener: Opener, device: str, report: Report) -> Callable[[Any], str | None]:
    return partial(_attempt, opener(device))


# ---- SLURM, through submitit -------------------------------------------------------------------------------------------


def _chunk(opener: Opener, device: str, jobs: list[Any]) -> Failures:
    """What one job of the array does: a worker's share."""
    do = opener(device)
    found = {job: _attempt(do, job) for job in jobs}
    return {job: text for job, text in found.items() if text is not None}


def _slurm_executor(engine: Engine) -> Any:
    """submitit's executor with the engine's options."""
    try:
        import submitit
    except ImportError:
        raise HistoddError("--engine slurm needs submitit: pip install submitit") from None
    options: dict[str, Any] = {k: int(v) if v.isdigit() else v for k, v in engine.options.items()}
    cluster, gpu = options.pop("cluster", "slurm"), engine.device.startswith("cuda")
    try:
        executor = submitit.AutoExecutor(folder=engine.folder / "submitit" / "%j", cluster=cluster)
    except RuntimeError:
        raise HistoddError(
            "--engine slurm: this machine has no srun: start it where SLURM is, or try it with --engine-option cluster=local"
        ) from None
    except ValueError as error:
        raise UsageError(f"--engine-option: {error}".splitlines()[0]) from None
    try:
        executor.update_parameters(**{"timeout_min": 24 * 60, "cpus_per_task": 1, **({"gpus_per_node": 1} if gpu else {}),
                                      "name": "histodd-slides", **options})  # fmt: skip
    except (NameError, TypeError, ValueError) as error:
        raise UsageError(f"--engine-option: {error}".splitlines()[0]) from None
    return executor


def _slurm(engine: Engine, opener: Opener, jobs: list[Any], on_done: Callable[[], None]) -> Failures:
    executor, gpu = _slurm_executor(engine), engine.device.startswith("cuda")
    shares = [jobs[i :: engine.workers] for i in range(min(engine.workers, len(jobs)))]
    devices = ["cuda" if gpu else engine.device] * len(shares)  # SLURM shows a job its own GPU only
    submitted = executor.map_array(_chunk, [opener] * len(shares), devices, shares)
    failures, waiting = Failures(), dict(zip(range(len(shares)), submitted, strict=True))
    looked, left = time.monotonic(), set[int]()  # jobs that had left the queue when it was last looked at
    try:
        while waiting:
            ended = {i for i, job in waiting.items() if job.done()}
            if executor.cluster == "slurm" and time.monotonic() - looked > _QUEUE_SECONDS:
                gone = {i for i, job in waiting.items() if i not in ended and _left_queue(job.job_id)}
                for i in gone & left:  # for long enough that a result would have been seen
                    failures.update(dict.fromkeys(shares[i], f"its job {waiting.pop(i).job_id} ended without a result"))
                    for _ in shares[i]:
                        on_done()
                looked, left = time.monotonic(), gone
            for i in ended:
                try:
                    failures.update(waiting.pop(i).result())
                except Exception as error:  # submitit raises several kinds for a job that died
                    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
                    lines = [line for line in lines if "Error:" in line] or lines
                    failures.update(
                        dict.fromkeys(shares[i], f"its job failed: {lines[-1] if lines else type(error).__name__}")
                    )
                for _ in shares[i]:
                    on_done()
            if waiting:
                time.sleep(_POLL)
    finally:
        for job in waiting.values():
            job.cancel()
    return failures


def _left_queue(job: str) -> bool:
    """Whether a job neither waits nor runs: submitit asks the accounting, and waits forever where a cluster has none."""
    try:
        asked = subprocess.run(["squeue", "-h", "-j", job], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return not asked.stdout.strip() if asked.returncode == 0 else "Invalid job id" in asked.stderr


# ---- Ray ---------------------------------------------------------------------------------------------------------------


def _ray_package() -> Any:
    try:
        import ray
    except ImportError:
        raise HistoddError("--engine ray needs Ray: pip install ray") from None
    return ray


def _ray(engine: Engine, opener: Opener, jobs: list[Any], on_done: Callable[[], None]) -> Failures:
    ray = _ray_package()
    gpu = engine.device.startswith("cuda")
    address = engine.options.get("address")
    started = not ray.is_initialized()
    if started:
        # A local cluster imports what this process can import, also from a checkout that is not installed.
        seen = {"env_vars": {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}}
        local: dict[str, Any] = {"num_cpus": engine.workers, "include_dashboard": False, "runtime_env": seen}
        local = {} if address else local
        ray.init(address=address, log_to_driver=False, configure_logging=False, **local)

    @ray.remote(num_cpus=1, num_gpus=1 if gpu else 0, max_restarts=0)
    class Worker:
        def __init__(self, opener: Opener, device: str) -> None:
            self.failed, self.do = "", None
            try:
                self.do = opener(device)
            except HistoddError as error:
                self.failed = str(error)

        def start(self) -> str:
            return self.failed

        def work(self, job: Any) -> str | None:
            assert self.do is not None
            return _attempt(self.do, job)

    queue, failures = deque(jobs), Failures()
    hands: dict[Any, tuple[Any, Any]] = {}  # future -> (worker, job in hand; None while it starts)

    def hire() -> None:
        worker = Worker.remote(opener, "cuda" if gpu else engine.device)  # type: ignore[attr-defined]
        hands[worker.start.remote()] = (worker, None)

    try:
        for _ in range(min(engine.workers, len(jobs))):
            hire()
        while hands:
            (future,), _ = ray.wait(list(hands), num_returns=1)
            worker, job = hands.pop(future)
            try:
                text = ray.get(future)
            except ray.exceptions.RayError as error:
                if job is None:
                    raise HistoddError(f"a Ray worker ended while starting: {str(error).splitlines()[0]}") from None
                failures[job[0]] = "its Ray worker ended"
                on_done()
                if queue:
                    hire()
                continue
            if job is None:
                if text:
                    raise HistoddError(text)
            else:
                if text is not None:
                    failures[job[0]] = text
                on_done()
            if queue:
                job = (queue.popleft(),)
                hands[worker.work.remote(job[0])] = (worker, job)
    finally:
        if started:
            ray.shutdown()
    return failures


ENGINES: dict[str, Callable[[Engine, Opener, list[Any], Callable[[], None]], Failures]] = {
    "local": _local,
    "slurm": _slurm,
    "ray": _ray,
}
