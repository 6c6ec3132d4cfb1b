"""Folders of patches that are not laid out as they should be, and what a prepared set says of its two sides."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from histodd_bench import cli
from histodd_bench.data import load_dataset
from histodd_bench.data.store import Dataset, read_dataset
from histodd_bench.errors import HistoddError, UsageError
from histodd_bench.progress import Progress
from histodd_bench.wording import absent_classes


def fill(folder: Path, count: int = 4, name: str = "{}.png") -> None:
    """Patches of noise, no two alike."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(list(str(folder).encode()))
    for i in range(count):
        Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)).save(folder / name.format(i))


def load(root: Path, size: int = 12) -> Dataset:
    return load_dataset(
        "imagefolder", root=root, image_size=size, cache=root.parent / "cache", progress=Progress.silent()
    )


def warnings(root: Path) -> list[str]:
    """Warnings but for that of the missing groups.csv."""
    return [note for note in load(root).notes if "WARNING" in note and "no groups.csv" not in note]


# ---- what the folders are --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("outer", "inner"),
    [
        (("training", "testing"), ("a", "b")),
        (("Training", "Validation", "other"), ("a", "b")),
        (("NCT-CRC-HE-100K", "CRC-VAL-HE-7K"), ("ADI", "BACK", "TUM")),
        (("set_train", "set_test"), ("",)),
    ],
)
def test_parts_of_a_split_are_no_classes(tmp_path: Path, outer: tuple[str, ...], inner: tuple[str, ...]) -> None:
    for a in outer:
        for b in inner:
            fill(tmp_path / "set" / a / b)
    with pytest.raises(
        HistoddError, match=r"look like the parts of a split .*: rename them to train and test \("
    ) as error:
        load(tmp_path / "set")
    assert all(name in str(error.value) for name in outer) and "\n" not in str(error.value)
    (tmp_path / "set" / "train").mkdir()
    for a in outer:
        shutil.move(tmp_path / "set" / a, tmp_path / "set" / "train" / a)
    assert load(tmp_path / "set").train.classes == tuple(sorted(outer)), "whoever means it can have it"


def test_two_parts_become_a_split_when_they_are_renamed_as_the_message_says(tmp_path: Path) -> None:
    for a, n in (("training", 4), ("testing", 2)):
        for b in "xy":
            fill(tmp_path / "set" / a / b, n)
    with pytest.raises(HistoddError, match="rename them to train and test"):
        load(tmp_path / "set")
    for a, b in (("training", "train"), ("testing", "test")):
        (tmp_path / "set" / a).rename(tmp_path / "set" / b)
    data = load(tmp_path / "set")
    assert data.train.class_counts() == [4, 4] and data.test.class_counts() == [2, 2]


def test_the_patients_of_the_idc_patches_are_no_classes(tmp_path: Path) -> None:
    for patient in ("8863", "8864", "8865"):
        for label in (0, 1)[: 1 + (patient != "8865")]:
            fill(tmp_path / "idc" / patient / str(label), name=f"{patient}_idx5_x{{}}_y1_class{label}.png")
    with pytest.raises(
        HistoddError, match=r"8863, 8864, 8865 are patients of the IDC patches .*: use the data set idc"
    ):
        load(tmp_path / "idc")
    for patient in ("8863", "8864", "8865"):
        for label in (0, 1)[: 1 + (patient != "8865")]:
            to = tmp_path / "sorted" / str(label) / patient
            shutil.copytree(tmp_path / "idc" / patient / str(label), to)
    assert load(tmp_path / "sorted").train.classes == ("0", "1"), "the same files sorted by class"


