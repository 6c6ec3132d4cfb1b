"""Extraction of slides beside a plain loop, memory, and random batches from a store of a million patches.

    python benchmarks/bench_slides.py make DIR                50 procedural slides of 8,192 x 8,192 px, JPEG tiles
    python benchmarks/bench_slides.py extract DIR [workers]   tiles per second: read_region loop, pyvips, data prepare; memory
    python benchmarks/bench_slides.py store DIR [patches]     time to open, random batches of 256 against the raw memmap

Prints one JSON object with the device and versions. ``extract`` reads every slide of DIR; name fewer with HISTODD_SLIDES=N.
"""

import json
import os
import platform
import resource
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

SIZE, MPP, SIDE = 256, 0.5, 8192  # of a patch, at level 0; of a slide


def make(folder: Path, count: int = 50) -> None:
    """Eight different fields of H&E-like texture, put together differently on every slide; a third of it is glass."""
    from PIL import Image

    from histodd_bench.data.pyramid import write_pyramid

    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    fields = []
    for _ in range(8):
        noise = [rng.standard_normal((1024 // k, 1024 // k)).astype(np.float32) for k in (2, 8, 64)]
        layers = [np.asarray(Image.fromarray(n).resize((1024, 1024), Image.Resampling.BICUBIC)) for n in noise]
        nuclei = (layers[1] + 0.4 * layers[0] > 0.9)[..., None]
        eosin = np.array([205.0, 140, 185]) + (10 * layers[0] + 18 * layers[2])[..., None] * (1.0, 1.2, 0.8)
        fields.append(
            np.clip(np.where(nuclei, [110, 70, 150] + 12 * layers[0][..., None], eosin), 0, 255).astype(np.uint8)
        )
    for i in range(count):
        path = folder / f"slide_{i:02d}.tif"
        if path.exists():
            continue
        order = np.random.default_rng(i)
        pixels = np.full((SIDE, SIDE, 3), 243, dtype=np.uint8)
        for y in range(0, SIDE, 1024):
            for x in range(0, SIDE, 1024):
                if order.random() < 0.67:
                    pixels[y : y + 1024, x : x + 1024] = np.roll(
                        fields[order.integers(8)], order.integers(1024), axis=1
                    )
        write_pyramid(path, pixels, MPP, levels=4, quality=85)
    rows = [f"slide_{i:02d}.tif,{'ab'[i % 2]},{'train' if i < count - 10 else 'test'}" for i in range(count)]
    (folder / "slides.csv").write_text("slide,label,split\n" + "\n".join(rows) + "\n")


def extract(folder: Path, workers: int) -> dict[str, Any]:
    """Tiles per second over the same tiles, one after another in this run."""
    from histodd_bench.data_commands import _start_workers

    _start_workers()  # as the command does; the imports of neither side are timed
    import openslide

    from histodd_bench.data import slides, store
    from histodd_bench.data.extract import extract as run
    from histodd_bench.data.jobs import SlideJob, Source, Tiling
    from histodd_bench.data.wsi import Slide
    from histodd_bench.progress import Progress

    found = slides.source(folder, 0)
    jobs = [job for job in found.jobs if isinstance(job, SlideJob)][
        : int(os.environ.get("HISTODD_SLIDES", "0")) or None
    ]
    source = Source("slides", found.classes, tuple(jobs), found.tiling, 256)
    tiling = Tiling(SIZE, MPP)
    out = folder / "shards"
    shutil.rmtree(out, ignore_errors=True)
    time.sleep(5)
    outcome = run(source, tiling, SIZE, out, workers=workers, progress=Progress.silent())
    ours = outcome.patches / outcome.seconds
    corners = {}
    for job in jobs:
        columns = store.load_columns(outcome.shards[job.slide])
        corners[job.path] = list(zip(columns["x"].tolist(), columns["y"].tolist(), strict=True))
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024
    shutil.rmtree(out)
    sample = list(corners)[
        : max(len(jobs) // 5, 1)
    ]  # every slide costs the same: a fifth of them is enough for the others
    start, n = time.perf_counter(), 0
    for path in sample:
        handle = openslide.OpenSlide(path)
        for corner in corners[path]:
            np.asarray(handle.read_region(corner, 0, (SIZE, SIZE)).convert("RGB"))
            n += 1
        handle.close()
    result = {
        "slides": len(jobs), "tiles": sum(map(len, corners.values())), "workers": workers, "prepare_tiles_per_s": ours,
        "read_region_loop_tiles_per_s": n / (time.perf_counter() - start), "worker_peak_mib": children,
        "parent_peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }  # fmt: skip
    result["ratio"] = result["prepare_tiles_per_s"] / result["read_region_loop_tiles_per_s"]
    try:
        import pyvips
    except ImportError:
        return result
    pyvips.cache_set_max(0)
    start, n = time.perf_counter(), 0
    for path in sample:
        region = pyvips.Region.new(pyvips.Image.new_from_file(str(path)))
        for x, y in corners[path]:
            np.frombuffer(region.fetch(x, y, SIZE, SIZE), dtype=np.uint8)
            n += 1
    result["pyvips_fetch_tiles_per_s"] = n / (time.perf_counter() - start)
    with Slide(sample[0]) as slide:
        result["slide"] = f"{slide.width} x {slide.height}, {len(slide.levels)} levels"
    return result


def stored(folder: Path, count: int) -> dict[str, Any]:
    """A store of ``count`` patches of 32 px: time to open it, patches per second in random batches of 256."""
    from histodd_bench.data import store

    target = folder / "million"
    if not (target / "meta.json").exists():
        rng = np.random.default_rng(0)
        with store.StoreWriter(target, (32, 32), ("a", "b")) as writer:
            for start in range(0, count, 10_000):
                n = min(10_000, count - start)
                images = rng.integers(0, 256, (n, 3, 32, 32), dtype=np.uint8)
                writer.append(
                    images, [(start + i) % 2 for i in range(n)], [f"s{(start + i) // 1000}" for i in range(n)]
                )
            writer.finish()
    start = time.perf_counter()
    patches = store.load(target)
    opened = time.perf_counter() - start
    raw = np.load(target / "images.npy", mmap_mode="r")
    rng = np.random.default_rng(1)
    rates: dict[str, list[float]] = {"store": [], "memmap": []}
    for _ in range(3):
        batches = [rng.integers(0, len(patches), 256) for _ in range(400)]
        start = time.perf_counter()
        for batch in batches:
            raw[batch].sum()
        rates["memmap"].append(256 * len(batches) / (time.perf_counter() - start))
        import torch

        start = time.perf_counter()
        for batch in batches:
            patches.images[torch.from_numpy(batch)].sum()
        rates["store"].append(256 * len(batches) / (time.perf_counter() - start))
    best = {name: max(values) for name, values in rates.items()}
    return {
        "patches": len(patches),
        "open_seconds": opened,
        "store_patches_per_s": best["store"],
        "memmap_patches_per_s": best["memmap"],
        "ratio": best["store"] / best["memmap"],
    }


def main(arguments: list[str]) -> None:
    """Run one of the parts."""
    what, folder = arguments[0], Path(arguments[1])
    if what == "make":
        make(folder, int(arguments[2]) if len(arguments) > 2 else 50)
        return
    if what == "extract":
        result = extract(folder, int(arguments[2]) if len(arguments) > 2 else 2)
    else:
        result = stored(folder, int(arguments[2]) if len(arguments) > 2 else 1_000_000)
    import openslide
    import torch

    device = {"cpu": platform.processor() or platform.machine(), "cores": len(os.sched_getaffinity(0))}
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "openslide": openslide.__library_version__,
    }
    print(json.dumps({"part": what, **result, "device": device, "versions": versions}, indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
