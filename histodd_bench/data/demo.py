"""The demo: slides drawn by :mod:`histodd_bench.data.demo_render`, written and read like real ones.

Every slide is a pyramidal TIFF with its scale and an ASAP annotation file beside it; patches come from them through OpenSlide,
tissue detection and the annotated outlines, as they would from a scanner's files. 40 training and 20 test slides of two
centres; every fifth slide has no tumour. Nothing here shows real tissue: results on the demo show that the program works, not how
well a method does on pathology.
"""

import csv
import io
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from histodd_bench.data import wsi
from histodd_bench.data.annotations import polygon_mask, read_asap
from histodd_bench.data.demo_render import MPP, draw_stain, render_slide
from histodd_bench.data.images import enlarged, resize
from histodd_bench.data.pyramid import write_pyramid
from histodd_bench.data.store import Dataset, StoreWriter, cached_dataset
from histodd_bench.data.tissue import tissue_mask
from histodd_bench.errors import HistoddError, UsageError
from histodd_bench.files import digest, locked, write_text
from histodd_bench.workers import Report, run_workers

CLASSES = ("normal", "tumour")
CENTRES = ("centre A", "centre B")
FIELD = 64.0  # microns: side of a patch
_MIN_TISSUE = 0.6
_TUMOUR_ABOVE, _NORMAL_BELOW = 0.75, 0.05  # share of a patch inside the outlines; patches between are left out
_MASK_MPP = 4.0
_VERSION = 1  # of the drawing; changes with every change to the pictures


@dataclass(frozen=True)
class DemoParams:
    """What is drawn.

    The defaults were calibrated on the slides of seed 0 with a small network trained on all and on 10 random patches per
    class, so that colour misleads and shape can be learned; they were fixed before any coreset or distillation was tried.
    """

    train_slides: int = 40
    test_slides: int = 20
    side: float = 832.0  # microns
    stain_variation: float = 1.0  # 0: all slides stained alike


def load(
    *, image_size: int, seed: int, cache: Path, workers: int, progress: Any, params: DemoParams = DemoParams()
) -> Dataset:
    """Draw the slides where the cache lacks them, tile them, and open the patches.

    Args:
        image_size: pixels that show 64 microns; from 128 px on, level 0 (0.5 mpp) is enlarged.
        seed: of the slides.
        cache: slides go to ``demo-slides-<key>``, patches to ``demo-<key>``.
        workers: processes that draw; slides do not depend on it.
    """
    if seed < 0:
        raise UsageError(f"the demo's seed must not be negative, got {seed}")
    key = {"drawing": _VERSION, "seed": seed, **asdict(params)}
    slides = Path(cache) / f"demo-slides-{digest(key)[:16]}"
    count = params.train_slides + params.test_slides
    notes = [
        f"procedural: {count} computer-drawn slides of {len(CENTRES)} made-up centres (seed {seed}), no real tissue; "
        f"{params.test_slides} slides are the test set",
    ]
    if params.stain_variation != 1.0:
        notes.append(f"stains vary {params.stain_variation:g} times as much between its slides as in 'demo'")

    def build(folder: Path) -> list[str]:
        make_slides(slides, params, seed, workers=workers, progress=progress)
        total = 0
        with progress.task("tiling demo slides", total=count) as task:
            for split, indices in _splits(params).items():
                with StoreWriter(folder / split, (image_size, image_size), CLASSES, CENTRES) as writer:
                    for index in indices:
                        _tile(writer, slides / f"{_name(index)}.tif", _centre(index), image_size)
                        task.advance(1)
                    total += len(writer)
                    if min(writer.finish().class_counts()) == 0:
                        raise HistoddError(f"the demo's {split} slides show one class only: draw more slides")
        return notes + enlarged({int(FIELD / MPP): total}, total, image_size)

    return cached_dataset(cache, "demo", {**key, "tiling": _VERSION, "size": image_size}, True, build, progress)


def _name(index: int) -> str:
    return f"slide_{index:03d}"


def _centre(index: int) -> int:
    return index % 2


def _splits(params: DemoParams) -> dict[str, range]:
    return {
        "train": range(params.train_slides),
        "test": range(params.train_slides, params.train_slides + params.test_slides),
    }


