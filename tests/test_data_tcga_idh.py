"""TCGA-IDH: the paper's facts, patients kept together, tables that disagree, and a miniature from end to end."""

from pathlib import Path

import pytest
from slide_makers import slide

from histodd_bench.data import load_dataset, tcga_idh
from histodd_bench.errors import HistoddError
from histodd_bench.progress import Progress


def name(patient: int, slide: int = 1) -> str:
    return f"TCGA-{patient:02d}-A{patient:03d}-01Z-00-DX{slide}.{patient:08x}-0000-4000-8000-{slide:012x}"


def miniature(root: Path, patients: int = 8, *, size: tuple[int, int] = (2048, 1024)) -> Path:
    """Slides of 1 x 2 patches of 1,024 px at 10x; patient 0 has two slides; labels alternate."""
    names = [name(i) for i in range(patients)] + [name(0, 2)]
    for index, each in enumerate(names):
        slide(root / "slides" / f"{each}.svs", size=size, seed=index)
    rows = [f"{each}.svs,{('MU', 'WT')[int(each[5:7]) % 2]}" for each in names]
    (root / "labels.csv").write_text("slide_id,label\n" + "\n".join(rows) + "\n")
    return root


def test_the_paper_s_facts() -> None:
    assert tcga_idh.SLIDES == {"train": (477, 714), "test": (59, 90)}
    assert (sum(tcga_idh.SLIDES["train"]), sum(tcga_idh.SLIDES["test"])) == (1191, 149)
    assert (tcga_idh.TILING.size, tcga_idh.TILING.mpp, tcga_idh.TILING.min_tissue) == (1024, 1.0, 0.5)
    assert tcga_idh.CLASSES == ("MU", "WT")


def test_a_miniature_from_slides_to_patches(tmp_path: Path) -> None:
    root = miniature(tmp_path / "tcga")
    data = load_dataset("tcga-idh", root=root, image_size=32, cache=tmp_path / "c", progress=Progress.silent())
    assert data.train.classes == ("MU", "WT") and data.train.image_size == (32, 32)
    assert len(data.train) + len(data.test) == 9 * 2
    groups = [{s.group_names[g] for g in s.groups} for s in (data.train, data.test)]
    assert not groups[0] & groups[1] and all(len(g) == 12 for g in groups[0] | groups[1])
    for part in (data.train, data.test):
        for label, group in zip(part.labels.tolist(), part.groups.tolist(), strict=True):
            assert label == int(part.group_names[group][5:7]) % 2
    assert any("1 of 8 patients are the test set, drawn with seed 0" in note for note in data.notes)


def test_the_split_follows_the_seed_and_keeps_patients_whole(tmp_path: Path) -> None:
    root = miniature(tmp_path / "tcga", size=(64, 64))
    sides = [{j.slide: j.split for j in tcga_idh.source(root, seed).jobs} for seed in (1, 1, 2, 3, 4)]
    assert sides[0] == sides[1] and len({tuple(sorted(s.items())) for s in sides}) > 1
    assert all(s[name(0)] == s[name(0, 2)] for s in sides)


def test_the_users_own_split(tmp_path: Path) -> None:
    root = miniature(tmp_path / "tcga", size=(64, 64))
    rows = [f"{name(i)[:12]},{'test' if i in (2, 3) else 'train'}" for i in range(7)]
    (root / "split.csv").write_text("patient,split\n" + "\n".join(rows) + "\n")
    found = tcga_idh.source(root, 0)
    assert {j.slide for j in found.jobs if j.split == "test"} == {name(2), name(3)}
    assert found.notes == (f"1 slides are not in split.csv and are left out: {name(7)}",)
    (root / "split.csv").write_text(f"slide_id,split\n{name(0)}.svs,train\n{name(0, 2).partition('.')[0]},test\n")
    with pytest.raises(HistoddError, match="has slides in train and in test"):
        tcga_idh.source(root, 0)


def test_labels_may_name_slides_in_three_ways(tmp_path: Path) -> None:
    root = miniature(tmp_path / "tcga", patients=3, size=(64, 64))
    (root / "labels.csv").write_text(
        f"slide_id,label\n{name(0)},mutant\n{name(1)}.svs,Wildtype\n{name(2).partition('.')[0]},0\nTCGA-99-ZZZZ-01Z-00-DX1,MU\n"
    )
    found = tcga_idh.source(root, 0)
    assert {j.slide: j.label for j in found.jobs} == {name(0): 0, name(1): 1, name(2): 1}
    assert found.notes[:2] == (
        "1 slides of labels.csv are not there: TCGA-99-ZZZZ-01Z-00-DX1",
        f"1 slides are not in labels.csv and are left out: {name(0, 2)}",
    )


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (None, "must have the columns slide_id and label"),
        ("slide,label\n", "has no column 'slide_id'"),
        ("slide_id,label\nTCGA-00,MU\n", "lists none of the 4 slides"),
        (f"slide_id,label\n{name(0)},maybe\n", "line 2: label must be MU or WT, got 'maybe'"),
        (f"slide_id,label\n{name(0)},MU\n{name(0)}.svs,WT\n", "line 3: .* is listed twice with different labels"),
        (f"slide_id,label\n{name(0)},MU\n", "one patient only"),
    ],
)
def test_labels_that_cannot_be_used(tmp_path: Path, labels: str | None, message: str) -> None:
    root = miniature(tmp_path / "tcga", patients=3, size=(64, 64))
    (root / "labels.csv").unlink()
    if labels is not None:
        (root / "labels.csv").write_text(labels)
    with pytest.raises(HistoddError, match=message):
        tcga_idh.source(root, 0)


def test_nothing_there_and_one_slide_twice(tmp_path: Path) -> None:
    with pytest.raises(HistoddError, match="no TCGA slides in"):
        tcga_idh.source(tmp_path, 0)
    root = miniature(tmp_path / "tcga", patients=3, size=(64, 64))
    (root / "again").mkdir()
    (root / "again" / f"{name(1)}.svs").write_bytes((root / "slides" / f"{name(1)}.svs").read_bytes())
    found = tcga_idh.source(root, 0)
    assert len(found.jobs) == 4 and found.notes[0].startswith("1 slides are there twice and used once")
