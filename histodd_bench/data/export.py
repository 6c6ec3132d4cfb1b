"""A prepared dataset as something other programs read: a folder of PNG patches, or coordinates for CLAM."""

import csv
import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from histodd_bench.data import store
from histodd_bench.data.clam import file_name, write_coordinates
from histodd_bench.data.extract import safe_name
from histodd_bench.errors import HistoddError, UsageError
from histodd_bench.files import new_folder, write_text, writing


def export_images(root: Path, out: Path, progress: Any) -> int:
    """Write ``<out>/<split>/<class>/<number>_<slide>.png`` and ``groups.csv``, as the dataset ``imagefolder`` reads them.

    Numbers follow the order of the store. Returns how many were written.

    Raises:
        HistoddError: no dataset in ``root``, ``out`` exists or cannot be written, or two classes have the same file name.
    """
    if out.exists():
        raise UsageError(f"{out} exists: choose another --out")
    store.read_dataset(root)
    table = io.StringIO()
    rows = csv.writer(table, lineterminator="\n")
    rows.writerow(["path", "group", "centre"])
    stores = {split: store.load(root / split) for split in ("train", "test")}
    folders = [safe_name(name) for name in stores["train"].classes]
    if len(set(folders)) < len(folders):
        raise HistoddError(f"classes {', '.join(stores['train'].classes)} do not differ as folder names: rename them")
    with new_folder(out) as folder, progress.task("writing PNG files", sum(map(len, stores.values()))) as task:
        for split, patches in stores.items():
            names = store.slide_names(root / split)
            slides = store.load_columns(root / split).get("slides")
            for name in folders:
                (folder / split / name).mkdir(parents=True)
            for i in range(len(patches)):
                slide = names[slides[i]] if slides is not None else patches.group_names[int(patches.groups[i])]
                path = f"{split}/{folders[int(patches.labels[i])]}/{i:07d}_{safe_name(slide)}.png"
                Image.fromarray(patches.images[i].permute(1, 2, 0).numpy()).save(folder / path)
                centre = "" if patches.centres is None else patches.centre_names[int(patches.centres[i])]
                rows.writerow([path, patches.group_names[int(patches.groups[i])], centre])
                task.advance(1)
        write_text(folder / "groups.csv", table.getvalue())
    return sum(map(len, stores.values()))


def export_coordinates(root: Path, out: Path) -> int:
    """Write ``<out>/<slide>.h5`` for every slide, as CLAM does and ``--coords`` looks for. Returns how many were written.

    Raises:
        HistoddError: the dataset does not come from slides, or ``out`` cannot be written.
    """
    described = store.read_dataset(root)
    facts = described.get("slides") or {}
    if not any(fact.get("levels") for fact in facts.values()):
        raise HistoddError(f"{root} was not cut out of slides: there are no coordinates to write")
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    try:
        return _write_coordinates(root, out, facts, described["settings"]["tiling"])
    except (KeyError, TypeError, IndexError, ValueError) as error:
        raise HistoddError(f"{root / 'dataset.json'} is damaged ({error!r}): prepare the data set again") from None


def _write_coordinates(root: Path, out: Path, facts: dict[str, Any], tiling: dict[str, Any]) -> int:
    written: set[str] = set()
    for split in ("train", "test"):
        columns, names = store.load_columns(root / split), store.slide_names(root / split)
        for index, name in enumerate(names):
            here = np.flatnonzero(columns["slides"] == index)
            corners = np.stack([columns["x"][here], columns["y"][here]], axis=1)
            corners = corners[np.lexsort((corners[:, 0], corners[:, 1]))]
            fact, level = facts[name], int(columns["level"][here[0]])
            size = round(tiling["size"] * tiling["mpp"] / (fact["mpp"] * fact["levels"][level][2]))
            file = file_name(name)
            if file in written:
                raise HistoddError(f"two slides come to {file}: CLAM's files cannot tell them apart, rename one")
            written.add(file)
            write_coordinates(out / file, corners, name=name, level=level, size=size, levels=fact["levels"])
    return len(written)
