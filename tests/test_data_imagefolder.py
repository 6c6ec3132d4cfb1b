"""Anyone's folder of patches: two to many classes, messy files, groups, centres, splits."""

import csv
import unicodedata

import numpy as np
import pytest
from PIL import Image

from histodd_bench import cli
from histodd_bench.data import DATASETS, load_dataset
from histodd_bench.errors import HistoddError, UsageError
from histodd_bench.progress import Progress


def load(root, image_size=8, **options):
    cache = options.pop("cache", root.parent / "cache")
    return load_dataset(
        "imagefolder", root=root, image_size=image_size, cache=cache, progress=Progress.silent(), **options
    )


def add(root, split, name, count, colour=0, size=(12, 12)):
    folder = root / split / name
    folder.mkdir(parents=True, exist_ok=True)
    return [save(folder / f"{k}.png", colour + k, size) for k in range(count)]


def save(path, value, size=(12, 12)):
    Image.new("RGB", size, (value, 0, 255)).save(path)
    return path


def groups_csv(root, rows, header=("path", "group", "centre"), **options):
    with open(root / "groups.csv", "w", newline="", **options) as file:
        csv.writer(file).writerows([header, *rows])


@pytest.fixture
def root(tmp_path):
    root = tmp_path / "set"
    for c, name in enumerate("abc"):
        add(root, "train", name, 4, 50 * c)
        add(root, "test", name, 2, 50 * c + 20)
    return root


@pytest.mark.parametrize("classes", [2, 5, 9])
def test_any_number_of_classes(tmp_path, classes):
    for c in range(classes):
        add(tmp_path / "set", "train", f"class {c}", 3, 20 * c)
        add(tmp_path / "set", "test", f"class {c}", 2, 20 * c + 10)
    ds = load(tmp_path / "set")
    assert ds.train.classes == tuple(f"class {c}" for c in range(classes))
    assert ds.train.class_counts() == [3] * classes and ds.test.class_counts() == [2] * classes
    assert ds.train.images[:, 0, 0, 0].tolist() == [20 * c + k for c in range(classes) for k in range(3)]
    assert not ds.procedural


def test_without_groups_every_file_is_its_own_with_a_warning(root):
    ds = load(root)
    assert len(ds.train.group_names) == 12 and ds.train.centres is None
    assert any(note.startswith("WARNING: no groups.csv") for note in ds.notes)


def test_groups_and_centres(root):
    rows = [(f"train/{c}/{k}.png", f"slide {k % 2}", "north" if k % 2 else "south") for c in "abc" for k in range(4)]
    rows += [(f"test\\{c}\\{k}.png", "slide 9", "") for c in "abc" for k in range(2)]
    groups_csv(root, rows, encoding="utf-8-sig")
    ds = load(root)
    assert set(ds.train.group_names) == {"slide 0", "slide 1"} and set(ds.test.group_names) == {"slide 9"}
    assert [ds.train.centre_names[c] for c in ds.train.centres[:2]] == ["south", "north"]
    assert {ds.test.centre_names[c] for c in ds.test.centres} == {"unknown"}
    assert not any("WARNING" in note for note in ds.notes)


@pytest.mark.parametrize("header", ["Path,Group", "path ,group ", "path;group", "PATH\tgroup", "path,group,scanner"])
def test_group_files_may_be_written_in_several_ways(root, header):
    separator = next(c for c in ",;\t" if c in header)
    rows = [
        f"{s}/{c}/{k}.png{separator} {s}{k % 2}"
        for s, n in (("train", 4), ("test", 2))
        for c in "abc"
        for k in range(n)
    ]
    (root / "groups.csv").write_text("\n".join([header, *rows, ""]))
    ds = load(root)
    assert set(ds.train.group_names) == {"train0", "train1"} and not ds.notes


def test_accents_may_be_written_in_two_ways(root):
    composed, apart = (unicodedata.normalize(form, "größe é") for form in ("NFC", "NFD"))
    assert composed != apart
    save(root / "train" / "a" / f"{apart}.png", 7)
    save(root / "train" / "b" / f"{composed}.png", 8)
    groups_csv(
        root, [(f"train/a/{composed}.png", "s1"), (f"train/b/{apart}.png", "s1")], ("path", "group"), encoding="utf-8"
    )
    ds = load(root)
    (note,) = [note for note in ds.notes if "groups.csv" in note]
    assert note.startswith("WARNING: 18 files are not in groups.csv")
    assert [int((ds.train.groups == ds.train.group_names.index("s1")).sum())] == [2]


