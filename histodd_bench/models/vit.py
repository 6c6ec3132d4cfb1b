"""Vision transformer (Dosovitskiy et al. 2021) from torchvision, with token patches that suit the image size."""

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torchvision.models import VisionTransformer


def token_size(image_size: int) -> tuple[int, int]:
    """Side of a token in pixels, and the image side it divides: ``image_size``, or a little more for awkward sizes.

    The token is the largest divisor of the side up to 16 that leaves at least eight tokens a side: 4 at 32
    px, 8 at 64, 16 at 224 and 256. Sizes without a fitting divisor (primes) are padded to the next one that
    has.
    """
    side = image_size
    while True:
        token = max(t for t in range(1, 17) if side % t == 0 and side // t >= 8)
        if token >= min(image_size / 16, 8):
            return token, side
        side += 1


class ViT(nn.Module):
    """torchvision's vision transformer: 12 layers, MLP four times as wide, no dropout, one head per 64 dimensions.

    At 224 px and 768 dimensions exactly ViT-B/16.

    Args:
        num_classes: outputs.
        image_size: side of the square patches in pixels, at least 16; see :func:`token_size`. Sizes without a
            fitting divisor are padded by repeating the edge.
        width: hidden dimensions: 768 is ViT-B, 384 ViT-S, 192 ViT-Ti.
    """

    def __init__(self, num_classes: int, image_size: int, width: int = 768) -> None:
        super().__init__()
        token, side = token_size(image_size)
        self.padding = side - image_size
        heads = max(h for h in range(1, max(width // 64, 1) + 1) if width % h == 0)
        self.body = VisionTransformer(side, token, 12, heads, width, 4 * width, num_classes=num_classes)
        self.body.heads = nn.Identity()  # type: ignore[assignment]
        self.classifier = nn.Linear(width, num_classes)
        nn.init.zeros_(self.classifier.weight)  # as torchvision does
        nn.init.zeros_(self.classifier.bias)

    def features(self, x: Tensor) -> Tensor:
        """``[N,3,H,W]`` float -> ``[N, width]``, the class token after the last layer norm."""
        if self.padding:
            x = F.pad(x, (0, self.padding, 0, self.padding), mode="replicate")
        # Fused attention has no second derivative, which gradient matching needs whenever the patches require
        # grad.
        plain = torch.is_grad_enabled() and x.requires_grad
        with sdpa_kernel(SDPBackend.MATH) if plain else nullcontext():
            return self.body(x)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[N, num_classes]``."""
        return self.classifier(self.features(x))
