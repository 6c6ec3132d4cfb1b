"""What distillation does with networks: which parameters it matches, and model augmentation."""

import torch
from torch import Generator, Tensor, nn


@torch.no_grad()
def augment_model(network: nn.Module, alpha: float, generator: Generator) -> nn.Module:
    """Model augmentation (eq. 2 and 3): add ``alpha`` times filter-normalised Gaussian noise to a network, in place, and
    return it.

    Every filter (row of a convolution or linear weight) moves by exactly ``alpha`` times its own Frobenius norm. Norms
    and biases are not perturbed.
    """
    for weight in matched_parameters(network, "weights"):
        direction = torch.randn(weight.shape, generator=generator).to(weight.device)
        rows, flat = direction.flatten(1), weight.flatten(1)
        rows = rows * (flat.norm(dim=1) / rows.norm(dim=1).clamp(min=1e-20))[:, None]
        weight.add_(rows.view_as(weight), alpha=alpha)
    return network


def draw_seed(generator: Generator) -> int:
    """A seed for a new network."""
    return int(torch.randint(1 << 62, (1,), generator=generator))


def matched_parameters(network: nn.Module, match: str) -> list[Tensor]:
    """Parameters whose gradients are matched, in network order: ``weights`` of convolutions and linear layers,
    ``features``: the same without the classifier, or ``all``."""
    if match == "all":
        return list(network.parameters())
    chosen: list[Tensor] = []
    for module in network.modules():
        if isinstance(module, nn.MultiheadAttention):
            chosen.append(module.in_proj_weight)
        elif isinstance(module, nn.Conv2d | nn.Linear) and not (match == "features" and module is network.classifier):
            chosen.append(module.weight)
    return chosen
