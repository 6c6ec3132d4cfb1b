"""Template choice, statistics and the fit / normalise pair."""

import copy
from collections.abc import Callable

import pytest
import torch
from small_sets import render, stained, two_classes
from torch import nn

from histodd_bench.augment import SiameseAugment
from histodd_bench.data.patchset import PatchSet
from histodd_bench.ops import macenko_fit
from histodd_bench.stain import MacenkoNormalizer, Preprocessing, StainTemplate, describe, fit_affine, fit_set


def test_normalised_patches_have_the_stains_of_the_template() -> None:
    skewed = torch.tensor([[0.65, 0.10], [0.70, 0.95], [0.29, 0.30]])
    skewed = skewed / skewed.norm(dim=0)
    g = torch.Generator().manual_seed(1)
    patches = render(1.2 * torch.rand(4, 48, 48, generator=g), 0.9 * torch.rand(4, 48, 48, generator=g), skewed)
    template = StainTemplate()
    affine, valid = fit_affine(patches, template)
    assert valid.all()
    moved = MacenkoNormalizer(template).normalize(patches)
    stain_matrix, max_concentration, status = macenko_fit(moved)
    assert (status == 0).all()
    # Refitting thresholds and percentiles see slightly other pixels, so the match is close, not exact.
    assert (stain_matrix - torch.tensor(template.stain_matrix)).abs().max() < 0.03
    assert (max_concentration / torch.tensor(template.max_concentration) - 1).abs().max() < 0.05


def test_a_patch_normalised_to_itself_moves_by_the_missing_one_only() -> None:
    patches = stained(1, 64)
    normalizer = MacenkoNormalizer().fit(patches[0])
    moved = normalizer.normalize(patches)
    # The inverse has no -1: io exp(-od) = I + 1 for pixels in the plane of the two stains.
    assert ((moved * 255) - (patches.float() + 1)).abs().max() < 0.05 * 255
    assert ((moved * 255) - (patches.float() + 1)).abs().median() < 1.5


def test_blank_patches_come_back_as_they_are_and_leave_neighbours_alone() -> None:
    patches = stained(3, 32)
    patches[1] = 250
    together = MacenkoNormalizer().normalize(patches)
    assert torch.equal(together[1], patches[1].float() / 255)
    alone = MacenkoNormalizer().normalize(patches[:1])
    torch.testing.assert_close(together[:1], alone)


@pytest.mark.parametrize(
    "cast",
    [lambda m: m.half(), lambda m: m.bfloat16(), lambda m: m.to("cpu", torch.float16), lambda m: m.type(torch.float32)],
    ids=["half", "bfloat16", "to", "type"],
)
def test_casting_a_model_leaves_the_target_as_it_is(cast: Callable[[nn.Module], nn.Module]) -> None:
    patches = stained(5, 48)
    normalizer = MacenkoNormalizer().fit(patches[4])
    expected, saved = normalizer.normalize(patches), copy.deepcopy(normalizer.state_dict())
    assert not any(torch.equal(t, t.bfloat16().double()) for t in saved.values())
    model = nn.Sequential(SiameseAugment(normalizer=normalizer), nn.Conv2d(3, 2, 3))
    assert cast(model) is model and model[1].weight.dtype != torch.float64
    assert torch.equal(normalizer.normalize(patches), expected)
    assert saved.keys() == normalizer.state_dict().keys() == {"target_stain", "target_concentration"}
    for name, value in normalizer.state_dict().items():
        assert value.dtype == torch.float64 and torch.equal(value, saved[name])


def test_the_target_moves_with_a_model() -> None:
    patches = stained(5, 48)
    normalizer = MacenkoNormalizer().fit(patches[4])
    expected, saved = normalizer.normalize(patches), copy.deepcopy(normalizer.state_dict())
    model = nn.Sequential(normalizer, nn.Conv2d(3, 2, 3)).to("meta", torch.float16)
    for moved in (normalizer.target_stain, normalizer.target_concentration):
        assert moved.device.type == "meta" and moved.dtype == torch.float64
    model.to_empty(device="cpu")
    normalizer.load_state_dict(saved)
    assert normalizer.to("cpu").target_stain.device.type == "cpu"
    assert torch.equal(normalizer.normalize(patches), expected)


def test_a_blank_target_is_refused() -> None:
    with pytest.raises(ValueError, match="too little tissue"):
        MacenkoNormalizer().fit(torch.full((3, 32, 32), 255, dtype=torch.uint8))


def test_gradient_flows_through_normalisation_to_the_image_only_along_the_affine() -> None:
    image = (stained(2, 8).double() / 255).requires_grad_(True)
    affine, valid = fit_affine(image, StainTemplate())
    assert not affine.requires_grad
    from histodd_bench.ops import stain_augment

    stain_augment(image, affine, valid=valid).sum().backward()
    assert image.grad is not None and (image.grad != 0).any()


