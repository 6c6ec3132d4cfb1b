"""The IDC adapter, on a made-up miniature and on the real files."""

import numpy as np
import pytest
import torch
from PIL import Image

from histodd_bench.data import load_dataset
from histodd_bench.errors import HistoddError, UsageError
from histodd_bench.progress import Progress


def tile(root, patient, label, x, y, size=(50, 50), value=100, name=None):
    folder = root / patient / str(label)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / (name or f"{patient}_idx5_x{x}_y{y}_class{label}.png")
    Image.new("RGB", size, (value, value, value)).save(path)
    return path


def load(root, cache, **options):
    return load_dataset(
        "idc", root=root, image_size=options.pop("image_size", 10), cache=cache, progress=Progress.silent(), **options
    )


@pytest.fixture
def root(tmp_path):
    for p in range(10):
        for k in range(4):
            tile(tmp_path / "idc", f"{100 + p}", k % 2, 50 * k + 1, 51, value=20 * p)
    return tmp_path / "idc"


def test_patients_are_split_and_positions_kept(root, tmp_path):
    ds = load(root, tmp_path / "cache")
    assert ds.train.classes == ("non-IDC", "IDC") and not ds.procedural
    assert len(ds.train.group_names) == 7 and len(ds.test.group_names) == 3
    assert not set(ds.train.group_names) & set(ds.test.group_names)
    for ps in (ds.train, ds.test):
        assert ps.class_counts()[0] == ps.class_counts()[1]
        for i in range(len(ps)):
            assert ps.images[i, 0, 5, 5] == 20 * (int(ps.group_names[ps.groups[i]]) - 100)
    other = load(root, tmp_path / "cache", seed=1)
    assert set(other.test.group_names) != set(ds.test.group_names)
    assert any("3 of 10 patients are the test set" in note for note in ds.notes)


def test_the_cache_answers_until_a_file_changes(root, tmp_path):
    first = load(root, tmp_path / "cache").train.fingerprint()
    assert load(root, tmp_path / "cache", workers=3).train.fingerprint() == first
    assert len(list((tmp_path / "cache").glob("idc-*/"))) == 1
    for p in range(10):
        tile(root, f"{100 + p}", 0, 999, 999, value=255)
    assert load(root, tmp_path / "cache").train.fingerprint() != first


def test_border_tiles_keep_their_scale(tmp_path):
    root = tmp_path / "idc"
    for p in ("1", "2"):
        for label in (0, 1):
            tile(root, p, label, 1, 1, size=(50, 30), value=0)
    data = load(root, tmp_path / "cache", image_size=50)
    assert not any("enlarged" in note for note in data.notes)
    assert "4 of 4 patches are enlarged from 50 to 64 px" in load(root, tmp_path / "cache", image_size=64).notes
    images = data.train.images
    assert (images[:, :, 10:40] == 0).all() and (images[:, :, :10] == 255).all() and (images[:, :, 40:] == 255).all()


def test_odd_files_are_counted_and_named(root, tmp_path):
    tile(root, "100", 0, 5, 5, name="holiday.png")
    tile(root, "100", 0, 5, 5, name="100_idx5_x5_y5_class1.png")
    tile(root, "100", 0, 5, 5, name=f"100_idx5_x{'9' * 30}_y5_class0.png")
    tile(root, "101", 1, 5, 5).write_bytes(b"\x89PNG broken")
    (root / "100" / "0" / ".DS_Store").write_bytes(b"x")
    (root / "notes").mkdir()
    ds = load(root, tmp_path / "cache")
    assert len(ds.train) + len(ds.test) == 40
    (note,) = [note for note in ds.notes if "skipped" in note]
    assert (
        note.startswith("4 of 44 files skipped: ")
        and "holiday.png" in note
        and "disagree" in note
        and "not an image" in note
    )


def test_what_cannot_be_read_does_not_change_the_split(root, tmp_path):
    clean = load(root, tmp_path / "cache")
    for k in range(9):
        tile(root, "104", 1, 50 * k + 1, 801).write_bytes(b"\x89PNG broken")
    tile(root, "200", 0, 1, 1).write_bytes(b"")  # nothing else of this patient
    ds = load(root, tmp_path / "cache")
    assert ds.test.group_names == clean.test.group_names
    assert [ds.train.fingerprint(), ds.test.fingerprint()] == [clean.train.fingerprint(), clean.test.fingerprint()]
    assert ds.notes[0] == clean.notes[0] and ds.notes[1].startswith("10 of 50 files skipped: ")


def test_roots_that_cannot_be_used(root, tmp_path):
    with pytest.raises(UsageError, match="--data-root"):
        load(None, tmp_path / "cache")
    with pytest.raises(UsageError, match="nowhere is not a folder"):
        load(tmp_path / "nowhere", tmp_path / "cache")
    (tmp_path / "empty").mkdir()
    with pytest.raises(HistoddError, match=r"no IDC patches in .*empty"):
        load(tmp_path / "empty", tmp_path / "cache")
    tile(tmp_path / "one", "7", 0, 1, 1)
    with pytest.raises(HistoddError, match=r"no IDC patches in .*one: expected PNG files in <patient>/1"):
        load(tmp_path / "one", tmp_path / "cache")
    tile(tmp_path / "one", "7", 1, 1, 1)
    with pytest.raises(HistoddError, match="one patient only"):
        load(tmp_path / "one", tmp_path / "cache")


def test_real_patches(shared_data, tmp_path):
    ds = load(shared_data / "idc", tmp_path / "cache", image_size=16)
    counts = np.array([ds.train.class_counts(), ds.test.class_counts()])
    assert counts.sum(0).tolist() == [5179, 2025]
    assert len(ds.train.group_names) == 140 and len(ds.test.group_names) == 60
    assert not set(ds.train.group_names) & set(ds.test.group_names)
    assert np.abs(counts[1] / counts.sum(0) - 0.3).max() < 0.02
    assert not any("skipped" in note for note in ds.notes)
    # Tumour is the darker, more cellular class in these files.
    means = [ds.train.float_batch(ds.train.class_indices(c)).mean() for c in (0, 1)]
    assert means[0] - means[1] > 0.05
    assert torch.unique(ds.train.labels).tolist() == [0, 1]
