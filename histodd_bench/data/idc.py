"""Breast IDC patches (Cruz-Roa et al. 2014): ``<patient>/<0|1>/<patient>_idx5_x<X>_y<Y>_class<C>.png``, 50x50 px at 2.5x.

0 is no invasive ductal carcinoma, 1 is invasive ductal carcinoma. The split is by patient: 30 % of the patients are test,
drawn by the seed so that both classes are represented alike. Tiles cut off by the slide's border are smaller than 50x50; they
are padded with white, which keeps their scale.
"""

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from histodd_bench.data.images import FileEntry, Splits, split_files, without, write_stores
from histodd_bench.data.listing import fingerprint, image_files, subfolders
from histodd_bench.data.store import Dataset, cached_dataset
from histodd_bench.errors import HistoddError

CLASSES = ("non-IDC", "IDC")
TEST_FRACTION = 0.3
_VERSION = 1
NAME = re.compile(r"(?P<patient>.+)_idx5_x(?P<x>\d{1,9})_y(?P<y>\d{1,9})_class(?P<label>[01])\.png", re.IGNORECASE)


def load(*, root: Path, image_size: int, seed: int, cache: Path, workers: int, progress: Any) -> Dataset:
    """Read the patients under ``root`` at ``image_size`` px, split by ``seed``.

    Raises:
        HistoddError: no patients there, fewer than two, or one class only.
    """
    patients = [folder for folder in subfolders(root) if (folder / "0").is_dir() or (folder / "1").is_dir()]
    if not patients:
        raise HistoddError(f"no IDC patches in {root}: expected folders <patient>/0 and <patient>/1 with PNG files")
    entries: list[FileEntry] = []
    skipped: list[tuple[Path, str]] = []
    files = [
        (folder, label, path) for folder in patients for label in (0, 1) for path in image_files(folder / str(label))
    ]
    for folder, label, path in files:
        match = NAME.fullmatch(path.name)
        if match is None:
            skipped.append((path, "name is not <patient>_idx5_x<X>_y<Y>_class<C>.png"))
        elif match["patient"] != folder.name or int(match["label"]) != label:
            skipped.append((path, "name and folder disagree on the patient or the class"))
        else:
            entries.append(FileEntry(path, label, folder.name, (("x", int(match["x"])), ("y", int(match["y"])))))
    for label, name in enumerate(CLASSES):
        if not any(entry.label == label for entry in entries):
            raise HistoddError(f"no {name} patches in {root}: expected PNG files in <patient>/{label}")

    names = sorted({entry.group for entry in entries})
    if len(names) < 2:
        raise HistoddError(f"one patient only ({names[0]}) in {root}: a patient-disjoint split needs at least two")

    def splits(unreadable: Collection[Path]) -> Splits:
        return split_files(without(entries, unreadable), TEST_FRACTION, seed)

    def build(folder: Path) -> list[str]:
        written, notes = write_stores(
            folder,
            splits,
            root=root,
            classes=CLASSES,
            image_size=image_size,
            fit="pad",
            workers=workers,
            skipped=skipped,
            progress=progress,
        )
        train, test = (len({entry.group for entry in written[split]}) for split in ("train", "test"))
        return [f"{test} of {train + test} patients are the test set, drawn with seed {seed}", *notes]

    key = {
        "adapter": f"idc {_VERSION}",
        "files": fingerprint([path for *_, path in files], root),
        "size": image_size,
        "seed": seed,
    }
    return cached_dataset(cache, "idc", key, False, build, progress)
