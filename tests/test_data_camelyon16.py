"""Camelyon16: public facts from the real tables, and the whole way on a miniature of the real layout."""

import csv
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from slide_makers import asap, corners, slide

from histodd_bench.data import camelyon16, load_dataset, store
from histodd_bench.data.annotations import coverage, read_annotation
from histodd_bench.data.csv_tables import read_table
from histodd_bench.data.images import read_rgb
from histodd_bench.data.jobs import SlideJob
from histodd_bench.data.prepared import prepare
from histodd_bench.data.tissue import pen_mask, tissue_pixels
from histodd_bench.errors import HistoddError
from histodd_bench.progress import Progress

SIDE = 512  # level-0 pixels of a patch: 256 px at 2 mpp of slides with 1 mpp
TUMOUR = (0, 0, SIDE, 2 * SIDE)


def miniature(
    root: Path, *, normals: tuple[int, ...] = (1, 101), tumours: tuple[int, ...] = (1, 10), bucket: bool = False
) -> Path:
    """Slides of 3 x 2 patches; tumour in the left column. ``bucket`` is the layout of the open-data bucket."""
    folders = {k: root / (f"training/{k}" if k != "test" else "testing/images") for k in ("normal", "tumor", "test")}
    marks = {"tumor": root / "training/lesion_annotations", "test": root / "testing/lesion_annotations"}
    if bucket:
        folders, marks = dict.fromkeys(folders, root / "images"), dict.fromkeys(marks, root / "annotations")
    size = (3 * SIDE, 2 * SIDE)
    for i in normals:
        slide(folders["normal"] / f"normal_{i:03d}.tif", size=size, seed=i)
    for i in tumours:
        slide(folders["tumor"] / f"tumor_{i:03d}.tif", size=size, seed=200 + i, tumour=TUMOUR)
        asap(marks["tumor"] / f"tumor_{i:03d}.xml", ("_0", corners(TUMOUR)))
    for i, tumour in ((1, True), (3, False), (114, True)):
        slide(folders["test"] / f"test_{i:03d}.tif", size=size, seed=400 + i, tumour=TUMOUR if tumour else None)
    for i in (1, 114):
        asap(marks["test"] / f"test_{i:03d}.xml", ("Tumor", corners(TUMOUR)))
    reference = root / ("evaluation" if bucket else "testing") / "reference.csv"
    reference.parent.mkdir(parents=True, exist_ok=True)
    reference.write_text("test_001,Tumor,IDC,Macro\ntest_003,Normal,DCIS,None\ntest_114,Tumor,ILC,Macro\n")
    (root / "metadata.csv").write_text(
        "label,tumorp1000,tumorp10000,tumorp40000,hospital,hospital_corrected,slide_name\n"
        + "".join(f"0,,,,0.0,0.0,normal_{i:03d}.tif\n" for i in normals if i <= 100)
        + "".join(f"0,,,,1.0,1.0,normal_{i:03d}.tif\n" for i in normals if i > 100)
        + "".join(f"1,0.1,0.1,0.1,0.0,0.0,tumor_{i:03d}.tif\n" for i in tumours)
        + "1,,,,0.0,0.0,test_001.tif\n0,,,,1.0,1.0,test_003.tif\n0,,,,1.0,1.0,test_114.tif\n"
    )
    return root


def test_the_paper_s_facts() -> None:
    assert camelyon16.SLIDES == {"train": (159, 111), "test": (80, 49)}
    assert (sum(camelyon16.SLIDES["train"]), sum(camelyon16.SLIDES["test"])) == (270, 129)
    assert (camelyon16.TILING.size, camelyon16.TILING.mpp) == (256, 2.0), "256 px at 5x"
    numbers = "010 015 018 020 025 029 033 034 044 046 051 054 055 056 067 079 085 092 095 110".split()
    assert camelyon16.PARTLY_ANNOTATED == {"test_114", *(f"tumor_{n}" for n in numbers)} and len(numbers) == 20


