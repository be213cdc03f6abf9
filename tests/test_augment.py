"""Colour jitter, image by image, against torchvision's functions."""

import pytest
import torch
from torchvision.transforms.v2 import functional

from mapet.data.augment import JitterDraws, color_jitter, sample_color_jitter

ADJUST = (functional.adjust_brightness, functional.adjust_contrast, functional.adjust_saturation)


def images(batch, size=12):
    return torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(5))


def one_by_one(batch, draws):
    """What torchvision gives for each image on its own."""
    out = []
    for image, factors, order in zip(batch, draws.factors, draws.order, strict=True):
        image = image.float() / 255
        for operation in order.tolist():
            image = ADJUST[operation](image, factors[operation].item())
        out.append(image)
    return torch.stack(out)


@pytest.mark.parametrize("strength", [0.0, 0.4, 1.0])
def test_equals_torchvision_per_image(strength):
    batch = images(64)
    draws = sample_color_jitter(64, strength, torch.Generator().manual_seed(1), "cpu")
    assert len({tuple(order) for order in draws.order.tolist()}) == 6
    found = color_jitter(batch, draws)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, one_by_one(batch, draws), atol=1e-6, rtol=0)


def test_strength_zero_only_scales():
    batch = images(4)
    found = color_jitter(batch, sample_color_jitter(4, 0.0, torch.Generator().manual_seed(0), "cpu"))
    torch.testing.assert_close(found, batch.float() / 255, atol=1e-6, rtol=0)


def test_extreme_factors_stay_in_range():
    batch = images(2)
    draws = JitterDraws(torch.tensor([[0.0, 2.0, 2.0], [2.0, 0.0, 0.0]]), torch.tensor([[2, 1, 0], [0, 2, 1]]))
    found = color_jitter(batch, draws)
    torch.testing.assert_close(found, one_by_one(batch, draws), atol=1e-6, rtol=0)
    assert found.min() >= 0 and found.max() <= 1
    assert not found[0].any()  # brightness 0 is black


def test_draws_are_the_generators_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = sample_color_jitter(1000, 0.4, torch.Generator().manual_seed(3), "cpu")
    second = sample_color_jitter(1000, 0.4, torch.Generator().manual_seed(3), "cpu")
    assert torch.equal(first.factors, second.factors) and torch.equal(first.order, second.order)
    assert torch.equal(torch.get_rng_state(), before)
    assert 0.6 <= first.factors.min() < 0.62 and 1.38 < first.factors.max() <= 1.4
    assert torch.equal(first.order.sort(dim=1).values, torch.arange(3).expand(1000, 3))


def test_the_input_is_not_changed():
    batch = images(2)
    kept = batch.clone()
    color_jitter(batch, sample_color_jitter(2, 0.4, torch.Generator().manual_seed(0), "cpu"))
    assert torch.equal(batch, kept)


def test_wrong_input_is_refused():
    draws = sample_color_jitter(2, 0.4, torch.Generator().manual_seed(0), "cpu")
    with pytest.raises(ValueError, match="uint8"):
        color_jitter(images(2).float(), draws)
    with pytest.raises(ValueError, match="3 images, but jitter was drawn for 2"):
        color_jitter(images(3), draws)
