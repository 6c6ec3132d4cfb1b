"""Siamese draws: ranges, sharing, order of the operations, and independence of the switches; and applying them."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_sets import stained

from histodd_bench.augment import OPERATIONS, Draw, SiameseAugment
from histodd_bench.errors import UsageError
from histodd_bench.ops import stain_augment
from histodd_bench.stain import MacenkoNormalizer


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@given(seed=st.integers(0, 2**31), n=st.integers(1, 5))
def test_warps_are_a_flip_a_rotation_and_a_scale_within_range(seed: int, n: int) -> None:
    draw = SiameseAugment().draw(generator(seed), n)
    assert draw.warp is not None and draw.warp.shape == (n, 2, 3) and draw.stain.shape == (n,)
    assert (draw.warp[:, :, 2] == 0).all()
    scales = torch.linalg.svdvals(draw.warp[:, :, :2])
    assert (scales <= 1.2 + 1e-5).all() and (scales >= 1 / 1.2 - 1e-5).all()


def test_every_operation_alone() -> None:
    g = generator(3)
    rotate = torch.cat([SiameseAugment(("rotate",)).draw(g).warp for _ in range(200)])[:, :, :2]
    torch.testing.assert_close(rotate @ rotate.mT, torch.eye(2).expand(200, 2, 2))
    angles = torch.atan2(rotate[:, 1, 0], rotate[:, 0, 0]) * 180 / math.pi
    assert 12 < angles.max() <= 15 and -15 <= angles.min() < -12

    scale = torch.cat([SiameseAugment(("scale",)).draw(g).warp for _ in range(200)])[:, :, :2]
    assert (scale[:, 0, 1] == 0).all() and (scale[:, 1, 0] == 0).all()
    factors = 1 / torch.stack([scale[:, 0, 0], scale[:, 1, 1]])
    assert factors.min() >= 1 / 1.2 - 1e-6 and factors.max() <= 1.2 + 1e-6 and (factors[0] != factors[1]).all()

    flip = torch.cat([SiameseAugment(("flip",)).draw(g).warp for _ in range(400)])[:, 0, 0]
    assert 150 < int((flip == -1).sum()) < 250

    stain = torch.cat([SiameseAugment(("stain",), stain_probability=0.25).draw(g).stain for _ in range(400)])
    assert 60 < int(stain.sum()) < 140
    assert SiameseAugment(("stain",)).draw(g).warp is None


def test_switching_one_operation_off_leaves_the_others_draws_alone() -> None:
    full = SiameseAugment().draw(generator(9), 4)
    without_stain = SiameseAugment(("flip", "rotate", "scale")).draw(generator(9), 4)
    assert full.warp is not None and without_stain.warp is not None
    assert torch.equal(full.warp, without_stain.warp) and not without_stain.stain.any()


def test_no_operations_draw_nothing_but_consume_the_same_numbers() -> None:
    a, b = generator(4), generator(4)
    nothing = SiameseAugment(()).draw(a, 3)
    SiameseAugment().draw(b, 3)
    assert nothing.warp is None and not nothing.stain.any()
    assert torch.equal(a.get_state(), b.get_state())


def test_a_flip_mirrors_left_and_right() -> None:
    image = torch.rand(1, 3, 4, 4, generator=generator())
    draws = (SiameseAugment(("flip",)).draw(generator(s)) for s in range(20))
    mirror = next(d for d in draws if d.warp is not None and d.warp[0, 0, 0] < 0)
    torch.testing.assert_close(stain_augment(image, warp=mirror.warp), image.flip(3), rtol=0, atol=1e-6)


def test_unknown_operation_is_refused() -> None:
    with pytest.raises(UsageError, match="shear"):
        SiameseAugment(("shear",))
    assert set(OPERATIONS) == {"stain", "flip", "rotate", "scale"}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"ratio": 0.0}, "ratio must be at least 1, got 0.0"),
        ({"ratio": math.nan}, "ratio must be at least 1"),
        ({"degrees": math.inf}, "degrees must be finite"),
        ({"stain_probability": 7}, r"stain_probability must lie in \[0, 1\], got 7"),
    ],
)
def test_numbers_that_mean_nothing_are_refused(arguments: dict[str, float], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        SiameseAugment(**arguments)


def test_two_batches_share_a_draw() -> None:
    """The same patch comes out the same in a batch of 5 and one of 2, and is what the operators give."""
    augment = SiameseAugment(normalizer=MacenkoNormalizer().fit(stained(1, 32, seed=8)[0]))
    real, draw = stained(5, 24), augment.draw(generator(1))
    views = augment(real, draw), augment(real[1:3].float() / 255, draw)
    torch.testing.assert_close(views[0][1:3], views[1], rtol=0, atol=1e-5)
    turned = stain_augment(real, warp=draw.warp.expand(5, 2, 3))
    fit = augment.normalizer.estimate(real)  # of the patches as they are, not as they lie
    torch.testing.assert_close(views[0], augment.normalizer.normalize(turned, fit), rtol=0, atol=1e-5)
    torch.testing.assert_close(augment(real, draw, fit), views[0], rtol=0, atol=0)


@pytest.mark.parametrize("definition", ["torchstain", "cucim"])
def test_a_draw_per_patch(definition: str) -> None:
    """Stains are normalised where the draw says so; the other patches are turned only."""
    augment = SiameseAugment(stain_probability=0.5, normalizer=MacenkoNormalizer(definition=definition))
    images, draw = stained(8, 24).double() / 255, augment.draw(generator(2), 8)
    assert 0 < int(draw.stain.sum()) < 8
    out, turned = augment(images, draw), stain_augment(images, warp=draw.warp.double())
    same = (out - turned).abs().flatten(1).amax(1) < 1e-12
    assert torch.equal(same, ~draw.stain)


def test_a_layer_augments_in_training_only() -> None:
    augment, images = SiameseAugment(), stained(3, 16).float() / 255
    torch.manual_seed(0)
    first, second = augment(images), augment(images)
    assert not torch.equal(first, second)
    assert torch.equal(augment.eval()(images), images)
    assert torch.equal(SiameseAugment(())(images), images)


def test_gradients_pass_and_it_compiles_in_one_graph() -> None:
    augment, images = SiameseAugment(), stained(3, 16).float() / 255
    draw = augment.draw(generator(5))
    x = images.requires_grad_()
    (expected,) = torch.autograd.grad(augment(x, draw).square().sum(), x)
    assert expected.abs().max() > 0
    compiled = torch.compile(augment, fullgraph=True, backend="aot_eager")
    (found,) = torch.autograd.grad(compiled(x, draw).square().sum(), x)
    torch.testing.assert_close(found, expected)
    assert compiled(x).shape == x.shape  # draws for itself


@pytest.mark.parametrize(
    "layer",
    [SiameseAugment(), SiameseAugment().eval(), MacenkoNormalizer(), MacenkoNormalizer(definition="tiatoolbox")],
)
def test_one_graph_takes_batches_of_any_size(compiled: object, layer: torch.nn.Module) -> None:
    """The last batch of an epoch is smaller. (Of the references, a warp is exported for one size only.)"""
    graph = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    size = torch.export.Dim.AUTO
    exported = torch.export.export(layer, (stained(4, 16),), dynamic_shapes=({0: size, 2: size, 3: size},)).module()
    for n, pixels in ((4, 16), (3, 20)):
        images = stained(n, pixels)
        for run in (graph, exported):
            torch.manual_seed(n)
            found = run(images)
            torch.manual_seed(n)
            torch.testing.assert_close(found, layer(images))


def test_draws_are_exact_under_autocast_and_lie_on_the_cpu() -> None:
    augment = SiameseAugment()
    expected = augment.draw(generator(3), 64)
    with torch.autocast("cpu"), torch.device("meta"):
        found = augment.draw(generator(3), 64)
    assert torch.equal(found.warp, expected.warp) and torch.equal(found.stain, expected.stain)


def test_a_draw_of_another_number_is_refused() -> None:
    augment = SiameseAugment()
    with pytest.raises(ValueError, match="one draw for all or one per patch: got 2 draws for 3 patches"):
        augment(stained(3, 16), augment.draw(generator(), 2))
    assert augment(stained(0, 16), Draw(None, torch.ones(1, dtype=torch.bool))).shape == (0, 3, 16, 16)
