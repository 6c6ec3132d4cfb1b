"""Builds the C++/CUDA operators against the torch that is installed. Everything else is declared in pyproject.toml.

    pip install --no-build-isolation -e .

HISTODD_EXTENSION     0 skips the extension, 1 makes its failure an error (default: try, and go on without it)
HISTODD_CUDA          0 builds for the CPU only, 1 makes a missing toolkit an error (default: CUDA where possible)
CUDA_HOME             the toolkit to use (default: one that has headers and the major version of torch's CUDA)
TORCH_CUDA_ARCH_LIST  architectures to compile for (default 7.5 8.0 8.6 8.9 9.0+PTX)
HISTODD_NVCC_FLAGS    more flags for nvcc, e.g. "-Xptxas -v"
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
REASON = "histodd_bench/_C_reason.txt"  # why there is no extension, for `python -m histodd_bench doctor`
DEFAULT_ARCHS = "7.5 8.0 8.6 8.9 9.0+PTX"
EXTENSION = os.environ.get("HISTODD_EXTENSION", "")
CUDA = os.environ.get("HISTODD_CUDA", "")
BUILDS = {"build", "build_ext", "bdist_wheel", "editable_wheel", "develop", "install"} & set(sys.argv)


def say(text: str) -> None:
    if BUILDS:
        print(f"histodd-bench: {text}", file=sys.stderr, flush=True)


def record(reason: str) -> None:
    """Remember why there is no extension; an empty reason forgets it."""
    if not BUILDS:
        return
    if reason:
        say(f"{reason}. Installing without the compiled operators; the slower torch references are used.")
        (ROOT / REASON).write_text(reason + "\n")
    else:
        (ROOT / REASON).unlink(missing_ok=True)


def toolkit_problem(home: Path, wanted: str) -> str:
    """Why ``home`` cannot compile for torch's CUDA version, or an empty string."""
    nvcc = home / "bin" / "nvcc"
    headers = [home / "include", *home.glob("targets/*/include")]
    if not nvcc.is_file() or not any((d / "cuda_runtime.h").is_file() for d in headers):
        return "it has no bin/nvcc or no include/cuda_runtime.h"
    try:
        text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        return f"its nvcc does not run ({error})"
    found = re.search(r"release (\d+)\.\d+", text)
    if not found or found[1] != wanted.split(".")[0]:
        return f"it is CUDA {found[1] if found else 'unknown'}, torch was built for {wanted}"
    return ""


def find_toolkit(wanted: str) -> tuple[Path | None, str]:
    """The CUDA toolkit to build with, or None and the reason. An nvcc on PATH may be a script far from its toolkit."""
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(name):
            problem = toolkit_problem(Path(os.environ[name]), wanted)
            if problem:
                return None, f"{name}={os.environ[name]} cannot be used: {problem}"
            return Path(os.environ[name]), ""
    places = [Path(os.path.realpath(p)).parent.parent for p in [shutil.which("nvcc")] if p]
    places += [Path("/usr/local/cuda"), Path(f"/usr/local/cuda-{wanted}")]
    places += sorted(Path("/usr/local").glob("cuda-*"), reverse=True) + [Path("/opt/cuda"), Path("/usr/lib/cuda")]
    places += [Path(p) for p in [os.environ.get("CONDA_PREFIX", "")] if p]
    for home in places:
        if not toolkit_problem(home, wanted):
            return home, ""
    return None, f"no CUDA {wanted.split('.')[0]} toolkit found (set CUDA_HOME to one)"


def obstacle() -> str:
    """What stands in the way of any extension, or an empty string."""
    if EXTENSION == "0":
        return "HISTODD_EXTENSION=0 was set when installing"
    try:
        import torch  # noqa: F401
    except Exception as error:
        return f"torch is not visible to the build ({error}): install torch, then pip install --no-build-isolation"
    if not any(shutil.which(c.split()[0]) for c in [os.environ.get("CXX", ""), "c++", "g++", "clang++"] if c):
        return "no C++ compiler found: install g++ (Debian, Ubuntu: apt install g++; Fedora: dnf install gcc-c++)"
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        return f"Python.h not found: install Python's headers (Debian, Ubuntu: apt install python{version}-dev)"
    return ""


