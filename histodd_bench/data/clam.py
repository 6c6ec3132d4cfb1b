"""Patch coordinates in the HDF5 files of CLAM: one ``<slide>.h5`` with a dataset ``coords``, top-left corners at level 0.

Its attributes say at which level a patch is read (``patch_level``) and how many pixels of that level it has
(``patch_size``). CLAM does not resample: where our scale lies between two levels, ``patch_size`` is the size before resampling.
"""

from pathlib import Path
from typing import Any

import numpy as np

from histodd_bench.data.wsi import Slide, SlideError
from histodd_bench.errors import HistoddError
from histodd_bench.files import PARTIAL, writing

_ENDINGS = (".svs", ".tif", ".tiff", ".ndpi", ".mrxs", ".scn", ".svslide", ".bif", ".vms", ".vmu", ".dcm", ".czi", ".zvi")
_TOLERANCE = 0.02  # of a patch's side
_MOST = 20_000_000


def hdf5() -> Any:
    """The module h5py, or one line that says how to get it."""
    try:
        import h5py
    except ImportError:
        raise HistoddError("HDF5 files need h5py: pip install 'histodd-bench[data]'") from None
    return h5py


def file_name(slide: str) -> str:
    """Name of the file for a slide: the slide's, with its ending (where it has one: TCGA's names only look so) made h5."""
    path = Path(slide)
    return f"{path.stem if path.suffix.lower() in _ENDINGS else path.name}.h5"


def read_coordinates(path: Path, slide: Slide, side: float) -> np.ndarray:
    """Corners of the patches of a slide, ``[N,2]`` int64 (x, y) in level-0 pixels.

    Args:
        side: expected side of a patch in level-0 pixels.

    Raises:
        SlideError: no such file, damaged, patches of another physical size, or corners outside the slide.
    """
    h5py = hdf5()
    if not path.is_file():
        raise SlideError(path, "no coordinates for this slide")
    try:
        with h5py.File(path, "r") as file:
            coords = file["coords"]
            if coords.ndim != 2 or coords.shape[1] != 2 or coords.shape[0] > _MOST or coords.dtype.kind not in "iu":
                raise ValueError(f"coords is {coords.dtype} {coords.shape}")
            attributes = dict(coords.attrs)
            corners = coords[:].astype(np.int64)
        level, size = int(attributes["patch_level"]), int(attributes["patch_size"])
        width = size * slide.levels[level][2]
    except (OSError, KeyError, ValueError, TypeError, IndexError, AttributeError) as error:
        raise SlideError(path, f"no CLAM coordinates of this slide ({error})") from None
    if abs(width / side - 1) > _TOLERANCE:
        raise SlideError(
            path,
            f"its patches are {width:.0f} level-0 pixels wide ({width * slide.mpp:.0f} microns), {side:.0f} "
            f"({side * slide.mpp:.0f} microns) are asked for: set --size and --magnification accordingly",
        )
    if len(corners) and ((corners < 0).any() or (corners >= (slide.width, slide.height)).any()):
        raise SlideError(path, "has coordinates outside the slide: it belongs to another one")
    return corners


def write_coordinates(
    path: Path, corners: np.ndarray, *, name: str, level: int, size: int, levels: list[tuple[int, int, float]]
) -> None:
    """Write one slide's corners so that CLAM reads them.

    Args:
        path: of the file; appears only when complete.
        corners: ``[N,2]`` (x, y) in level-0 pixels.
        name: of the slide.
        level: that patches are read from; size: of a patch in pixels of that level.
        levels: (width, height, downsample) of every level of the slide.
    """
    h5py = hdf5()
    width, height, downsample = levels[level]
    partial = path.with_name(path.name + PARTIAL)
    with writing(path):
        with h5py.File(partial, "w") as file:
            coords = file.create_dataset(
                "coords", data=corners.astype(np.int64), maxshape=(None, 2), chunks=(max(min(len(corners), 1024), 1), 2)
            )
            coords.attrs["patch_size"] = size
            coords.attrs["patch_level"] = level
            coords.attrs["downsample"] = (float(downsample), float(downsample))
            coords.attrs["downsampled_level_dim"] = (int(width), int(height))
            coords.attrs["level_dim"] = (int(width), int(height))
            coords.attrs["name"] = name
            coords.attrs["save_path"] = "."
        partial.replace(path)
