"""Patches that come as arrays in files: streamed into stores, never whole in memory."""

import zipfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from histodd_bench.data.images import at_once, resize
from histodd_bench.data.store import StoreWriter
from histodd_bench.errors import HistoddError

_CHUNK = 512  # patches in memory at once


def write_arrays(
    writer: StoreWriter,
    batches: Iterator[np.ndarray],
    labels: np.ndarray,
    groups: Sequence[str],
    columns: dict[str, Any],
    task: Any,
) -> Counter[int]:
    """Write ``[B,H,W,3]`` uint8 batches, resized to the store's size, with their labels, groups and columns.

    Returns:
        How many patches had how many pixels a side.

    Raises:
        HistoddError: another number of images than of labels.
    """
    start, size = 0, writer.image_size
    sides: Counter[int] = Counter()
    for batch in (part for whole in batches for part in _pieces(whole, at_once(size[0]))):
        part = slice(start, start + len(batch))
        images = np.stack([resize(image, *size) for image in batch]).transpose(0, 3, 1, 2)
        writer.append(
            images, labels[part].tolist(), groups[part], **{name: values[part] for name, values in columns.items()}
        )
        start += len(batch)
        sides[min(batch.shape[1:3])] += len(batch)
        task.advance(len(batch))
    if start != len(labels):
        raise HistoddError(f"{start} images for {len(labels)} labels: the file is incomplete, fetch it again")
    return sides


def _pieces(batch: np.ndarray, most: int) -> Iterator[np.ndarray]:
    return (batch[start : start + most] for start in range(0, len(batch), most))


def zip_array(archive: zipfile.ZipFile, member: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and type of an array in an ``.npz`` file, without reading it."""
    with archive.open(f"{member}.npy") as stream:
        return _header(stream)


def read_zip_array(archive: zipfile.ZipFile, member: str) -> Iterator[np.ndarray]:
    """Batches along the first axis of an array in an ``.npz`` file. Nothing is unpickled.

    Raises:
        ValueError: an array of objects or in Fortran order, or one that ends early.
    """
    with archive.open(f"{member}.npy") as stream:
        shape, dtype = _header(stream)
        each = int(np.prod(shape[1:], dtype=np.int64)) * dtype.itemsize
        for start in range(0, shape[0], _CHUNK):
            n = min(_CHUNK, shape[0] - start)
            content = stream.read(n * each)
            if len(content) != n * each:
                raise ValueError(f"{member} ends early")
            yield np.frombuffer(content, dtype).reshape(n, *shape[1:])


def _header(stream: Any) -> tuple[tuple[int, ...], np.dtype[Any]]:
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(stream)
    if fortran or dtype.hasobject:
        raise ValueError("an array in Fortran order, or of objects")
    return shape, dtype


def require_file(root: Path, *names: str) -> Path:
    """The first of the named files that is under ``root``.

    Raises:
        HistoddError: none is.
    """
    for name in names:
        if (root / name).is_file():
            return root / name
    raise HistoddError(f"no {names[0]} in {root}")
