"""Slide-level models against cases computed by hand from their equations, and the invariances that each has."""

import math

import pytest
import torch
import torch.nn.functional as F

from histodd_bench.errors import HistoddError, UsageError
from histodd_bench.mil import MIL_MODELS, build_mil
from histodd_bench.mil.abmil import GatedAttention, masked_softmax
from histodd_bench.mil.clam import smooth_svm
from histodd_bench.mil.transmil import PPEG, fill_square

pytest.importorskip("nystrom_attention", reason="TransMIL needs the group 'mil'")
ORDERLESS = ["abmil", "clam-sb", "clam-mb", "dsmil"]


def model(name: str, classes: int = 3, seed: int = 0, features: int = 6, width: int | None = None):
    return build_mil(name, in_features=features, num_classes=classes, seed=seed, width=width or 16).double().eval()


def bag(n: int, features: int = 6, seed: int = 0) -> torch.Tensor:
    return torch.randn(1, n, features, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- every model ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MIL_MODELS)
@pytest.mark.parametrize("n", [1, 2, 3, 10, 17, 5000])
def test_bags_of_any_size_give_finite_logits_and_gradients(name: str, n: int) -> None:
    net = build_mil(name, in_features=6, num_classes=3, seed=0, width=16)
    x = bag(n).float()
    assert net.eval()(x).shape == (1, 3)
    loss = net.train().loss(x, torch.tensor([1]))
    loss.backward()
    assert math.isfinite(loss.item())
    gradients = [p.grad for p in net.parameters() if p.grad is not None]
    assert gradients and all(torch.isfinite(g).all() for g in gradients)


@pytest.mark.parametrize("name", MIL_MODELS)
def test_the_seed_alone_decides_the_initial_weights(name: str) -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = build_mil(name, in_features=6, num_classes=2, seed=3, width=16).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    second = build_mil(name, in_features=6, num_classes=2, seed=3, width=16).state_dict()
    other = build_mil(name, in_features=6, num_classes=2, seed=4, width=16).state_dict()
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert any(not torch.equal(first[k], other[k]) for k in first)


def test_published_widths() -> None:
    """Parameters at 1,024 features and two classes, counted from the layers that the papers name."""

    def linear(i: int, o: int) -> int:
        return i * o + o

    count = {
        n: sum(p.numel() for p in build_mil(n, in_features=1024, num_classes=2, seed=0).parameters())
        for n in MIL_MODELS
    }
    gates = 2 * linear(512, 256)
    assert count["clam-sb"] == linear(1024, 512) + gates + linear(256, 1) + linear(512, 2) + 2 * linear(512, 2)
    assert count["clam-mb"] == count["clam-sb"] + linear(256, 1)
    query = linear(1024, 128) + linear(128, 128)
    assert count["dsmil"] == linear(1024, 2) + query + linear(1024, 1024) + linear(2 * 1024, 2)
    attention = 3 * 512 * 512 + linear(512, 512) + 8 * 33 + 2 * 512  # qkv, output, residual convolution, layer norm
    ppeg = 512 * (49 + 25 + 9) + 3 * 512
    assert count["transmil"] == linear(1024, 512) + 512 + 2 * attention + ppeg + 2 * 512 + linear(512, 2)


@pytest.mark.parametrize("name", ORDERLESS)
def test_the_order_of_instances_does_not_matter(name: str) -> None:
    net, x = model(name), bag(23)
    shuffled = x[:, torch.randperm(23, generator=torch.Generator().manual_seed(5))]
    label = torch.tensor([2])
    torch.testing.assert_close(net(shuffled), net(x))
    torch.testing.assert_close(net.loss(shuffled, label), net.loss(x, label))


@pytest.mark.parametrize("name", ORDERLESS)
def test_padding_does_not_matter(name: str) -> None:
    """Bags of 1, 5 and 9 in one padded batch give what each gives alone, whatever the padding holds."""
    net, sizes = model(name), [1, 5, 9]
    labels = torch.tensor([0, 2, 1])
    padded = torch.full((3, 9, 6), 1e3, dtype=torch.float64)
    mask = torch.zeros(3, 9, dtype=torch.bool)
    for i, n in enumerate(sizes):
        padded[i, :n], mask[i, :n] = bag(n, seed=i)[0], True
    alone = torch.cat([net(bag(n, seed=i)) for i, n in enumerate(sizes)])
    torch.testing.assert_close(net(padded, mask), alone)
    losses = [net.loss(bag(n, seed=i), labels[i : i + 1]) for i, n in enumerate(sizes)]
    torch.testing.assert_close(net.loss(padded, labels, mask), torch.stack(losses).mean())


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"name": "clam"}, UsageError, "did you mean 'clam-"),
        ({"num_classes": 1}, UsageError, "at least two classes"),
        ({"name": "transmil", "width": 40}, UsageError, "multiple of 16"),
    ],
)
def test_impossible_models(arguments, error, says) -> None:
    with pytest.raises(error, match=says):
        build_mil(**{"name": "abmil", "in_features": 4, "num_classes": 2, "seed": 0, **arguments})