@pytest.mark.parametrize(
    ("outer", "inner"),
    [
        (("p1", "p2", "p3"), ("normal", "tumour")),  # patients with classes inside
        (("A", "B"), ("ADI", "BACK", "TUM")),
        (("normal", "tumour"), ("p1", "p2", "p3")),  # classes with the same patients: nothing tells it from the others
    ],
)
def test_the_same_few_folders_everywhere_are_a_warning(
    tmp_path: Path, outer: tuple[str, ...], inner: tuple[str, ...]
) -> None:
    root = tmp_path / "set"
    for a in outer:
        for b in inner:
            fill(root / a / b)
    (warning,) = warnings(root)
    assert warning.startswith(
        f"WARNING: the {len(outer)} class folders ({', '.join(outer)}) hold only the folders {', '.join(inner)}: "
    )
    assert load(root).train.classes == outer, "a guess is no refusal"
    rows = [f"{a}/{b}/{i}.png,{b}" for a in outer for b in inner for i in range(4)]
    (root / "groups.csv").write_text("\n".join(["path,group", *rows]))
    assert warnings(root) == [], "the groups say what the inner folders are"


def test_patients_without_one_of_the_classes_are_a_warning_too(tmp_path: Path) -> None:
    for patient, labels in (("p1", "ab"), ("p2", "a"), ("p3", "b")):
        for label in labels:
            fill(tmp_path / "set" / patient / label)
    (warning,) = warnings(tmp_path / "set")
    assert "(p1, p2, p3) hold only the folders a, b" in warning


@pytest.mark.parametrize(
    "folders",
    [
        ("a/p1", "a/p2", "b/p3", "b/p4"),  # patients of their own
        ("a/p1", "a/p2", "b/p1", "b/p3"),  # some shared
        ("a/images", "b/images", "c/images"),
        ("a/p1", "a/p2", "b/p1", "b/p2", "b"),  # images beside the folders
        ("valid/p1", "valid/p2", "invalid/p3", "invalid/p4"),
        ("a", "b"),
    ],
)
def test_other_folders_inside_classes_are_nobody_s_business(tmp_path: Path, folders: tuple[str, ...]) -> None:
    for name in folders:
        fill(tmp_path / "set" / name)
    assert warnings(tmp_path / "set") == []


# ---- what is on both sides, and what is missing ----------------------------------------------------------------------


@pytest.fixture
def split(tmp_path: Path) -> Path:
    for side, count in (("train", 4), ("test", 3)):
        for label in "ab":
            fill(tmp_path / "set" / side / label, count)
    return tmp_path / "set"


def test_images_on_both_sides_are_counted_whatever_their_names_and_groups(split: Path) -> None:
    assert warnings(split) == []
    shutil.copy(split / "train" / "a" / "1.png", split / "test" / "a" / "copy.png")
    with Image.open(split / "train" / "b" / "0.png") as image:
        image.save(split / "test" / "a" / "other.bmp")
    shutil.copy(split / "test" / "b" / "0.png", split / "test" / "b" / "twice.png")  # within one side: no matter
    sides = [path.relative_to(split).as_posix() for path in split.rglob("*.*")]
    (split / "groups.csv").write_text("\n".join(["path,group", *(f"{path},{path[:6]}" for path in sides)]))
    expected = (
        "WARNING: 2 of 9 test images are pixel for pixel in the training set (e.g. test/a/copy.png is train/a/1.png): "
        "the test set is not independent of the training set"
    )
    for _ in range(2):  # read, and from the cache
        assert warnings(split) == [expected]


def test_a_drawn_split_is_searched_for_copies_too_and_not_for_files_that_cannot_be_read(tmp_path: Path) -> None:
    root = tmp_path / "set"
    for label in "ab":
        fill(root / label, 6)
        for i in range(6):
            shutil.copy(root / label / f"{i}.png", root / label / f"{i} again.png")
        (root / label / "broken.png").write_bytes(b"no image")
    data = load(root)
    train, test = ({images.tobytes() for images in part.images.numpy()} for part in (data.train, data.test))
    shared = sum(images.tobytes() in train for images in data.test.images.numpy())
    assert train & test and any(
        f"{shared} of {len(data.test)} test images are pixel for pixel" in n for n in data.notes
    )


