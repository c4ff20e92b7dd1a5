"""Pasted classes and exchanged spectra: what is conserved, what changes, and NumPy's answer."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medkd.losses.mixing import amplitude_mix, class_mix_mask, low_frequency_swap, paste


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(st.integers(0, 2**20), st.integers(1, 6))
@settings(max_examples=40, deadline=None)
def test_the_mask_covers_half_of_the_classes_whole(seed, classes):
    generator = torch.Generator().manual_seed(seed)
    label = torch.randint(-1, classes, (3, 1, 4, 5), generator=generator)
    mask = class_mix_mask(label, generator)
    assert mask.shape == label.shape
    assert mask.dtype == torch.bool
    for image, chosen in zip(label, mask, strict=True):
        inside, outside = set(image[chosen].tolist()), set(image[~chosen].tolist())
        assert not inside & outside
        assert -1 not in inside
        present = len((inside | outside) - {-1})
        assert len(inside) == (present + 1) // 2


def test_the_mask_is_a_function_of_the_generator_and_differs_between_images():
    label = torch.arange(16).reshape(1, 1, 4, 4).repeat(4, 1, 1, 1)
    masks = [class_mix_mask(label, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])
    assert len({tuple(mask.flatten().tolist()) for mask in masks[0]}) > 1


def test_pasting_conserves_pixels():
    generator = torch.Generator().manual_seed(0)
    label = torch.randint(0, 3, (2, 1, 6, 6), generator=generator)
    mask = class_mix_mask(label, generator)
    a, b = draw(2, 2, 6, 6), draw(2, 2, 6, 6, seed=1)
    mixed, rest = paste(mask, a, b), paste(~mask, a, b)
    assert torch.equal(mixed + rest, a + b)
    assert torch.equal(mixed[mask.expand_as(a)], a[mask.expand_as(a)])
    assert torch.equal(paste(mask, a, a), a)
    labels = paste(mask, label, torch.full_like(label, 7))
    assert torch.equal(labels == 7, ~mask)


@pytest.mark.parametrize("shape", [(2, 1, 8, 8), (1, 2, 7, 9), (1, 1, 6, 5, 4), (2, 1, 10)])
@pytest.mark.parametrize("beta", [0.0, 0.1, 0.3, 0.5])
def test_swapping_an_image_with_itself_changes_nothing(shape, beta):
    image = draw(*shape)
    torch.testing.assert_close(low_frequency_swap(image, image, beta), image, rtol=0, atol=1e-12)
    torch.testing.assert_close(low_frequency_swap(image.float(), image.float(), beta), image.float(), rtol=0, atol=1e-5)


def centered_swap(source: np.ndarray, target: np.ndarray, beta: float) -> np.ndarray:
    """The published recipe: shift frequency 0 to the middle, exchange the amplitudes of a square around it."""
    a, b = (np.fft.fftshift(np.fft.fft2(image)) for image in (source, target))
    amplitude, phase = np.abs(a), np.angle(a)
    h, w = source.shape
    half, row, column = int(np.floor(min(h, w) * beta)), h // 2, w // 2
    square = np.s_[row - half : row + half + 1, column - half : column + half + 1]
    amplitude[square] = np.abs(b)[square]
    return np.real(np.fft.ifft2(np.fft.ifftshift(amplitude * np.exp(1j * phase))))


@pytest.mark.parametrize("shape", [(16, 16), (15, 22), (33, 12)])
@pytest.mark.parametrize("beta", [0.0, 0.01, 0.09, 0.25])
def test_low_frequency_swap_equals_the_published_recipe(shape, beta):
    source, target = draw(1, 1, *shape), draw(1, 1, *shape, seed=1)
    expected = centered_swap(source[0, 0].numpy(), target[0, 0].numpy(), beta)
    np.testing.assert_allclose(low_frequency_swap(source, target, beta)[0, 0].numpy(), expected, atol=1e-12)


def test_a_half_width_of_zero_exchanges_the_mean_brightness_alone():
    source, target = draw(1, 1, 8, 8).abs(), draw(1, 1, 8, 8, seed=1).abs()
    expected = source - source.mean() + target.mean()
    torch.testing.assert_close(low_frequency_swap(source, target, 0.0), expected)


def test_amplitudes_come_from_both_and_phases_stay():
    image, other = draw(2, 1, 8, 8), draw(2, 1, 8, 8, seed=1)
    mixed = torch.fft.fft2(amplitude_mix(image, other, ratio=torch.tensor([0.25, 1.0])))
    own, foreign = torch.fft.fft2(image), torch.fft.fft2(other)
    torch.testing.assert_close(mixed[0].abs(), 0.75 * own[0].abs() + 0.25 * foreign[0].abs())
    torch.testing.assert_close(mixed[1].abs(), foreign[1].abs())
    torch.testing.assert_close(mixed * own.abs(), own * mixed.abs())  # equal phases
    torch.testing.assert_close(amplitude_mix(image, other, ratio=0.0), image)


def test_mixing_is_real_the_same_for_each_image_alone_and_keeps_the_precision():
    image, other = draw(3, 2, 7, 6), draw(3, 2, 7, 6, seed=1)
    whole = amplitude_mix(image, other, ratio=0.6, beta=0.2)
    for i in range(3):
        alone = amplitude_mix(image[i : i + 1], other[i : i + 1], ratio=0.6, beta=0.2)
        torch.testing.assert_close(alone[0], whole[i])
    assert whole.dtype == torch.float64
    assert amplitude_mix(image.bfloat16(), other.bfloat16(), ratio=0.6).dtype == torch.float32


def test_wrong_arguments_are_named():
    image = draw(2, 1, 4, 4)
    with pytest.raises(ValueError, match=r"\(2, 4, 4\)"):
        class_mix_mask(torch.zeros(2, 4, 4))
    with pytest.raises(ValueError, match=r"\(2, 1, 4, 4\).*\(2, 4, 4\)"):
        paste(torch.ones(2, 4, 4, dtype=torch.bool), image, image)
    with pytest.raises(ValueError, match=r"foreground.*\(2, 1, 4, 4\).*\(1, 1, 4, 4\)"):
        paste(torch.ones(2, 1, 4, 4, dtype=torch.bool), image, image[:1])
    with pytest.raises(ValueError, match=r"\(2, 1, 4, 4\).*\(2, 1, 4, 3\)"):
        low_frequency_swap(image, image[..., :3], 0.1)
    for beta in (-0.1, 0.6):
        with pytest.raises(ValueError, match="beta"):
            low_frequency_swap(image, image, beta)
    for ratio in (-0.1, 1.1, torch.tensor([0.0, 2.0])):
        with pytest.raises(ValueError, match="ratio must lie"):
            amplitude_mix(image, image, ratio=ratio)
    with pytest.raises(ValueError, match=r"ratio.*\(3,\)"):
        amplitude_mix(image, image, ratio=torch.ones(3))
    with pytest.raises(ValueError, match=r"\(2, 4\)"):
        amplitude_mix(draw(2, 4), draw(2, 4), ratio=0.5)
