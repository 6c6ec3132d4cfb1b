"""The operators read nothing outside their tensors: see guarded.py."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="pages are protected as on Linux")
@pytest.mark.parametrize("capability", ["", "avx2", "default"])
def test_nothing_outside_the_tensors_is_read(compiled, capability):
    if capability and os.environ.get("HISTODD_EMULATED"):
        pytest.skip("CUDA kernels have no instruction sets")
    environment = os.environ | ({"ATEN_CPU_CAPABILITY": capability} if capability else {})
    command = [sys.executable, str(Path(__file__).with_name("guarded.py"))]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0 and result.stdout.endswith("done\n"), result.stdout + result.stderr[-5000:]
