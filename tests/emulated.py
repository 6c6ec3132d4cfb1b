"""The CUDA kernels, compiled for the CPU against ``emulation/cuda_runtime.h``: their logic without a GPU.

The extension built here has the sources of ``csrc/cuda`` behind the operators on CPU tensors. Importing the result takes
the place of ``histodd_bench._C``: one process has the one or the other.
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent
# What C++ leaves undefined ends the process: a division by zero, an overflow, a read of four pixels from an address that
# is not a multiple of their size.
UNDEFINED = ("-fsanitize=undefined", "-fno-sanitize=vptr", "-fno-sanitize-recover=undefined")


def fit(text: str) -> str:
    """CUDA's own syntax, and the device the operators are for, as a C++ compiler and CPU tensors need them."""
    text = re.sub(r"(\w+(?:<[^;{}]*?>)?)\s*<<<(.*?)>>>\(",
                  r"emulation::Launch(\2).run([&](auto&&... a) { \1(a...); }, ", text, flags=re.S)  # fmt: skip
    text = re.sub(r"extern __shared__ __align__\(16\) unsigned char (\w+)\[\]",
                  r"unsigned char* const \1 = emulation::dynamic_shared()", text)  # fmt: skip
    text = re.sub(r"const __grid_constant__ ([\w<>, ]+?) (\w+)([,)])", r"const \1& \2\3", text)
    text = text.replace("__noinline__", "").replace("(histodd, CUDA, m)", "(histodd, CPU, m)")
    return text.replace('kind == "l1" && real[0].is_cpu()', "false")


def undefined_flags() -> list[str]:
    """None where the compiler's package lacks the sanitizer's library."""
    with tempfile.TemporaryDirectory() as folder:
        program = ["c++", *UNDEFINED, "-shared", "-fPIC", "-x", "c++", os.devnull, "-o", f"{folder}/empty.so"]
        return list(UNDEFINED) if subprocess.run(program, capture_output=True, check=False).returncode == 0 else []


def extension(build: Path) -> ModuleType:
    """Compiles what changed and loads it; ``build`` keeps the objects."""
    from torch.utils.cpp_extension import load

    sources = []
    for path in sorted((ROOT / "csrc").rglob("*.*")):
        if path.parent.name == "cpu":
            continue
        to = build / path.relative_to(ROOT)
        to = to.with_suffix(".cu.cpp") if path.suffix == ".cu" else to
        text = fit(path.read_text())
        if not to.is_file() or to.read_text() != text:
            to.parent.mkdir(parents=True, exist_ok=True)
            to.write_text(text)
        if to.suffix == ".cpp":
            sources.append(str(to))
    undefined = undefined_flags()
    objects = build / "objects"
    objects.mkdir(parents=True, exist_ok=True)
    module = load(
        name="_C",
        sources=sources,
        extra_include_paths=[str(ROOT / "tests" / "emulation")],
        extra_cflags=[
            "-O1",
            "-g0",
            "-std=c++20",
            "-Wno-unknown-pragmas",
            "-Wno-ignored-attributes",
            "-U_FORTIFY_SOURCE",
            *undefined,
        ],
        extra_ldflags=undefined,
        build_directory=str(objects),
        with_cuda=False,
    )
    sys.modules["histodd_bench._C"] = module
    return module
