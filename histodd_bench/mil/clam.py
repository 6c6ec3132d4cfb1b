"""CLAM: attention with instance clustering (Lu et al. 2021, "Data-efficient and weakly supervised computational pathology").

Equation numbers are avoided, since the journal does not number them; the sections are those of its Methods, "CLAM".
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from histodd_bench.mil.abmil import GatedAttention, masked_softmax

INSTANCES = 8  # B: instances clustered at either end of the attention, at most


class CLAM(nn.Module):
    """Attention pooling plus one binary classifier per class that clusters the instances of high and of low attention.

    Args:
        in_features: dimensions of a feature vector.
        num_classes: outputs; classes exclude each other.
        multi: CLAM-MB: an attention branch and a classifier per class; otherwise CLAM-SB: one of both.
        width: dimensions after the first layer; the attention has half as many.
        dropout: after the first layer and within the attention.
        bag_weight: c1, the share of the bag's loss; the rest is the clustering's.
        instances: B; a bag of n uses min(B, n // 2) at either end, so a bag of one has no clustering loss.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        multi: bool = False,
        width: int = 512,
        dropout: float = 0.25,
        bag_weight: float = 0.7,
        instances: int = INSTANCES,
    ) -> None:
        super().__init__()
        self.num_classes, self.multi, self.bag_weight, self.instances = num_classes, multi, bag_weight, instances
        self.embed = nn.Sequential(nn.Linear(in_features, width), nn.ReLU(), nn.Dropout(dropout))
        self.attention = GatedAttention(width, max(width // 2, 1), num_classes if multi else 1, dropout)
        # Multi: row c classifies the slide-level vector of branch c, an independent linear layer with one output.
        self.classifier = nn.Linear(width, num_classes)
        self.clusters = nn.ModuleList(nn.Linear(width, 2) for _ in range(num_classes))

    def forward(self, bags: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits ``[B,C]`` of padded bags ``[B,N,in_features]``; ``mask [B,N]`` is True for instances, None for no padding."""
        return self._pool(*self._attend(bags), mask)

    def _attend(self, bags: Tensor) -> tuple[Tensor, Tensor]:
        h = self.embed(bags)
        return h, self.attention(h)

    def _pool(self, h: Tensor, scores: Tensor, mask: Tensor | None) -> Tensor:
        """Slide-level vectors h_slide,m = sum_k a_k,m h_k and their logits s_slide,m = W_c,m h_slide,m."""
        pooled = masked_softmax(scores, mask).transpose(1, 2) @ h  # [B, branches, width]
        if not self.multi:
            return self.classifier(pooled[:, 0])
        return (pooled * self.classifier.weight).sum(2) + self.classifier.bias

    def loss(self, bags: Tensor, labels: Tensor, mask: Tensor | None = None) -> Tensor:
        """c1 L_slide + c2 L_patch, averaged over the bags; ``labels [B]`` int64.

        A bag too small to be clustered has L_patch = 0 and keeps its c1, as the public code does.
        """
        h, scores = self._attend(bags)
        slide = F.cross_entropy(self._pool(h, scores, mask), labels)
        patch = torch.stack([self._clustering(*bag) for bag in self._unpadded(h, scores, labels, mask)]).mean()
        return self.bag_weight * slide + (1 - self.bag_weight) * patch

    def _unpadded(self, h: Tensor, scores: Tensor, labels: Tensor, mask: Tensor | None):  # type: ignore[no-untyped-def]
        for i, label in enumerate(labels.tolist()):
            kept = slice(None) if mask is None else mask[i]
            yield h[i][kept], scores[i][kept], label

    def _clustering(self, h: Tensor, scores: Tensor, label: int) -> Tensor:
        """L_patch of one bag ``[n,width]`` ("Instance-level clustering"), a mean over the classes.

        Of the true class's branch the most attended instances are evidence (1) and the least attended are not (0). Classes
        exclude each other, so the most attended instances of every other branch are false evidence (0).
        """
        k = min(self.instances, len(h) // 2)
        if k == 0:
            return h.new_zeros(())
        losses = []
        for c, cluster in enumerate(self.clusters):
            attention = scores[:, c if self.multi else 0]
            top = attention.topk(k).indices
            if c == label:
                chosen = torch.cat([top, attention.topk(k, largest=False).indices])
                targets = torch.arange(2, device=h.device).flip(0).repeat_interleave(k)
            else:
                chosen, targets = top, torch.zeros(k, dtype=torch.int64, device=h.device)
            losses.append(smooth_svm(cluster(h[chosen]), targets))
        return torch.stack(losses).mean()


def smooth_svm(scores: Tensor, labels: Tensor, margin: float = 1.0, temperature: float = 1.0) -> Tensor:
    """Smooth top-1 SVM loss (Berrada, Zisserman, Kumar 2018, eq. 6 with k = 1), mean over the rows.

    ``temperature * log sum_j exp((margin [j != y] + s_j - s_y) / temperature)`` for scores ``[N,K]``, labels ``[N]``: the
    multi-class hinge loss as the temperature goes to 0.
    """
    true = scores.gather(1, labels[:, None])
    violation = scores - true + margin * (1 - F.one_hot(labels, scores.shape[1]).to(scores.dtype))
    return temperature * (violation / temperature).logsumexp(1).mean()