def test_the_real_tables_give_the_facts(shared_data: Path, tmp_path: Path) -> None:
    """All 399 real names, with the real reference.csv and metadata.csv: files are found by name and not opened for listing."""
    with open(shared_data / "camelyon16" / "metadata.csv", newline="") as file:
        names = [row["slide_name"] for row in csv.DictReader(file)]
    assert len(names) == 399
    names += ["normal_086.tif", "test_049.tif"]
    for name in names:
        folder = tmp_path / ("testing/images" if name.startswith("test") else f"training/{name.partition('_')[0]}")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
        if not name.startswith("normal"):
            (tmp_path / "annotations").mkdir(exist_ok=True)
            (tmp_path / "annotations" / name.replace(".tif", ".xml")).touch()
    for name in ("reference.csv", "metadata.csv"):
        shutil.copy(shared_data / "camelyon16" / name, tmp_path / name)
    found = camelyon16.source(tmp_path, 0)
    by_name = {job.slide: job for job in found.jobs if isinstance(job, SlideJob)}
    missing = [n for n in names if n[:-4] not in by_name]
    known = {
        row["slide"]
        for row in read_table(tmp_path / "reference.csv", ("slide",), header=("slide", "class", "type", "size"))
    }
    assert set(missing) == {"normal_086.tif", "test_049.tif"} | {
        n for n in names if n.startswith("test") and n[:-4] not in known
    }
    train = [job for job in by_name.values() if job.split == "train"]
    assert [sum(job.annotation is None for job in train), sum(job.annotation is not None for job in train)] == [
        159,
        111,
    ]
    test = [job for job in by_name.values() if job.split == "test"]
    assert sum(job.annotation is not None for job in test) == 49 and len(test) == len(known & {n[:-4] for n in names})
    assert {
        job.slide for job in by_name.values() if job.annotation is not None and job.outside is None
    } == camelyon16.PARTLY_ANNOTATED
    assert found.centres == ("Radboud", "Utrecht")
    centre = {
        name: found.centres[by_name[name].centre or 0] for name in ("tumor_001", "tumor_004", "tumor_064", "tumor_073")
    }
    assert centre == {"tumor_001": "Radboud", "tumor_004": "Radboud", "tumor_064": "Radboud", "tumor_073": "Utrecht"}
    assert any(note.startswith("normal_086 is left out") for note in found.notes)


@pytest.mark.parametrize("bucket", [False, True])
def test_a_miniature_from_slides_to_patches(tmp_path: Path, bucket: bool) -> None:
    root = miniature(tmp_path / "c16", bucket=bucket)
    data = load_dataset("camelyon16", root=root, image_size=32, cache=tmp_path / "cache", progress=Progress.silent())
    assert data.train.classes == ("normal", "tumour") and not data.procedural
    # Two normal slides of 6 patches; tumor_001 gives 2 tumour and 4 normal, tumor_010 is not exhaustively annotated: no normal.
    assert data.train.class_counts() == [6 + 6 + 4, 2 + 2]
    assert data.test.class_counts() == [6 + 4, 2 + 2], "test_114 is not exhaustively annotated either"
    assert set(data.train.group_names) == {"normal_001", "normal_101", "tumor_001", "tumor_010"}
    centre = {
        data.train.group_names[g]: data.train.centre_names[c]
        for g, c in zip(data.train.groups, data.train.centres, strict=True)
    }
    assert centre == {"normal_001": "Radboud", "normal_101": "Utrecht", "tumor_001": "Radboud", "tumor_010": "Radboud"}
    tumour = data.train.images[data.train.labels == 1].float().mean()
    assert tumour < data.train.images[data.train.labels == 0].float().mean() - 20, "tumour was drawn darker"
    assert any("of the 399 slides of Camelyon16 are used" in note for note in data.notes)


def test_prepared_with_positions_and_scale(tmp_path: Path) -> None:
    source = camelyon16.source(miniature(tmp_path / "c16"), 0)
    prepare(source, source.tiling, source.image_size, tmp_path / "out", progress=Progress.silent())
    patches, columns = store.load(tmp_path / "out" / "train"), store.load_columns(tmp_path / "out" / "train")
    assert patches.image_size == (256, 256) and set(columns["mpp"]) == {2.0} and set(columns["level"]) == {1}
    assert set(columns["x"]) == {0, SIDE, 2 * SIDE}
    again = load_dataset(
        "camelyon16", root=tmp_path / "out", image_size=256, cache=tmp_path / "c", progress=Progress.silent()
    )
    assert again.train.fingerprint() == patches.fingerprint()


