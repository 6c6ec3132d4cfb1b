"""The dataset ``slides``: its table, labels from outlines, the rule for partly covered patches, splits, and what is refused."""

from pathlib import Path

import numpy as np
import pytest
from slide_makers import asap, corners, project, qupath, slide

from histodd_bench import cli
from histodd_bench.data import load_dataset, slides, store
from histodd_bench.data.jobs import SlideJob, Tiling
from histodd_bench.data.prepared import prepare
from histodd_bench.data.wsi import Slide
from histodd_bench.errors import HistoddError
from histodd_bench.progress import Progress

TILING = Tiling(256, 1.0)


def table(root: Path, *rows: str) -> Path:
    (root / "slides.csv").write_text("\n".join(rows) + "\n")
    return root


def by_place(root: Path, out: Path, tiling: Tiling = TILING) -> dict[tuple[int, int], str]:
    """Class of every training patch by column and row of the grid."""
    prepare(slides.source(root, 0), tiling, 16, out, progress=Progress.silent())
    columns, patches = store.load_columns(out / "train"), store.load(out / "train")
    return {
        (x // 256, y // 256): patches.classes[label]
        for x, y, label in zip(columns["x"].tolist(), columns["y"].tolist(), columns["labels"].tolist(), strict=True)
    }


@pytest.fixture
def annotated(tmp_path: Path) -> Path:
    """One slide of 4 x 3 patches; the outline covers the left column whole and 60 % of the next, less a cut-out patch."""
    slide(tmp_path / "a.tif")
    slide(tmp_path / "b.tif", seed=1)
    slide(tmp_path / "z.tif", seed=8)  # to be scored on
    return tmp_path


LEFT = (0, 0, 256 + 154, 768)  # 60 % of the second column
HOLE = (0, 512, 256, 768)


def test_patches_inside_have_the_label_and_those_outside_the_other(annotated: Path, tmp_path: Path) -> None:
    asap(annotated / "a.xml", ("Tumor", corners(LEFT)), ("_2", corners(HOLE)))
    table(annotated, "slide,label,annotation,outside,split", "a.tif,tumour,a.xml,normal,train", "b.tif,normal,,,test")
    got = by_place(annotated, tmp_path / "out")
    inside = {(0, 0), (0, 1), (1, 0), (1, 1), (1, 2)}
    outside = {(x, y) for x in (2, 3) for y in range(3)}
    assert {place for place, name in got.items() if name == "tumour"} == inside, "60 % counts, the cut-out does not"
    assert {place for place, name in got.items() if name == "normal"} == outside, "what was cut out is of neither class"


def test_partly_covered_patches_follow_the_shares(annotated: Path, tmp_path: Path) -> None:
    asap(annotated / "a.xml", ("Tumor", corners(LEFT)))
    table(annotated, "slide,label,annotation,outside,split", "a.tif,tumour,a.xml,normal,train", "b.tif,normal,,,test")
    strict = by_place(annotated, tmp_path / "o1", Tiling(256, 1.0, positive=0.75))
    assert {p for p, n in strict.items() if n == "tumour"} == {(0, y) for y in range(3)} and (1, 0) not in strict
    lax = by_place(annotated, tmp_path / "o2", Tiling(256, 1.0, positive=0.75, negative=0.7))
    assert lax[1, 0] == "normal"


def test_without_outside_only_outlines_count(annotated: Path, tmp_path: Path) -> None:
    asap(annotated / "a.xml", ("Tumor", corners(LEFT)))
    table(annotated, "slide,label,annotation,split", "a.tif,tumour,a.xml,train", "b.tif,normal,,train",
          "z.tif,normal,,test")  # fmt: skip
    got = by_place(annotated, tmp_path / "out")
    prepared = store.load(tmp_path / "out" / "train")
    assert prepared.class_counts() == [12, 6] and len(got) == 12


def test_classes_come_from_qupath_where_there_is_no_label(annotated: Path, tmp_path: Path) -> None:
    ring, lumen = corners((0, 0, 512, 512)), corners((0, 0, 256, 256))
    ignored, stroma = corners((768, 0, 1024, 256)), corners((512, 0, 1024, 768))
    qupath(annotated / "a.geojson", ("Tumour", [ring, lumen]), ("Stroma", [stroma]), ("Ignore*", [ignored]))
    qupath(annotated / "z.geojson", ("Stroma", [ring]))
    table(annotated, "slide,annotation,split", "a.tif,a.geojson,train", "z.tif,z.geojson,test")
    got = by_place(annotated, tmp_path / "out")
    assert {p for p, n in got.items() if n == "Tumour"} == {(1, 0), (0, 1), (1, 1)}
    assert {p for p, n in got.items() if n == "Stroma"} == {(2, 0), (2, 1), (2, 2), (3, 1), (3, 2)}


def test_smaller_outlines_win_within_larger_ones(annotated: Path, tmp_path: Path) -> None:
    qupath(annotated / "a.geojson", ("Tumour", [corners((0, 0, 1024, 768))]), ("Stroma", [corners((0, 0, 256, 256))]))
    qupath(annotated / "z.geojson", ("Stroma", [corners((0, 0, 512, 512))]))
    table(annotated, "slide,annotation,split", "a.tif,a.geojson,train", "z.tif,z.geojson,test")
    got = by_place(annotated, tmp_path / "out")
    assert got[0, 0] == "Stroma" and got[1, 1] == "Tumour"
    qupath(annotated / "a.geojson", ("Stroma", [corners((0, 0, 1024, 768))]), ("Tumour", [corners((0, 0, 256, 256))]))
    got = by_place(annotated, tmp_path / "out2")
    assert got[0, 0] == "Tumour" and got[1, 1] == "Stroma"


def test_broken_annotations_leave_out_their_slide_only(annotated: Path, tmp_path: Path) -> None:
    for name in ("c.tif", "d.tif"):
        slide(annotated / name, seed=2)
    (annotated / "c.xml").write_text("<ASAP_Annotations><Annotations>")
    asap(annotated / "a.xml", ("Tumor", corners(LEFT)))
    asap(annotated / "d.xml", ("Tumor", [(0, 0), (100, 100)]))
    table(annotated, "slide,label,annotation,outside,split", "a.tif,tumour,a.xml,normal,train", "b.tif,normal,,,train",
          "c.tif,tumour,c.xml,normal,train", "d.tif,tumour,d.xml,normal,test", "z.tif,normal,,,test")  # fmt: skip
    outcome = prepare(slides.source(annotated, 0), Tiling(256, 1.0), 16, tmp_path / "o", progress=Progress.silent())
    assert outcome.failed["c.tif"].startswith("no readable annotation XML")
    assert outcome.failed["d.tif"] == "annotation 'Annotation 0' is no area: it has 2 points, or not finite ones"
    assert len(store.load(tmp_path / "o" / "train")) == 6 + 6 + 12 - 0


def test_tissue_decides_what_becomes_a_patch(tmp_path: Path) -> None:
    slide(tmp_path / "a.tif", tissue=(0, 0, 640, 768))  # 2.5 columns of 4
    slide(tmp_path / "b.tif", seed=1)
    slide(tmp_path / "z.tif", seed=8)
    table(tmp_path, "slide,label,split", "a.tif,x,train", "b.tif,y,train", "z.tif,y,test")
    got = [by_place(tmp_path, tmp_path / f"o{t}", Tiling(256, 1.0, min_tissue=t)) for t in (0.4, 0.6)]
    counts = [store.load(tmp_path / f"o{t}" / "train").class_counts() for t in (0.4, 0.6)]
    assert counts == [[9, 12], [6, 12]] and all(len(g) == 12 for g in got)


def test_scales_come_from_the_table_for_files_without_one(shared_data: Path, tmp_path: Path) -> None:
    wsi = shared_data / "wsi"
    table(
        tmp_path,
        "slide,label,split,mpp",
        f"{wsi}/CMU-1-Small-Region.svs,a,train,",
        f"{wsi}/tcga-cr-7395-01a-01-ts1.svs,b,train,0.5",
        "z.tif,a,test,",
    )
    slide(tmp_path / "z.tif")
    outcome = prepare(slides.source(tmp_path, 0), Tiling(224, 1.0), 56, tmp_path / "o", progress=Progress.silent())
    assert not outcome.failed
    columns = store.load_columns(tmp_path / "o" / "train")
    assert set(columns["mpp"]) == {4.0}
    for name, index in zip(store.slide_names(tmp_path / "o" / "train"), range(2), strict=True):
        here = columns["slides"] == index
        mpp = 0.499 if "CMU" in name else 0.5
        steps = np.unique(np.diff(np.unique(columns["x"][here])))
        assert set(steps) <= {round(224 / mpp), round(224 / mpp) - 1, round(224 / mpp) + 1, 2 * round(224 / mpp)}
        assert set(columns["level"][here]) == ({0} if "CMU" in name else {1})
    with Slide(wsi / "CMU-1-Small-Region.svs") as opened:
        n = np.sum([columns["slides"] == 0])
        assert 0 < n <= len(opened.grid(224, 1.0))


def test_real_rejected_files_are_named_and_the_rest_goes_on(shared_data: Path, tmp_path: Path) -> None:
    wsi = shared_data / "wsi"
    rows = [
        f"{wsi}/rejected/kidney-48-5.tif,a,train,",
        f"{wsi}/rejected/smalltif.tif,b,train,",
        f"{wsi}/small_HE_levels.tiff,a,train,",
    ]
    rows += [f"{wsi}/CMU-1-Small-Region.svs,a,train,", f"{wsi}/tcga-cr-7395-01a-01-ts1.svs,b,train,0.5"]
    table(tmp_path, "slide,label,split,mpp", *rows)
    outcome = prepare(slides.source(tmp_path, 0), Tiling(256, 1.0), 32, tmp_path / "o", progress=Progress.silent())
    assert {Path(name).name for name in outcome.failed} == {"kidney-48-5.tif", "smalltif.tif", "small_HE_levels.tiff"}
    notes = store.read_dataset(tmp_path / "o")["notes"]
    assert len(notes) == 2 and notes[1].startswith("3 of 5 slides could not be used: ")
    assert min(store.load(tmp_path / "o" / "train").class_counts()) > 4


def test_the_split_is_by_patient_and_seed(tmp_path: Path) -> None:
    project(tmp_path)
    text = (tmp_path / "slides.csv").read_text().replace(",train,", ",,").replace(",test,", ",,")
    (tmp_path / "slides.csv").write_text(text.replace(",p1,", ",p0,"))
    first, again, other = (slides.source(tmp_path, seed) for seed in (0, 0, 3))
    sides = [{job.slide: job.split for job in s.jobs} for s in (first, again, other)]
    assert sides[0] == sides[1] and sides[0]["s0.tif"] == sides[0]["s1.tif"]
    assert set(sides[0].values()) == {"train", "test"} and "drawn with seed 0" in first.notes[0]


def test_a_slide_that_is_not_there_and_one_listed_twice_are_said(tmp_path: Path) -> None:
    project(tmp_path)
    with open(tmp_path / "slides.csv", "a") as file:
        file.write("gone.svs,benign,train,p9,A\ns0.tif,benign,train,p0,A\n")
    found = slides.source(tmp_path, 0)
    assert len(found.jobs) == 6
    assert found.notes == (
        "1 slides are listed twice in slides.csv and used once: s0.tif",
        "1 of 7 slides of slides.csv are not there: gone.svs",
    )


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["image,label", "s0.tif,x"], "has no column 'slide'"),
        (["slide,label", "gone.tif,x"], "lists 1 slides and none is there"),
        (["slide,label", "s0.tif,x"], "slides.csv has one class only"),
        (
            ["slide,label", "s0.tif,x", "s1,y"],
            "slides.csv: 1 of 2 slides of slides.csv are not there: s1: s1 must be written with its ending, as s1.tif; "
            "what is left has one class only",
        ),
        (["slide,label", "s0,x", "s1,y"], "lists 2 slides and none is there: s0 must be written .* as s0.tif"),
        (
            ["slide,label,patient", "s0.tif,x,p", "s1.tif,y,p", "gone.tif,y,q"],
            "1 of 3 slides of slides.csv are not there: gone.tif; what is left has one patient only",
        ),
        (["slide,label", "s0.tif,", "s1.tif,x"], "line 2: s0.tif has neither label nor annotation"),
        (["slide,label", ",x"], "line 2: no slide is named"),
        (
            ["slide,label", "s0.tif,x", "s1.tif,y", "s0.tif,y"],
            "line 4: s0.tif is listed again with another label than on line 2",
        ),
        (["slide,label,split", "s0.tif,x,train", "s1.tif,y,valid"], "line 3: split must be train or test, got 'valid'"),
        (["slide,label,split", "s0.tif,x,train", "s1.tif,y,"], "line 3: split must be train or test"),
        (
            ["slide,label,split,patient", "s0.tif,x,train,p", "s1.tif,y,test,p"],
            "patient p has slides in train and in test",
        ),
        (["slide,label,patient", "s0.tif,x,p", "s1.tif,y,p"], "one patient only"),
        (
            ["slide,label", "s0.tif,Tumour", "s1.tif,tumour"],
            "the classes 'Tumour' and 'tumour' differ only in case: write them alike",
        ),
        (["slide,label,mpp", "s0.tif,x,352.9", "s1.tif,y,"], "line 2: mpp must be microns per pixel"),
        (["slide,label,mpp", "s0.tif,x,wide", "s1.tif,y,"], "line 2: mpp must be microns per pixel"),
    ],
)
def test_tables_that_cannot_be_used(tmp_path: Path, rows: list[str], message: str) -> None:
    for i in range(2):
        slide(tmp_path / f"s{i}.tif", size=(300, 300), seed=i, levels=1)
    table(tmp_path, *rows)
    with pytest.raises(HistoddError, match=message) as error:
        slides.source(tmp_path, 0)
    assert "slides.csv" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("misnamed", "meant"),
    [("patient_id", "patient"), ("PatientID", "patient"), ("Patient ID", "patient"), ("patients", "patient"), ("case", "patient"),
     ("center", "centre"), ("centre_id", "centre"), ("labels", "label"), ("annotations", "annotation")],
)  # fmt: skip
def test_a_column_that_is_nearly_one_of_ours_is_refused(tmp_path: Path, misnamed: str, meant: str) -> None:
    project(tmp_path)
    text = (tmp_path / "slides.csv").read_text()
    header = "slide,label,split,patient,centre"
    if meant in header:
        (tmp_path / "slides.csv").write_text(text.replace(meant, misnamed, 1))
    else:
        (tmp_path / "slides.csv").write_text(text.replace("\n", ",\n").replace(",\n", f",{misnamed}\n", 1))
    with pytest.raises(HistoddError, match=rf"has a column '{misnamed.lower()}'.* rename it to '{meant}'"):
        slides.source(tmp_path, 0)


