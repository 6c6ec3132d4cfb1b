"""DSMIL: two streams, max pooling and attention to the critical instance (Li, Li, Eliceiri 2021, "Dual-stream MIL network")."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DSMIL(nn.Module):
    """An instance classifier finds the critical instance of every class, to which all instances attend.

    Classes exclude each other here, so both streams are trained with cross-entropy and the prediction is the softmax of
    their mean; the public code, whose classes may occur together, has sigmoids there.

    Args:
        in_features: dimensions of a feature vector.
        num_classes: outputs.
        width: dimensions of queries (the public code has 128).
        dropout: on the way to the values.
    """

    def __init__(self, in_features: int, num_classes: int, width: int = 128, dropout: float = 0.0) -> None:
        super().__init__()
        self.instance = nn.Linear(in_features, num_classes)  # W_0
        self.query = nn.Sequential(nn.Linear(in_features, width), nn.ReLU(), nn.Linear(width, width), nn.Tanh())  # W_q
        self.value = nn.Sequential(nn.Dropout(dropout), nn.Linear(in_features, in_features), nn.ReLU())  # W_v
        # W_b of eq. 6: a class's score sees the bag embeddings of all classes, as the public code's convolution does.
        self.bag = nn.Linear(num_classes * in_features, num_classes)

    def streams(self, bags: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Logits ``[B,C]`` of the instance stream and of the bag stream; arguments as in :meth:`forward`."""
        instances = self.instance(bags)  # [B,N,C]
        if mask is not None:
            instances = instances.masked_fill(~mask[:, :, None], -torch.inf)
        highest, critical = instances.max(1)  # eq. 2: c_m = max_i W_0 h_i, per class
        queries = self.query(bags)
        # eq. 3-4: U(h_i, h_m) = softmax_i <q_i, q_m>; scaled by the square root of the width, as in the public code.
        keys = queries.gather(1, critical[:, :, None].expand(-1, -1, queries.shape[2]))  # [B,C,width]
        scores = keys @ queries.transpose(1, 2) / queries.shape[2] ** 0.5  # [B,C,N]
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None, :], -torch.inf)
        embedding = scores.softmax(2) @ self.value(bags)  # eq. 5: b = sum_i U(h_i, h_m) v_i, [B,C,in_features]
        return highest, self.bag(embedding.flatten(1))

    def forward(self, bags: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits ``[B,C]`` (eq. 6, the mean of both streams) of padded bags ``[B,N,in_features]``.

        ``mask [B,N]`` is True for instances, None for no padding.
        """
        instance, bag = self.streams(bags, mask)
        return (instance + bag) / 2

    def loss(self, bags: Tensor, labels: Tensor, mask: Tensor | None = None) -> Tensor:
        """Half the cross-entropy of either stream, mean over the bags; ``labels [B]`` int64."""
        instance, bag = self.streams(bags, mask)
        return (F.cross_entropy(instance, labels) + F.cross_entropy(bag, labels)) / 2
