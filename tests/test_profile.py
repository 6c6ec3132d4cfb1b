"""The profiler: its clock, what it compares before it times, its problems and peers, its record and its command."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from histodd_bench import cli
from histodd_bench.profile import measure, report
from histodd_bench.profile.measure import device_clock, wall_clock
from histodd_bench.profile.patches import from_folder, procedural
from histodd_bench.profile.peers import PACKAGES
from histodd_bench.profile.problems import COMPILED, OPERATORS, Backend, problems
from histodd_bench.profile.run import difference, measure_problem, steps_of

CPU = torch.device("cpu")
QUICK_BACKENDS = (COMPILED, "reference", "plain", "loop")  # torch.compile takes minutes


def some(operator: str, dtype: str = "float32", n: int = 3, side: int = 48):
    return list(problems([operator], [(n, side)], [dtype], CPU))


def test_spread_is_the_median_and_the_20th_and_80th_percentile() -> None:
    assert measure.spread([5.0, 1.0, 4.0, 2.0, 3.0, 6.0]) == pytest.approx(
        {"median": 3.5, "p20": 2.0, "p80": 5.0, "calls": 6}
    )


def test_backends_take_turns_and_keep_their_parts_apart() -> None:
    order = []

    def run(name, parts):
        order.append(name)
        return parts

    samples = measure.take_turns({"a": lambda: run("a", [1.0, 2.0]), "b": lambda: run("b", [3.0])}, seconds=50.0)
    assert samples == {"a": [[1.0] * 15, [2.0] * 15], "b": [[3.0] * 15]}  # 50 s / 3 s in 5 rounds
    assert "".join(order) == "aabb" + "aaabbb" * 5


def test_peak_memory_sees_a_temporary_and_not_the_inputs() -> None:
    x = torch.rand(16, 2**20)
    peak = measure.peak_memory(lambda: float((x + 1).sum()), CPU)
    if peak is None:
        pytest.skip("this system does not tell")
    assert 60 * 2**20 < peak < 80 * 2**20


def test_copy_bandwidth_is_that_of_a_machine() -> None:
    assert 1e8 < measure.copy_bandwidth(CPU, seconds=0.05, megabytes=16) < 1e13


def test_procedural_patches_are_repeatable_and_can_be_fitted() -> None:
    from histodd_bench.ops import macenko_fit

    patches = procedural(12, 64)
    assert patches.shape == (12, 3, 64, 64) and patches.dtype == torch.uint8
    assert torch.equal(patches, procedural(12, 64)) and not torch.equal(patches[:8], procedural(8, 64))
    assert (macenko_fit(procedural(32, 128))[2] == 0).all()


def test_patches_from_a_folder_are_resized_and_repeated(tmp_path: Path) -> None:
    from PIL import Image

    for i, colour in enumerate(((200, 10, 10), (10, 200, 10))):
        Image.new("RGB", (30, 20), colour).save(tmp_path / f"{i}.png")
    patches = from_folder(tmp_path, 3, 16)
    assert patches.shape == (3, 3, 16, 16)
    assert patches[:, 0, 0, 0].tolist() == [200, 10, 200]


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("dtype", ["uint8", "float32", "float16"])
def test_every_backend_computes_the_same(operator: str, dtype: str) -> None:
    for problem in some(operator, dtype):
        names = [b.name for b in problem.backends]
        assert names[:2] == [COMPILED, "reference"] and len(set(names)) == len(names)
        for backend in problem.backends:
            if backend.name in QUICK_BACKENDS:
                assert difference(problem, backend) <= backend.limit, (problem.title, backend.name)


@pytest.mark.parametrize("name", PACKAGES)
def test_public_packages_compute_the_same(name: str) -> None:
    if not PACKAGES[name].installed:
        pytest.skip(f"{PACKAGES[name].distribution} is not installed")
    (problem,) = some("normalise", "uint8", side=96)
    (backend,) = [b for b in problem.backends if b.name == name]
    assert difference(problem, backend) <= backend.limit


def test_torch_compile_computes_the_same() -> None:
    problem = some("gradient_distance")[1]
    (backend,) = [b for b in problem.backends if b.name == "torch.compile of loop"]
    try:
        found = difference(problem, backend)
    except Exception as error:
        pytest.skip(f"torch.compile does not work here: {type(error).__name__}")
    assert found <= backend.limit


def test_bytes_are_those_of_every_input_and_result_once() -> None:
    n = 3 * 3 * 48 * 48
    stain, warped = some("stain_augment", "float32")
    assert (stain.forward_bytes, stain.backward_bytes) == (8 * n, 12 * n)
    assert (some("stain_augment", "uint8")[0].forward_bytes, some("macenko_fit", "uint8")[0].forward_bytes) == (
        5 * n,
        n,
    )
    resnet = some("gradient_distance")[0]
    assert "62 tensors, 11.2 M" in resnet.title
    assert (resnet.forward_bytes, resnet.backward_bytes) == (8 * 11_169_858, 12 * 11_169_858)


def test_what_computes_something_else_or_fails_is_reported_and_not_timed() -> None:
    def wrong(image, stain, warp, mean, std):
        return good.function(image, 1.01 * stain, warp, mean, std)

    def broken(*inputs):
        raise RuntimeError("no such\nthing")

    problem = some("stain_augment")[0]
    good = next(b for b in problem.backends if b.name == "reference")
    problem = dataclasses.replace(problem, backends=(good, Backend("wrong", wrong), Backend("broken", broken)))
    lines: list[str] = []
    rows = measure_problem(problem, CPU, 0.01, log=lines.append)
    assert [("failed" in row, "forward" in row) for row in rows] == [(False, True), (True, False), (True, False)]
    assert rows[1]["failed"].startswith("computes something else: differs by 0.0")
    assert rows[2]["failed"] == "RuntimeError: no such thing" and len(lines) == 2
    assert rows[0]["both"]["bytes"] == problem.forward_bytes + problem.backward_bytes
    assert rows[0]["both"]["bandwidth"] == pytest.approx(rows[0]["both"]["bytes"] / rows[0]["both"]["median"])


def test_a_wrong_gradient_is_noticed() -> None:
    problem = some("stain_augment")[0]
    good = next(b for b in problem.backends if b.name == "reference")
    detached = Backend("detached", lambda x, *rest: good.function(x.detach(), *rest) + 0 * x.sum())
    assert difference(problem, detached) > 0.5


def test_forward_and_backward_are_timed_apart() -> None:
    problem, fit = some("gradient_distance")[1], some("macenko_fit")[0]
    assert len(wall_clock(steps_of(problem, problem.backends[1]), CPU)()) == 2
    assert len(wall_clock(steps_of(fit, fit.backends[1]), CPU)()) == 1


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_device_clock_leaves_out_what_the_host_does_meanwhile() -> None:
    device = torch.device("cuda")
    x = torch.ones(2**20, device=device)

    def steps(mark) -> None:
        mark()
        x.add_(1)
        sum(range(100_000))  # about a millisecond
        mark()

    slow, fast = wall_clock(steps, device), device_clock(steps, device)
    assert min(fast()[0] for _ in range(5)) < 0.5 * min(slow()[0] for _ in range(5))


def times(median: float) -> dict[str, float]:
    return {
        "median": median,
        "p20": 0.9 * median,
        "p80": 1.2 * median,
        "calls": 9,
        "bytes": 3e6,
        "bandwidth": 3e6 / median,
    }


RECORD = {
    "format": 1,
    "command": "python -m histodd_bench profile",
    "images": "procedural",
    "copy_bandwidth": 6e9,
    "environment": {"device": "A CPU", "threads": 2, "instruction_set": "AVX2", "torch": "2.11", "commit": "abc"},
    "measurements": [
        {"operator": "o", "problem": "p", "backend": "compiled", "forward": times(1e-3), "peak_bytes": 2**20},
        {"operator": "o", "problem": "p", "backend": "compiled (deterministic)", "forward": times(1.5e-3)},
        {"operator": "o", "problem": "p", "backend": "slow", "forward": times(4e-3), "peak_bytes": None},
        {"operator": "o", "problem": "p", "backend": "peer", "forward": times(2.5e-3)},
        {"operator": "o", "problem": "p", "backend": "other", "failed": "computes something else"},
    ],
}


def test_report_names_the_best_peer_and_the_share_of_the_copy() -> None:
    ((title, header, lines, notes),) = report.tables(RECORD)
    assert title == "o: p" and all(len(line) == len(header) for line in lines)
    assert lines[0] == ["compiled", "1.00 (0.90-1.20)", "", "", "3.0", "50 %", "1.0 MiB", "1.00 x"]
    assert lines[2][4:] == ["0.8", "12 %", "", "4.00 x"] and lines[4][1] == "computes something else"
    assert notes == ["forward: 2.50 x as fast as the fastest other backend here (peer)"]
    text = report.markdown(RECORD)
    assert "| peer | 2.50 (2.25-3.00) |" in text and text.count("\n|") == 7


def test_report_of_a_gpu_has_the_devices_own_times_and_both_shares() -> None:
    row = {
        "operator": "o",
        "problem": "p",
        "backend": "compiled",
        "forward": times(1e-3) | {"device": times(5e-4), "bandwidth": 4.5e9},
        "backward": times(2e-3) | {"device": times(1e-3), "bandwidth": 3e9},
        "both": times(3e-3) | {"device": times(1.5e-3), "bandwidth": 4e9},
        "peak_bytes": 2**20,
    }
    failed = {"operator": "o", "problem": "p", "backend": "other", "failed": "no"}
    ((_, header, lines, _),) = report.tables(RECORD | {"measurements": [failed, row]}, short=True)
    assert header == report.GPU_HEADER and all(len(line) == len(header) for line in lines)
    assert lines[1] == ["compiled", "1.00", "2.00", "3.00", "0.500", "1.00", "75 %", "50 %", "1.0 MiB", "1.00 x"]


def test_command_writes_a_record_and_a_trace_and_shows_it_again(tmp_path: Path, capsys) -> None:
    out, trace = tmp_path / "record.json", tmp_path / "trace.json"
    arguments = ["profile", "gradient_distance", "--backends", "compiled,loop", "--seconds", "0.01", "--device", "cpu"]
    try:
        assert cli.main([*arguments, "--threads", "1", "--out", str(out), "--trace", str(trace)]) == 0
    finally:
        torch.set_num_threads(1)
    printed = capsys.readouterr()
    assert "ResNet18: 62 tensors" in printed.out and f"record: {out}" in printed.err
    record = json.loads(out.read_text())
    assert record["environment"]["threads"] == 1 and record["copy_bandwidth"] > 0
    assert record["command"].startswith("python -m histodd_bench profile gradient_distance --backends compiled,loop")
    assert [row["backend"] for row in record["measurements"]] == ["compiled", "loop"] * 2
    events = {event.get("name") for event in json.loads(trace.read_text())["traceEvents"]}
    assert any(str(name).startswith("gradient_distance L1, ConvNet-D3") for name in events)
    assert cli.main(["profile", "--show", str(out)]) == 0
    assert "62 tensors" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["stain_argument"], "did you mean 'stain_augment'"),
        (["--dtypes", "float23"], "did you mean 'float32'"),
        (["--backends", "compile"], "did you mean 'compiled'"),
        (["--shapes", "64"], "must be like 64x64"),
        (["--shapes", "0x64"], "whole number above 0"),
        (["--seconds", "-1"], "must be a number above 0"),
        (["--images", "no/such/folder"], "no/such/folder is not a folder"),
        (["--show", "no.json"], "cannot read no.json"),
        (["--show", "no.json", "--device", "cpu"], "--device does not go with it"),
        (["step", "--show", "no.json"], "what to measure does not go with it"),
        (["--device", "cuda:99"], "--device cuda:99: not usable here"),
    ],
)
def test_bad_requests_are_one_clear_line(arguments: list[str], message: str, capsys) -> None:
    assert cli.main(["profile", *arguments]) == 2
    printed = capsys.readouterr().err
    assert message in printed and printed.count("\n") == 1


@pytest.mark.parametrize("option", ["--out", "--trace"])
def test_a_place_that_cannot_be_written_is_refused_before_anything_is_measured(
    tmp_path: Path, capsys, option: str
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    for place in (tmp_path / "file" / "x.json", tmp_path / "folder"):
        assert cli.main(["profile", "gradient_distance", "--seconds", "0.01", option, str(place)]) == 1
        line = capsys.readouterr().err
        assert line.startswith(f"error: cannot write {place}: ") and line.count("\n") == 1
        assert f"choose another folder with {option}" in line


def test_a_file_that_is_no_record_is_refused(tmp_path: Path, capsys) -> None:
    for text in ("{", "[]", '{"format": 99}'):
        (tmp_path / "x.json").write_text(text)
        assert cli.main(["profile", "--show", str(tmp_path / "x.json")]) == 2
        assert "is not a record of 'profile'" in capsys.readouterr().err
