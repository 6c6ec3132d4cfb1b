"""The stain template of a dataset (paper 3.1), stored with it: found once, in one streaming pass over the training patches.

The template is the patch whose channel means and standard deviations are closest to the whole set's; what is kept is its stain
matrix and maximum concentrations. :func:`histodd_bench.stain.describe` finds it.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from histodd_bench.data import store
from histodd_bench.files import write_text

if TYPE_CHECKING:
    from histodd_bench.stain import Preprocessing

FILE = "template.json"


def write_template(folder: Path, progress: Any) -> None:
    """Find the template of the store ``train`` of a dataset folder and keep it in ``template.json``."""
    from histodd_bench.stain import describe

    train = store.load(folder / "train")
    with progress.task("choosing the stain template", 1):
        found = describe(train)
    where: dict[str, Any] = {}
    if found.template_index >= 0:
        columns, names = store.load_columns(folder / "train"), store.slide_names(folder / "train")
        where = {name: columns[name][found.template_index].item() for name in ("x", "y", "mpp") if name in columns}
        if names:
            where["slide"] = names[columns["slides"][found.template_index]]
    described = {
        "train": train.fingerprint(),
        "mean": found.mean,
        "std": found.std,
        "index": found.template_index,
        "stain_matrix": found.template.stain_matrix,
        "max_concentration": found.template.max_concentration,
        **where,
    }
    write_text(folder / FILE, json.dumps(described, indent=1))


def read_template(folder: Path, fingerprint: str) -> "Preprocessing | None":
    """The template kept with a dataset; None where there is none, or where it belongs to other patches.

    Args:
        fingerprint: of the training patches.
    """
    from histodd_bench.stain import Preprocessing, StainTemplate

    try:
        kept = json.loads((folder / FILE).read_text(encoding="utf-8"))
        if kept["train"] != fingerprint:
            return None
        (r, g, b), (h, e) = kept["mean"], kept["max_concentration"]
        stain = tuple((float(row[0]), float(row[1])) for row in kept["stain_matrix"])
        spread = tuple(float(v) for v in kept["std"])
        if len(stain) != 3 or len(spread) != 3:
            return None
        template = StainTemplate(stain, (float(h), float(e)))
        return Preprocessing((float(r), float(g), float(b)), spread, template, int(kept["index"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None  # absent or damaged: it is found again