def test_a_class_that_the_test_set_lacks_is_a_warning_of_the_command_and_kept(
    split: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in (split / "test" / "b").iterdir():
        path.write_bytes(b"no image")
    out = tmp_path / "out"
    arguments = ["data", "prepare", "imagefolder", "--root", str(split), "--out", str(out), "--image-size", "12"]
    assert cli.main([*arguments, "--workers", "1"]) == 0
    warning = (
        "WARNING: the test set has no patch of class b: balanced accuracy covers only the class that is there, "
        "and AUC is left out"
    )
    assert capsys.readouterr().out.count(f"note: {warning}\n") == 1
    assert read_dataset(out)["notes"].count(warning) == 1
    data = load_dataset("imagefolder", root=out, image_size=8, cache=tmp_path / "c", progress=Progress.silent())
    assert data.notes.count(warning) == 1, "at another size too"


def test_absent_classes() -> None:
    assert absent_classes("test", "abc", [1, 2, 3]) == absent_classes("test", "abc", [0, 0, 0]) == []
    (two,) = absent_classes("test", "abc", [1, 0, 3])
    assert two.endswith("no patch of class b: balanced accuracy and AUC cover only the classes that are there")
    (one,) = absent_classes("test", "abc", [0, 0, 3])
    assert "class a, b: balanced accuracy covers only the class that is there" in one
    assert absent_classes("train", "ab", [0, 3]) == [
        "WARNING: the training set has no patch of class a: no set can be made of it"
    ]


def test_a_class_of_one_group_that_is_drawn_for_the_test_set(tmp_path: Path) -> None:
    root = tmp_path / "set"
    for label in "ab":
        fill(root / label, 6)
    (root / "groups.csv").write_text(
        "\n".join(["path,group", *(f"{label}/{i}.png,{label}" for label in "ab" for i in range(6))])
    )
    with pytest.raises(
        HistoddError, match=r"class '[ab]' is in 1 group only, which the split put into the test set: "
    ) as error:
        load(root)
    assert "skipped" not in str(error.value) and "\n" not in str(error.value)


# ---- data info, and sizes --------------------------------------------------------------------------------------------


def test_info_counts_the_images_of_a_folder_without_reading_them(
    split: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (split / "test" / "a" / "broken.png").write_bytes(b"no image")
    fill(split / "train" / "c", 1)
    assert cli.main(["data", "info", "imagefolder", "--root", str(split)]) == 0
    text = capsys.readouterr().out
    rows = {line.rsplit(None, 2)[0].strip(): line.split()[-2:] for line in text.splitlines() if "patches" in line}
    assert rows["patches"] == ["9", "7"] and rows["patches of c"] == ["1", "0"]
    assert rows["patches of a"] == ["4", "4"] and rows["patches of b"] == ["4", "3"]
    assert "note: WARNING: no groups.csv" in text and "images are counted by name" in text
    assert "note: WARNING: the test set has no patch of class c: " in text


def test_info_draws_the_split_that_prepare_will(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for label in "ab":
        fill(tmp_path / "set" / label, 11)
    rows = [f"{label}/{i}.png,{label}{min(i, 4)}" for label in "ab" for i in range(11)]
    (tmp_path / "set" / "groups.csv").write_text("\n".join(["path,group", *rows]))
    for seed in range(4):
        assert (
            cli.main(["data", "info", "imagefolder", "--root", str(tmp_path / "set"), "--split-seed", str(seed)]) == 0
        )
        (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  patches of a")]
        data = load_dataset("imagefolder", root=tmp_path / "set", image_size=8, seed=seed, cache=tmp_path / "c",
                            progress=Progress.silent())  # fmt: skip
        assert line.split()[-2:] == [str(data.train.class_counts()[0]), str(data.test.class_counts()[0])]


@pytest.mark.parametrize("size", [0, 4097, 100_000])
def test_sizes_that_nobody_means_are_refused_before_anything_is_read(split: Path, size: int) -> None:
    with pytest.raises(UsageError, match=f"--image-size must be 1 to 4096 pixels, got {size}"):
        load(split, size)
    assert not (split.parent / "cache").exists()
