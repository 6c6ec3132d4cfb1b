"""ResNet18 (He et al. 2016) from torchvision's blocks, with a stem that suits small patches."""

from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, ResNet


class ResNet18(ResNet):
    """torchvision's ResNet18, batch norm included; above 128 px and 64 wide exactly that network.

    Args:
        num_classes: outputs.
        image_size: side of the square patches in pixels, at least 16. Up to 64 px the stem is a 3x3
            convolution without pooling, up to 128 px a 3x3 convolution of stride 2, above the original 7x7 of
            stride 2 with max-pooling.
        width: channels of the stem and the first stage; doubles three times.
    """

    def __init__(self, num_classes: int, image_size: int, width: int = 64) -> None:
        super().__init__(BasicBlock, [2, 2, 2, 2], num_classes=num_classes)
        del self.fc
        if width != 64:  # torchvision fixes 64, so its layers are made again
            self.inplanes = width
            self.layer1 = self._make_layer(BasicBlock, width, 2)
            self.layer2 = self._make_layer(BasicBlock, 2 * width, 2, stride=2)
            self.layer3 = self._make_layer(BasicBlock, 4 * width, 2, stride=2)
            self.layer4 = self._make_layer(BasicBlock, 8 * width, 2, stride=2)
            self.bn1 = nn.BatchNorm2d(width)
        if image_size > 128:
            self.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
        else:
            self.conv1 = nn.Conv2d(3, width, 3, stride=1 if image_size <= 64 else 2, padding=1, bias=False)
            self.maxpool = nn.Identity()  # type: ignore[assignment]
        self.classifier = nn.Linear(8 * width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def features(self, x: Tensor) -> Tensor:
        """``[N,3,H,W]`` float -> ``[N, 8 * width]``."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.avgpool(x).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[N, num_classes]``."""
        return self.classifier(self.features(x))
