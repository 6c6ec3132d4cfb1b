"""The demo's slides are real files, the same whatever draws them, and their colour does not give the answer away."""

import csv
import hashlib
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from functools import partial

import numpy as np
import openslide
import pytest
import torch

from histodd_bench.data import annotations, demo, load_dataset
from histodd_bench.data.demo import DemoParams
from histodd_bench.data.demo_render import MPP, draw_stain, render_slide
from histodd_bench.data.prepared import prepare_files
from histodd_bench.errors import HistoddError, UsageError
from histodd_bench.progress import Progress

SMALL = DemoParams(train_slides=4, test_slides=2, side=416.0)


def make(folder, params=SMALL, seed=0, workers=1):
    demo.make_slides(folder, params, seed, workers=workers, progress=Progress.silent())
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def load(cache, image_size=16, params=SMALL, seed=0):
    return demo.load(
        image_size=image_size, seed=seed, cache=cache, workers=1, progress=Progress.silent(), params=params
    )


@pytest.fixture(scope="module")
def slides(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "slides"
    return folder, make(folder)


def test_slides_are_pyramids_with_scale_and_annotation(slides):
    folder, files = slides
    assert len(files) == 6 * 2 + 1
    for path in sorted(folder.glob("*.tif")):
        with openslide.OpenSlide(path) as slide:
            assert slide.dimensions == (832, 832) and slide.level_count == 2
            assert float(slide.properties["openslide.mpp-x"]) == pytest.approx(MPP)
        for polygon in annotations.read_asap(path.with_suffix(".xml")):
            assert polygon.inside and len(polygon.points) > 20
    assert annotations.read_asap(folder / "slide_004.xml") == [], "every fifth slide has no tumour"
    with open(folder / "slides.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["split"] for row in rows] == ["train"] * 4 + ["test"] * 2
    assert {row["centre"] for row in rows} == set(demo.CENTRES)


def test_the_number_of_workers_changes_nothing(slides, tmp_path):
    assert make(tmp_path / "slides", workers=2) == slides[1]


def test_missing_and_damaged_slides_are_drawn_again(slides, tmp_path):
    make(tmp_path / "slides")
    (tmp_path / "slides" / "slide_001.tif").unlink()
    (tmp_path / "slides" / "slide_002.xml").unlink()
    os.truncate(tmp_path / "slides" / "slide_003.tif", 3000)
    untouched = (tmp_path / "slides" / "slide_000.tif").stat().st_mtime_ns
    assert make(tmp_path / "slides") == slides[1]
    assert (tmp_path / "slides" / "slide_000.tif").stat().st_mtime_ns == untouched


def test_a_killed_drawing_goes_on(slides, tmp_path):
    code = (
        "from pathlib import Path; from histodd_bench.data import demo; from histodd_bench.progress import Progress\n"
        f"p = demo.DemoParams({SMALL.train_slides}, {SMALL.test_slides}, {SMALL.side})\n"
        f"demo.make_slides(Path({str(tmp_path / 'slides')!r}), p, 0, workers=1, progress=Progress.silent())\n"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen([sys.executable, "-c", code], env=env)
    while len(list((tmp_path / "slides").glob("*.tif"))) < 2 and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert make(tmp_path / "slides").items() >= slides[1].items()


def test_seed_and_variation_matter(slides, tmp_path):
    assert make(tmp_path / "seed", DemoParams(1, 0, 416.0), seed=1)["slide_000.tif"] != slides[1]["slide_000.tif"]
    same = [draw_stain(np.random.default_rng(i), i % 2, 0.0) for i in range(4)]
    for stain in same:
        assert stain.amounts == (1.0, 1.0) and np.array_equal(stain.haematoxylin, same[0].haematoxylin)
    amounts = np.log([draw_stain(np.random.default_rng(i), i % 2, 1.0).amounts for i in range(200)])
    assert (amounts.std(0) > 0.2).all()


def test_patches_come_from_tissue_with_the_annotation_as_label(tmp_path):
    ds = load(tmp_path)
    assert ds.procedural and "procedural" in ds.notes[0] and "no real tissue" in ds.notes[0]
    assert ds.train.classes == ("normal", "tumour") and min(ds.train.class_counts()) > 0
    assert set(ds.train.group_names) == {f"slide_{i:03d}" for i in range(4)}
    assert set(ds.test.group_names) == {"slide_004", "slide_005"}
    assert set(ds.train.centres.tolist()) == {0, 1} and ds.train.centre_names == demo.CENTRES
    count = len(ds.train) + len(ds.test)
    assert load(tmp_path, 130).notes == (*ds.notes, f"{count} of {count} patches are enlarged from 128 to 130 px")
    for i in range(len(ds.train)):
        assert ds.train.centres[i] == int(ds.train.group_names[ds.train.groups[i]][-3:]) % 2
    assert (ds.train.images.float().mean((1, 2, 3)) < 225).all(), "no patch of empty glass"
    of_slide_4 = ds.test.groups == ds.test.group_names.index("slide_004")
    assert (ds.test.labels[of_slide_4] == 0).all()


def test_any_patch_size_shows_the_same_field(tmp_path):
    small, native, large = (load(tmp_path, size).train for size in (16, 64, 192))
    assert len(list(tmp_path.glob("demo-slides-*/"))) == 1, "slides are drawn once for all sizes"
    assert torch.equal(small.labels, native.labels) and torch.equal(native.labels, large.labels)
    reduced = native.images.float().reshape(len(native), 3, 16, 4, 16, 4).mean((3, 5))
    assert (reduced - small.images.float()).abs().mean() < 3
    reduced = large.images.float().reshape(len(large), 3, 64, 3, 64, 3).mean((3, 5))
    assert (reduced - native.images.float()).abs().mean() < 5


def test_tumour_shows_in_its_nuclei():
    """Drawn with one stain, tumour has larger dark spots: the mean run of dark pixels is longer than in normal tissue."""
    stain = draw_stain(np.random.default_rng(0), 0, 0.0)
    runs = {}
    for share in (0.0, 2.0):
        pixels, _ = render_slide(np.random.default_rng(5), 416.0, stain, share)
        dark = pixels[250:600, 250:600, 0] < 150
        starts = np.diff(dark.astype(int), axis=1) == 1
        runs[share] = dark.sum() / starts.sum()
    assert runs[2.0] > 1.1 * runs[0.0]


def test_colour_alone_misleads(tmp_path):
    """A nearest-mean-colour classifier learned on training slides is near chance on test slides.

    Fewer and smaller slides than the demo's own, where it reaches 54 %.
    """
    ds = load(tmp_path, params=DemoParams(train_slides=24, test_slides=16, side=480.0))
    colour = {name: ps.images[:].float().mean((2, 3)) for name, ps in (("train", ds.train), ("test", ds.test))}
    means = torch.stack([colour["train"][ds.train.labels == c].mean(0) for c in (0, 1)])
    guess = torch.cdist(colour["test"], means).argmin(1)
    balanced = np.mean([(guess[ds.test.labels == c] == c).float().mean() for c in (0, 1)])
    assert 0.38 < balanced < 0.62
    slide_means = torch.stack([colour["train"][ds.train.groups == g].mean(0) for g in range(24)])
    between_classes = (means[0] - means[1]).abs().max()
    assert slide_means.std(0).min() > 1.5 * between_classes, "slides differ more than classes do"


def test_the_demo_itself():
    """What the demo is made of is fixed: changing it changes every number shown for it."""
    assert DemoParams() == DemoParams(train_slides=40, test_slides=20, side=832.0, stain_variation=1.0)
    pixels, outlines = render_slide(np.random.default_rng(0), 208.0, draw_stain(np.random.default_rng(0), 0, 1.0), 0.5)
    assert pixels.shape == (416, 416, 3) and len(outlines) == 1
    assert pixels.reshape(-1, 3).mean(0) == pytest.approx((202.1, 182.1, 203.3), abs=0.5)


def test_a_prepared_demo_is_read_where_it_is_and_no_other_folder_is(tmp_path):
    draw = partial(demo.load, params=SMALL)
    prepare_files("demo", draw, 16, tmp_path / "out", progress=Progress.silent(), seed=0, workers=1)
    direct = load(tmp_path / "direct")
    options = {"image_size": 16, "cache": tmp_path / "cache", "progress": Progress.silent()}
    data = load_dataset("demo", root=tmp_path / "out", **options)
    assert data.train.fingerprint() == direct.train.fingerprint() and data.procedural and data.notes == direct.notes
    assert not (tmp_path / "cache").exists(), "nothing is drawn"
    with pytest.raises(UsageError, match="'demo' is drawn: it reads no --data-root"):
        load_dataset("demo", root=tmp_path, **options)


def test_a_drawing_process_that_is_killed_is_an_error_and_no_standstill(tmp_path):
    jobs = [(tmp_path, SMALL, 0, index) for index in range(6)]
    drawing = demo._run(jobs, 2)
    next(drawing)
    for child in multiprocessing.active_children():
        child.kill()
    with pytest.raises(HistoddError, match=r"process that draws slides died|ended while starting"):
        list(drawing)
    assert not multiprocessing.active_children()
