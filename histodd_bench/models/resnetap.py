"""ResNetAP-10: ResNet-10 that pools where a ResNet strides, for denser image gradients (paper 4; Kim et al. 2022)."""

import math

import torch.nn.functional as F
from torch import Tensor, nn

from histodd_bench.models.pooling import HalvingPool


def _conv(channels: int, width: int, kernel: int) -> nn.Conv2d:
    return nn.Conv2d(channels, width, kernel, padding=kernel // 2, bias=False)


class _Block(nn.Module):
    """Basic block. Where ``pool`` is set, 2x2 average pooling follows the first convolution and the shortcut's."""

    def __init__(self, channels: int, width: int, pool: bool) -> None:
        super().__init__()
        self.pool = HalvingPool() if pool else nn.Identity()
        self.conv1, self.norm1 = _conv(channels, width, 3), nn.GroupNorm(width, width)
        self.conv2, self.norm2 = _conv(width, width, 3), nn.GroupNorm(width, width)
        self.shortcut = (
            nn.Sequential(_conv(channels, width, 1), HalvingPool(), nn.GroupNorm(width, width))
            if pool
            else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        out = self.pool(F.relu(self.norm1(self.conv1(x)), inplace=True))
        return F.relu(self.norm2(self.conv2(out)) + self.shortcut(x), inplace=True)


class ResNetAP10(nn.Module):
    """Blocks [1, 1, 1, 1], width doubling three times, instance norm (affine ``GroupNorm(C, C)``), global average pool.

    4,906,818 parameters for 2 classes with the large stem.

    Args:
        num_classes: outputs.
        image_size: side of the square patches in pixels, at least 16. The stem is a 3x3 convolution up to 64
            px, followed by 2x2 average pooling up to 128 px, and a 7x7 convolution with 4x4 average pooling
            above.
        width: channels of the stem and the first block, 64 in the literature.
    """

    def __init__(self, num_classes: int, image_size: int, width: int = 64) -> None:
        super().__init__()
        stem: list[nn.Module] = [
            _conv(3, width, 3 if image_size <= 128 else 7),
            nn.GroupNorm(width, width),
            nn.ReLU(inplace=True),
        ]
        if image_size > 64:
            stem.append(HalvingPool() if image_size <= 128 else nn.AvgPool2d(4))
        self.stem = nn.Sequential(*stem)
        self.stages = nn.Sequential(
            _Block(width, width, pool=False),
            _Block(width, 2 * width, pool=True),
            _Block(2 * width, 4 * width, pool=True),
            _Block(4 * width, 8 * width, pool=True),
        )
        self.classifier = nn.Linear(8 * width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
                nn.init.normal_(module.weight, 0.0, math.sqrt(2 / fan_out))

    def features(self, x: Tensor) -> Tensor:
        """``[N,3,H,W]`` float -> ``[N, 8 * width]``."""
        return self.stages(self.stem(x)).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[N, num_classes]``."""
        return self.classifier(self.features(x))
