"""Image files to patches: every common pixel format becomes RGB uint8; what cannot be read is named, never fatal."""

import hashlib
import os
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from histodd_bench.data.split import draw_groups
from histodd_bench.data.store import StoreWriter
from histodd_bench.errors import HistoddError
from histodd_bench.wording import counted

_AT_ONCE, _AT_ONCE_BYTES = 512, 1 << 27  # patches held before they are written together: no more than either
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # how TIFF files begin

Fit = Literal["crop", "pad"]


class UnreadableImage(HistoddError):
    """A file that is no readable image. ``reason`` is short enough to be counted and listed."""

    def __init__(self, path: Path, reason: str):
        super().__init__(f"{printable(path)}: {reason}")
        self.path, self.reason = path, reason


def printable(path: Path | str) -> str:
    """A path that can be printed whatever bytes its name has."""
    return os.fsencode(path).decode("utf-8", "replace")


def at_once(image_size: int) -> int:
    """How many patches to hold before they are written: a number of bytes, not of patches."""
    return min(_AT_ONCE, max(1, _AT_ONCE_BYTES // (3 * image_size**2)))


_LARGE = 1 << 24  # px; larger images are shrunk as a whole, not as floating-point numbers
_pixel_limit = threading.Lock()


@contextmanager
def pixels_allowed(count: int | None) -> Iterator[None]:
    """Let Pillow open images of up to ``count`` pixels within the block; None keeps its own limit (179 million)."""
    if count is None:
        yield
        return
    with _pixel_limit:
        before = Image.MAX_IMAGE_PIXELS
        Image.MAX_IMAGE_PIXELS = count // 2  # Pillow warns from this on and refuses from twice this on
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = before


def read_rgb(path: Path, *, max_pixels: int | None = None, at_least: int | None = None) -> np.ndarray:
    """Read the first frame of an image file.

    Grayscale, palette, CMYK and 1-bit images become RGB; 16-bit grayscale is scaled by its full range (65535 -> 255);
    transparency is composited on white, the colour of empty glass. Orientation tags are ignored.

    Args:
        max_pixels: raises Pillow's limit on the size of an image, while it is read.
        at_least: a pixel count per side that is enough: an image of more than 16 million pixels is box-averaged by a whole
            factor down to no less than that, which takes a fraction of the memory.

    Returns:
        ``[H,W,3]`` uint8.

    Raises:
        UnreadableImage: not an image, truncated, empty, of an unsupported pixel type, or unreasonably large.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # large images and odd metadata are not the user's problem here
            with pixels_allowed(max_pixels), Image.open(path) as image:
                image.load()
                factor = min(image.size) // at_least if at_least and image.width * image.height > _LARGE else 1
                if factor > 1 and image.mode in ("RGB", "RGBA", "L"):
                    return np.asarray(_to_rgb(image.reduce(factor)))
                return np.asarray(_to_rgb(image))
    except UnreadableImage:
        raise
    except Image.UnidentifiedImageError:
        raise UnreadableImage(path, _unknown(path)) from None
    except Exception as error:  # decoders raise nearly anything on damaged input
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UnreadableImage(path, error.strerror if isinstance(error, OSError) and error.strerror else text) from None


def _unknown(path: Path) -> str:
    """What to say of a file that Pillow does not know."""
    with open(path, "rb") as file:
        head = file.read(4)
    if head in _TIFF:
        import tifffile

        try:
            with tifffile.TiffFile(path) as tiff:
                page = tiff.pages.first
                kind = f"{page.dtype} x {page.samplesperpixel}"
            return f"pixels of type {kind} cannot be read: save it as RGB with 8 bits"
        except Exception:  # tifffile raises many types for what is damaged
            pass
    return "not an image" if head else "empty file"


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I;16"):
        grey = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((grey + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError(f"pixel type {image.mode!r} (32 bit) has no defined white: save it with 8 or 16 bits")
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def square(pixels: np.ndarray, fit: Fit) -> np.ndarray:
    """Make ``[H,W,3]`` square: ``crop`` keeps the central square, ``pad`` adds white on both shorter sides."""
    height, width = pixels.shape[:2]
    if height == width:
        return pixels
    side = min(height, width) if fit == "crop" else max(height, width)
    top, left = abs(height - side) // 2, abs(width - side) // 2
    if fit == "crop":
        return pixels[top : top + side, left : left + side]
    padded = np.full((side, side, 3), 255, dtype=np.uint8)
    padded[top : top + height, left : left + width] = pixels
    return padded


@lru_cache(maxsize=64)
def _area_weights(n_in: int, n_out: int) -> np.ndarray:
    """``[n_out, n_in]`` float32: how much of every output pixel each input pixel covers. Rows sum to one."""
    edges = np.linspace(0, n_in, n_out + 1)
    left, right = edges[:-1, None], edges[1:, None]
    pixel = np.arange(n_in)[None]
    cover = np.clip(np.minimum(right, pixel + 1) - np.maximum(left, pixel), 0, None)
    return (cover / cover.sum(1, keepdims=True)).astype(np.float32)


def resize(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize ``[H,W,3]`` uint8: exact area average where it shrinks, bilinear where it grows."""
    h, w = pixels.shape[:2]
    if (h, w) == (height, width):
        return pixels
    if h >= height and w >= width:
        rows = np.tensordot(_area_weights(h, height), pixels.astype(np.float32), axes=(1, 0))
        both = np.einsum("hwc,ow->hoc", rows, _area_weights(w, width), optimize=True)
        return np.clip(np.floor(both + 0.5), 0, 255).astype(np.uint8)
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR))


