"""Gradient matching of real patches (GRAD-MATCH, Killamsetty et al. 2021, in spirit): a subset whose mean gradient is that of
its class. A coreset of its own, and where Histo-DD starts."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from histodd_bench.baselines.random import stratified_draw
from histodd_bench.data.patchset import PatchSet
from histodd_bench.distill.networks import augment_model, draw_seed, matched_parameters
from histodd_bench.errors import at_least
from histodd_bench.files import digest
from histodd_bench.models import ModelPool
from histodd_bench.progress import Progress

VERSION = 1  # raised, and Histo-DD's with it, when the same fields would give other patches
COORDINATES = 65536  # of a network's gradient that are looked at, drawn at random where it has more
AT_ONCE = 1 << 26  # numbers in the gradients of as many patches as go through a network together


@dataclass(frozen=True)
class GradMatch:
    """What Histo-DD starts from, left as it is: the control that tells what distillation adds. See :func:`gradient_matched`.

    Attributes:
        candidates: patches per class that are chosen from.
        alpha: strength of the model augmentation of the pool's networks (eq. 3).
        match: parameters whose gradients are matched, see :class:`~histodd_bench.distill.histodd.HistoDD`.
    """

    candidates: int = 640
    alpha: float = 0.05
    match: Literal["weights", "features", "all"] = "weights"

    def __post_init__(self) -> None:
        at_least(1, "gradmatch", candidates=self.candidates)
        at_least(0, "gradmatch", alpha=self.alpha)

    def __call__(
        self,
        train: PatchSet,
        ipc: int,
        pool: ModelPool,
        seed: int,
        *,
        device: torch.device | str = "cpu",
        workdir: Path,
        progress: Progress,
    ) -> PatchSet:
        """``ipc`` patches per class, class by class. ``workdir`` and ``progress`` are not used: the pool reports.

        Raises:
            HistoddError: a class has fewer than ``ipc`` patches; training of the pool diverged.
        """
        return train.subset(
            gradient_matched(
                train, ipc, pool, seed, candidates=self.candidates, alpha=self.alpha, match=self.match, device=device
            )
        )


def gradient_matched(
    train: PatchSet,
    ipc: int | Sequence[int],
    pool: ModelPool,
    seed: int,
    *,
    candidates: int,
    alpha: float,
    match: str,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Indices ``[C * ipc]`` of real patches, class by class: those whose mean gradient is closest to the mean gradient of
    all the candidates of their class. ``ipc`` may be a number for each class, 0 for none.

    Candidates are drawn stratified over slides. Gradients are those of the cross-entropy, without augmentation, in the
    networks of the pool, augmented, and in as many new ones. Closeness is the squared Euclidean distance between mean
    gradients, every network's in units of its candidates' mean squared norm, over all networks. The subset is found greedily,
    then improved by exchanges. Inner products of the candidates' gradients depend on ``seed`` and not on ``ipc``, so the pool
    keeps them: sets of several sizes share them.

    Args:
        pool: gives its networks in evaluation mode, so that every patch is looked at on its own.
        candidates: per class (fewer where the class has fewer); memory grows with the square, time in proportion.
        alpha: strength of the model augmentation of the pool's networks (eq. 3).
        match: which parameters, see :class:`~histodd_bench.distill.histodd.HistoDD`.

    Raises:
        HistoddError: a class has fewer than ``ipc`` patches.
    """
    train.require(ipc)
    budgets = [ipc] * train.num_classes if isinstance(ipc, int) else list(ipc)
    sizes = [len(train.class_indices(label)) for label in range(train.num_classes)]
    counts = [min(max(candidates, budget), n) if budget else 0 for budget, n in zip(budgets, sizes, strict=True)]
    generator = Generator().manual_seed(seed)
    drawn = stratified_draw(train, counts, generator)
    members = [drawn[train.labels[drawn] == label] for label in range(train.num_classes)]

    networks = [augment_model(pool.load(i), alpha, generator) for i in range(len(pool))]  # always: the pool counts them
    networks += [pool.new(draw_seed(generator)) for _ in range(len(pool))]

    def products() -> Tensor:
        title = f"gradients of candidates, seed {seed}"
        total = [torch.zeros(n, n, dtype=torch.float64) for n in counts]
        with pool.progress.task(title, sum(n > 0 for n in counts) * len(networks)) as task:
            for network in networks:
                parameters = matched_parameters(network, match)
                coordinates = _coordinates(parameters, generator)
                for label in [label for label, n in enumerate(counts) if n]:
                    x = pool.preprocessing(train.images[members[label]].to(device))
                    gradients = _gradients(network, parameters, x, label, coordinates)
                    total[label] += _relative_products(gradients).cpu()
                    task.advance()
        return torch.cat([t.flatten() for t in total]).float()

    depends = {
        "version": VERSION,
        "counts": counts,
        "seed": seed,
        "alpha": alpha,
        "match": match,
        "networks": len(pool),
    }
    kept = pool.kept(f"gradients-{digest(depends)[:16]}", products).double()
    each = kept.split([n * n for n in counts])
    return torch.cat(
        [
            of_class[closest_subset(part.view(n, n), budget)]
            for of_class, part, n, budget in zip(members, each, counts, budgets, strict=True)
            if budget
        ]
    )


