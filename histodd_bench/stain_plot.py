"""The stains of a data set as numbers for the report: Macenko fits of some training patches, before and after normalisation."""

import json
from typing import TYPE_CHECKING, Any

import torch

from histodd_bench.files import write_text
from histodd_bench.ops import macenko_fit, stain_augment
from histodd_bench.ops.macenko_fit import OK
from histodd_bench.sets import to_uint8

if TYPE_CHECKING:
    from histodd_bench.experiment import Experiment

STAINS = "stains"  # folder of results
_PATCHES = 300  # fitted, evenly spaced over the training set


@torch.no_grad()
def write_fits(experiment: "Experiment") -> None:
    """Write ``stains/<dataset>.json``, unless it is there and of the same training patches.

    It holds the template, and for every patch that could be fitted the haematoxylin and eosin vectors (optical density of red,
    green, blue; unit length) and maximum concentrations, before and after normalisation to the template.
    """
    request, train = experiment.request, experiment.dataset.train
    path = request.out / STAINS / f"{request.dataset}.json"
    known: dict[str, Any] = {}
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        pass
    if known.get("train") == train.fingerprint():
        return
    indices = torch.linspace(0, len(train) - 1, min(len(train), _PATCHES)).round().long().unique()
    images = train.images[indices]
    template = experiment.preprocessing.template
    stain, top, status = macenko_fit(images)
    ok = status == OK
    moved = to_uint8(stain_augment(images, template.affine(stain, top), None, None, None, valid=ok))
    again, again_top, again_status = macenko_fit(moved)
    ok &= again_status == OK
    centres = None if train.centres is None else train.centres[indices][ok].tolist()
    facts = {
        "train": train.fingerprint(),
        "dataset": request.dataset,
        "procedural": experiment.dataset.procedural,
        "tried": len(indices),
        "template": {"stain": template.stain_matrix, "top": template.max_concentration},
        "before": _rows(stain[ok], top[ok]),
        "after": _rows(again[ok], again_top[ok]),
        "centres": centres,
        "centre_names": list(train.centre_names),
    }
    write_text(path, json.dumps(facts))


def _rows(stain: torch.Tensor, top: torch.Tensor) -> list[list[float]]:
    """``[n][8]``: haematoxylin r, g, b, eosin r, g, b, maximum concentrations of both."""
    flat = torch.cat([stain[:, :, 0], stain[:, :, 1], top], 1)
    return [[round(v, 4) for v in row] for row in flat.tolist()]
