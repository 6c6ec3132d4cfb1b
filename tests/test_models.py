"""Networks: published parameter counts, torchvision as the peer, every patch size, and gradients of gradients."""

import copy

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.func import functional_call

from histodd_bench.errors import UsageError
from histodd_bench.models import MODELS, build, paramcount
from histodd_bench.models.pooling import HalvingPool
from histodd_bench.models.vit import token_size

NARROW = {"convnet-d3": 6, "resnetap10": 4, "resnet18": 4, "densenet121": 4, "vit": 8}


def narrow(name: str, size: int, classes: int = 2, seed: int = 0) -> nn.Module:
    return build(name, num_classes=classes, image_size=size, width=NARROW[name], generator_seed=seed)


def count(name: str, classes: int, size: int, width: int | None = None) -> int:
    with torch.device("meta"):  # no memory, no initialisation
        options = {} if width is None else {"width": width}
        return paramcount(MODELS[name].build(num_classes=classes, image_size=size, **options))


@pytest.mark.parametrize(
    ("name", "classes", "size", "width", "published"),
    [
        ("convnet-d3", 10, 32, None, 320_010),  # Zhao et al. 2021, CIFAR-10
        ("resnetap10", 2, 256, None, 4_906_818),  # large stem, 7x7
        ("resnetap10", 2, 224, None, 4_906_818),
        ("resnetap10", 2, 128, None, 4_906_818 - 3 * (49 - 9) * 64),  # 3x3 stem, otherwise the same
        ("resnetap10", 2, 64, None, 4_906_818 - 3 * (49 - 9) * 64),
        ("resnetap10", 9, 256, None, 4_906_818 + 7 * 513),
        ("resnet18", 1000, 224, None, 11_689_512),  # torchvision
        ("resnet18", 10, 32, None, 11_173_962),  # the usual CIFAR variant: 3x3 stem
        ("densenet121", 1000, 224, None, 7_978_856),  # torchvision
        ("vit", 1000, 224, None, 86_567_656),  # ViT-B/16, torchvision
        ("vit", 1000, 224, 384, 22_050_664),  # DeiT-S/16
        ("vit", 1000, 224, 192, 5_717_416),  # DeiT-Ti/16
    ],
)
def test_parameter_counts_are_the_published_ones(name, classes, size, width, published):
    assert count(name, classes, size, width) == published


def peer(name: str) -> nn.Module:
    if name == "resnet18":
        return torchvision.models.resnet18(num_classes=3)
    if name == "densenet121":
        return torchvision.models.densenet121(num_classes=3)
    return torchvision.models.VisionTransformer(224, 16, 12, 3, 192, 768, num_classes=3)


@pytest.mark.parametrize("name", ["resnet18", "densenet121", "vit"])
def test_large_stem_is_torchvisions_network(name):
    ours = build(name, num_classes=3, image_size=224, width=192 if name == "vit" else None, generator_seed=1).eval()
    theirs = peer(name).eval()
    values = list(theirs.state_dict().values())
    assert [v.shape for v in ours.state_dict().values()] == [v.shape for v in values]
    ours.load_state_dict(dict(zip(ours.state_dict(), values, strict=True)))
    nn.init.normal_(ours.classifier.weight, generator=torch.Generator().manual_seed(0))
    (
        theirs.fc if name == "resnet18" else theirs.classifier if name == "densenet121" else theirs.heads.head
    ).weight.data = ours.classifier.weight.data
    x = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("size", "classes"), [(32, 2), (50, 9), (64, 3), (96, 6), (128, 2), (256, 2), (37, 2)])
def test_every_patch_size(name, size, classes):
    model = narrow(name, size, classes)
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    features = model.features(x)
    assert features.shape == (2, model.classifier.in_features)
    assert isinstance(model.classifier, nn.Linear)
    logits = model.eval()(x)
    assert logits.shape == (2, classes)
    torch.testing.assert_close(logits, model.classifier(model.features(x)))


@pytest.mark.parametrize("name", MODELS)
def test_smallest_patch_trains_with_a_batch_of_one_and_smaller_is_refused(name):
    least = MODELS[name].min_size
    model = narrow(name, least).train()
    nn.init.normal_(model.classifier.weight, generator=torch.Generator().manual_seed(1))
    x = torch.randn(1, 3, least, least, generator=torch.Generator().manual_seed(0), requires_grad=True)
    model(x)[0, 0].backward()
    assert x.grad is not None and x.grad.abs().sum() > 0
    with pytest.raises(UsageError, match=f"{least - 1} px are too small for {name}: it needs at least {least} px"):
        narrow(name, least - 1)


@pytest.mark.parametrize("name", MODELS)
def test_parameters_follow_from_the_seed_alone(name):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    one = narrow(name, 32, seed=7).state_dict()
    assert torch.equal(torch.get_rng_state(), state), "the global generator was used"
    torch.manual_seed(6)
    again, other = narrow(name, 32, seed=7).state_dict(), narrow(name, 32, seed=8).state_dict()
    assert all(torch.equal(one[k], again[k]) for k in one)
    assert any(not torch.equal(one[k], other[k]) for k in one)


