"""The on-disk store: what is written is what is read, nothing half-written is ever opened, size does not matter."""

import json
import os
import resource
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from histodd_bench.data import store
from histodd_bench.data.patchset import PatchSet
from histodd_bench.data.store import StoreError, StoreWriter, cached_dataset
from histodd_bench.errors import HistoddError

CLASSES = ("benign", "malignant", "other")


def some_patches(n: int, seed: int = 0, size: int = 6):
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (n, 3, size, size), dtype=np.uint8)
    return images, rng.integers(0, 3, n), [f"slide {i}" for i in rng.integers(0, 4, n)], rng.integers(0, 2, n)


def write(folder, n=20, batches=(7, 20), size=6):
    images, labels, groups, centres = some_patches(n, size=size)
    with StoreWriter(folder, (size, size), CLASSES, ("north", "south")) as writer:
        start = 0
        for stop in batches:
            part = slice(start, stop)
            writer.append(images[part], labels[part], groups[part], centres=centres[part], x=np.arange(start, stop))
            start = stop
        return writer.finish()


def test_what_is_written_is_read(tmp_path):
    write(tmp_path / "a")
    images, labels, groups, centres = some_patches(20)
    ps = store.load(tmp_path / "a")
    assert torch.equal(ps.images, torch.from_numpy(images))
    assert ps.labels.tolist() == labels.tolist() and ps.classes == CLASSES
    assert [ps.group_names[g] for g in ps.groups] == groups
    assert ps.centres.tolist() == centres.tolist() and ps.centre_names == ("north", "south")
    assert store.load_columns(tmp_path / "a")["x"].tolist() == list(range(20))
    assert np.array_equal(np.load(tmp_path / "a" / "images.npy"), images), "images.npy is an ordinary NumPy file"


def test_stored_fingerprint_is_the_computed_one(tmp_path):
    ps = write(tmp_path / "a")
    images, labels, _, centres = some_patches(20)
    in_memory = PatchSet(
        torch.from_numpy(images),
        torch.from_numpy(labels),
        ps.groups,
        ps.group_names,
        CLASSES,
        torch.from_numpy(centres),
        ("north", "south"),
    )
    assert store.load(tmp_path / "a").fingerprint() == in_memory.fingerprint()


@settings(max_examples=8)
@given(cuts=st.lists(st.integers(0, 12), max_size=4))
def test_batching_does_not_matter(tmp_path_factory, cuts):
    folder = tmp_path_factory.mktemp("store")
    whole = write(folder / "whole", 12, (12,))
    parts = write(folder / "parts", 12, (*sorted(cuts), 12))
    assert whole.fingerprint() == parts.fingerprint()
    assert (folder / "whole" / "images.npy").read_bytes() == (folder / "parts" / "images.npy").read_bytes()


def test_a_million_large_patches_open_without_being_read(tmp_path):
    n, size = 1_000_000, 256
    folder = tmp_path / "big"
    folder.mkdir()
    with open(folder / "images.npy", "wb") as file:
        np.lib.format.write_array_header_1_0(
            file, {"descr": "|u1", "fortran_order": False, "shape": (n, 3, size, size)}
        )
        offset = file.tell()
        try:
            file.truncate(offset + n * 3 * size * size)  # 197 GB of holes: more than memory, nothing on disk
        except OSError as error:
            pytest.skip(f"the file system takes no sparse file of 197 GB: {error}")
        file.seek(offset + 777_777 * 3 * size * size)
        file.write(bytes([9]) * 3 * size * size)
    np.save(folder / "labels.npy", np.arange(n) % 2)
    np.save(folder / "groups.npy", np.arange(n) % 500)
    meta = {
        "format": "histodd-bench patch store", "version": store.VERSION, "shape": [n, 3, size, size], "classes": ["a", "b"],
        "centre_names": [], "columns": ["groups", "labels"], "group_names": [f"s{i}" for i in range(500)], "fingerprint": "0" * 64,
    }  # fmt: skip
    (folder / "meta.json").write_text(json.dumps(meta))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    ps = store.load(folder)
    batch = ps.images[torch.tensor([5, 777_777, 999_999])]
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert batch.flatten(1).float().mean(1).tolist() == [0, 9, 0]
    assert ps.class_counts() == [500_000, 500_000] and ps.fingerprint() == "0" * 64
    assert grown < 150_000, f"{grown} KiB of memory for three patches"


def test_changing_a_batch_never_reaches_the_file(tmp_path):
    before = write(tmp_path / "a").images.clone()
    store.load(tmp_path / "a").images[:5].zero_()
    assert torch.equal(store.load(tmp_path / "a").images, before)


def damage_truncate(folder):
    os.truncate(folder / "images.npy", os.path.getsize(folder / "images.npy") - 1)


def damage_empty(folder):
    (folder / "images.npy").write_bytes(b"")


def damage_meta(folder):
    (folder / "meta.json").write_text('{"format": "hist')


def damage_other_file(folder):
    (folder / "meta.json").write_text("[1, 2]")


def damage_keys(folder):
    meta = json.loads((folder / "meta.json").read_text())
    del meta["classes"]
    (folder / "meta.json").write_text(json.dumps(meta))


def damage_column(folder):
    (folder / "labels.npy").unlink()


