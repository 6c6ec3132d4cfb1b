"""PatchCamelyon and PathMNIST: array files with the real names, shapes and columns, streamed into stores."""

import csv
import re
from pathlib import Path

import numpy as np
import pytest

from histodd_bench import cli
from histodd_bench.data import load_dataset, pathmnist, pcam, store
from histodd_bench.data.fetch import _PATHMNIST_MD5, _PCAM_MD5
from histodd_bench.data.images import resize
from histodd_bench.errors import HistoddError
from histodd_bench.progress import Progress

h5py = pytest.importorskip("h5py")


def load(name: str, root: Path, size: int, cache: Path):
    return load_dataset(name, root=root, image_size=size, cache=cache, progress=Progress.silent())


# ---- PatchCamelyon ---------------------------------------------------------------------------------------------------


def write_pcam(root: Path, counts: dict[str, int] | None = None, *, meta: bool = True) -> dict[str, np.ndarray]:
    """The three splits under their real names: x [N,96,96,3] uint8, y [N,1,1,1] uint8, and the tables of slides."""
    root.mkdir(parents=True, exist_ok=True)
    images = {}
    for seed, (split, n) in enumerate((counts or {"train": 1100, "valid": 4, "test": 30}).items()):
        rng = np.random.default_rng(seed)
        x = rng.integers(0, 256, (n, 1, 1, 3), dtype=np.uint8) // 2 + rng.integers(
            0, 100, (n, 96, 96, 3), dtype=np.uint8
        )
        y = (np.arange(n) % 2).astype(np.uint8).reshape(n, 1, 1, 1)
        images[split] = x
        for what, name, values in (("x.h5", "x", x), ("y.h5", "y", y)):
            with h5py.File(root / pcam.name(split, what), "w") as file:
                file.create_dataset(name, data=values, chunks=(1, *values.shape[1:]))
        if meta:
            with open(root / pcam.name(split, "meta.csv"), "w", newline="") as file:
                rows = [
                    [i, 10 * i, 20 * i, bool(i % 2), bool(i % 2), f"camelyon16_{split}_{i % 5:03d}"] for i in range(n)
                ]
                csv.writer(file).writerows(
                    [["", "coord_y", "coord_x", "tumor_patch", "center_tumor_patch", "wsi"], *rows]
                )
    return images


def test_pcam_s_facts() -> None:
    assert pcam.PATCHES == {"train": 2**18, "valid": 2**15, "test": 2**15} and sum(pcam.PATCHES.values()) == 327_680
    torchvision = pytest.importorskip("torchvision.datasets")
    for split in ("train", "test"):
        files = torchvision.PCAM._FILES[split]
        assert files["images"][0] == pcam.name(split, "x.h5") and files["targets"][0] == pcam.name(split, "y.h5")
        assert files["images"][2] == _PCAM_MD5[f"{split}_x.h5"] and files["targets"][2] == _PCAM_MD5[f"{split}_y.h5"]


def test_pcam_is_read_whole_and_in_order(tmp_path: Path) -> None:
    images = write_pcam(tmp_path / "pcam" / "pcam")
    data = load("pcam", tmp_path / "pcam", 96, tmp_path / "c")
    assert data.train.class_counts() == [550, 550] and data.test.class_counts() == [15, 15]
    for split, part in (("train", data.train), ("test", data.test)):
        assert np.array_equal(part.images.numpy(), images[split].transpose(0, 3, 1, 2))
    assert [data.train.group_names[g] for g in data.train.groups[:3]] == [f"camelyon16_train_{i:03d}" for i in range(3)]
    assert data.notes == ("the official validation set is not used",) and data.folder is not None
    assert store.load_columns(data.folder / "train")["x"][:3].tolist() == [0, 20, 40]
    small = load("pcam", tmp_path / "pcam", 32, tmp_path / "c")
    assert np.array_equal(small.test.images[3].numpy(), resize(images["test"][3], 32, 32).transpose(2, 0, 1))
    large = load("pcam", tmp_path / "pcam", 100, tmp_path / "c")
    assert large.notes == (*data.notes, "1130 of 1130 patches are enlarged from 96 to 100 px")


