"""ABMIL: attention pooling with gates (Ilse, Tomczak, Welling 2018, "Attention-based deep multiple instance learning")."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class GatedAttention(nn.Module):
    """Attention scores ``w^T (tanh(V h) * sigmoid(U h))`` of every instance (eq. 9 of the paper, before its softmax).

    Args:
        width: dimensions of an instance.
        hidden: rows of V and U.
        branches: vectors w; CLAM's multi-branch model has one per class.
        dropout: of both gates' outputs.
    """

    def __init__(self, width: int, hidden: int, branches: int = 1, dropout: float = 0.0) -> None:
        super().__init__()
        self.tanh = nn.Sequential(nn.Linear(width, hidden), nn.Tanh(), nn.Dropout(dropout))
        self.gate = nn.Sequential(nn.Linear(width, hidden), nn.Sigmoid(), nn.Dropout(dropout))
        self.scores = nn.Linear(hidden, branches)

    def forward(self, h: Tensor) -> Tensor:
        """``[B,N,width]`` -> scores ``[B,N,branches]``."""
        return self.scores(self.tanh(h) * self.gate(h))


def masked_softmax(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax of ``[B,N,K]`` over the instances of each bag; where ``mask [B,N]`` is False (padding) the weight is 0."""
    if mask is not None:
        scores = scores.masked_fill(~mask[:, :, None], -torch.inf)
    return scores.softmax(1)


class ABMIL(nn.Module):
    """One gated attention pools the instances into one vector (eq. 7), which a linear layer classifies.

    Args:
        in_features: dimensions of a feature vector.
        num_classes: outputs.
        width: dimensions after the first layer.
        dropout: after the first layer.
    """

    def __init__(self, in_features: int, num_classes: int, width: int = 512, dropout: float = 0.25) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(in_features, width), nn.ReLU(), nn.Dropout(dropout))
        self.attention = GatedAttention(width, max(width // 4, 1))
        self.classifier = nn.Linear(width, num_classes)

    def forward(self, bags: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits ``[B,C]`` of padded bags ``[B,N,in_features]``; ``mask [B,N]`` is True for instances, None for no padding."""
        h = self.embed(bags)
        weights = masked_softmax(self.attention(h), mask)
        return self.classifier((weights * h).sum(1))

    def loss(self, bags: Tensor, labels: Tensor, mask: Tensor | None = None) -> Tensor:
        """Mean cross-entropy of the bags; ``labels [B]`` int64."""
        return F.cross_entropy(self(bags, mask), labels)
