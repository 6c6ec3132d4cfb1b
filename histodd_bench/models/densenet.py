"""DenseNet121 (Huang et al. 2017) from torchvision, with a stem that suits small patches."""

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.densenet import DenseNet


class DenseNet121(nn.Module):
    """torchvision's DenseNet121, batch norm included; above 128 px with growth rate 32 exactly that network.

    Args:
        num_classes: outputs.
        image_size: side of the square patches in pixels, at least 16. Up to 64 px the stem is a 3x3
            convolution without pooling, up to 128 px a 3x3 convolution of stride 2, above the original 7x7 of
            stride 2 with max-pooling.
        width: growth rate; the stem has twice as many channels.
    """

    def __init__(self, num_classes: int, image_size: int, width: int = 32) -> None:
        super().__init__()
        network = DenseNet(width, (6, 12, 24, 16), 2 * width, num_classes=num_classes)
        if image_size <= 128:
            stem = nn.Conv2d(3, 2 * width, 3, stride=1 if image_size <= 64 else 2, padding=1, bias=False)
            nn.init.kaiming_normal_(stem.weight)  # as torchvision does
            network.features.conv0 = stem
            network.features.pool0 = nn.Identity()
        self.body, self.classifier = network.features, network.classifier

    def features(self, x: Tensor) -> Tensor:
        """``[N,3,H,W]`` float -> ``[N, D]``; D is 1024 at growth rate 32."""
        return F.adaptive_avg_pool2d(F.relu(self.body(x), inplace=True), 1).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[N, num_classes]``."""
        return self.classifier(self.features(x))
