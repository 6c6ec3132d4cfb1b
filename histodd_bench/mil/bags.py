"""Bags: the features of every slide's patches, in memory and as one HDF5 file."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from histodd_bench.data.patchset import PatchSet
from histodd_bench.errors import HistoddError
from histodd_bench.files import PARTIAL, canonical, writing

FORMAT = 1


@dataclass(frozen=True, eq=False)
class Bags:
    """One bag of feature vectors per slide.

    Attributes:
        features: slide by slide, ``[n,D]`` float32 each, n at least 1.
        labels: ``[S]`` int64 slide labels, indices into ``classes``.
        names: slides.
        classes: class names in label order.
        skipped: slides without patches, which are in no bag.
    """

    features: tuple[Tensor, ...]
    labels: Tensor
    names: tuple[str, ...]
    classes: tuple[str, ...]
    skipped: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not len(self.features) == len(self.labels) == len(self.names):
            raise HistoddError(
                f"{len(self.features)} bags, {len(self.labels)} labels and {len(self.names)} names do not belong together"
            )
        for name, bag in zip(self.names, self.features, strict=True):
            if bag.ndim != 2 or len(bag) == 0:
                raise HistoddError(f"slide {name} has no patches (features {tuple(bag.shape)}): leave it out")
            if bag.shape[1] != self.features[0].shape[1]:
                raise HistoddError(
                    f"slide {name} has features of {bag.shape[1]} dimensions, {self.names[0]} of {self.in_features}: "
                    "extract all with one encoder"
                )
            if not bool(torch.isfinite(bag).all()):
                raise HistoddError(f"slide {name} has features that are NaN or infinite: extract them again")

    def __len__(self) -> int:
        return len(self.names)

    @property
    def in_features(self) -> int:
        """Dimensions of a feature vector; 0 without bags."""
        return self.features[0].shape[1] if self.features else 0

    def class_counts(self) -> list[int]:
        """Number of slides per class."""
        return torch.bincount(self.labels, minlength=len(self.classes)).tolist()

    def subset(self, indices: Sequence[int]) -> "Bags":
        """The bags at ``indices``, in that order."""
        chosen = torch.as_tensor(indices, dtype=torch.int64)
        return Bags(
            tuple(self.features[i] for i in indices),
            self.labels[chosen],
            tuple(self.names[i] for i in indices),
            self.classes,
        )


def slide_label(labels: Tensor, num_classes: int) -> int:
    """The label of a slide from those of its patches (``[n]`` int64, n at least 1).

    Patches that agree (weakly labelled data) give it. Of two classes, one patch of the second makes a slide positive, the
    assumption of multiple instance learning and the rule of Camelyon16; of more, the most frequent class wins, the lowest
    where several do.
    """
    counts = torch.bincount(labels, minlength=num_classes)
    return int(counts[1] > 0) if num_classes == 2 else int(counts.argmax())


def slide_labels(patches: PatchSet) -> dict[str, int]:
    """:func:`slide_label` of every slide that has patches, in the order of ``group_names``."""
    return {
        patches.group_names[g]: slide_label(patches.labels[patches.groups == g], patches.num_classes)
        for g in patches.groups.unique().tolist()
    }


def make_bags(features: Tensor, patches: PatchSet, labels: Mapping[str, int]) -> Bags:
    """Features ``[N,D]`` of ``patches`` as bags, one for each slide in ``labels`` (slide name -> slide label) and in their order.

    Slides of ``labels`` without patches are named in ``skipped``.
    """
    index = {name: i for i, name in enumerate(patches.group_names)}
    rows = {name: (patches.groups == index.get(name, -1)).nonzero().flatten() for name in labels}
    kept = [name for name in labels if len(rows[name])]
    return Bags(
        tuple(features[rows[name]] for name in kept),
        torch.tensor([labels[name] for name in kept], dtype=torch.int64),
        tuple(kept),
        patches.classes,
        tuple(name for name in labels if not len(rows[name])),
    )


def _h5py() -> Any:
    try:
        import h5py
    except ImportError:
        raise HistoddError("slide-level features are cached in HDF5: pip install h5py") from None
    return h5py


def write_features(path: Path, features: Tensor, facts: Mapping[str, Any]) -> None:
    """Write features ``[N,D]`` with ``facts`` (JSON values, for whoever opens it) as an HDF5 file that appears complete or not at all."""
    h5py = _h5py()
    partial = path.with_name(f"{path.name}.{os.getpid()}{PARTIAL}")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with h5py.File(partial, "w") as file:
                file.create_dataset("features", data=features.contiguous().numpy())
                file.attrs["format"] = FORMAT
                file.attrs["facts"] = canonical(dict(facts))
            with open(partial, "rb") as written:
                os.fsync(written.fileno())
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


def read_features(path: Path) -> Tensor:
    """The features ``[N,D]`` that :func:`write_features` wrote.

    Raises:
        HistoddError: missing, damaged, written by another version, or features that are NaN or infinite.
    """
    h5py = _h5py()
    if not path.is_file():
        raise HistoddError(f"{path} is missing: the features must be extracted again")
    try:
        with h5py.File(path, "r") as file:
            version = int(file.attrs["format"])
            features = torch.from_numpy(file["features"][()])
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise HistoddError(f"{path} is damaged ({error}): delete it, and it will be made again") from None
    if version != FORMAT:
        raise HistoddError(f"{path} has format {version}, this version reads {FORMAT}: delete it to have it made again")
    if features.ndim != 2 or not bool(torch.isfinite(features).all()):
        raise HistoddError(f"{path} holds features that are NaN or infinite: delete it, and it will be made again")
    return features
