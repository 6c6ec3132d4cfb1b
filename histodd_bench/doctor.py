"""What works on this machine, and why the rest does not."""

import importlib
import platform
import shutil
from importlib import metadata
from pathlib import Path

from histodd_bench import __version__
from histodd_bench.wording import counted

_PACKAGES = ("torch", "torchvision", "numpy", "pandas", "pillow", "rich", "safetensors", "openslide-python", "tifffile")


def report(cache: Path) -> str:
    """Versions, devices, compiled operators, OpenSlide, folders: one line each."""
    rows = [("histodd-bench", f"{__version__} in {Path(__file__).resolve().parent}")]
    rows.append(("python", f"{platform.python_version()} on {platform.platform()}"))
    rows += [(name, _version(name)) for name in _PACKAGES]
    rows += _devices()
    rows += [
        ("compiled operators", _operators()),
        ("OpenSlide", _openslide()),
        ("torchvision operators", _torchvision()),
    ]
    rows += [
        ("data and networks", _folder(cache, "HISTODD_CACHE names another")),
        ("results", _folder(Path("runs"), "--out names another")),
    ]
    rows += [("plug-ins", _plugins())]
    width = max(len(name) for name, _ in rows)
    return "".join(f"{name:<{width}}  {text}\n" for name, text in rows)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return f"not installed: pip install {package}"


def _devices() -> list[tuple[str, str]]:
    import torch

    from histodd_bench.environment import device_name

    rows = [("cpu", f"{device_name(torch.device('cpu'))}, torch would use {counted(torch.get_num_threads(), 'thread')}")]
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            p = torch.cuda.get_device_properties(i)
            rows.append((f"cuda:{i}", f"{p.name}, {p.total_memory / 2**30:.1f} GiB, sm_{p.major}{p.minor}"))
    elif torch.version.cuda:
        rows.append(("cuda", f"torch is built for CUDA {torch.version.cuda}, but there is no usable GPU or driver"))
    else:
        rows.append(("cuda", "this torch is built without CUDA"))
    return rows


def _operators() -> str:
    from histodd_bench.ops import _extension

    reason = _extension.missing_reason()
    if reason:
        return f"not used: {reason}; the slower torch references are used (pip install --no-build-isolation -e . builds them)"
    info = _extension.build_info()
    where = f"CPU and CUDA {info.get('cuda_toolkit')} ({info.get('cuda_archs')})" if info.get("cuda") else "CPU only"
    return f"{where}; built against torch {info.get('torch')} with {info.get('compiler')}"


def _openslide() -> str:
    try:
        openslide = importlib.import_module("openslide")
        return f"library {openslide.__library_version__}"
    except Exception as error:  # a missing shared library raises what its loader likes
        return f"not usable ({error}): pip install openslide-python openslide-bin"


def _torchvision() -> str:
    try:
        importlib.import_module("torchvision")
        return "usable"
    except Exception as error:
        return f"not usable ({str(error).splitlines()[0]}): install the torchvision that belongs to this torch"


def _folder(path: Path, hint: str) -> str:
    parent = path.absolute()
    while not parent.exists():
        parent = parent.parent
    import os

    state = "" if os.access(parent, os.W_OK) else ", NOT WRITABLE"
    return f"{path.absolute()}{state}, {shutil.disk_usage(parent).free / 2**30:.1f} GiB free ({hint})"


def _plugins() -> str:
    from histodd_bench.methods import GROUP, METHODS, all_methods

    names = [n for n in all_methods() if n not in METHODS]
    return ", ".join(names) if names else f"none (entry-point group {GROUP})"
