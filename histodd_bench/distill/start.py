"""Where distillation starts: real patches, drawn, or chosen because together their gradients are those of their class."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from histodd_bench.baselines.random import stratified_draw
from histodd_bench.data.patchset import PatchSet
from histodd_bench.distill.networks import matched_parameters
from histodd_bench.progress import Progress
from histodd_bench.stain import Preprocessing

COORDINATES = 65536  # of a network's gradient that are looked at, drawn at random where it has more


def matched_start(
    train: PatchSet,
    ipc: int | Sequence[int],
    networks: Sequence[nn.Module],
    generator: Generator,
    *,
    preprocessing: Preprocessing,
    candidates: int,
    match: str,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> Tensor:
    """Indices ``[C * ipc]`` of real patches, class by class: those whose mean gradient is closest to the mean gradient of
    all the candidates of their class, over all ``networks``. ``ipc`` may be a number for each class, 0 for none.

    Candidates are drawn stratified over slides. Closeness is the squared Euclidean distance between mean gradients of the
    cross-entropy, without augmentation, every network's in units of its candidates' mean squared norm. The subset is found
    greedily, then improved by exchanging single patches until no exchange helps; compare GRAD-MATCH (Killamsetty et al. 2021).

    Args:
        networks: on ``device``; used in evaluation mode, since every patch is looked at on its own.
        candidates: per class (fewer where the class has fewer); memory grows with the square, time in proportion.
        match: which parameters, see :class:`~histodd_bench.distill.histodd.HistoDD`.

    Raises:
        HistoddError: a class has fewer than ``ipc`` patches.
    """
    train.require(ipc)
    budgets = [ipc] * train.num_classes if isinstance(ipc, int) else list(ipc)
    sizes = [len(train.class_indices(label)) for label in range(train.num_classes)]
    drawn = stratified_draw(
        train,
        [min(max(candidates, budget), n) if budget else 0 for budget, n in zip(budgets, sizes, strict=True)],
        generator,
    )
    present = [label for label, budget in enumerate(budgets) if budget]
    chosen = []
    with (progress or Progress.silent()).task("choosing where to start", len(present) * len(networks)) as task:
        for label in present:
            members = drawn[train.labels[drawn] == label]
            products = torch.zeros(len(members), len(members), dtype=torch.float64)
            for network in networks:
                parameters = matched_parameters(network, match)
                x = preprocessing(train.images[members].to(device))
                gradients = _gradients(network.eval(), parameters, x, label, generator)
                products += _relative_products(gradients).cpu()
                task.advance()
            chosen.append(members[closest_subset(products, budgets[label])])
    return torch.cat(chosen)


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


def _gradients(network: nn.Module, parameters: list[Tensor], x: Tensor, label: int, generator: Generator) -> Tensor:
    """Every patch's own gradient ``[N,D]``, or D random coordinates of it."""
    total = sum(p.numel() for p in parameters)
    kept = None
    if total > COORDINATES:
        kept = torch.randperm(total, generator=generator)[:COORDINATES].to(x.device)
    target = torch.full((1,), label, device=x.device)
    rows = []
    for patch in x:  # one after the other: patches of one batch would share a gradient
        loss = F.cross_entropy(network(patch[None]), target)
        row = torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])
        rows.append(row if kept is None else row[kept])
    return torch.stack(rows)


def _relative_products(vectors: Tensor) -> Tensor:
    """Inner products ``[N,N]`` in float64, in units of the mean squared norm."""
    products = (vectors @ vectors.T).double()
    return products / products.diagonal().mean().clamp(min=1e-30)