def extension_arguments() -> dict:
    reason = obstacle()
    if reason:
        if EXTENSION == "1" and BUILDS:
            raise SystemExit(f"histodd-bench: {reason}")
        record(reason)
        return {}

    import torch

    toolkit, no_cuda = None, "HISTODD_CUDA=0"
    if CUDA != "0":
        if torch.version.cuda:
            toolkit, no_cuda = find_toolkit(torch.version.cuda)
        else:
            no_cuda = "this torch has no CUDA"
        if CUDA == "1" and toolkit is None and BUILDS:
            raise SystemExit(f"histodd-bench: HISTODD_CUDA=1, but {no_cuda}")
    if toolkit:  # cpp_extension reads both when it is imported
        os.environ["CUDA_HOME"] = str(toolkit)
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", DEFAULT_ARCHS)
    archs = os.environ.get("TORCH_CUDA_ARCH_LIST", "") if toolkit else ""
    say(f"operators for CPU and CUDA ({archs}) with {toolkit}" if toolkit else f"operators for the CPU only: {no_cuda}")

    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    class Build(BuildExtension):
        def build_extensions(self) -> None:
            try:
                super().build_extensions()
            except Exception as error:
                if EXTENSION == "1" or (CUDA == "1" and toolkit):
                    raise
                hint = "; HISTODD_CUDA=0 builds for the CPU only" if toolkit else ""
                reason = f"compiling failed ({' '.join(str(error).split())[:200]}){hint}"
                record(reason)
                for extension in self.extensions:
                    extension.optional = True
                self.extensions = []
                built = Path(self.build_lib, REASON)
                if built.parent.is_dir():
                    built.write_text(reason + "\n")
            else:
                record("")

    here = os.path.relpath(ROOT)
    sources = [
        *sorted(map(str, Path(here, "csrc").glob("*.cpp"))),
        *sorted(map(str, Path(here, "csrc/cpu").glob("*.cpp"))),
    ]
    sources = [os.path.normpath(s) for s in sources]
    version = re.search(r'__version__ = "(.+)"', (ROOT / "histodd_bench/__init__.py").read_text())[1]
    macros = [("HISTODD_VERSION", f'"{version}"')]
    flags = {"cxx": ["-O3", "-g0", "-fno-math-errno", "-fno-trapping-math"]}
    if sys.platform.startswith("linux"):
        # Compile for OpenMP but do not link it: torch brings its own runtime, and a second one would not share its
        # thread settings.
        flags["cxx"].append("-fopenmp")
    if toolkit:
        sources += sorted(map(os.path.normpath, map(str, Path(here, "csrc/cuda").glob("*.cu"))))
        macros += [
            ("HISTODD_WITH_CUDA", "1"),
            ("HISTODD_CUDA_ARCHS", f'"{archs}"'),
            ("HISTODD_CUDA_TOOLKIT", f'"{torch.version.cuda}"'),
        ]
        flags["nvcc"] = ["-O3", *os.environ.get("HISTODD_NVCC_FLAGS", "").split()]
    link = []
    if sys.platform.startswith("linux"):
        # Where the compiler has its C++ library as an archive only, that copy must stay our own: half of its symbols
        # would be taken from the copy that torch has loaded, and printing a number would crash.
        link.append("-Wl,--exclude-libs,ALL")
    make = CUDAExtension if toolkit else CppExtension
    depends = [os.path.normpath(str(p)) for p in Path(here, "csrc").rglob("*.*h")]
    extension = make(
        "histodd_bench._C",
        sources,
        define_macros=macros,
        extra_compile_args=flags,
        extra_link_args=link,
        depends=depends,
    )
    extension.optional = True
    return {"ext_modules": [extension], "cmdclass": {"build_ext": Build}}


def package_names() -> list[str]:
    found = find_packages(str(ROOT), include=["histodd_bench*"])
    return [*(p for p in found if not p.startswith("histodd_bench.baselines")), "histodd_bench.baselines"]


if __name__ == "__main__":
    setup(
        packages=package_names(),
        package_dir={"histodd_bench.baselines": "baselines"},
        package_data={"histodd_bench": ["_C_reason.txt"]},
        **extension_arguments(),
    )