def test_what_is_missing_or_twice_is_said(tmp_path: Path) -> None:
    root = miniature(tmp_path / "c16")
    (root / "training/lesion_annotations/tumor_001.xml").unlink()
    shutil.copy(root / "training/normal/normal_001.tif", root / "normal_001.tif")
    shutil.copy(root / "training/normal/normal_001.tif", root / "training/normal/normal_086.tif")
    shutil.copy(root / "testing/images/test_003.tif", root / "testing/images/test_007.tif")
    (root / "metadata.csv").unlink()
    found = camelyon16.source(root, 0)
    notes = "\n".join(found.notes)
    for expected in ("1 slides are there twice and used once", "normal_086 is left out: it became tumor_111",
                     "1 tumour slides have no <slide>.xml and are left out: tumor_001", "1 test slides are not in reference.csv",
                     "no metadata.csv"):  # fmt: skip
        assert expected in notes
    assert {job.slide for job in found.jobs} == {
        "normal_001",
        "normal_101",
        "tumor_010",
        "test_001",
        "test_003",
        "test_114",
    }
    assert found.centres == ()


def test_copies_of_a_slide_are_left_out(tmp_path: Path) -> None:
    root = miniature(tmp_path / "c16")
    shutil.copy(root / "training/normal/normal_001.tif", root / "testing/images/test_003.tif")
    data = load_dataset("camelyon16", root=root, image_size=16, cache=tmp_path / "c", progress=Progress.silent())
    assert "1 slides are copies of others and were left out: test_003 (the same picture as normal_001)" in data.notes
    assert data.test.class_counts() == [4, 4]


def test_the_real_annotation_covers_its_own_area(shared_data: Path) -> None:
    """The excerpt of tumor_001, counted on 2 px patches: the area of its outline, at its place."""
    (polygon,) = read_annotation(shared_data / "camelyon16/annotations/tumor_001_excerpt.xml")
    x, y = polygon.points.T
    area = abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))) / 2
    left, top, right, bottom = int(x.min()) - 8, int(y.min()) - 8, int(x.max()) + 8, int(y.max()) + 8
    grid = np.stack(np.meshgrid(np.arange(left, right, 2), np.arange(top, bottom, 2)), axis=-1).reshape(-1, 2)
    assert coverage([polygon], grid, 2.0).sum() * 4 == pytest.approx(area, rel=0.15)
    assert coverage([polygon], grid + 1000, 2.0).sum() == 0


def test_real_patches_have_tissue(shared_data: Path) -> None:
    """The 89 real patches are tissue (fat and glass apart) to the mask that cuts slides, and none is a pen mark."""
    files = sorted((shared_data / "camelyon16" / "patches").glob("*/*.png"))
    assert len(files) == 89 and all(re.fullmatch(r"tumor_\d{3}_\d+_\d+\.png", f.name) for f in files)
    shares = [tissue_pixels(read_rgb(path)).mean() for path in files]
    assert sum(share > 0.5 for share in shares) >= 80
    assert max(pen_mask(read_rgb(path)[::8, ::8]).mean() for path in files) == 0


@pytest.mark.parametrize("break_it", ["nothing there", "no reference", "odd reference", "odd metadata"])
def test_unusable_layouts(tmp_path: Path, break_it: str) -> None:
    root = tmp_path / "c16"
    root.mkdir()
    message = "no Camelyon16 slides in"
    if break_it != "nothing there":
        miniature(root, normals=(1,), tumours=())
        if break_it == "no reference":
            (root / "testing/reference.csv").unlink()
            message = "has test slides but no reference.csv"
        elif break_it == "odd reference":
            (root / "testing/reference.csv").write_text("test_001,Maybe,IDC,Macro\n")
            message = "line 1: expected Tumor or Normal, got 'Maybe'"
        else:
            (root / "metadata.csv").write_text("slide_name,hospital_corrected\nnormal_001.tif,7\n")
            message = "hospital_corrected must be 0 or 1, got '7'"
    with pytest.raises(HistoddError, match=message):
        camelyon16.source(root, 0)
