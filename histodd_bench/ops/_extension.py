"""Finds the compiled operators (``histodd_bench/_C*.so``) and says why when there are none."""

import importlib
import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

REASON_FILE = Path(__file__).resolve().parents[1] / "_C_reason.txt"  # written by setup.py when it could not build

FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

_warned: set[str] = set()


def _load() -> tuple[dict[str, object] | None, str]:
    """Load the extension: its build information, or None and the reason."""
    if os.environ.get("HISTODD_EXTENSION") == "0":
        return None, "HISTODD_EXTENSION=0 is set"
    try:
        module = importlib.import_module("histodd_bench._C")
    except ModuleNotFoundError as error:
        if error.name != "histodd_bench._C":
            return None, f"it could not be loaded ({error})"
        reason = REASON_FILE.read_text().strip() if REASON_FILE.is_file() else "it was not built"
        return None, reason
    except ImportError as error:  # an undefined symbol: built against another torch
        detail = " ".join(str(error).split())[:160]
        return None, f"it was built against another torch and must be rebuilt ({detail})"
    return module.build_info(), ""


_INFO, _REASON = _load()


def build_info() -> dict[str, object]:
    """Facts about the loaded extension, empty when there is none.

    Keys: ``version``, ``torch`` (version it was built against), ``cuda`` (bool), ``cuda_toolkit``, ``cuda_archs``,
    ``compiler``, ``openmp`` (bool).
    """
    return dict(_INFO or {})


def missing_reason() -> str:
    """Why the compiled operators are not used, or an empty string when they are."""
    return _REASON


def require_one_device(**tensors: torch.Tensor | None) -> None:
    """For fake kernels, which a call lands in when any of its tensors is on the meta device: all must lie where the first does.

    Raises:
        ValueError: naming the tensor that does not.
    """
    (first, where), *others = ((name, t.device) for name, t in tensors.items() if t is not None)
    for name, device in others:
        if device != where:
            raise ValueError(f"{name} lies on {device}, {first} on {where}")


def require_shape(name: str, tensor: torch.Tensor, shape: Sequence[int]) -> None:
    """The check of a shape for references and fake kernels. Symbolic sizes are the kernel's to check, when it runs.

    Raises:
        ValueError: naming the tensor.
    """
    if tensor.ndim != len(shape) or any(isinstance(b, int) and a != b for a, b in zip(tensor.shape, shape, strict=True)):
        raise ValueError(f"{name} must be {list(shape)}, got {list(tensor.shape)}")


def require_image(image: torch.Tensor) -> None:
    """The check of ``image`` for references and fake kernels.

    Raises:
        ValueError: not ``[N,3,H,W]`` of a dtype that images have.
    """
    if image.ndim != 4 or image.shape[1] != 3:
        raise ValueError(f"image must be [N,3,H,W], got {list(image.shape)}")
    if image.dtype not in (torch.uint8, *FLOATING):
        raise ValueError(f"image must be uint8, float64, float32, float16 or bfloat16, got {image.dtype}")


def require_tensor(name: str, value: object) -> None:
    """Raise TypeError for what is not a tensor."""
    if not isinstance(value, torch.Tensor):
        kind = type(value).__name__
        remedy = ": for images [N,H,W,3] torch.from_numpy(images).permute(0, 3, 1, 2)" if kind == "ndarray" else ""
        raise TypeError(f"{name} must be a torch tensor, got {kind}{remedy}")


def without_autocast(device: torch.device) -> torch.autocast:
    """A context in which matrix products keep the dtype of what they are given: autocast would take them to half."""
    return torch.autocast("cpu" if device.type == "meta" else device.type, enabled=False)


@torch.compiler.assume_constant_result  # torch.compile runs it, with the warning, and keeps the answer
def use_compiled(device: torch.device) -> bool:
    """Whether tensors on ``device`` have compiled operators; where they have not, warn once that references are used."""
    kind = device.type
    if kind in ("cpu", "meta"):
        reason = _REASON
    elif kind == "cuda":
        reason = _REASON or ("" if _INFO and _INFO["cuda"] else "it was built for the CPU only")
    else:
        reason = _REASON or f"it has no operators for {kind}"
    if reason and reason not in _warned:
        _warned.add(reason)
        warnings.warn(
            f"histodd_bench uses its slower torch references on {kind}, not its compiled extension: {reason}. "
            "To build it: pip install --no-build-isolation -e . (python -m histodd_bench doctor tells more)",
            RuntimeWarning,
            stacklevel=3,
        )
    return not reason
