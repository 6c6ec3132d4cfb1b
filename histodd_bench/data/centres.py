"""The part of a data set that one scanning centre holds, as a data set of its own."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from histodd_bench.data.patchset import PatchSet
from histodd_bench.data.store import Dataset, StoreWriter, cached_dataset
from histodd_bench.errors import HistoddError

_CHUNK = 1024  # patches in memory at once


def centres_of(dataset: Dataset) -> tuple[str, ...]:
    """Centres that have both training and test patches.

    Raises:
        HistoddError: the data set does not say which centre its patches come from, or has fewer than two such centres.
    """
    train, test = dataset.train, dataset.test
    if train.centres is None or test.centres is None:
        raise HistoddError(
            f"{dataset.name} does not say which centre its patches come from (imagefolder: column 'centre')"
        )
    both = set(train.centres.unique().tolist())
    names = [train.centre_names[c] for c in sorted(both)]
    tested = {test.centre_names[c] for c in test.centres.unique().tolist()}
    found = tuple(name for name in names if name in tested)
    if len(found) < 2:
        raise HistoddError(
            f"{dataset.name} has {len(found)} centres with training and test patches: a transfer needs two"
        )
    return found


def centre_part(dataset: Dataset, centre: str, *, cache: Path, progress: Any) -> Dataset:
    """The training and test patches of one centre, copied into a memory-mapped store of their own.

    Raises:
        HistoddError: the centre has no training patches, or one class only.
    """

    def copy(patches: PatchSet, folder: Path) -> None:
        chosen = torch.zeros(0, dtype=torch.int64)
        if patches.centres is not None and centre in patches.centre_names:
            chosen = (patches.centres == patches.centre_names.index(centre)).nonzero().flatten()
        with StoreWriter(folder, patches.image_size, patches.classes, (centre,)) as writer:
            for rows in chosen.split(_CHUNK):
                groups = [patches.group_names[g] for g in patches.groups[rows].tolist()]
                images, labels = patches.images[rows].contiguous().numpy(), patches.labels[rows].tolist()
                writer.append(images, labels, groups, centres=[0] * len(rows))
            writer.finish()

    def build(folder: Path) -> list[str]:
        copy(dataset.train, folder / "train")
        copy(dataset.test, folder / "test")
        return [*dataset.notes, f"only the slides of {centre}"]

    key = {"train": dataset.train.fingerprint(), "test": dataset.test.fingerprint(), "centre": centre}
    part = cached_dataset(cache, f"{dataset.name}-centre", key, dataset.procedural, build, progress)
    part = Dataset(dataset.name, part.train, part.test, part.procedural, part.notes)
    counts = part.train.class_counts()
    if min(counts) == 0:
        raise HistoddError(f"{centre} has no training patches of class {part.train.classes[counts.index(0)]!r}")
    return part


def open_experiment(request: Any, progress: Any, centre: str | None = None) -> Any:
    """The slide-level experiment of a request, on the slides of one centre where one is named.

    Budgets are capped slide by slide, so the data set may have fewer patches per class than were asked for.
    """
    from histodd_bench.experiment import Experiment

    experiment = Experiment(replace(request, methods=(), ipc=()), progress)
    experiment.request = request
    if centre is not None:
        experiment.dataset = centre_part(experiment.dataset, centre, cache=request.cache / "data", progress=progress)
    return experiment