def test_changed_groups_are_noticed(root):
    rows = [(f"{s}/{c}/{k}.png", f"{s}{k}") for s, n in (("train", 4), ("test", 2)) for c in "abc" for k in range(n)]
    groups_csv(root, rows, ("path", "group"))
    assert len(load(root).train.group_names) == 4
    groups_csv(root, [(path, group[:-1] + "x") for path, group in rows], ("path", "group"))
    assert len(load(root).train.group_names) == 1


def test_a_group_on_both_sides_is_a_warning(root):
    groups_csv(root, [(f"{s}/{c}/{k}.png", "same") for s in ("train", "test") for c in "abc" for k in range(4)])
    notes = load(root).notes
    assert any("not independent" in note for note in notes) and any(
        "6 files that are not there" in note for note in notes
    )


def test_unlisted_files_are_counted(root):
    groups_csv(root, [("train/a/0.png", "s1", "x")])
    assert any("17 files are not in groups.csv" in note for note in load(root).notes)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,group\ntrain/a/0.png,s\n", "no column 'path'"),
        ("path,group\ntrain/a/0.png,\n", "line 2: path or group is empty"),
        ("path,group\nelsewhere/a/0.png,s\n", "lists none of the 18 files"),
        ("path,group\ntrain/a/0.png,s\ntrain/a/0.png,t\n", "line 3: train/a/0.png is listed twice"),
        (b"path,group\n\xff\xfe,s\n", "cannot be read"),
        ("", "no column"),
        ("path,group,center\ntrain/a/0.png,s,x\n", "column 'center'.* rename it to 'centre'"),
    ],
)
def test_bad_group_files_are_named(root, text, message):
    (root / "groups.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(HistoddError, match=message) as error:
        load(root)
    assert "groups.csv" in str(error.value)


def test_without_test_folder_the_groups_are_split(tmp_path):
    root = tmp_path / "set"
    for c in "ab":
        add(root, "train", c, 20)
    groups_csv(root, [(f"train/{c}/{k}.png", f"patient {k // 2}") for c in "ab" for k in range(20)])
    ds = load(root)
    assert len(ds.train.group_names) == 7 and len(ds.test.group_names) == 3
    assert not set(ds.train.group_names) & set(ds.test.group_names)
    assert ds.test.class_counts() == [6, 6]
    assert set(load(root, seed=3).test.group_names) != set(ds.test.group_names)
    assert any("no test/ folder: 3 of 10 groups" in note for note in ds.notes)


def test_class_folders_directly_in_the_root(tmp_path):
    for c in range(3):
        add(tmp_path, "set", f"c{c}", 10, 30 * c)
    ds = load(tmp_path / "set")
    assert ds.train.class_counts() == [7, 7, 7] and ds.test.class_counts() == [3, 3, 3]


def test_one_group_cannot_be_split(tmp_path):
    root = tmp_path / "set"
    for c in "ab":
        add(root, "train", c, 2)
    groups_csv(root, [(f"train/{c}/{k}.png", "p", "") for c in "ab" for k in range(2)])
    with pytest.raises(HistoddError, match="one group only"):
        load(root)


def test_messy_files(root):
    (root / "train" / "a" / "Thumbs.db").write_bytes(b"\0" * 100)
    (root / "train" / "a" / ".DS_Store").write_bytes(b"\0")
    (root / ".git").mkdir()
    (root / "val" / "a").mkdir(parents=True)
    (root / "train" / "b" / "empty.jpg").touch()
    (root / "train" / "b" / "gone.png").symlink_to(root / "nowhere.png")
    nested = root / "train" / "c" / "slide 7"
    nested.mkdir()
    save(nested / "größe.png", 77)
    cut = root / "test" / "c" / "1.png"
    cut.write_bytes(cut.read_bytes()[:40])
    Image.fromarray(np.full((9, 30), 60000, dtype=np.uint16)).save(root / "train" / "a" / "grey16.png")
    Image.new("RGBA", (30, 9), (0, 0, 0, 0)).save(root / "train" / "a" / "clear.png")
    ds = load(root)
    assert ds.train.class_counts() == [6, 4, 5] and ds.test.class_counts() == [2, 2, 1]
    (note,) = [note for note in ds.notes if "skipped" in note]
    assert note.startswith("4 of 24 files skipped")
    for part in ("Thumbs.db (not an image)", "empty.jpg (empty file)", "gone.png (No such file", "test/c/1.png"):
        assert part in note
    assert any("folders beside train and test are not used: val" in note for note in ds.notes)
    values = ds.train.images[ds.train.labels == 0].flatten(1).float()
    assert (values == 255).all(1).sum() == 1 and (values == 233).all(1).sum() == 1


def test_what_is_no_image_does_not_change_the_split(tmp_path):
    root = tmp_path / "set"
    for c in range(2):
        add(tmp_path, "set", f"c{c}", 10, 100 * c)
    clean = load(root)
    for c in range(2):
        for name in ("Thumbs.db", "0.json", "desktop.ini", "NOTES.TXT", ".DS_Store"):
            (root / f"c{c}" / name).write_bytes(b"no image")
    ds = load(root)
    assert [ds.train.fingerprint(), ds.test.fingerprint()] == [clean.train.fingerprint(), clean.test.fingerprint()]
    assert [ds.train.group_names, ds.test.group_names] == [clean.train.group_names, clean.test.group_names]
    assert any("of 20 groups are the test set" in note for note in ds.notes)
    assert any(note.startswith("8 of 28 files skipped: c0/0.json (not an image)") for note in ds.notes)
    drawn = ["c0/2.png", "c0/4.png", "c0/6.png", "c1/3.png", "c1/6.png", "c1/9.png"]
    assert sorted(clean.test.group_names) == drawn, "the split of a clean folder is for good"


def test_patches_that_are_smaller_than_asked_for_are_said_to_be_enlarged(root, tmp_path, capsys):
    add(root, "train", "a", 4, size=(40, 20))  # 20 px when cropped
    notes = {size: [n for n in load(root, size).notes if "enlarged" in n] for size in (8, 12, 16, 32)}
    assert notes[8] == notes[12] == []
    assert notes[16] == ["14 of 18 patches are enlarged from 12 to 16 px"]
    assert notes[32] == ["18 of 18 patches are enlarged to 32 px: 14 from 12 px, 4 from 20 px"]
    assert notes[32][0] in load(root, 32).notes, "from the cache"
    arguments = ["data", "prepare", "imagefolder", "--root", str(root), "--out", str(tmp_path / "o"), "--workers", "1"]
    assert cli.main(arguments) == 0
    said = "note: 18 of 18 patches are enlarged to 256 px: 14 from 12 px, 4 from 20 px"
    assert said in capsys.readouterr().out


@pytest.fixture
def flat(tmp_path):
    for c in range(2):
        add(tmp_path, "flat", f"c{c}", 10, 100 * c)
    return tmp_path / "flat"


def test_an_image_that_cannot_be_read_does_not_change_the_split(flat):
    clean = load(flat)
    (flat / "c0" / "3 broken.png").write_bytes(b"no image")
    (flat / "c1" / "empty.jpg").touch()
    ds = load(flat)
    for split in ("train", "test"):
        assert getattr(ds, split).fingerprint() == getattr(clean, split).fingerprint()
        assert getattr(ds, split).group_names == getattr(clean, split).group_names
    (skipped,) = set(ds.notes) - set(clean.notes)
    assert skipped.startswith("2 of 22 files skipped: c")
    assert load(flat).train.fingerprint() == clean.train.fingerprint(), "from the cache"


def test_readable_images_of_one_group_cannot_be_split(flat):
    groups_csv(flat, [(f"c{c}/{k}.png", f"p{k // 5}", "") for c in range(2) for k in range(10)])
    for c in range(2):
        for k in range(5, 10):
            (flat / f"c{c}" / f"{k}.png").write_bytes(b"no image")
    with pytest.raises(HistoddError, match=r"at least two groups .*, got 1; 10 of 20 files skipped: c0/5.png \(not an"):
        load(flat)
    for k in range(5):
        (flat / "c1" / f"{k}.png").write_bytes(b"no image")
    with pytest.raises(HistoddError, match="class 'c1' has no readable training image; 15 of 20 files skipped"):
        load(flat)


def test_results_inside_the_data_are_no_class(flat):
    clean = load(flat)
    (flat / "runs" / "table1" / "sheets").mkdir(parents=True)
    (flat / "runs" / "table1" / ".lock").touch()
    started = load(flat)
    save(flat / "runs" / "table1" / "sheets" / "s0.png", 9)
    (flat / "runs" / "table1" / "plan.json").write_text("{}")
    (flat / "runs" / "profile").mkdir()
    (flat / "runs" / "profile" / "cpu.json").write_text("{}")
    (flat / "shared" / "ours" / "patches" / "c0").mkdir(parents=True)
    (flat / "shared" / "ours" / "card.json").write_text("{}")
    save(flat / "shared" / "ours" / "patches" / "c0" / "0000.png", 9)
    (flat / "c1" / "stains").mkdir()
    (flat / "c1" / "stains" / "stains.csv").touch()
    save(flat / "c1" / "stains" / "stains.png", 9)
    ds = load(flat, cache=flat / "cache")
    again = load(flat, cache=flat / "cache")
    for found in (started, ds, again):
        assert [found.train.fingerprint(), found.test.fingerprint()] == [
            clean.train.fingerprint(),
            clean.test.fingerprint(),
        ]
    assert "1 folders that this program wrote are not used: runs" in started.notes
    assert "3 folders that this program wrote are not used: c1/stains, runs, shared" in ds.notes
    assert "4 folders that this program wrote are not used: c1/stains, cache, runs, shared" in again.notes


def test_a_dataset_json_of_somebody_else_s_marks_nothing(flat):
    (flat / "c0" / "dataset.json").write_text('{"source": "elsewhere"}')
    assert load(flat).train.classes == ("c0", "c1")


def test_results_among_the_classes_are_refused(flat, root):
    for folder in (flat, root):
        (folder / ".lock").touch()
        (folder / "sheets").mkdir()
        save(folder / "sheets" / "s0.png", 9)
    with pytest.raises(HistoddError, match=r"flat holds results of this program .* move .lock, sheets away and choose"):
        load(flat)
    assert load(root).train.classes == ("a", "b", "c"), "beside train and test they do no harm"


def test_links_to_folders_are_followed_but_not_around(root):
    outside = root.parent / "slides"
    (outside / "s1" / "deeper").mkdir(parents=True)
    save(outside / "s1" / "x.png", 91)
    save(outside / "s1" / "deeper" / "y.png", 92)
    a = root / "train" / "a"
    (a / "s1").symlink_to(outside / "s1")
    (a / "again").symlink_to(outside / "s1" / "deeper")  # reached a second time below s1
    (a / "up").symlink_to(a)
    (a / "all").symlink_to(root)  # the other classes too
    (outside / "s1" / "back").symlink_to(outside)
    (root / "train" / "b" / "own").mkdir()
    save(root / "train" / "b" / "own" / "z.png", 93)
    (root / "train" / "b" / "a link").symlink_to("own")
    ds = load(root)
    assert ds.train.class_counts() == [6, 5, 4]
    assert "train/b/own/z.png" in ds.train.group_names, "the folder itself goes before links to it"
    assert set(ds.train.images[ds.train.labels == 0][:, 0, 0, 0].tolist()) == {0, 1, 2, 3, 91, 92}


def test_a_class_without_a_readable_image(root):
    for path in (root / "train" / "b").iterdir():
        path.write_bytes(b"broken")
    with pytest.raises(HistoddError, match=r"class 'b' has no readable training image; 4 of .* files skipped"):
        load(root)
    assert not any(path.is_dir() for path in (root.parent / "cache").iterdir())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: None, "no class folders in .*set"),
        (lambda root: (root / "train").mkdir(), "no class folders in .*set/train"),
        (lambda root: add(root, "train", "only", 3), r"one class only \(only\) in .*set/train"),
        (
            lambda root: (add(root, "train", "a", 3), (root / "train" / "b").mkdir()),
            "class folder .*set/train/b has no images",
        ),
        (lambda root: add(root, "test", "a", 3), "has test/ but no train/"),
        (
            lambda root: [
                add(root, s, c, 2) for s, c in (("train", "a"), ("train", "b"), ("test", "a"), ("test", "B"))
            ],
            "class 'B' is not in",
        ),
    ],
)
def test_folders_that_cannot_be_used(tmp_path, make, message):
    root = tmp_path / "set"
    root.mkdir()
    make(root)
    with pytest.raises(HistoddError, match=message) as error:
        load(root)
    assert "\n" not in str(error.value)


def test_a_class_missing_from_test_is_noted(root):
    for path in (root / "test" / "c").iterdir():
        path.unlink()
    (root / "test" / "c").rmdir()
    ds = load(root)
    assert ds.test.class_counts() == [2, 2, 0] and ds.notes[-1] == (
        "WARNING: the test set has no patch of class c: balanced accuracy and AUC cover only the classes that are there"
    )


def test_a_test_side_without_a_readable_image(root):
    for path in (root / "test").rglob("*.png"):
        path.write_bytes(b"no image")
    with pytest.raises(HistoddError, match=r"there is no readable test image; 6 of \d+ files skipped"):
        load(root)


def test_unwritable_cache(root, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(HistoddError, match="cannot write"):
        load(root, cache=tmp_path / "file" / "cache")


def test_unknown_names_get_a_suggestion(tmp_path):
    with pytest.raises(UsageError, match="did you mean 'imagefolder'"):
        load_dataset("imagefoldr", image_size=8, cache=tmp_path, progress=Progress.silent())
    with pytest.raises(UsageError, match="--image-size"):
        load_dataset("demo", image_size=0, cache=tmp_path, progress=Progress.silent())
    assert {"demo", "idc", "imagefolder"} <= DATASETS.keys()