# ---- ABMIL ----------------------------------------------------------------------------------------------------------


def test_gated_attention_by_hand() -> None:
    """Eq. 9 with V = (1, 0), U = (0, 1), w = 2 for two instances."""
    attention = GatedAttention(2, 1).double()
    with torch.no_grad():
        attention.tanh[0].weight.copy_(torch.tensor([[1.0, 0.0]]))
        attention.gate[0].weight.copy_(torch.tensor([[0.0, 1.0]]))
        attention.scores.weight.fill_(2.0)
        for layer in (attention.tanh[0], attention.gate[0], attention.scores):
            layer.bias.zero_()
    h = torch.tensor([[[1.0, 0.0], [-2.0, 3.0]]], dtype=torch.float64)
    first, second = 2 * math.tanh(1) * 0.5, 2 * math.tanh(-2) / (1 + math.exp(-3))
    scores = attention(h)
    assert scores.flatten().tolist() == pytest.approx([first, second])
    weights = masked_softmax(scores, None).flatten().tolist()
    assert weights[0] == pytest.approx(math.exp(first) / (math.exp(first) + math.exp(second)))
    assert masked_softmax(scores, torch.tensor([[False, True]])).flatten().tolist() == [0, 1]


def test_abmil_of_equal_instances_is_the_classifier_of_one() -> None:
    net, x = model("abmil"), bag(1)
    torch.testing.assert_close(net(x.expand(-1, 7, -1)), net(x))
    torch.testing.assert_close(net(x), net.classifier(net.embed(x))[:, 0])


# ---- CLAM -----------------------------------------------------------------------------------------------------------


def test_smooth_svm_by_hand_and_in_its_limit() -> None:
    scores, labels = torch.tensor([[2.0, 0.5], [0.0, 0.0]], dtype=torch.float64), torch.tensor([0, 1])
    expected = (math.log(math.exp(0) + math.exp(1 + 0.5 - 2)) + math.log(math.exp(0) + math.exp(1))) / 2
    assert smooth_svm(scores, labels).item() == pytest.approx(expected)
    generator = torch.Generator().manual_seed(0)
    scores = 3 * torch.randn(50, 4, generator=generator, dtype=torch.float64)
    labels = torch.randint(4, (50,), generator=generator)
    hinge = F.multi_margin_loss(scores, labels, reduction="none") * 4
    margins = scores - scores.gather(1, labels[:, None]) + 1 - F.one_hot(labels, 4)
    assert smooth_svm(scores, labels, temperature=1e-4).item() == pytest.approx(margins.amax(1).mean().item(), abs=1e-3)
    assert (hinge >= margins.amax(1) - 1e-12).all()  # torch's sums over classes instead of taking the largest


@pytest.mark.parametrize("name", ["clam-sb", "clam-mb"])
def test_clam_loss_from_its_parts(name: str) -> None:
    """0.7 L_slide + 0.3 L_patch, with the patches sorted by attention one by one."""
    net, x, label = model(name), bag(11), 1
    h, scores = net.embed(x)[0], net.attention(net.embed(x))[0]
    k, parts = 11 // 2, []
    for c in range(3):
        order = scores[:, c if name == "clam-mb" else 0].argsort(descending=True)
        logits = net.clusters[c](h)
        rows, targets = [*order[:k].tolist()], [1 if c == label else 0] * k
        if c == label:
            rows, targets = rows + order[-k:].tolist(), targets + [0] * k
        parts.append(smooth_svm(logits[rows], torch.tensor(targets)))
    expected = 0.7 * F.cross_entropy(net(x), torch.tensor([label])) + 0.3 * torch.stack(parts).mean()
    torch.testing.assert_close(net.loss(x, torch.tensor([label])), expected)


def test_clam_multi_branch_pools_each_class_with_its_own_attention() -> None:
    net, x = model("clam-mb"), bag(5)
    h = net.embed(x)[0]
    weights = net.attention(h[None])[0].softmax(0)  # [5, 3]
    expected = [(net.classifier.weight[c] @ (weights[:, c] @ h) + net.classifier.bias[c]).item() for c in range(3)]
    assert net(x)[0].tolist() == pytest.approx(expected)


