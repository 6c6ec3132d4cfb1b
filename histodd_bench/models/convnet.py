"""ConvNet-D3: the small network of the distillation literature (Gidaris & Komodakis 2018; Zhao et al. 2021)."""

from torch import Tensor, nn

from histodd_bench.models.pooling import HalvingPool


class ConvNetD3(nn.Module):
    """Three times (3x3 convolution, instance norm, ReLU, 2x2 average pool), flatten, one linear layer.

    The instance norm is ``GroupNorm(C, C)`` with an affine map, initialised as torch does, as in the public
    code.

    Args:
        num_classes: outputs.
        image_size: side of the square patches in pixels, at least 8; odd rests are dropped by the pooling.
        width: channels of every convolution, 128 in the literature.
    """

    def __init__(self, num_classes: int, image_size: int, width: int = 128) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for channels in (3, width, width):
            layers += [
                nn.Conv2d(channels, width, kernel_size=3, padding=1),
                nn.GroupNorm(width, width),
                nn.ReLU(inplace=True),
                HalvingPool(),
            ]
        self.body = nn.Sequential(*layers)
        self.classifier = nn.Linear(width * (image_size // 8) ** 2, num_classes)

    def features(self, x: Tensor) -> Tensor:
        """``[N,3,H,W]`` float -> ``[N, width * (H // 8) * (W // 8)]``."""
        return self.body(x).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[N, num_classes]``."""
        return self.classifier(self.features(x))