def test_statistics_are_those_of_all_pixels_and_the_template_is_the_closest_patch() -> None:
    patches = two_classes(per_class=30, size=16)
    described = describe(patches)
    x = patches.images.double() / 255
    torch.testing.assert_close(torch.tensor(described.mean, dtype=torch.float64), x.mean((0, 2, 3)), rtol=1e-5, atol=0)
    torch.testing.assert_close(
        torch.tensor(described.std, dtype=torch.float64), x.transpose(0, 1).flatten(1).std(1, unbiased=False), rtol=1e-5, atol=0
    )
    own = torch.cat([x.mean((2, 3)), x.flatten(2).std(2, unbiased=False)], 1)
    whole = torch.cat([x.mean((0, 2, 3)), x.transpose(0, 1).flatten(1).std(1, unbiased=False)])
    distance = (own - whole).norm(dim=1)
    status = macenko_fit(patches.images)[2]
    closest = min((d.item(), i) for i, d in enumerate(distance) if status[i] == 0)[1]
    assert described.template_index == closest


def test_a_set_without_tissue_falls_back_to_the_reference_template() -> None:
    blank = PatchSet(
        torch.full((4, 3, 8, 8), 250, dtype=torch.uint8), torch.tensor([0, 1, 0, 1]), torch.zeros(4, dtype=torch.int64), ("s",), ("a", "b")
    )
    described = describe(blank)
    assert described.template == StainTemplate() and described.template_index == -1
    assert min(described.std) > 0


def test_fitting_a_set_in_chunks_equals_fitting_it_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    patches = two_classes(per_class=20)
    patches.images[:-1] = 250  # blank, so that the closest patches have no template
    whole, described = fit_set(patches, StainTemplate()), describe(patches)
    monkeypatch.setattr("histodd_bench.stain._CHUNK", 7)
    assert describe(patches) == described and described.template_index == len(patches) - 1
    chunked = fit_set(patches, StainTemplate())
    torch.testing.assert_close(whole[0], chunked[0])
    assert torch.equal(whole[1], chunked[1])


def test_preprocessing_normalises_channels() -> None:
    described = Preprocessing((0.5, 0.25, 0.75), (0.5, 0.25, 0.125))
    out = described(torch.tensor([255, 0, 0], dtype=torch.uint8).view(1, 3, 1, 1))
    torch.testing.assert_close(out.flatten(), torch.tensor([1.0, -1.0, -6.0]))


def test_what_the_normaliser_refuses_is_named() -> None:
    target = stained(1, 32)[0]
    with pytest.raises(TypeError, match=r"images must be a torch tensor, got ndarray.*permute\(0, 3, 1, 2\)"):
        MacenkoNormalizer().fit(target.numpy())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="got ndarray"):
        MacenkoNormalizer().normalize(target[None].numpy())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"out_of_range; images are uint8, or float in \[0, 1\]"):
        MacenkoNormalizer().fit(target.float())  # 0 to 255, as some packages take them
    normaliser, levels = MacenkoNormalizer().fit(target), target[None].float()
    torch.testing.assert_close(normaliser.normalize(levels), levels)
    with pytest.raises(ValueError, match="images must lie in"):
        normaliser.normalize(levels, check=True)
    with pytest.raises(ValueError, match=r"images must lie in .* out of range: \[0\] of 1"):
        normaliser.normalize(levels, normaliser.estimate(target), check=True)  # the status is that of another image
    for where in (torch.ones(3, dtype=torch.bool), torch.ones(1), torch.ones(1, 1, dtype=torch.bool)):
        with pytest.raises(ValueError, match=r"where must be bool, \[N\] or \[1\]"):
            normaliser.normalize(target[None], where=where)


def test_one_patch_is_a_batch_of_one() -> None:
    """So a normaliser can stand in a list of transforms."""
    normaliser, patch = MacenkoNormalizer().fit(stained(1, 32, seed=3)[0]), stained(1, 24)[0]
    assert torch.equal(normaliser(patch), normaliser(patch[None])[0])
    fit = normaliser.estimate(patch)
    assert fit.status.shape == (1,) and torch.equal(normaliser(patch, fit), normaliser(patch))


def test_preprocessing_does_not_remember_the_mode_of_its_first_call() -> None:
    preprocessing, images = Preprocessing((0.7, 0.5, 0.6), (0.2, 0.25, 0.2)), stained(2, 16)
    with torch.inference_mode():
        seen = preprocessing(images)
    x = (images.double() / 255).float().requires_grad_()
    (gradient,) = torch.autograd.grad(preprocessing(x).sum(), x)
    torch.testing.assert_close(gradient[0, 1], torch.full((16, 16), 4.0))
    stain, _ = fit_affine(images, StainTemplate())
    assert torch.equal(preprocessing(images, stain=stain), preprocessing(images, stain=stain, valid=torch.ones(2) > 0))
    torch.testing.assert_close(torch.compile(preprocessing, fullgraph=True, backend="aot_eager")(images), seen)


@pytest.mark.parametrize("definition", ["torchstain", "cucim", "tiatoolbox"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_images_lose_no_more_than_their_rounding(definition: str, dtype: torch.dtype) -> None:
    normaliser, images = MacenkoNormalizer(definition=definition), (stained(2, 24).float() / 255).to(dtype)
    warp = torch.tensor([[[0.0, 1.0, 0.1], [-1.0, 0.0, 0.0]]]).expand(2, 2, 3)
    fit = normaliser.estimate(images)
    for turn in (None, warp):
        out, exact = normaliser(images, fit, warp=turn), normaliser(images.float(), fit, warp=turn)
        assert out.dtype == dtype
        torch.testing.assert_close(out, exact.to(dtype), rtol=0, atol=torch.finfo(dtype).eps / 2)