@pytest.mark.parametrize(("n", "k"), [(1, 0), (2, 1), (3, 1), (10, 5), (16, 8), (500, 8)])
def test_clam_clusters_at_most_half_the_bag(n: int, k: int) -> None:
    """The clustering loss touches 2 k instances for the true class: the others get no gradient from it."""
    net = model("clam-sb")
    h = net.embed(bag(n))[0].detach().requires_grad_(True)
    loss = net._clustering(h, net.attention(h[None])[0].detach(), 0)
    if k == 0:
        assert loss.item() == 0
    else:
        (gradient,) = torch.autograd.grad(loss, h)
        assert int((gradient.abs().sum(1) > 0).sum()) == 2 * k


# ---- DSMIL ----------------------------------------------------------------------------------------------------------


def test_dsmil_by_hand() -> None:
    """Both streams written out instance by instance (eq. 2 to 6)."""
    net, x = model("dsmil"), bag(4)
    instances = net.instance(x)[0]
    queries, values = net.query(x)[0].detach(), net.value(x)[0].detach()
    embeddings = []
    for c in range(3):
        critical = max(range(4), key=lambda i: instances[i, c].item())
        weights = [math.exp((queries[i] @ queries[critical]).item() / 4) for i in range(4)]  # width 16: square root 4
        embeddings.append(sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights))
    bag_logits = net.bag.weight @ torch.cat(embeddings) + net.bag.bias
    highest = instances.amax(0)
    instance_stream, bag_stream = net.streams(x)
    torch.testing.assert_close(instance_stream[0], highest)
    torch.testing.assert_close(bag_stream[0], bag_logits)
    torch.testing.assert_close(net(x)[0], (highest + bag_logits) / 2)
    label = torch.tensor([2])
    expected = (F.cross_entropy(highest[None], label) + F.cross_entropy(bag_logits[None], label)) / 2
    torch.testing.assert_close(net.loss(x, label), expected)


# ---- TransMIL -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "side"), [(1, 1), (2, 2), (3, 2), (4, 2), (5, 3), (9, 3), (10, 4), (5000, 71)])
def test_instances_fill_a_square_with_the_first_ones_again(n: int, side: int) -> None:
    x = torch.arange(float(n))[None, :, None]
    filled, found = fill_square(x)
    assert found == side and filled.shape == (1, side * side, 1)
    assert filled.flatten().tolist() == [*range(n), *range(side * side - n)]


def test_position_encoding_by_hand() -> None:
    """With every kernel 1 at its centre and no bias the three convolutions and the skip give four times the input."""
    layer = PPEG(2)
    with torch.no_grad():
        for convolution, k in zip(layer.convolutions, (7, 5, 3), strict=True):
            convolution.weight.zero_()
            convolution.weight[:, 0, k // 2, k // 2] = 1
            convolution.bias.zero_()
    x = torch.randn(1, 1 + 9, 2, generator=torch.Generator().manual_seed(0))
    y = layer(x, 3)
    torch.testing.assert_close(y[:, 1:], 4 * x[:, 1:])
    torch.testing.assert_close(y[:, :1], x[:, :1])
    with torch.no_grad():  # a kernel of one neighbour moves rows, so instances lie row by row
        layer.convolutions[2].weight.zero_()
        layer.convolutions[2].weight[:, 0, 0, 1] = 1  # the instance above
    above = torch.cat([torch.zeros(1, 3, 2), x[:, 1:7]], 1)
    torch.testing.assert_close(layer(x, 3)[:, 1:], 3 * x[:, 1:] + above)


def test_nystrom_attention_is_exact_where_every_token_is_a_landmark() -> None:
    """The package's attention against softmax(q k^T / sqrt(d)) v for as many tokens as landmarks, without the residual."""
    from nystrom_attention import NystromAttention

    torch.manual_seed(0)
    layer = NystromAttention(dim=16, dim_head=8, heads=2, num_landmarks=4, pinv_iterations=30, residual=False).double()
    x = torch.randn(1, 4, 16, dtype=torch.float64)
    q, k, v = (t.reshape(1, 4, 2, 8).transpose(1, 2) for t in layer.to_qkv(x).chunk(3, dim=-1))
    exact = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(1, 4, 16)
    torch.testing.assert_close(layer(x), layer.to_out(exact), atol=1e-4, rtol=1e-4)


def test_transmil_depends_on_order_and_takes_one_bag_at_a_time() -> None:
    net, x = model("transmil"), bag(9)
    assert (net(x.flip(1)) - net(x)).abs().max() > 1e-6
    two = torch.cat([x, bag(9, seed=1)])
    # Not compared tightly: the package scales its pseudo-inverse by the largest sum of the whole batch.
    torch.testing.assert_close(net(two)[:1], net(x), atol=2e-2, rtol=2e-2)
    with pytest.raises(HistoddError, match="one bag at a time"):
        net(x, torch.tensor([[True] * 8 + [False]]))
