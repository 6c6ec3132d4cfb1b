"""What a slide-level table needs of a data set and of this installation."""

from importlib.util import find_spec
from pathlib import Path

from histodd_bench.data.centres import centres_of
from histodd_bench.data.patchset import PatchSet
from histodd_bench.data.store import Dataset
from histodd_bench.engines import Engine
from histodd_bench.errors import HistoddError
from histodd_bench.methods import method_entry
from histodd_bench.mil.bags import slide_labels
from histodd_bench.mil.features import check_encoder
from histodd_bench.request import Request, SlideOptions
from histodd_bench.slides_distill import METHODS
from histodd_bench.tables.slide_level import SlideTable


def check_request(options: SlideOptions, image_size: int, device: str, out: Path) -> None:
    """Refuse an encoder or engine that a slide-level table would only stumble over after minutes of work.

    Raises:
        UsageError, HistoddError: one line that names the option.
    """
    check_encoder(options.encoder, options.weights, image_size)
    Engine(options.engine, 1, device, out / "work", options.engine_options).check()


def obstacle(table: SlideTable, request: Request, dataset: Dataset) -> str:
    """Why a slide-level table cannot be computed, in one line; empty where it can be."""
    needed = {"h5py": "h5py"}
    if "transmil" in request.slides.models:
        needed["nystrom_attention"] = "nystrom-attention"
    missing = [package for module, package in needed.items() if find_spec(module) is None]
    if missing:
        return f"it needs packages that are not installed: pip install {' '.join(missing)}"
    wrong = [m for m in request.methods if m not in METHODS and not method_entry(m).whole]
    if wrong:
        return f"{wrong[0]!r} cannot be applied slide by slide: choose from {', '.join(METHODS)} and full"
    found = _slides(dataset.train, "training", dataset.name) or _slides(dataset.test, "test", dataset.name)
    if found or table.name != "table5":
        return found
    try:
        centres_of(dataset)
    except HistoddError as error:
        return str(error)
    return ""


def _slides(patches: PatchSet, side: str, name: str) -> str:
    if len(patches.groups.unique()) == len(patches):
        return f"{name} does not say which slide its {side} patches come from (imagefolder: groups.csv)"
    slides = slide_labels(patches)
    if len(set(slides.values())) < 2:
        return (
            f"the {side} slides of {name} are all of class {patches.classes[next(iter(slides.values()))]!r}, "
            "there is nothing to tell apart"
        )
    return ""