def test_pcam_without_tables_warns(tmp_path: Path) -> None:
    write_pcam(tmp_path, {"train": 6, "test": 4}, meta=False)
    data = load("pcam", tmp_path, 32, tmp_path / "c")
    assert any(note.startswith("WARNING: no ..._meta.csv") for note in data.notes) and len(data.train.group_names) == 6


def test_an_empty_test_set_is_refused(tmp_path: Path) -> None:
    write_pcam(tmp_path / "p", {"train": 20, "test": 2}, meta=False)
    for what, shape in (("x", (0, 96, 96, 3)), ("y", (0, 1, 1, 1))):
        _rewrite(tmp_path / "p" / pcam.name("test", f"{what}.h5"), what, np.zeros(shape, np.uint8))
    with pytest.raises(HistoddError, match="pcam: there is no test patch: nothing could be scored"):
        load("pcam", tmp_path / "p", 32, tmp_path / "cache")
    assert not [path for path in (tmp_path / "cache").iterdir() if path.suffix != ".lock"]


def test_pcam_is_described_and_prepared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_pcam(tmp_path / "p", {"train": 6, "test": 4})
    assert cli.main(["data", "info", "pcam", "--root", str(tmp_path / "p")]) == 0
    rows = [line.rsplit(None, 2) for line in capsys.readouterr().out.splitlines()[-3:]]
    assert rows == [["  patches", "6", "4"], ["  patches of normal", "3", "2"], ["  patches of tumour", "3", "2"]]
    assert (
        cli.main(
            ["data", "prepare", "pcam", "--root", str(tmp_path / "p"), "--out", str(tmp_path / "o"), "--workers", "1"]
        )
        == 0
    )
    direct, again = (load("pcam", tmp_path / name, 96, tmp_path / "c").train for name in ("p", "o"))
    assert again.fingerprint() == direct.fingerprint()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda r: (r / pcam.name("train", "x.h5")).unlink(), "'data fetch pcam"),
        (
            lambda r: (r / pcam.name("test", "x.h5")).rename(r / (pcam.name("test", "x.h5") + ".gz")),
            "unpack it with gunzip",
        ),
        (lambda r: (r / pcam.name("train", "y.h5")).write_bytes(b"junk"), "y.h5 is damaged or not PatchCamelyon's"),
        (lambda r: (r / pcam.name("train", "x.h5")).write_bytes(b"junk"), "x.h5 is damaged or not PatchCamelyon's"),
        (
            lambda r: (r / pcam.name("train", "meta.csv")).write_text("wsi,coord_x,coord_y\na,1,2\n"),
            "has 1 lines for 6 patches",
        ),
        (
            lambda r: (r / pcam.name("test", "meta.csv")).write_text("wsi,coord_x,coord_y\n" + "a,inf,2\n" * 4),
            "has a coordinate that is no number",
        ),
        (lambda r: _rewrite(r / pcam.name("train", "y.h5"), "y", np.full((6, 1, 1, 1), 7)), "labels must be 0 or 1"),
        (
            lambda r: _rewrite(r / pcam.name("train", "x.h5"), "x", np.zeros((5, 96, 96, 3), np.uint8)),
            "5 images for 6 labels",
        ),
        (
            lambda r: _rewrite(r / pcam.name("train", "x.h5"), "x", np.zeros((6, 96, 96), np.uint8)),
            "not PatchCamelyon's",
        ),
    ],
)
def test_damaged_pcam_is_named(tmp_path: Path, damage, message: str) -> None:
    write_pcam(tmp_path, {"train": 6, "test": 4})
    damage(tmp_path)
    with pytest.raises(HistoddError, match=message) as error:
        load("pcam", tmp_path, 32, tmp_path / "c")
    assert "\n" not in str(error.value) and not list((tmp_path / "c").glob("pcam-*/"))


def _rewrite(path: Path, name: str, values: np.ndarray) -> None:
    with h5py.File(path, "w") as file:
        file.create_dataset(name, data=values)


# ---- PathMNIST -------------------------------------------------------------------------------------------------------


