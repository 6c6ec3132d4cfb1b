"""Saved sets: written whole, verified on reading, and any folder of images."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_project import write_imagefolder

from histodd_bench import sets
from histodd_bench.contact_sheet import contact_sheet
from histodd_bench.data.patchset import PatchSet
from histodd_bench.errors import HistoddError
from histodd_bench.files import sha256

CLASSES = ("normal", "tumour")


def patch_set(
    dtype: torch.dtype = torch.float32, per_class: int = 3, size: int = 8, classes: tuple[str, ...] = CLASSES
) -> PatchSet:
    n = per_class * len(classes)
    images = torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(0))
    images = images if dtype == torch.float32 else (images * 255).to(torch.uint8)
    labels = torch.arange(len(classes)).repeat_interleave(per_class)
    return PatchSet(images, labels, torch.arange(n) * 10, tuple(f"slide{i}" for i in range(10 * n)), classes,
                    torch.arange(n) % 2, ("a", "b"))  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_a_set_comes_back_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    made = patch_set(dtype)
    sets.save(made, tmp_path / "s", {"method": "random", "seconds": {"total": 1.5}})
    back = sets.load(tmp_path / "s")
    assert back.patches.images.dtype == dtype and torch.equal(back.patches.images, made.images)
    assert torch.equal(back.patches.labels, made.labels) and torch.equal(back.patches.centres, made.centres)
    # only the slides in use are named, and still the right ones
    assert [back.patches.group_names[g] for g in back.patches.groups] == [made.group_names[g] for g in made.groups]
    assert len(back.patches.group_names) == 6
    assert back.seconds == {"total": 1.5} and back.card["method"] == "random" and back.card["versions"]["torch"]
    assert back.initial is None


def test_previews_are_the_patches_to_the_nearest_grey_level(tmp_path: Path) -> None:
    made = patch_set()
    sets.save(made, tmp_path / "s", {"seconds": {}})
    files = sorted((tmp_path / "s" / "patches").rglob("*.png"))
    assert [str(f.relative_to(tmp_path / "s" / "patches")) for f in files][:2] == ["normal/0000.png", "normal/0001.png"]
    pixels = torch.stack([torch.from_numpy(np.asarray(Image.open(f)).copy()).permute(2, 0, 1) for f in files])
    assert (pixels.float() / 255 - made.images).abs().max() <= 0.5 / 255 + 1e-6


def test_nothing_is_there_before_it_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sets.save(patch_set(torch.uint8), tmp_path / "s", {"seconds": {}})
    before = sha256(tmp_path / "s" / "images.safetensors")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(
        HistoddError, match="No space left on device: free some space or choose another folder with --out"
    ):
        sets.save(patch_set(), tmp_path / "s", {"seconds": {}})
    with pytest.raises(HistoddError, match="No space left"):
        sets.save(patch_set(), tmp_path / "new", {"seconds": {}})
    monkeypatch.undo()
    assert (
        sorted(p.name for p in tmp_path.iterdir()) == ["s"] and sha256(tmp_path / "s" / "images.safetensors") == before
    )


def test_nan_is_refused_before_writing_and_on_reading(tmp_path: Path) -> None:
    made = patch_set()
    made.images[4, 1, 2, 3] = float("nan")
    with pytest.raises(HistoddError, match="patch 4 holds NaN"):
        sets.save(made, tmp_path / "s", {"seconds": {}})
    assert not (tmp_path / "s").exists()
    sets.save(patch_set(), tmp_path / "s", {"seconds": {}})
    tensors = load_file(tmp_path / "s" / "images.safetensors")
    tensors["images"][2, 0, 0, 0] = float("nan")
    save_file(tensors, tmp_path / "s" / "images.safetensors")
    card = json.loads((tmp_path / "s" / "card.json").read_text())
    card["checksums"]["images.safetensors"] = sha256(tmp_path / "s" / "images.safetensors")
    (tmp_path / "s" / "card.json").write_text(json.dumps(card))
    with pytest.raises(HistoddError, match="patch 2 holds NaN"):
        sets.load(tmp_path / "s")


def test_a_changed_set_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    sets.save(patch_set(), folder, {"seconds": {}})
    data = bytearray((folder / "images.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "images.safetensors").write_bytes(data)
    with pytest.raises(HistoddError, match=r"images\.safetensors has changed since it was written: make the set again"):
        sets.load(folder)
    (folder / "images.safetensors").unlink()
    with pytest.raises(HistoddError, match="damaged"):
        sets.load(folder)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"format": 99}', r"another version \(format 99, this one reads 1\)"),
        ("{", "cannot be read"),
        ("{}", "cannot be read"),
    ],
)
def test_a_card_of_another_version_is_refused(tmp_path: Path, text: str, says: str) -> None:
    sets.save(patch_set(), tmp_path / "s", {"seconds": {}})
    (tmp_path / "s" / "card.json").write_text(text)
    with pytest.raises(HistoddError, match=says):
        sets.load(tmp_path / "s")


def test_a_folder_without_a_card_is_not_a_set(tmp_path: Path) -> None:
    with pytest.raises(HistoddError, match=r"card\.json is missing"):
        sets.load(tmp_path)


def test_class_names_that_are_no_file_names(tmp_path: Path) -> None:
    sets.save(patch_set(classes=("../a b", "..")), tmp_path / "s", {"seconds": {}})
    places = {p.parent.name for p in (tmp_path / "s").rglob("*.png")}
    assert len(places) == 2 and all(re.fullmatch(r"[\w.-]+", p) and not p.startswith(".") for p in places)
    assert sets.load(tmp_path / "s").patches.classes == ("../a b", "..")


def test_a_saved_set_takes_the_label_order_of_the_test_data(tmp_path: Path) -> None:
    sets.save(patch_set(), tmp_path / "s", {"seconds": {}})
    turned = sets.load_any(tmp_path / "s", ("tumour", "normal"), 8)
    assert turned.labels.tolist() == [1, 1, 1, 0, 0, 0] and turned.classes == ("tumour", "normal")
    with pytest.raises(HistoddError, match="add --image-size 8"):
        sets.load_any(tmp_path / "s", CLASSES, 32)
    with pytest.raises(HistoddError, match="class 'normal', which the test data lack: theirs are a, b"):
        sets.load_any(tmp_path / "s", ("a", "b"), 8)


def test_any_folder_of_images_is_a_set(tmp_path: Path) -> None:
    write_imagefolder(tmp_path, train=(3, 2))
    patches = sets.load_any(tmp_path / "train", ("class0", "class1"), 8)
    assert patches.class_counts() == [3, 2] and patches.image_size == (8, 8) and patches.images.dtype == torch.uint8
    with pytest.raises(HistoddError, match="class 'class2' has 0 patches"):
        sets.load_any(tmp_path / "train", ("class0", "class1", "class2"), 8)
    (tmp_path / "train" / "class0" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    with pytest.raises(HistoddError, match=r"broken\.png"):
        sets.load_any(tmp_path / "train", ("class0", "class1"), 8)
    (tmp_path / "empty").mkdir()
    with pytest.raises(HistoddError, match="holds no images"):
        sets.load_any(tmp_path / "empty", CLASSES, 8)
    with pytest.raises(HistoddError, match="is not a folder"):
        sets.load_any(tmp_path / "nothing", CLASSES, 8)


def test_previews_of_a_set_are_a_folder_of_images_themselves(tmp_path: Path) -> None:
    made = patch_set()
    sets.save(made, tmp_path / "s", {"seconds": {}})
    again = sets.load_any(tmp_path / "s" / "patches", CLASSES, 8)
    assert torch.equal(again.images, sets.to_uint8(made.images)) and torch.equal(again.labels, made.labels)


def test_contact_sheet_shows_every_patch_before_and_after(tmp_path: Path) -> None:
    made = patch_set(per_class=3)
    before = 1 - made.images
    contact_sheet(made, tmp_path / "after.png")
    contact_sheet(made, tmp_path / "both.png", before=before)
    after, both = (np.asarray(Image.open(tmp_path / f"{n}.png")).astype(int) for n in ("after", "both"))
    assert both.shape[1] == after.shape[1] and both.shape[0] > 1.8 * after.shape[0] - 40

    def shows(sheet: np.ndarray, image: torch.Tensor) -> bool:
        tile = sets.to_uint8(image[None])[0].permute(1, 2, 0).numpy().repeat(8, 0).repeat(8, 1)
        h, w = tile.shape[:2]
        return any(
            (sheet[y : y + h, x : x + w] == tile).all()
            for y in range(sheet.shape[0] - h + 1)
            for x in range(2, sheet.shape[1] - w + 1, 66)
        )

    assert all(shows(after, image) for image in made.images)
    assert all(shows(both, image) for image in made.images) and all(shows(both, image) for image in before)
    assert not shows(after, before[0])
