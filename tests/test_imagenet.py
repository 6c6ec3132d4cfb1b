"""Networks from ImageNet weights: made-up weights in torch's hub folder give torchvision's features; absent ones are named."""

from pathlib import Path

import pytest
import torch
import torchvision.models as models

from histodd_bench import cli
from histodd_bench.models import PRETRAINED, build
from histodd_bench.models.imagenet import weights_file

MAKERS = {"resnet18-imagenet": "resnet18", "densenet121-imagenet": "densenet121", "vit-imagenet": "vit_b_16"}


@pytest.fixture(autouse=True)
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    return tmp_path


def published(name: str, hub: Path) -> torch.nn.Module:
    """torchvision's own network with random weights, saved where torch's hub would have put the published ones."""
    torch.manual_seed(3)
    network = getattr(models, MAKERS[name])(weights=None).eval()
    with pytest.raises(Exception) as error:
        weights_file(name)
    path = Path(str(error.value).split("this machine: ")[1].split(" is missing")[0])
    path.parent.mkdir(exist_ok=True)
    state = network.state_dict()
    if name.startswith("densenet"):  # as the published file has it
        state = {k.replace("norm1.", "norm.1.").replace("norm2.", "norm.2.").replace("conv1.", "conv.1.").replace("conv2.", "conv.2.")
                 if "denselayer" in k else k: v for k, v in state.items()}  # fmt: skip
    torch.save(state, path)
    return network


@pytest.mark.parametrize("name", PRETRAINED)
def test_features_are_those_of_the_network_whose_weights_they_are(name: str, hub: Path) -> None:
    network = published(name, hub)
    mine = build(name, num_classes=3, image_size=224, generator_seed=0).eval()
    x = torch.rand(2, 3, 224, 224)
    head = {"resnet18": "fc", "densenet121": "classifier", "vit_b_16": "heads"}[MAKERS[name]]
    setattr(network, head, torch.nn.Identity())
    with torch.no_grad():
        torch.testing.assert_close(mine.features(x), network(x), rtol=1e-4, atol=1e-4)  # type: ignore[operator]
        assert mine(torch.rand(1, 3, 64, 64)).shape == (1, 3)


@pytest.mark.parametrize("name", PRETRAINED)
def test_missing_weights_are_said_before_anything_is_computed(
    name: str, hub: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["run", "table3", "--archs", name, "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert "needs ImageNet weights that are not on this machine" in error and error.count("\n") == 1
    assert "fetches it" in error and not (tmp_path / "out").exists()


def test_damaged_weights_are_refused(hub: Path) -> None:
    published("resnet18-imagenet", hub)
    path = weights_file("resnet18-imagenet")
    torch.save({"conv1.weight": torch.zeros(64, 3, 7, 7)}, path)
    with pytest.raises(Exception, match="do not fit"):
        build("resnet18-imagenet", num_classes=2, image_size=64, generator_seed=0)