def test_other_columns_and_other_ways_to_write_them_are_fine(tmp_path: Path) -> None:
    project(tmp_path)
    plain = slides.source(tmp_path, 0)
    text = (tmp_path / "slides.csv").read_text()
    (tmp_path / "slides.csv").write_text(text.replace("slide,label,split,patient,", "Slide, LABEL ,split,Patient ,", 1))
    assert slides.source(tmp_path, 0) == plain
    more = text.replace("\n", ",,\n").replace(",,\n", ",patient_id,scanner\n", 1)
    (tmp_path / "slides.csv").write_text(more)
    assert slides.source(tmp_path, 0) == plain, "patient is there: patient_id beside it is somebody's own"
    for separator in ";\t":
        (tmp_path / "slides.csv").write_text(text.replace(",", separator), encoding="utf-8-sig")
        assert slides.source(tmp_path, 0) == plain
    (tmp_path / "slides.csv").write_text(text.replace("centre", "label", 1))
    with pytest.raises(HistoddError, match="two columns 'label'"):
        slides.source(tmp_path, 0)


def test_slides_without_patients_are_a_warning(tmp_path: Path) -> None:
    project(tmp_path)
    assert not any("WARNING" in note for note in slides.source(tmp_path, 0).notes)
    text = (tmp_path / "slides.csv").read_text()
    (tmp_path / "slides.csv").write_text(text.replace(",p1,", ",,"))
    assert slides.source(tmp_path, 0).notes == (
        "WARNING: 1 slides have no patient in slides.csv and count as their own: s1.tif",
    )
    (tmp_path / "slides.csv").write_text(text.replace("patient", "scanner", 1))
    found = slides.source(tmp_path, 0)
    assert found.notes[0].startswith("WARNING: slides.csv names no patients: every slide counts as its own patient")
    assert [job.patient for job in found.jobs] == [job.slide for job in found.jobs]


