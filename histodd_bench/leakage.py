"""How close a set is to the real patches it was made from: copies, and what it gives away about who was in the data.

The paper argues that distilled patches protect patients and shows no number. Three are measured here, each in two views
of a patch (see :data:`VIEWS`), over the eight flips and quarter turns:

- the distance of every patch of the set to the nearest training patch, beside that of held-out real patches, which
  come from other slides and cannot be copies;
- for a distilled set that still has the real patches it began with: how many of its patches have their own beginning as
  the nearest training patch, so that whoever holds the slides can say where it came from;
- membership inference: does the distance to the set tell training patches from held-out ones? An attacker who has a
  patch guesses that it was used where it is near; the area under the curve is 0.5 where the set tells nothing.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from histodd_bench.data.patchset import PatchSet
from histodd_bench.errors import HistoddError
from histodd_bench.sets import to_uint8

LARGEST_SIDE = 32  # patches are averaged down to this for comparison
_CHUNK = 1024
_COPY_PERCENTILE = 0.01
_FALSE_ALARMS = 0.01
_SAME = 0.01  # distance up to which two patches are one, but for rounding


def _colours(x: Tensor) -> Tensor:
    return x.flatten(1)


def _structure(x: Tensor) -> Tensor:
    grey = x.mean(1).flatten(1)
    centred = grey - grey.mean(1, keepdim=True)
    return centred / centred.square().mean(1, keepdim=True).sqrt().clamp(min=1e-3)


# What is compared: a vector for each patch, whose root mean square difference is the distance.
VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "colours": _colours,  # intensities in [0, 1]
    "structure": _structure,  # grey, brightness and contrast taken out: a copy that was stained anew is still one
}


@dataclass(frozen=True)
class Leakage:
    """One view's numbers; distances are root mean square differences.

    Attributes:
        view: a key of :data:`VIEWS`.
        to_training: median distance of the set's patches to the nearest training patch.
        held_out: the same of held-out real patches: what is usual between slides.
        copies: share of the set's patches that are nearer to a training patch than all but 1 % of held-out ones are.
        begun: share of a distilled set's patches whose nearest training patch is the one they began as; None where it
            began with no training patches, or with unknown ones.
        membership: area under the curve of telling training from held-out patches by their distance to the set.
        caught: share of training patches that are told at 1 % false alarms.
        beginnings: area under the curve of telling the patches the set began with (of a coreset: its own); None as above.
    """

    view: str
    to_training: float
    held_out: float
    copies: float
    begun: float | None
    membership: float
    caught: float
    beginnings: float | None


def measure(
    made: PatchSet, training: PatchSet, held_out: PatchSet, initial: Tensor | None = None, *, most: int = 2000, seed: int = 0
) -> list[Leakage]:
    """Compare a set with the training patches it was made from and with held-out ones.

    Args:
        made: the set, uint8 or float.
        training, held_out: real patches of the same size, of different slides.
        initial: ``[N,3,H,W]`` the patches that a distillation began with, in the set's order; None: not known. A set of
            real patches is its own beginning.
        most: how many training and held-out patches membership is inferred of, drawn with ``seed``; a quarter as many
            held-out ones say what distance is usual.

    Raises:
        HistoddError: patches of different sizes, or no held-out patches.
    """
    for name, other in (("training", training), ("held-out", held_out)):
        if not len(other):
            raise HistoddError(f"there are no {name} patches to compare with")
        if other.image_size != made.image_size:
            raise HistoddError(f"the set holds {made.image_size[0]} px patches, the data {other.image_size[0]} px ones")
    if initial is not None and len(initial) != len(made):
        raise HistoddError(f"the set holds {len(made)} patches and began with {len(initial)}: it was changed since")
    begun = made.images if made.images.dtype == torch.uint8 else initial
    return [_measure(view, made, training, held_out, begun, most, seed) for view in VIEWS]


def _measure(
    view: str, made: PatchSet, training: PatchSet, held_out: PatchSet, begun: Tensor | None, most: int, seed: int
) -> Leakage:
    generator = torch.Generator().manual_seed(seed)
    of = VIEWS[view]
    few = {name: _some(part, most, generator) for name, part in (("in", training), ("out", held_out))}
    own = _vectors(made.images, of, turned=True)
    queries = [own, _vectors(_some(held_out, max(most // 4, 1), generator), of, turned=True)]
    if begun is not None:
        queries.append(_vectors(begun, of)[:, None])
    (near, index), (usual, _), *start = _nearest(queries, training, of)
    to_set = {name: _to_set(_vectors(part, of), own) for name, part in few.items()}
    first = beginnings = None
    for apart, where in start:
        if apart.max() < _SAME:  # otherwise it began with noise, or with patches of others
            # Patches that are alike have one number: which of two equal ones was drawn does not matter.
            same = (index == where) | (_rows(training, index, of) == _rows(training, where, of)).all(1)
            first, beginnings = float(same.double().mean()), _area(_to_set(queries[2][:, 0], own), to_set["out"])
    limit = torch.quantile(to_set["out"].double(), _FALSE_ALARMS)
    return Leakage(
        view,
        float(near.median()),
        float(usual.median()),
        float((near.double() < torch.quantile(usual.double(), _COPY_PERCENTILE)).double().mean()),
        first,
        _area(to_set["in"], to_set["out"]),
        float((to_set["in"].double() < limit).double().mean()),
        beginnings,
    )


def _some(patches: PatchSet, most: int, generator: torch.Generator) -> Tensor:
    rows = torch.randperm(len(patches), generator=generator)[:most].sort().values
    return patches.images[rows]


def _vectors(images: Tensor, of: Callable[[Tensor], Tensor], *, turned: bool = False) -> Tensor:
    """``[N,D]``, or with all flips and quarter turns ``[N,8,D]``."""
    x = images.float() / 255 if images.dtype == torch.uint8 else images.float()
    if max(x.shape[-2:]) > LARGEST_SIDE:
        x = F.adaptive_avg_pool2d(x, (min(x.shape[-2], LARGEST_SIDE), min(x.shape[-1], LARGEST_SIDE)))
    if not turned:
        return of(x)
    square = x.shape[-1] == x.shape[-2]
    turns = [torch.rot90(x, k, (2, 3)) for k in (range(4) if square else (0, 2))]
    return torch.stack([of(y) for t in turns for y in (t, t.flip(3))], 1)


def _rows(patches: PatchSet, index: Tensor, of: Callable[[Tensor], Tensor]) -> Tensor:
    return _vectors(patches.images[index], of)


def _distances(a: Tensor, b: Tensor) -> Tensor:
    """``[N,M]`` of ``a [N,T,D]``, the least over T, and ``b [M,D]``; by matrix products, so good to about 1e-3."""
    middle = b.mean(0)
    apart = torch.cdist((a - middle).flatten(0, 1), b - middle)
    return apart.view(*a.shape[:2], len(b)).amin(1) / b.shape[1] ** 0.5


def _nearest(queries: list[Tensor], patches: PatchSet, of: Callable[[Tensor], Tensor]) -> list[tuple[Tensor, Tensor]]:
    """For each ``[N,T,D]``: distance ``[N]`` to the nearest patch and which it is. The patches are read once, in chunks."""
    found = [(torch.full((len(a),), torch.inf), torch.zeros(len(a), dtype=torch.int64)) for a in queries]
    for start in range(0, len(patches), _CHUNK):
        chunk = _vectors(patches.images[start : start + _CHUNK], of)
        for a, (best, index) in zip(queries, found, strict=True):
            distance, place = _distances(a, chunk).min(1)
            nearer = distance < best
            best[nearer], index[nearer] = distance[nearer], place[nearer] + start
    return found


def _to_set(vectors: Tensor, own: Tensor) -> Tensor:
    """Distance of every vector to the nearest patch of the set, whichever way that is turned."""
    return torch.cat([_distances(own, part).amin(0) for part in vectors.split(_CHUNK)])


def _area(members: Tensor, others: Tensor) -> float:
    """Chance that a member is nearer than another one, ties counted half."""
    from sklearn.metrics import roc_auc_score

    labels = torch.cat([torch.ones(len(members)), torch.zeros(len(others))])
    return float(roc_auc_score(labels.numpy(), -torch.cat([members, others]).numpy()))


def identical(made: PatchSet, others: PatchSet) -> int:
    """How many patches of a set are, pixel by pixel as bytes and whatever their labels, also among others of the same size."""
    known = set(_hashes(others))
    return sum(h in known for h in _hashes(made))


def _hashes(patches: PatchSet) -> Iterator[bytes]:
    for start in range(0, len(patches), _CHUNK):
        for image in to_uint8(patches.images[start : start + _CHUNK]):
            yield hashlib.sha256(image.contiguous().numpy().tobytes()).digest()


def as_record(found: list[Leakage]) -> list[dict[str, Any]]:
    """Plain numbers for JSON."""
    return [asdict(view) for view in found]