def closest_subset(products: Tensor, size: int) -> Tensor:
    """Ascending indices ``[size]`` of the vectors, given by their inner products ``[N,N]`` (float64, N >= size), whose mean is
    closest to the mean of all N: greedily, then by exchanges until none brings it closer. No vector is taken twice.
    """
    squares, towards = products.diagonal(), products.mean(1)  # |v|^2, and v . mean
    taken = torch.zeros(len(products), dtype=torch.bool)
    overlap = torch.zeros_like(squares)  # v . sum of those taken
    subset: list[int] = []
    for n in range(1, size + 1):
        distance = (2 * overlap + squares) / n**2 - 2 * towards / n  # with v, up to what is the same for every v
        subset.append(int(distance.masked_fill(taken, torch.inf).argmin()))
        taken[subset[-1]] = True
        overlap += products[subset[-1]]
    tolerance = 1e-9 * float(squares.mean()) / size**2  # rounding must not exchange for ever
    while size < len(products):
        out = torch.tensor(subset)
        change = squares[out, None] + squares - 2 * products[out] + 2 * (overlap - overlap[out, None])
        change = change / size**2 - 2 * (towards - towards[out, None]) / size
        place, new = divmod(int(change.masked_fill(taken, torch.inf).argmin()), len(products))
        if float(change[place, new]) >= -tolerance:
            break
        overlap += products[new] - products[subset[place]]
        taken[subset[place]], taken[new] = False, True
        subset[place] = new
    return torch.tensor(sorted(subset), dtype=torch.long)


def _coordinates(parameters: list[Tensor], generator: Generator) -> Tensor | None:
    """Which coordinates of a gradient are looked at; None for all."""
    total = sum(p.numel() for p in parameters)
    return torch.randperm(total, generator=generator)[:COORDINATES] if total > COORDINATES else None


@torch.no_grad()  # no graph of parameters that are not matched; grad() below is not affected
def _gradients(network: nn.Module, parameters: list[Tensor], x: Tensor, label: int, kept: Tensor | None) -> Tensor:
    """Every patch's own gradient ``[N,D]``, or its coordinates ``kept``."""
    target = torch.full((1,), label, device=x.device)
    kept = None if kept is None else kept.to(x.device)
    names = {id(p): name for name, p in network.named_parameters()}
    matched = {names[id(p)]: p.detach() for p in parameters}

    def loss(matched: dict[str, Tensor], patch: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(network, matched, (patch[None],)), target)

    rows = []
    for patches in x.split(max(1, min(32, AT_ONCE // sum(p.numel() for p in parameters)))):
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernels of attention have no batching rule
            gradients = vmap(grad(loss), in_dims=(None, 0))(matched, patches)
        row = torch.cat([gradients[name].flatten(1) for name in matched], dim=1)
        rows.append(row if kept is None else row[:, kept])
    return torch.cat(rows)


def _relative_products(vectors: Tensor) -> Tensor:
    """Inner products ``[N,N]`` in float64, in units of the mean squared norm."""
    products = (vectors @ vectors.T).double()
    return products / products.diagonal().mean().clamp(min=1e-30)
