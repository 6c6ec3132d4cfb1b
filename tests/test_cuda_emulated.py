"""The operators' tests with the CUDA kernels in the place of the CPU's, run by ``emulation/cuda_runtime.h``.

What a device adds to these, its own arithmetic, races within a warp and speed, ``benchmarks/gpu_check.sh`` looks at.
HISTODD_EMULATED names a folder that keeps what was compiled; with it set, any test of the operators runs like that:
``HISTODD_EMULATED=build/emulated python -m pytest tests/test_ops_cuda.py``.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
NOT_CUDA = "not instruction_set and not signs_stand"  # of the CPU's kernels
LOAD = "import sys; from pathlib import Path; import emulated; emulated.extension(Path(sys.argv[1]))"

pytestmark = [
    pytest.mark.skipif(bool(os.environ.get("HISTODD_EMULATED")), reason="HISTODD_EMULATED is set"),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="fibers are those of Linux"),
    pytest.mark.skipif(not (shutil.which("c++") and shutil.which("ninja")), reason="needs a C++ compiler and ninja"),
]


@pytest.fixture(scope="module")
def built(compiled, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("emulated")
    subprocess.run([sys.executable, "-c", LOAD, folder], cwd=TESTS, check=True, timeout=600)
    return folder


@pytest.mark.parametrize(
    ("capability", "file"),
    [
        *(("9.0", path.name) for path in sorted(TESTS.glob("test_ops_*.py"))),
        ("7.5", "test_ops_macenko_fit_compiled.py"),  # its shared memory holds less
    ],
)
def test_the_kernels_pass_the_tests_of_the_operators(built, capability, file):
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(TESTS / file), "-k", NOT_CUDA]
    environment = os.environ | {"HISTODD_EMULATED": str(built), "HISTODD_EMULATED_DEVICE": capability}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)
    assert result.returncode == 0 and " passed" in result.stdout, result.stdout[-5000:] + result.stderr[-2000:]