def test_outlines_and_labels_that_differ_only_in_case(annotated: Path) -> None:
    qupath(annotated / "a.geojson", ("TUMOUR", [corners((0, 0, 512, 512))]))
    table(annotated, "slide,label,annotation", "a.tif,,a.geojson", "b.tif,tumour,", "z.tif,normal,")
    with pytest.raises(HistoddError, match=r"slides.csv: the classes 'TUMOUR' and 'tumour' differ only in case"):
        slides.source(annotated, 0)


def test_a_class_that_the_test_slides_lack_is_a_warning(
    annotated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slide(annotated / "y.tif", seed=9)
    table(annotated, "slide,label,split", "a.tif,tumour,train", "b.tif,normal,train", "z.tif,normal,test", "y.tif,normal,test")
    arguments = ["data", "prepare", "slides", "--root", str(annotated), "--out", str(tmp_path / "o"), "--workers", "1"]
    warning = "WARNING: the test set has no patch of class tumour: balanced accuracy covers only the class that is there"
    assert cli.main([*arguments, "--image-size", "16", "--dry-run"]) == 0
    assert capsys.readouterr().err.count(warning) == 1, "before hours of work"
    assert cli.main([*arguments, "--image-size", "16"]) == 0
    assert capsys.readouterr().out.count(f"note: {warning}, and AUC is left out\n") == 1
    data = load_dataset("slides", root=annotated, image_size=16, cache=tmp_path / "c", progress=Progress.silent())
    assert sum(warning in note for note in data.notes) == 1


def test_no_table_or_no_text(tmp_path: Path) -> None:
    with pytest.raises(HistoddError, match=r"slides.csv is missing: .* with the columns slide .*label, split, patient"):
        slides.source(tmp_path, 0)
    (tmp_path / "slides.csv").write_bytes(b"slide,label\n\xff\xfe,x\n")
    with pytest.raises(HistoddError, match="cannot be read"):
        slides.source(tmp_path, 0)


def test_it_loads_like_any_dataset(tmp_path: Path) -> None:
    project(tmp_path / "p")
    data = load_dataset("slides", root=tmp_path / "p", image_size=32, cache=tmp_path / "c", progress=Progress.silent())
    again = load_dataset("slides", root=tmp_path / "p", image_size=32, cache=tmp_path / "c", progress=Progress.silent())
    assert len(data.train) == 48 and data.train.fingerprint() == again.train.fingerprint()
    assert data.preprocessing is not None and not list((tmp_path / "c").glob("slides-slides-*"))


def test_overlapping_patches(tmp_path: Path) -> None:
    slide(tmp_path / "a.tif")
    job = SlideJob("a", tmp_path / "a.tif", "a", "train", label=0)
    assert job.count(Tiling(256, 1.0, stride=128), ("x",)) == [7 * 5]
    assert job.count(Tiling(256, 2.0), ("x",)) == [2], "512 microns: 2 x 1 of 1024 x 768"
