"""What setup.py decides, and what an installation holds."""

import importlib.metadata
import importlib.util
import sys
from pathlib import Path

import pytest
import torch

import histodd_bench
from histodd_bench.ops._extension import build_info, missing_reason

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def setup_script():
    """setup.py as a module; it sets nothing up unless it is run."""
    spec = importlib.util.spec_from_file_location("histodd_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def toolkit(folder: Path, version: str | None, headers: bool = True) -> Path:
    (folder / "bin").mkdir(parents=True)
    if headers:
        (folder / "include").mkdir()
        (folder / "include/cuda_runtime.h").touch()
    if version:
        (folder / "bin/nvcc").write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {version}, V{version}.1'\n")
        (folder / "bin/nvcc").chmod(0o755)
    return folder


@pytest.fixture
def no_cuda_variables(monkeypatch):
    for name in ("CUDA_HOME", "CUDA_PATH", "CONDA_PREFIX"):
        monkeypatch.delenv(name, raising=False)


def test_cuda_home_is_honoured(setup_script, tmp_path, monkeypatch, no_cuda_variables):
    monkeypatch.setenv("CUDA_HOME", str(toolkit(tmp_path / "mine", "13.2")))
    assert setup_script.find_toolkit("13.0") == (tmp_path / "mine", "")


@pytest.mark.parametrize(
    ("version", "headers", "reason"),
    [
        ("12.6", True, "it is CUDA 12, torch was built for 13.0"),
        ("13.0", False, "no include/cuda_runtime.h"),
        (None, True, "no bin/nvcc"),
    ],
)
def test_unusable_cuda_home_is_named_and_not_replaced(
    setup_script, tmp_path, monkeypatch, no_cuda_variables, version, headers, reason
):
    monkeypatch.setenv("CUDA_HOME", str(toolkit(tmp_path / "mine", version, headers)))
    home, why = setup_script.find_toolkit("13.0")
    assert home is None and "CUDA_HOME=" in why and reason.split("no ")[-1] in why


def test_nvcc_script_far_from_its_toolkit_is_not_taken_for_one(setup_script, tmp_path, monkeypatch, no_cuda_variables):
    """A wrapper on PATH has no headers beside it; a link leads to the toolkit it points into."""
    wrapper = toolkit(tmp_path / "wrapper", "99.0", headers=False)
    monkeypatch.setenv("PATH", f"{wrapper / 'bin'}:/bin:/usr/bin")
    assert setup_script.find_toolkit("99.0")[0] is None
    real = toolkit(tmp_path / "real", "99.1")
    (wrapper / "bin/nvcc").unlink()
    (wrapper / "bin/nvcc").symlink_to(real / "bin/nvcc")
    assert setup_script.find_toolkit("99.0") == (real, "")


def test_missing_compiler_says_what_to_install(setup_script, monkeypatch, tmp_path):
    monkeypatch.setattr(setup_script, "EXTENSION", "")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert "install g++" in setup_script.obstacle()
    monkeypatch.setattr(setup_script, "EXTENSION", "0")
    assert "HISTODD_EXTENSION=0" in setup_script.obstacle()


def test_every_package_is_installed(setup_script):
    folders = {p.parent for p in (ROOT / "histodd_bench").rglob("__init__.py") if not p.parent.is_symlink()}
    names = {".".join(f.relative_to(ROOT).parts) for f in folders} | {"histodd_bench.baselines"}
    assert set(setup_script.package_names()) == names and len(setup_script.package_names()) == len(names)


def test_baselines_are_part_of_the_package():
    from histodd_bench.baselines.random import Random

    assert Random.__module__ == "histodd_bench.baselines.random"
    import random

    assert hasattr(random, "Random") and not hasattr(random, "histodd_bench")


def test_versions_agree():
    if build_info():
        assert build_info()["version"] == histodd_bench.__version__
    try:
        installed = importlib.metadata.version("histodd-bench")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("histodd-bench runs from its source tree, not installed")
    assert installed == histodd_bench.__version__


def test_extension_is_there_or_says_why(compiled):
    assert missing_reason() == ""
    assert str(compiled["torch"]).split("+")[0] == torch.__version__.split("+")[0]
    if sys.platform.startswith("linux"):
        assert compiled["openmp"]
    if compiled["cuda"]:
        assert torch.version.cuda.split(".")[0] == str(compiled["cuda_toolkit"]).split(".")[0]
        assert compiled["cuda_archs"]


def test_openmp_is_compiled_for_but_not_linked(compiled):
    """A second runtime would not share torch's thread settings: the symbols must come from the one torch brings."""
    from histodd_bench import _C

    assert b"libgomp" not in Path(_C.__file__).read_bytes()
