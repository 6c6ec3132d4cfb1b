"""Where distillation starts: real patches, drawn, or chosen because their gradients come close to their class's."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from histodd_bench.baselines.random import stratified_draw
from histodd_bench.data.patchset import PatchSet
from histodd_bench.distill.networks import matched_parameters
from histodd_bench.ops import gradient_distance
from histodd_bench.progress import Progress
from histodd_bench.stain import Preprocessing

REAL = 256  # patches whose mean gradient stands for that of their class


def matched_start(
    train: PatchSet,
    ipc: int | Sequence[int],
    networks: Sequence[nn.Module],
    generator: Generator,
    *,
    preprocessing: Preprocessing,
    candidates: int,
    match: str,
    distance: str,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> Tensor:
    """Indices ``[C * ipc]`` of real patches, class by class: of ``candidates`` draws, stratified over slides, the one
    whose gradients are closest to those of the class, over all ``networks``. ``ipc`` may be a number for each class, 0 for none.

    The distance is that of eq. 1 between the mean gradients of a draw and of 256 patches of the class, without
    augmentation, divided by its mean over the draws so that every network counts alike.

    Args:
        networks: on ``device``.
        match: which parameters, see :class:`~histodd_bench.distill.histodd.HistoDD`.
        distance: of :func:`histodd_bench.ops.gradient_distance`.
    """
    budgets = [ipc] * train.num_classes if isinstance(ipc, int) else ipc
    draws = [stratified_draw(train, ipc, generator) for _ in range(candidates)]
    scores = torch.zeros(train.num_classes, candidates, device=device)
    present = [label for label, budget in enumerate(budgets) if budget]
    with (progress or Progress.silent()).task("choosing where to start", len(present) * len(networks)) as task:
        for label in present:
            members = train.class_indices(label)
            real = members[torch.randperm(len(members), generator=generator)[:REAL]]
            parts = [draw[train.labels[draw] == label] for draw in draws]
            for network in networks:
                parameters = matched_parameters(network, match)
                wanted = _gradients(network, parameters, preprocessing(train.images[real].to(device)), label)
                distances = torch.zeros(candidates, device=device)  # stays there: no wait for each draw
                for i, part in enumerate(parts):
                    found = _gradients(network, parameters, preprocessing(train.images[part].to(device)), label)
                    distances[i] = gradient_distance(wanted, found, distance)
                scores[label] += distances / distances.mean().clamp(min=1e-20)
                task.advance()
    chosen = scores.argmin(1).tolist()
    return torch.cat([draws[best][train.labels[draws[best]] == label] for label, best in enumerate(chosen)])


def _gradients(network: nn.Module, parameters: list[Tensor], x: Tensor, label: int) -> list[Tensor]:
    loss = F.cross_entropy(network(x), torch.full((len(x),), label, device=x.device))
    return [g.detach() for g in torch.autograd.grad(loss, parameters)]