def write_pathmnist(root: Path, side: int = 28, counts: dict[str, int] | None = None) -> dict[str, np.ndarray]:
    root.mkdir(parents=True, exist_ok=True)
    arrays = {}
    for seed, (split, n) in enumerate((counts or {"train": 700, "val": 9, "test": 45}).items()):
        rng = np.random.default_rng([side, seed])
        arrays[f"{split}_images"] = rng.integers(0, 256, (n, side, side, 3), dtype=np.uint8)
        arrays[f"{split}_labels"] = (np.arange(n) % 9).astype(np.uint8)[:, None]
    np.savez_compressed(root / pathmnist.file_name(side), **arrays)
    return arrays


def test_pathmnist_s_facts_are_medmnist_s() -> None:
    info = pytest.importorskip("medmnist").INFO["pathmnist"]
    assert tuple(info["label"][str(i)] for i in range(9)) == pathmnist.CLASSES
    assert info["n_samples"] == pathmnist.PATCHES
    assert [info["MD5"], info["MD5_64"], info["MD5_128"], info["MD5_224"]] == list(_PATHMNIST_MD5.values())


def test_pathmnist_is_what_medmnist_reads(tmp_path: Path) -> None:
    medmnist = pytest.importorskip("medmnist")
    write_pathmnist(tmp_path)
    data = load("pathmnist", tmp_path, 28, tmp_path / "c")
    for split, part in (("train", data.train), ("test", data.test)):
        theirs = medmnist.PathMNIST(split=split, root=str(tmp_path), download=False)
        assert np.array_equal(part.images.numpy().transpose(0, 2, 3, 1), theirs.imgs)
        assert part.labels.tolist() == theirs.labels.reshape(-1).tolist()


def test_the_smallest_sufficient_file_is_taken(tmp_path: Path) -> None:
    small, large = write_pathmnist(tmp_path), write_pathmnist(tmp_path, 64)
    for size, arrays in ((28, small), (32, large), (64, large)):
        data = load("pathmnist", tmp_path, size, tmp_path / "c")
        expected = resize(arrays["train_images"][5], size, size).transpose(2, 0, 1)
        assert np.array_equal(data.train.images[5].numpy(), expected)
    assert len(data.train) == 700 and any("slides are not published" in note for note in data.notes)
    assert not any("enlarged" in note for note in data.notes)
    data = load("pathmnist", tmp_path, 65, tmp_path / "c")
    assert "745 of 745 patches are enlarged from 64 to 65 px" in data.notes


def test_damaged_pathmnist_is_named(tmp_path: Path) -> None:
    with pytest.raises(HistoddError, match="'data fetch pathmnist"):
        load("pathmnist", tmp_path, 28, tmp_path / "c")
    path = tmp_path / "pathmnist.npz"
    path.write_bytes(b"PK no zip")
    with pytest.raises(HistoddError, match=r"is no .npz file"):
        load("pathmnist", tmp_path, 28, tmp_path / "c")
    np.savez(path, train_images=np.zeros((3, 28, 28, 3), np.uint8), train_labels=np.array([{"a": 1}], dtype=object))
    with pytest.raises(HistoddError, match="not PathMNIST's"):
        load("pathmnist", tmp_path, 28, tmp_path / "c")
    arrays = {"train_images": np.zeros((2, 28, 28, 3), np.uint8)}
    for labels in (np.array([0, -1]), np.array([3, 9]), np.array(["a", "b"]), np.array([1, 2], "datetime64[s]")):
        np.savez(path, **arrays, train_labels=labels)
        with pytest.raises(HistoddError, match="not PathMNIST's"):
            load("pathmnist", tmp_path, 28, tmp_path / "c")
    np.savez(path, **arrays, train_labels=np.array([0, 1]))
    locked = bytearray(path.read_bytes())
    for signature, flags in ((b"PK\1\2", 8), (b"PK\3\4", 6)):
        for start in (m.start() for m in re.finditer(re.escape(signature), bytes(locked))):
            locked[start + flags] |= 1  # says that it is encrypted
    path.write_bytes(bytes(locked))
    with pytest.raises(HistoddError, match=r"not PathMNIST's .*encrypted"):
        load("pathmnist", tmp_path, 28, tmp_path / "c")
    write_pathmnist(tmp_path)
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 0xFF
    path.write_bytes(bytes(content))
    with pytest.raises(HistoddError, match="fetch it again"):
        load("pathmnist", tmp_path, 28, tmp_path / "c")
    assert not list((tmp_path / "c").glob("pathmnist-*/"))