def damage_short_column(folder):
    np.save(folder / "groups.npy", np.zeros(3, dtype=np.int64))


def damage_labels(folder):
    np.save(folder / "labels.npy", np.full(20, 3))


def damage_version(folder):
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps({**meta, "version": 999}))


DAMAGES = [damage_truncate, damage_empty, damage_meta, damage_other_file, damage_keys, damage_column, damage_short_column,
           damage_labels, damage_version]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_store_is_named(tmp_path, damage):
    write(tmp_path / "a")
    damage(tmp_path / "a")
    with pytest.raises(StoreError, match=r"delete .* to have it rebuilt") as error:
        store.load(tmp_path / "a")
    assert str(tmp_path / "a") in str(error.value) and "\n" not in str(error.value)


def test_another_version_is_said(tmp_path):
    write(tmp_path / "a")
    damage_version(tmp_path / "a")
    with pytest.raises(StoreError, match="another version"):
        store.load(tmp_path / "a")


def test_the_fingerprint_covers_the_last_byte(tmp_path):
    write(tmp_path / "a")
    kept = store.load(tmp_path / "a").fingerprint()
    assert replace(store.load(tmp_path / "a"), _known_fingerprint=None).fingerprint() == kept
    with open(tmp_path / "a" / "images.npy", "rb+") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    assert replace(store.load(tmp_path / "a"), _known_fingerprint=None).fingerprint() != kept


def test_unfinished_is_not_there(tmp_path):
    images, labels, groups, _ = some_patches(5)
    with pytest.raises(RuntimeError), StoreWriter(tmp_path / "a", (6, 6), CLASSES) as writer:
        writer.append(images, labels, groups)
        raise RuntimeError("the caller failed")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(StoreError, match="not a finished patch store"):
        store.load(tmp_path / "a")


def test_wrong_batches_are_refused(tmp_path):
    images, labels, groups, centres = some_patches(5)
    with StoreWriter(tmp_path / "a", (6, 6), CLASSES) as writer:
        with pytest.raises(HistoddError, match="uint8"):
            writer.append(images.astype(np.float32), labels, groups)
        with pytest.raises(HistoddError, match="4 values for 5"):
            writer.append(images, labels[:4], groups)
        writer.append(images, labels, groups)
        with pytest.raises(HistoddError, match="columns changed"):
            writer.append(images, labels, groups, centres=centres)


def test_a_full_disk_is_one_clear_line(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    images, labels, groups, _ = some_patches(200, size=32)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # Python ignores the signal: the write fails instead
    try:
        with pytest.raises(HistoddError, match=r"cannot write .*: free some space") as error:
            with StoreWriter(tmp_path / "a", (32, 32), CLASSES) as writer:
                writer.append(images, labels, groups)
                writer.finish()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_an_unwritable_place_is_one_clear_line(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(HistoddError, match=r"cannot write .*choose another folder"):
        StoreWriter(tmp_path / "file" / "a", (6, 6), CLASSES)


# ---- cached datasets -------------------------------------------------------------------------------------------------


class Log:
    def __init__(self):
        self.lines = []

    def log(self, text):
        self.lines.append(text)


def build_both(folder):
    write(folder / "train", 20)
    write(folder / "test", 12, (12,))
    return ["a note"]


def cached(cache, build=build_both, key=None, log=None):
    return cached_dataset(cache, "toy", key or {"size": 6}, True, build, log or Log())


def fail(folder):
    raise AssertionError("built again")


def test_a_dataset_is_built_once_per_key(tmp_path):
    first = cached(tmp_path)
    again = cached(tmp_path, build=fail)
    assert again.train.fingerprint() == first.train.fingerprint() and len(again.test) == 12
    assert again.notes == ("a note",) and again.procedural and again.name == "toy"
    with pytest.raises(AssertionError, match="built again"):
        cached(tmp_path, build=fail, key={"size": 7})


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_dataset_is_rebuilt(tmp_path, damage):
    whole = cached(tmp_path).train.fingerprint()
    (folder,) = tmp_path.glob("toy-*/")
    damage(folder / "train")
    log = Log()
    again = cached(tmp_path, log=log).train
    assert replace(again, _known_fingerprint=None).fingerprint() == whole
    assert "rebuilding" in log.lines[0]


def test_a_failed_build_leaves_nothing(tmp_path):
    def half(folder):
        write(folder / "train")
        raise HistoddError("no test images")

    with pytest.raises(HistoddError, match="no test images"):
        cached(tmp_path, build=half)
    assert not list(tmp_path.glob("toy-*/"))
    assert len(cached(tmp_path).train) == 20


def test_a_killed_build_is_done_again(tmp_path):
    code = (
        f"import sys; sys.path.insert(0, {os.path.dirname(__file__)!r}); from pathlib import Path; import os\n"
        "import test_data_store as t\n"
        "def die(folder):\n    t.write(folder / 'train'); os.kill(os.getpid(), 9)\n"
        f"t.cached(Path({str(tmp_path)!r}), build=die)\n"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", code], env=env).returncode == -9
    assert any(tmp_path.glob("toy-*.partial")), "the test killed it too late"
    assert len(cached(tmp_path).test) == 12
    assert not any(tmp_path.glob("toy-*.partial"))