def make_slides(folder: Path, params: DemoParams, seed: int, *, workers: int = 1, progress: Any) -> None:
    """Draw all slides that ``folder`` lacks: ``slide_<i>.tif``, ``slide_<i>.xml`` and one ``slides.csv``.

    Every slide has its own random generator, so that neither the number of processes nor an interruption changes a byte.
    """
    with locked(folder.with_name(folder.name + ".lock")):
        table = io.StringIO()
        rows = csv.writer(table)
        rows.writerow(["slide", "annotation", "split", "centre"])
        for split, indices in _splits(params).items():
            rows.writerows([f"{_name(i)}.tif", f"{_name(i)}.xml", split, CENTRES[_centre(i)]] for i in indices)
        count = params.train_slides + params.test_slides
        jobs = [(folder, params, seed, index) for index in range(count) if not _is_done(folder / _name(index))]
        if jobs or not (folder / "slides.csv").exists():
            write_text(folder / "slides.csv", table.getvalue())
        if jobs:
            with progress.task("drawing demo slides", total=count, done=count - len(jobs)) as task:
                with closing(_run(jobs, workers)) as done:
                    for _ in done:
                        task.advance(1)


def _is_done(stem: Path) -> bool:
    # The annotation is written first, so a slide that opens is complete.
    try:
        wsi.Slide(stem.with_suffix(".tif")).close()
    except wsi.SlideError:
        return False
    return stem.with_suffix(".xml").exists()


def _run(jobs: list[tuple[Path, DemoParams, int, int]], workers: int) -> Generator[None, None, None]:
    if min(workers, len(jobs)) <= 1:
        yield from map(_draw, jobs)
        return
    with closing(run_workers(_opened, jobs, workers)) as events:
        for kind, _, value in events:
            if kind == "died":
                raise HistoddError(
                    f"a process that draws slides died (exit code {value}): the same command goes on, try a lower --workers"
                )
            yield


def _opened(report: Report) -> Callable[[tuple[Path, DemoParams, int, int]], None]:
    return _draw


def _draw(job: tuple[Path, DemoParams, int, int]) -> None:
    folder, params, seed, index = job
    rng = np.random.default_rng([seed, index])
    stain = draw_stain(rng, _centre(index), params.stain_variation)
    share = 0.0 if index % 5 == 4 else rng.uniform(0.4, 0.75)
    pixels, outlines = render_slide(rng, params.side, stain, share)
    stem = folder / _name(index)
    write_text(stem.with_suffix(".xml"), _asap(outlines))
    write_pyramid(stem.with_suffix(".tif"), pixels, MPP)


def _asap(outlines: list[np.ndarray]) -> str:
    root = ElementTree.Element("ASAP_Annotations")
    annotations = ElementTree.SubElement(root, "Annotations")
    for number, outline in enumerate(outlines):
        node = ElementTree.SubElement(
            annotations, "Annotation", Name=f"Annotation {number}", Type="Polygon", PartOfGroup="Tumor", Color="#F4FA58"
        )
        points = ElementTree.SubElement(node, "Coordinates")
        for order, (x, y) in enumerate(outline):
            ElementTree.SubElement(points, "Coordinate", Order=str(order), X=f"{x:.2f}", Y=f"{y:.2f}")
    groups = ElementTree.SubElement(root, "AnnotationGroups")
    ElementTree.SubElement(groups, "Group", Name="Tumor", PartOfGroup="None", Color="#FF0000")
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def _tile(writer: StoreWriter, path: Path, centre: int, image_size: int) -> None:
    with wsi.Slide(path) as slide:
        side = FIELD / slide.mpp
        size = min(image_size, int(side))
        mpp = FIELD / size
        corners = slide.grid(size, mpp)
        tumour = polygon_mask(read_asap(path.with_suffix(".xml")), slide, _MASK_MPP).fraction(corners, side)
        tissue = tissue_mask(slide, _MASK_MPP).fraction(corners, side)
        chosen = (tissue >= _MIN_TISSUE) & ((tumour >= _TUMOUR_ABOVE) | (tumour <= _NORMAL_BELOW))
        corners, labels = corners[chosen], (tumour[chosen] >= _TUMOUR_ABOVE).astype(int)
        tiles = []
        for _, tile in slide.tiles(corners, size, mpp):
            if isinstance(tile, wsi.UnreadableTile):
                raise HistoddError(f"{tile}: delete the file to have it drawn again")
            tiles.append(resize(tile, image_size, image_size).transpose(2, 0, 1))
        if tiles:
            n = len(tiles)
            x, y = corners.T.tolist()
            writer.append(
                np.stack(tiles),
                labels.tolist(),
                [path.stem] * n,
                centres=[centre] * n,
                x=x,
                y=y,
                mpp=[FIELD / image_size] * n,
            )