@pytest.mark.parametrize("size", [64, 128, 256])
def test_resnetap_stem_pools_by_size(size):
    model = narrow("resnetap10", size)
    pooled = {64: 1, 128: 2, 256: 4}[size]
    x = torch.zeros(1, 3, size, size)
    assert model.stem(x).shape[-1] == size // pooled
    assert model.stages(model.stem(x)).shape == (1, 8 * NARROW["resnetap10"], size // pooled // 8, size // pooled // 8)
    assert all(m.stride == (1, 1) for m in model.modules() if isinstance(m, nn.Conv2d))


@pytest.mark.parametrize("name", ["convnet-d3", "resnetap10"])
def test_instance_norm_sees_each_patch_alone(name):
    model = narrow(name, 32).train()
    x = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model(x)[:1], model(x[:1]))


def test_token_sizes():
    assert {s: token_size(s) for s in (16, 32, 50, 64, 96, 128, 224, 256, 37, 257)} == {
        16: (2, 16),
        32: (4, 32),
        50: (5, 50),
        64: (8, 64),
        96: (12, 96),
        128: (16, 128),
        224: (16, 224),
        256: (16, 256),
        37: (3, 39),  # a prime: padded
        257: (13, 260),
    }


def test_vit_padding_repeats_the_edge():
    padded, plain = narrow("vit", 37), narrow("vit", 39)
    x = torch.randn(1, 3, 37, 37, generator=torch.Generator().manual_seed(0))
    larger = torch.cat([x, x[..., -1:].expand(1, 3, 37, 2)], 3)
    larger = torch.cat([larger, larger[:, :, -1:].expand(1, 3, 2, 39)], 2)
    torch.testing.assert_close(padded.features(x), plain.features(larger))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_gradient_of_the_gradient_against_finite_differences(name, training):
    """The derivative, with respect to the patches, of a function of the parameters' gradients (eq. 1 needs it)."""
    size, generator = 16, torch.Generator().manual_seed(3)
    model = narrow(name, size, 3).double().train(training)
    for p in model.parameters():  # a zero classifier (ViT) or zero biases would hide most of the graph
        p.data += 0.1 * torch.randn(p.shape, generator=generator, dtype=torch.float64)
    buffers = copy.deepcopy(dict(model.named_buffers()))
    parameters = dict(model.named_parameters())
    x = torch.randn(3, 3, size, size, generator=generator, dtype=torch.float64)
    y = torch.tensor([0, 1, 2])
    targets = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in parameters.values()]

    def distance(images: Tensor) -> Tensor:
        logits = functional_call(model, (parameters, copy.deepcopy(buffers)), (images,))
        gradients = torch.autograd.grad(nn.functional.cross_entropy(logits, y), parameters.values(), create_graph=True)
        return sum(((g - t) ** 2).sum() for g, t in zip(gradients, targets, strict=True))

    direction = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    x.requires_grad_(True)
    (gradient,) = torch.autograd.grad(distance(x), x)
    expected = (gradient * direction).sum()
    step = 1e-8  # small: the gradient jumps wherever a ReLU switches on the way
    numeric = (distance(x + step * direction) - distance(x - step * direction)).detach() / (2 * step)
    assert expected.abs() > 1e-6
    torch.testing.assert_close(expected, numeric, rtol=1e-3, atol=1e-4)


def test_attention_gives_the_same_with_and_without_second_derivatives():
    model = narrow("vit", 32, 3)
    nn.init.normal_(model.classifier.weight, generator=torch.Generator().manual_seed(1))
    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model(x), model(x.clone().requires_grad_(True)), rtol=1e-4, atol=1e-4)


def test_bad_requests():
    with pytest.raises(UsageError, match=r"unknown model 'resnet8': did you mean 'resnet18'"):
        build("resnet8", num_classes=2, image_size=32, generator_seed=0)
    with pytest.raises(UsageError, match="at least two classes, got 1"):
        build("convnet-d3", num_classes=1, image_size=32, generator_seed=0)
    with pytest.raises(UsageError, match="width of vit must be at least 1, got 0"):
        build("vit", num_classes=2, image_size=32, width=0, generator_seed=0)


@pytest.mark.parametrize(("name", "width"), [("vit", 200), ("vit", 100), ("resnet18", 7), ("densenet121", 5)])
def test_awkward_widths(name, width):
    model = build(name, num_classes=2, image_size=32, width=width, generator_seed=0)
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 2)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (2, 1, 7, 10), (1, 4, 6, 9), (3, 2, 2, 2), (0, 2, 4, 4)])
def test_halving_pool_has_the_bits_of_avg_pool2d_to_the_second_derivative(shape, layout) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).contiguous(memory_format=layout).requires_grad_()
    results = []
    for pool in (HalvingPool(), torch.nn.AvgPool2d(2)):
        y = pool(x)
        (first,) = torch.autograd.grad((y * y).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad((first * first * first).sum(), x)
        results.append((y, first, second))
    for ours, torchs in zip(*results, strict=True):
        assert ours.shape == torchs.shape
        assert torch.equal(ours, torchs)


def test_halving_pool_gradients_are_those_of_finite_differences() -> None:
    x = torch.randn(1, 2, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    assert torch.autograd.gradcheck(HalvingPool(), x)
    assert torch.autograd.gradgradcheck(HalvingPool(), x)
