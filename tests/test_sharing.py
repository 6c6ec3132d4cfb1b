"""Sets that are handed on: what goes along, what stays behind, and what is refused on arrival."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_sets import CLASSES, patch_set

from histodd_bench import cli, sets
from histodd_bench.errors import HistoddError
from histodd_bench.files import sha256
from histodd_bench.sharing import export_set, import_set


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A distilled set with the real patches that it began with."""
    work = tmp_path / "work"
    work.mkdir()
    save_file({"images": torch.zeros(6, 3, 8, 8)}, work / "initial.safetensors")
    (work / "history.json").write_text("[]")
    card = {"method": "histodd", "dataset": "demo", "ipc": 3, "seconds": {"total": 2.0}, "config": {"set": {"ipc": 3}},
            "source": {"patches": 90, "slides": 4}}  # fmt: skip
    sets.save(patch_set(), tmp_path / "set", card, workdir=work)
    return tmp_path / "set"


def test_export_leaves_behind_what_says_whose_slides_they_were(saved: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export_set(saved, out)
    assert sorted(p.name for p in out.iterdir()) == ["card.json", "images.safetensors", "patches"]
    text = (out / "card.json").read_text()
    card = json.loads(text)
    assert card["group_names"] == [f"slide-{i}" for i in range(1, 7)] and card["centre_names"] == []
    assert "slide10" in (saved / "card.json").read_text() and "slide10" not in text and str(tmp_path) not in text
    assert card["source"] == {"patches": 90, "slides": 4} and card["shared"] == {"real_patches": False}
    assert set(load_file(out / "images.safetensors")) == {"images", "labels", "groups"}
    assert torch.equal(sets.load(out).patches.images, sets.load(saved).patches.images)


def test_what_was_exported_comes_in_bit_for_bit_and_can_be_used(saved: Path, tmp_path: Path, capsys) -> None:
    assert cli.main(["export", str(saved), "--out", str(tmp_path / "shared")]) == 0
    shutil.move(tmp_path / "shared", tmp_path / "elsewhere")
    assert cli.main(["import", str(tmp_path / "elsewhere"), "--out", str(tmp_path / "in")]) == 0
    assert "3 normal, 3 tumour" in capsys.readouterr().out
    back = sets.load_any(tmp_path / "in", CLASSES, 8)
    assert torch.equal(back.images, sets.load(saved).patches.images)
    card = json.loads((tmp_path / "in" / "card.json").read_text())
    assert card["imported"]["checksum"] == card["checksums"]["images.safetensors"]
    assert cli.main(["import", str(tmp_path / "elsewhere"), "--out", str(tmp_path / "in")]) == 1
    assert "imported already" in capsys.readouterr().err


def test_what_changed_on_the_way_is_refused_and_nothing_is_written(saved: Path, tmp_path: Path) -> None:
    export_set(saved, tmp_path / "shared")
    tensors = load_file(tmp_path / "shared" / "images.safetensors")
    tensors["images"][0, 0, 0, 0] = 0.123
    save_file(tensors, tmp_path / "shared" / "images.safetensors")
    with pytest.raises(HistoddError, match="has changed since"):
        import_set(tmp_path / "shared", tmp_path / "in")
    card = json.loads((tmp_path / "shared" / "card.json").read_text())
    card["checksums"] = {}  # a sender who would rather not be checked
    (tmp_path / "shared" / "card.json").write_text(json.dumps(card))
    with pytest.raises(HistoddError, match="no checksum"):
        import_set(tmp_path / "shared", tmp_path / "in")
    assert not (tmp_path / "in").exists()


@pytest.mark.parametrize("bad", ["nan", "label", "shape"])
def test_patches_that_no_set_can_hold_are_refused_though_their_checksum_is_right(
    saved: Path, tmp_path: Path, bad: str
) -> None:
    export_set(saved, tmp_path / "shared")
    path = tmp_path / "shared" / "images.safetensors"
    tensors, card = load_file(path), json.loads((tmp_path / "shared" / "card.json").read_text())
    if bad == "nan":
        tensors["images"][1] = float("nan")
    elif bad == "label":
        tensors["labels"][0] = 7
    else:
        card["shape"] = [6, 3, 9, 9]
    save_file(tensors, path)
    card["checksums"]["images.safetensors"] = sha256(path)
    (tmp_path / "shared" / "card.json").write_text(json.dumps(card))
    with pytest.raises(HistoddError):
        import_set(tmp_path / "shared", tmp_path / "in")
    assert not (tmp_path / "in").exists()


def test_slides_become_one_set(tmp_path: Path, capsys) -> None:
    folder = tmp_path / "slides"
    folder.mkdir()
    rows = {}
    for i, name in enumerate(("patient-A", "patient-B")):
        save_file({"images": torch.full((i + 1, 3, 8, 8), 0.5), "labels": torch.full((i + 1,), i)}, folder / f"{i}.safetensors")
        rows[name] = {"file": f"{i}.safetensors", "had": [10 * (1 - i), 20 * i], "seconds": 1.5, "kept": [], "capped": {}}
    index = {"slides": rows, "missing": [], "classes": list(CLASSES), "method": "histodd", "dataset": "demo", "config": {}}
    (folder / "slides.json").write_text(json.dumps(index))
    assert cli.main(["export", str(folder), "--out", str(tmp_path / "out")]) == 0
    assert "30 patches of 2 slides" in capsys.readouterr().out
    made = sets.load(tmp_path / "out")
    assert made.patches.labels.tolist() == [0, 1, 1] and made.patches.groups.tolist() == [0, 1, 1]
    assert made.card["seconds"] == {"total": 3.0} and "patient" not in (tmp_path / "out" / "card.json").read_text()
    (folder / "slides.json").write_text(json.dumps({**index, "missing": ["patient-C"]}))
    assert cli.main(["export", str(folder), "--out", str(tmp_path / "two")]) == 1
    assert "lacks 1 slides, patient-C first" in capsys.readouterr().err


def test_what_is_no_set_is_one_line(tmp_path: Path, capsys) -> None:
    (tmp_path / "empty").mkdir()
    for arguments, message in (
        (["export", str(tmp_path / "none"), "--out", str(tmp_path / "o")], "is not a folder"),
        (["export", str(tmp_path / "empty"), "--out", str(tmp_path / "o")], "is not a saved set"),
        (["import", str(tmp_path / "empty"), "--out", str(tmp_path / "o")], "is not a saved set"),
        (["import", str(tmp_path / "none.zip")], "unpack the set"),
    ):
        assert cli.main(arguments) in (1, 2)
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and message in error
