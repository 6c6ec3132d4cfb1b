"""PatchSet: labelled patches with the slide and centre each came from. Every method reads one and returns one."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from histodd_bench.errors import HistoddError

_CHUNK = 4096  # patches touched at once when a whole (possibly memory-mapped) set must be read


@dataclass(frozen=True, eq=False)
class PatchSet:
    """Patches with labels, slides (groups) and, where known, scanning centres.

    Attributes:
        images: ``[N,3,H,W]``; uint8 (0..255, real patches, may be memory-mapped) or float32 in [0, 1] (synthetic).
        labels: ``[N]`` int64, indices into ``classes``.
        groups: ``[N]`` int64, indices into ``group_names``. Splits and stratified draws never mix groups.
        group_names: slide or patient identifiers.
        classes: class names, in label order.
        centres: ``[N]`` int64, indices into ``centre_names``, or None where unknown.
        centre_names: scanning centres.
    """

    images: Tensor
    labels: Tensor
    groups: Tensor
    group_names: tuple[str, ...]
    classes: tuple[str, ...]
    centres: Tensor | None = None
    centre_names: tuple[str, ...] = ()
    _known_fingerprint: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        n = self.images.shape[0]
        if self.images.ndim != 4 or self.images.shape[1] != 3:
            raise HistoddError(f"images must be [N,3,H,W], got {tuple(self.images.shape)}")
        if self.images.dtype not in (torch.uint8, torch.float32):
            raise HistoddError(f"images must be uint8 or float32, got {self.images.dtype}")
        columns = {"labels": (self.labels, self.classes), "groups": (self.groups, self.group_names)}
        if self.centres is not None:
            columns["centres"] = (self.centres, self.centre_names)
        for name, (values, names) in columns.items():
            if values.shape != (n,) or values.dtype != torch.int64:
                raise HistoddError(f"{name} must be [{n}] int64, got {tuple(values.shape)} {values.dtype}")
            if n and not 0 <= int(values.min()) <= int(values.max()) < len(names):
                raise HistoddError(
                    f"{name} must lie in 0..{len(names) - 1}, got {int(values.min())}..{int(values.max())}"
                )

    def __len__(self) -> int:
        return self.images.shape[0]

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.images.shape[2], self.images.shape[3]

    def class_counts(self) -> list[int]:
        """Number of patches per class."""
        return torch.bincount(self.labels, minlength=self.num_classes).tolist()

    def class_indices(self, label: int) -> Tensor:
        """Indices of the patches of one class, ascending, int64."""
        return (self.labels == label).nonzero().flatten()

    def subset(self, indices: Tensor | Sequence[int]) -> "PatchSet":
        """The patches at ``indices``, in that order (copied; names are kept)."""
        indices = torch.as_tensor(indices, dtype=torch.int64)
        return PatchSet(
            self.images[indices],
            self.labels[indices],
            self.groups[indices],
            self.group_names,
            self.classes,
            None if self.centres is None else self.centres[indices],
            self.centre_names,
        )

    def float_batch(self, indices: Tensor | slice, device: torch.device | str = "cpu") -> Tensor:
        """One batch as float32 in [0, 1] on ``device``; reads only the patches asked for."""
        batch = self.images[indices].to(device)
        return batch.float() / 255 if batch.dtype == torch.uint8 else batch

    def require(self, ipc: int | Sequence[int]) -> None:
        """Raise unless there are at least two classes and every class has at least ``ipc`` patches (or its own number)."""
        if self.num_classes < 2:
            raise HistoddError(f"one class only ({', '.join(self.classes)}): a classifier needs at least two")
        budgets = [ipc] * self.num_classes if isinstance(ipc, int) else ipc
        for name, count, asked in zip(self.classes, self.class_counts(), budgets, strict=True):
            if count < asked:
                raise HistoddError(
                    f"class {name!r} has {count} patches, fewer than the {asked} per class asked for: lower --ipc"
                )

    def validate(self) -> None:
        """Raise if float images leave [0, 1] or hold NaN (reads the whole set)."""
        if self.images.dtype == torch.uint8:
            return
        for start in range(0, len(self), _CHUNK):
            chunk = self.images[start : start + _CHUNK]
            bad = ~((chunk >= 0) & (chunk <= 1)).flatten(1).all(1)
            if bad.any():
                first = start + int(bad.nonzero()[0])
                raise HistoddError(
                    f"patch {first} holds NaN or values outside [0, 1]: float images must be scaled to [0, 1]"
                )

    def fingerprint(self) -> str:
        """SHA-256 over pixels, labels, groups, centres and names: equal sets, equal fingerprints. Computed once."""
        if self._known_fingerprint is None:
            digest = hashlib.sha256()
            shape, kind = tuple(self.images.shape), str(self.images.dtype)
            digest.update(repr((shape, kind, self.classes, self.group_names, self.centre_names)).encode())
            for column in (self.labels, self.groups, self.centres):
                digest.update(b"-" if column is None else column.contiguous().numpy().tobytes())
            for start in range(0, len(self), _CHUNK):
                digest.update(self.images[start : start + _CHUNK].cpu().flatten().numpy().data)
            object.__setattr__(self, "_known_fingerprint", digest.hexdigest())
        assert self._known_fingerprint is not None
        return self._known_fingerprint