def enlarged(sides: Mapping[int, int], total: int, image_size: int) -> list[str]:
    """A note on patches that had fewer pixels than they are stored with: no detail was added. Empty where none had.

    Args:
        sides: how many patches had how many pixels a side.
        total: how many patches there are.
        image_size: side in pixels at which they are stored.
    """
    small = sorted(((n, side) for side, n in sides.items() if side < image_size), reverse=True)
    if not small:
        return []
    count = f"{sum(n for n, _ in small)} of {total} patches are enlarged"
    if len(small) == 1:
        return [f"{count} from {small[0][1]} to {image_size} px"]
    shown = ", ".join(f"{n} from {side} px" for n, side in small[:3])
    more = f" and {sum(n for n, _ in small[3:])} from other sizes" if small[3:] else ""
    return [f"{count} to {image_size} px: {shown}{more}"]


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One image file that becomes one patch. ``columns`` are numbers kept beside it (x, y, centres)."""

    path: Path
    label: int
    group: str
    columns: tuple[tuple[str, int], ...] = ()


Splits = dict[str, list[FileEntry]]


def split_files(entries: Sequence[FileEntry], fraction: float, seed: int) -> Splits:
    """``train`` and ``test``, about ``fraction`` of the groups: see :func:`~histodd_bench.data.split.draw_groups`."""
    _, groups = np.unique([entry.group for entry in entries], return_inverse=True)
    test = draw_groups(np.array([entry.label for entry in entries]), groups, fraction, seed)
    return {
        "train": [entry for entry, group in zip(entries, groups, strict=True) if not test[group]],
        "test": [entry for entry, group in zip(entries, groups, strict=True) if test[group]],
    }


def without(entries: Sequence[FileEntry], paths: Collection[Path]) -> list[FileEntry]:
    """The entries of other files than these."""
    return [entry for entry in entries if entry.path not in paths]


def write_files(
    writer: StoreWriter,
    entries: Sequence[FileEntry],
    *,
    image_size: int,
    fit: Fit,
    workers: int = 1,
    advance: Callable[[int], object] = lambda n: None,
) -> tuple[list[UnreadableImage], Counter[int], list[tuple[bytes, Path]]]:
    """Read image files into a store, in order.

    Args:
        writer: an open store of ``image_size`` square patches.
        entries: the files; all with the same columns.
        image_size: side of the patches in pixels.
        fit: what to do with images that are not square, see :func:`square`.
        workers: decoding threads; the result does not depend on it.
        advance: called with the number of files just done.

    Returns:
        What could not be read; of the others, how many had how many pixels a side when they had been made square, and for
        each a hash of the pixels that are stored, with its file.
    """

    def read(entry: FileEntry) -> tuple[np.ndarray, int, bytes] | UnreadableImage:
        try:
            pixels = square(read_rgb(entry.path), fit)
            patch = np.ascontiguousarray(resize(pixels, image_size, image_size))
            digest = hashlib.blake2b(patch.reshape(-1).data, digest_size=16).digest()
            return patch.transpose(2, 0, 1), len(pixels), digest
        except UnreadableImage as error:
            return error

    skipped: list[UnreadableImage] = []
    sides: Counter[int] = Counter()
    hashes: list[tuple[bytes, Path]] = []
    step = at_once(image_size)
    with ThreadPoolExecutor(max(workers, 1)) as pool:
        for start in range(0, len(entries), step):
            chunk = entries[start : start + step]
            results = list(pool.map(read, chunk))
            skipped += [result for result in results if isinstance(result, UnreadableImage)]
            good = [(e, r) for e, r in zip(chunk, results, strict=True) if not isinstance(r, UnreadableImage)]
            if good:
                columns = {name: [dict(e.columns)[name] for e, _ in good] for name, _ in good[0][0].columns}
                images = np.stack([patch for _, (patch, *_) in good])
                writer.append(images, [e.label for e, _ in good], [e.group for e, _ in good], **columns)
                sides.update(side for _, (_, side, _) in good)
                hashes += [(pixels, e.path) for e, (*_, pixels) in good]
            advance(len(chunk))
    return skipped, sides, hashes


def write_stores(
    folder: Path,
    splits: Callable[[Collection[Path]], Splits],
    *,
    root: Path,
    classes: Sequence[str],
    centre_names: Sequence[str] = (),
    image_size: int,
    fit: Fit,
    workers: int = 1,
    skipped: Sequence[tuple[Path, str]] = (),
    progress: Any,
) -> tuple[Splits, list[str]]:
    """Write one store per split under ``folder`` and say what was left out or enlarged, or is on both sides.

    Whether a file can be read shows when it is read. What cannot must not move the others from one side to the other: where
    the splits come out otherwise without it, they are written a second time.

    Args:
        splits: the files of each split, given those that cannot be read, which take no part.
        skipped: files the adapter left out already, with the reason; counted with the unreadable ones.

    Returns:
        The files in each store, and notes: at most three sentences.

    Raises:
        HistoddError: a class that the listing has is left without a single readable training image, or no test image is.
    """
    bad: dict[Path, str] = {}
    chosen = splits(bad)
    files = [entry for entries in chosen.values() for entry in entries]
    total = len(skipped) + len(files)

    def skips() -> str:
        return _skips([*skipped, *bad.items()], total, root)

    def require_classes(*parts: list[FileEntry]) -> None:
        there = {entry.label for entries in parts for entry in entries}
        for label, name in enumerate(classes):
            if label in there:
                continue
            if any(entry.label == label and entry.path in bad for entry in files):
                raise HistoddError(f"{printable(root)}: class {name!r} has no readable training image; {skips()}")
            n = len({entry.group for entry in files if entry.label == label})
            raise HistoddError(
                f"{printable(root)}: class {name!r} is in {counted(n, 'group')} only, which the split put into the test "
                "set: no training image is left; add slides or patients of that class, or a test/ folder"
            )

    while True:
        sides: Counter[int] = Counter()
        hashes: dict[str, list[tuple[bytes, Path]]] = {}
        with progress.task(f"reading {root.resolve().name} at {image_size} px", sum(map(len, chosen.values()))) as task:
            for split, entries in chosen.items():
                with StoreWriter(folder / split, (image_size, image_size), classes, centre_names) as writer:
                    found, of, hashes[split] = write_files(
                        writer, entries, image_size=image_size, fit=fit, workers=workers, advance=task.advance
                    )
                    writer.finish()
                bad |= {error.path: error.reason for error in found}
                sides += of
        written = {split: without(entries, bad) for split, entries in chosen.items()}
        require_classes(*written.values())  # no other split would bring one back
        if not bad:
            break
        try:
            chosen = splits(bad)
        except HistoddError as error:
            raise HistoddError(f"{printable(root)}: {error}; {skips()}") from None
        if chosen == written:
            break
        progress.log(f"{printable(root)}: the split is drawn again without the {len(bad)} files that cannot be read")
    require_classes(written["train"])
    if not written["test"]:
        raise HistoddError(f"{printable(root)}: there is no readable test image; {skips()}")
    notes = [skips()] if skipped or bad else []
    notes += enlarged(sides, sides.total(), image_size)
    return written, notes + _on_both_sides(hashes["train"], hashes["test"], root)


def _on_both_sides(train: Sequence[tuple[bytes, Path]], test: Sequence[tuple[bytes, Path]], root: Path) -> list[str]:
    """A warning where test patches are training patches too; empty where none is."""
    known = dict(reversed(train))
    copies = [(path, known[pixels]) for pixels, path in test if pixels in known]
    if not copies:
        return []
    copy, original = (printable(path.relative_to(root)) for path in copies[0])
    return [
        f"WARNING: {len(copies)} of {len(test)} test images are pixel for pixel in the training set (e.g. {copy} is {original}): "
        "the test set is not independent of the training set"
    ]


def _skips(skipped: Sequence[tuple[Path, str]], total: int, root: Path) -> str:
    """One sentence that counts skipped files and names the first five with their reasons."""
    shown = [f"{printable(path.relative_to(root))} ({reason})" for path, reason in skipped[:5]]
    more = f" and {len(skipped) - 5} more" if len(skipped) > 5 else ""
    return f"{len(skipped)} of {total} files skipped" + (f": {', '.join(shown)}{more}" if shown else "")
