"""docs/performance.md holds what the records under benchmarks/results/ give, and says so where a device is missing."""

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def performance_page():
    path = ROOT / "benchmarks" / "performance_page.py"
    if not path.is_file():
        pytest.skip("benchmarks/ is not part of this copy")
    spec = importlib.util.spec_from_file_location("performance_page", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_page_is_what_the_records_give(performance_page) -> None:
    assert performance_page.PAGE.read_text() == performance_page.page(), "run python benchmarks/performance_page.py"


def test_page_without_a_gpu_says_so(performance_page, tmp_path: Path) -> None:
    environment = {
        "device": "A CPU",
        "threads": 2,
        "instruction_set": "AVX2",
        "torch": "2.11",
        "python": "3.12",
        "commit": None,
    }
    times = {"median": 1e-3, "p20": 1e-3, "p80": 1e-3, "calls": 5, "bytes": 1e6, "bandwidth": 1e9}
    record = {
        "format": 1,
        "command": "python -m histodd_bench profile",
        "device_type": "cpu",
        "images": "procedural",
        "copy_bandwidth": 2e9,
        "environment": environment,
        "measurements": [{"operator": "o", "problem": "p", "backend": "compiled", "forward": times}],
    }
    (tmp_path / "a-cpu").mkdir()
    (tmp_path / "a-cpu" / "x.json").write_text(json.dumps(record))
    (tmp_path / "a-cpu" / "other.json").write_text(json.dumps({"something": "else"}))
    text = performance_page.page(tmp_path)
    assert "There are no GPU figures" in text and "## A CPU" in text and "| compiled | 1.00 (1.00-1.00) |" in text
    (tmp_path / "a-cpu" / "x.json").write_text(json.dumps(record | {"device_type": "cuda"}))
    assert "There are no GPU figures" not in performance_page.page(tmp_path)
