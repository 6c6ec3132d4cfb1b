"""data prepare: the same patches whatever the workers; what is stored; estimates; what the command says."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from prepared_slides import SMALL, fingerprints, prepared, silent

from histodd_bench import cli
from histodd_bench.data import load_dataset, slides, store
from histodd_bench.data.extract import estimate
from histodd_bench.data.wsi import Slide
from histodd_bench.errors import UsageError
from histodd_bench.stain import describe


def test_every_patch_is_the_slide_at_its_place(slide_project: Path, prepared_project: Path) -> None:
    for split, count in (("train", 4 * 12), ("test", 2 * 12)):
        patches, columns = store.load(prepared_project / split), store.load_columns(prepared_project / split)
        names = store.slide_names(prepared_project / split)
        assert len(patches) == count and patches.classes == ("benign", "malignant")
        assert set(columns) == {"labels", "groups", "centres", "slides", "x", "y", "level", "mpp"}
        assert set(columns["mpp"]) == {4.0} and set(columns["level"]) == {0}
        for i in range(0, count, 7):
            name = names[columns["slides"][i]]
            with Slide(slide_project / name) as opened:
                seen = opened.read(int(columns["x"][i]), int(columns["y"][i]), 64, 64, 4.0)
            assert np.abs(patches.images[i].permute(1, 2, 0).numpy().astype(int) - seen).mean() < 2
            index = int(name[1])
            assert patches.classes[patches.labels[i]] == ("benign", "malignant")[index % 2]
            assert patches.group_names[patches.groups[i]] == f"p{index}"
            assert patches.centre_names[patches.centres[i]] == "AB"[index // 2 % 2]


def test_patches_are_ordered_by_class_slide_and_place(prepared_project: Path) -> None:
    columns, names = store.load_columns(prepared_project / "train"), store.slide_names(prepared_project / "train")
    rows = list(zip(columns["labels"], [names[i] for i in columns["slides"]], columns["y"], columns["x"], strict=True))
    assert rows == sorted(rows)


@pytest.mark.parametrize("workers", [2, 3])
def test_workers_do_not_change_a_byte(slide_project: Path, prepared_project: Path, tmp_path: Path, workers: int) -> None:
    outcome = prepared(slide_project, tmp_path / "out", workers=workers)
    assert outcome.patches == 72 and outcome.new == 6 and not outcome.failed
    assert fingerprints(tmp_path / "out") == fingerprints(prepared_project)


def test_somebody_elses_dataset_json_is_not_ours(slide_project: Path, tmp_path: Path) -> None:
    shutil.copytree(slide_project, tmp_path / "p")
    (tmp_path / "p" / "dataset.json").write_text('{"name": "my slides"}')
    data = load_dataset("slides", root=tmp_path / "p", image_size=16, cache=tmp_path / "c", progress=silent())
    assert len(data.train) == 48


def test_the_template_is_stored_with_the_dataset(prepared_project: Path, tmp_path: Path) -> None:
    train = store.load(prepared_project / "train")
    kept = json.loads((prepared_project / "template.json").read_text())
    expected = describe(train)
    assert kept["index"] == expected.template_index and kept["train"] == train.fingerprint()
    x = train.images.double() / 255
    # By hand: the patch whose channel means and standard deviations are nearest to the set's, among those that can be fitted.
    ours = torch.cat([x.mean((2, 3)), x.std((2, 3), correction=0)], 1)
    sets = torch.cat([x.mean((0, 2, 3)), x.transpose(0, 1).flatten(1).std(1, correction=0)])
    order = (ours - sets).square().sum(1).argsort()
    assert kept["index"] in order[:8].tolist()
    names, columns = store.slide_names(prepared_project / "train"), store.load_columns(prepared_project / "train")
    assert kept["slide"] == names[columns["slides"][kept["index"]]] and kept["x"] == columns["x"][kept["index"]]
    data = load_dataset("slides", root=prepared_project, image_size=64, cache=tmp_path, progress=silent())
    assert data.preprocessing == expected, "what is stored is what would be found, bit for bit"


def test_a_template_of_other_patches_is_not_used(prepared_project: Path, tmp_path: Path) -> None:
    shutil.copytree(prepared_project, tmp_path / "copy")
    kept = json.loads((tmp_path / "copy" / "template.json").read_text())
    (tmp_path / "copy" / "template.json").write_text(json.dumps({**kept, "train": "0" * 64}))
    assert (
        load_dataset("slides", root=tmp_path / "copy", image_size=64, cache=tmp_path, progress=silent()).preprocessing
        is None
    )
    (tmp_path / "copy" / "template.json").write_text("{")
    assert (
        load_dataset("slides", root=tmp_path / "copy", image_size=64, cache=tmp_path, progress=silent()).preprocessing
        is None
    )


def test_a_prepared_set_opens_at_any_size_and_under_its_own_name_only(prepared_project: Path, tmp_path: Path) -> None:
    data = load_dataset("slides", root=prepared_project, image_size=64, cache=tmp_path, progress=silent())
    assert [data.train.fingerprint(), data.test.fingerprint()] == fingerprints(prepared_project) and not list(tmp_path.iterdir())
    small = load_dataset("slides", root=prepared_project, image_size=32, cache=tmp_path, workers=2, progress=silent())
    box = data.train.images.float().unfold(2, 2, 2).unfold(3, 2, 2).mean((4, 5))
    assert (small.train.images.float() - box).abs().max() <= 0.51
    assert torch.equal(small.train.groups, data.train.groups) and small.train.centre_names == ("A", "B")
    larger = load_dataset("slides", root=prepared_project, image_size=96, cache=tmp_path, progress=silent())
    assert "72 of 72 patches are enlarged from 64 to 96 px" in larger.notes
    with pytest.raises(UsageError, match="prepared from 'slides': use --dataset slides"):
        load_dataset("camelyon16", root=prepared_project, image_size=64, cache=tmp_path, progress=silent())


def test_patches_of_slides_that_are_enlarged_are_counted(
    slide_project: Path, prepared_project: Path, tmp_path: Path
) -> None:
    prepared(slide_project, tmp_path / "larger", size=260)
    assert "72 of 72 patches are enlarged from 256 to 260 px" in store.read_dataset(tmp_path / "larger")["notes"]
    assert not any("enlarged" in note for note in store.read_dataset(prepared_project)["notes"])


def test_dry_run_counts_what_extraction_gives(
    slide_project: Path, prepared_project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    counts, failed = estimate(slides.source(slide_project, 0), SMALL, progress=silent())
    assert not failed and {name: sum(values) for name, values in counts.items()} == {f"s{i}.tif": 12 for i in range(6)}
    out = tmp_path / "none"
    assert cli.main(["data", "prepare", "slides", "--root", str(slide_project), "--out", str(out), "--image-size", "64",
                     "--workers", "1", "--dry-run"]) == 0  # fmt: skip
    text = capsys.readouterr().out
    assert "train: 4 slides, 48 patches (benign 24, malignant 24)" in text and "72 patches of 64 px: 889 kB" in text
    assert not out.exists()
    actual = sum(p.stat().st_size for split in ("train", "test") for p in (prepared_project / split).iterdir())
    assert actual == pytest.approx(889_000, rel=0.03)


def test_the_command_reports_and_info_describes(slide_project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["data", "prepare", "slides", "--root", str(slide_project), "--out", str(tmp_path / "o"), "--workers", "1"]
    assert cli.main([*arguments, "--magnification", "10", "--size", "128", "--stride", "256", "--shard", "2/2"]) == 0
    assert "part 2/2 is done" in capsys.readouterr().out
    assert cli.main([*arguments, "--magnification", "10", "--size", "128", "--stride", "256"]) == 0
    text = capsys.readouterr().out
    assert (
        "3 slides read in" in text and "patches/s" in text and "ready: run table1 --dataset slides --data-root" in text
    )
    assert cli.main(["data", "info", "slides", "--root", str(tmp_path / "o")]) == 0
    text = capsys.readouterr().out
    assert "patches of malignant" in text and "stain template: training patch" in text
    assert cli.main(["data", "info", "slides", "--root", str(slide_project)]) == 0
    rows = dict(
        line.strip().rsplit(None, 2)[:2]
        for line in capsys.readouterr().out.splitlines()
        if line.rstrip().endswith((" 2", " 1"))
    )
    assert rows["slides"] == "4" and rows["slides with benign"] == "2" and rows["slides of A"] == "2"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--shard", "3/2"], "argument --shard: must be I/N"),
        (["--shard", "x"], "argument --shard: must be I/N"),
        (["--workers", "0"], "argument --workers: must be a whole number above 0, got '0'"),
        (["--workers", "-2"], "--workers"),
        (["--split-seed", "-1"], "--split-seed"),
        (["--split-seed", "1.5"], "argument --split-seed: must be a whole number from 0"),
        (["--shard", "1/2", "--dry-run"], "--dry-run looks at all slides"),
        (["--coords", ".", "--stride", "9"], "--stride and --min-tissue do not go with it"),
        (["--coords", ".", "--min-tissue", "0"], "--stride and --min-tissue do not go with it"),
        (["--magnification", "20", "--target-mpp", "0.5"], "say the same"),
        (["--magnification", "0"], "argument --magnification: must be a number above 0"),
        (["--magnification", "nan"], "argument --magnification: must be a number above 0"),
        (["--magnification", "900"], "not a microscope's"),
        (["--mpp", "352.9"], "--mpp: 352.9 microns per pixel is not a microscope's"),
        (["--size", "0"], "argument --size: must be"),
        (["--size", "9000"], "--size must be 1 to 4096"),
        (["--min-tissue", "1.5"], "--min-tissue must be"),
        (["--positive", "0.1", "--negative", "0.2"], "0 <= negative < positive <= 1"),
        (["--coords", "/nowhere"], "--coords /nowhere is not a folder"),
        (["--image-size", "-3"], "--image-size"),
    ],
)
def test_wrong_options_are_one_line(
    slide_project: Path, tmp_path: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["data", "prepare", "slides", "--root", str(slide_project), "--out", str(tmp_path / "o"), *options]) == 2
    line = capsys.readouterr().err.strip()
    assert message in line and "\n" not in line and not (tmp_path / "o").exists()


def test_names_and_roots_are_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--out", str(tmp_path / "o")]
    assert cli.main(["data", "prepare", "camelion16", *out]) == 2
    assert "did you mean 'camelyon16'?" in capsys.readouterr().err
    assert cli.main(["data", "prepare", "camelyon16", *out]) == 2
    assert "say where they are with --root" in capsys.readouterr().err
    assert cli.main(["data", "prepare", "camelyon16", "--root", str(tmp_path / "x"), *out]) == 2
    assert "is not a folder" in capsys.readouterr().err
    assert cli.main(["data", "prepare", "imagefolder", "--root", str(tmp_path), *out, "--size", "3"]) == 2
    assert "--size is for data sets that consist of slides" in capsys.readouterr().err
    assert cli.main(["data", "export", str(tmp_path), "--to", "imagefolder", *out]) == 2
    assert "not a prepared data set" in capsys.readouterr().err


def test_a_dataset_of_files_is_prepared_too(
    shared_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for patient in sorted(os.listdir(shared_data / "idc"))[:6]:
        shutil.copytree(shared_data / "idc" / patient, tmp_path / "idc" / patient)
    arguments = [
        "data",
        "prepare",
        "idc",
        "--root",
        str(tmp_path / "idc"),
        "--out",
        str(tmp_path / "o"),
        "--workers",
        "1",
    ]
    assert cli.main(arguments) == 0
    direct = load_dataset("idc", root=tmp_path / "idc", image_size=50, cache=tmp_path / "c", progress=silent())
    data = load_dataset("idc", root=tmp_path / "o", image_size=50, cache=tmp_path / "c", progress=silent())
    assert data.train.fingerprint() == direct.train.fingerprint() and data.notes == direct.notes
    assert data.preprocessing == describe(direct.train)
    assert not (tmp_path / "o" / "work").exists()
    assert cli.main(arguments) == 0 and "already prepared" in capsys.readouterr().err
