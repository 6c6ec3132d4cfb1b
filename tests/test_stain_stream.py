"""Fits pooled over many patches: streaming against the exact fit of all pixels, within the stated error."""

import pytest
import torch
from small_sets import stained

from histodd_bench.ops.macenko_fit import DEGENERATE, LITTLE_TISSUE, OK, OUT_OF_RANGE
from histodd_bench.stain import MacenkoNormalizer
from histodd_bench.stain_definitions import DEFINITIONS, Definition
from histodd_bench.stain_stream import StreamingFit, fit_pooled, fit_stream


def angle_between(a, b):
    return torch.atan2(torch.linalg.cross(a, b, dim=0).norm(dim=0), (a * b).sum(0))


@pytest.mark.parametrize("name", ["torchstain", "torchstain-numpy", "cucim"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float64])
def test_streaming_stays_within_its_stated_error(name, dtype):
    images = stained(40, 24, seed=2)
    exact = fit_pooled(images.double() / 255, name)
    images = images if dtype == torch.uint8 else images.double() / 255
    fit = StreamingFit(name)
    for _ in fit.passes():
        for batch in images.split(7):
            fit.update(batch)
    streamed = fit.finish()
    assert streamed.status.tolist() == exact.status.tolist() == [OK]
    assert fit.patches == 40 and fit.skipped == 0
    slack = 1e-6 if dtype == torch.uint8 else 1e-9  # densities are float32 there
    turned = angle_between(streamed.stain_matrix[0], exact.stain_matrix[0])
    assert (turned <= fit.angle_error + slack).all()
    off = (streamed.max_concentration[0] - exact.max_concentration[0]).abs()
    assert (off <= fit.concentration_error + slack).all()
    assert 0 < fit.concentration_error.max() < 5e-4 and fit.angle_error < 1.3e-5


def test_neither_batches_nor_order_matter():
    images = stained(12, 20)
    whole = fit_stream([images])
    for batches in (images.split(5), [images[i : i + 1] for i in range(12)], images.flip(0).split(4)):
        for a, b in zip(fit_stream(list(batches)), whole, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=2e-4)


def test_lightness_mask_in_a_stream():
    images = stained(6, 40, seed=5)
    streamed, exact = (
        fit_stream(list(images.split(1)), "tiatoolbox"),
        [DEFINITIONS["tiatoolbox"].fit(image[None]).stain_matrix[0] for image in images],
    )
    assert streamed.status.tolist() == [OK]
    assert min((streamed.stain_matrix[0] - e).abs().max() for e in exact) < 0.1


def test_patches_out_of_range_are_left_out_and_counted():
    images = stained(6, 24).float() / 255
    broken = images.clone()
    broken[2, 1, 0, 0], broken[4] = torch.nan, broken[4] * 255
    kept = images[[0, 1, 3, 5]]
    fit = StreamingFit()
    for _ in fit.passes():
        fit.update(broken)
    assert (fit.patches, fit.skipped) == (6, 2)
    for a, b in zip(fit.finish(), fit_stream([kept]), strict=True):
        torch.testing.assert_close(a, b)
    assert fit_pooled(broken).status.tolist() == [OUT_OF_RANGE]


def test_nothing_to_fit_ends_early():
    white, pink = torch.full((2, 3, 8, 8), 250, dtype=torch.uint8), torch.full((2, 3, 8, 8), 120, dtype=torch.uint8)
    for images, status in ((white, LITTLE_TISSUE), (pink, DEGENERATE), (white[:0], LITTLE_TISSUE)):
        fit = StreamingFit()
        passes = 0
        for _ in fit.passes():
            fit.update(images)
            passes += 1
        assert passes == 1 and fit.finish().status.tolist() == [status]
        assert all(t.isfinite().all() for t in fit.finish()[:2])


def test_misuse_is_refused():
    fit = StreamingFit()
    assert fit.finish().status.tolist() == [LITTLE_TISSUE]  # of nothing
    with pytest.raises(RuntimeError, match="loop over passes"):
        fit.update(stained(1))
    with pytest.raises(ValueError, match=r"image must be \[N,3,H,W\]"):
        for _ in fit.passes():
            fit.update(stained(1)[0])
    with pytest.raises(RuntimeError, match="after the loop"):
        fit.finish()
    with pytest.raises(ValueError, match=r"pass 2 saw 0 pixels, the first one .*a generator is used up"):
        fit_stream(batch for batch in stained(4, 24).split(2))
    with pytest.raises(ValueError, match="image must be uint8, float64"):
        fit_stream([stained(1).long()])
    with pytest.raises(ValueError, match=r"image must be \[N,3,H,W\]"):
        fit_pooled(stained(2)[0])
    with pytest.raises(TypeError, match="images must be a torch tensor, got list"):
        fit_pooled([stained(1)])


def test_passes_begin_a_new_fit() -> None:
    fit, first, second = StreamingFit(), stained(2, 24), stained(3, 24, seed=4)
    for images in (first, second):
        for _ in fit.passes():
            fit.update(images)
    assert fit.patches == 3
    for found, expected in zip(fit.finish(), fit_stream([second]), strict=True):
        assert torch.equal(found, expected)


def test_the_default_device_is_not_where_sums_are_kept() -> None:
    images = stained(2, 24)
    expected = fit_stream([images])
    with torch.device("meta"):
        found = fit_stream([images])
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_slide_is_normalised_with_one_fit():
    slide, target = stained(8, 24, seed=1), stained(1, 64, seed=9)
    fit = fit_stream(list(slide.split(3)), Definition())
    out = MacenkoNormalizer().fit(target[0]).normalize(slide, fit)
    assert out.shape == slide.shape and out.isfinite().all()
    assert (out * 255 - slide.float()).abs().mean() < 8  # same stains, other noise
    assert MacenkoNormalizer().fit(fit).template.max_concentration == tuple(fit.max_concentration[0].tolist())
