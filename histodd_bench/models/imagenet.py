"""Networks that start from ImageNet weights, where those are on this machine: nothing is downloaded here."""

import re
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from histodd_bench.errors import HistoddError
from histodd_bench.files import read_state
from histodd_bench.models.densenet import DenseNet121
from histodd_bench.models.resnet import ResNet18
from histodd_bench.models.vit import ViT

_SIZE = 224  # of the networks whose weights these are
_WEIGHTS = {  # torchvision's function, and its file
    "resnet18-imagenet": ("resnet18", "ResNet18_Weights"),
    "densenet121-imagenet": ("densenet121", "DenseNet121_Weights"),
    "vit-imagenet": ("vit_b_16", "ViT_B_16_Weights"),
}


def weights_file(name: str) -> Path:
    """Where torch's hub keeps the weights of a network.

    Raises:
        HistoddError: they are not there.
    """
    import torchvision.models as models

    function, enum = _WEIGHTS[name]
    url: str = getattr(models, enum).IMAGENET1K_V1.url
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[-1]
    if not path.is_file():
        raise HistoddError(
            f"{name} needs ImageNet weights that are not on this machine: {path} is missing; where there is a network, "
            f"python -c \"import torchvision; torchvision.models.{function}(weights='IMAGENET1K_V1')\" fetches it"
        )
    return path


class ResNet18ImageNet(ResNet18):
    """ResNet18 with its original stem at every patch size, all but the classifier from ImageNet."""

    def __init__(self, num_classes: int, image_size: int) -> None:
        super().__init__(num_classes, _SIZE)
        state = read_state(weights_file("resnet18-imagenet"))
        _load(self, {k: v for k, v in state.items() if not k.startswith("fc.")})


class DenseNet121ImageNet(DenseNet121):
    """DenseNet121 with its original stem at every patch size, all but the classifier from ImageNet."""

    def __init__(self, num_classes: int, image_size: int) -> None:
        super().__init__(num_classes, _SIZE)
        state = read_state(weights_file("densenet121-imagenet"))
        # The file is older than torchvision's names: norm.1 has become norm1.
        renamed = {re.sub(r"(denselayer\d+\.(?:norm|conv))\.(\d)", r"\1\2", k): v for k, v in state.items()}
        _load(self, {k.replace("features.", "body."): v for k, v in renamed.items() if k.startswith("features.")})


class ViTImageNet(ViT):
    """ViT-B/16, all but the classifier from ImageNet; patches are enlarged to the 224 px it was trained at."""

    def __init__(self, num_classes: int, image_size: int) -> None:
        super().__init__(num_classes, _SIZE)
        state = read_state(weights_file("vit-imagenet"))
        _load(self, {f"body.{k}": v for k, v in state.items() if not k.startswith("heads.")})

    def features(self, x: Tensor) -> Tensor:
        """``[N,3,H,W]`` float -> ``[N,768]``."""
        if x.shape[-1] != _SIZE:
            x = F.interpolate(x, size=(_SIZE, _SIZE), mode="bilinear", align_corners=False, antialias=True)
        return super().features(x)


def _load(model: torch.nn.Module, state: dict[str, Tensor]) -> None:
    missing, unexpected = model.load_state_dict(state, strict=False)
    wrong = [
        k for k in missing if not k.startswith("classifier.") and not k.endswith("num_batches_tracked")
    ] + unexpected
    if wrong:
        raise HistoddError(f"the ImageNet weights of {type(model).__name__} do not fit: {wrong[0]}: fetch them again")
