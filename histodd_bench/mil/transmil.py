"""TransMIL: two layers of Nystrom attention with a pyramid position encoding between (Shao et al. 2021, Algorithm 1 and 2).

The attention is that of the package ``nystrom-attention`` (group ``mil``). Unlike the other models this one depends on the
order of the instances: they are laid out row by row on a square, and the square is filled with the first ones again.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from histodd_bench.errors import HistoddError, UsageError


class Layer(nn.Module):
    """``x + NystromMSA(LayerNorm(x))``: 8 heads, landmarks half the width, 6 iterations of the pseudo-inverse."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        try:
            from nystrom_attention import NystromAttention
        except ImportError:
            raise HistoddError("transmil needs the package nystrom-attention: pip install nystrom-attention") from None
        self.norm = nn.LayerNorm(width)
        self.attention = NystromAttention(
            dim=width,
            dim_head=width // 8,
            heads=8,
            num_landmarks=width // 2,
            pinv_iterations=6,
            residual=True,
            dropout=dropout,
        )

    def forward(self, x: Tensor) -> Tensor:
        """Tokens ``[B,T,width]`` -> the same shape."""
        return x + self.attention(self.norm(x))


class PPEG(nn.Module):
    """Pyramid position encoding generator (Algorithm 2): depth-wise convolutions of 7, 5 and 3 over the square, summed."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(nn.Conv2d(width, width, k, padding=k // 2, groups=width) for k in (7, 5, 3))

    def forward(self, x: Tensor, side: int) -> Tensor:
        """Tokens ``[B, 1 + side * side, width]``, the class token first, which passes unchanged."""
        token, instances = x[:, :1], x[:, 1:]
        square = instances.transpose(1, 2).reshape(len(x), -1, side, side)
        square = square + sum(convolution(square) for convolution in self.convolutions)
        return torch.cat([token, square.flatten(2).transpose(1, 2)], 1)


def fill_square(h: Tensor) -> tuple[Tensor, int]:
    """Instances ``[B,N,width]`` -> ``[B, side^2, width]`` with the smallest side that holds them, and the side.

    The first instances are repeated at the end (Algorithm 1, step 1); at most ``2 (side - 1)`` are missing, never more than N.
    """
    n = h.shape[1]
    side = math.isqrt(n - 1) + 1
    return torch.cat([h, h[:, : side * side - n]], 1), side


class TransMIL(nn.Module):
    """The class token's logits after layer, PPEG, layer.

    Args:
        in_features: dimensions of a feature vector.
        num_classes: outputs.
        width: dimensions of a token, a multiple of 16 (published: 512).
        dropout: within the attention.
    """

    def __init__(self, in_features: int, num_classes: int, width: int = 512, dropout: float = 0.1) -> None:
        super().__init__()
        if width % 16:
            raise UsageError(f"the width of transmil must be a multiple of 16, got {width}")
        self.embed = nn.Sequential(nn.Linear(in_features, width), nn.ReLU())
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.first, self.position, self.second = Layer(width, dropout), PPEG(width), Layer(width, dropout)
        self.norm = nn.LayerNorm(width)
        self.classifier = nn.Linear(width, num_classes)

    def forward(self, bags: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits ``[B,C]`` of bags ``[B,N,in_features]``, all of N instances; padding is refused.

        Raises:
            HistoddError: ``mask`` marks padding: the square would hold it. Give one bag at a time.
        """
        if mask is not None and not bool(mask.all()):
            raise HistoddError("transmil takes one bag at a time: it cannot leave padding out of its square")
        h, side = fill_square(self.embed(bags))
        x = torch.cat([self.token.expand(len(h), -1, -1), h], 1)
        x = self.second(self.position(self.first(x), side))
        return self.classifier(self.norm(x)[:, 0])

    def loss(self, bags: Tensor, labels: Tensor, mask: Tensor | None = None) -> Tensor:
        """Mean cross-entropy of the bags; ``labels [B]`` int64."""
        return F.cross_entropy(self(bags, mask), labels)
