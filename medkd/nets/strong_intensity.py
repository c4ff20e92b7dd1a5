"""A strong augmentation that changes intensities alone, so that labels stay where they are."""

from __future__ import annotations

import torch
from monai.networks.layers.convutils import gaussian_1d
from torch.nn import functional

_LARGEST_BLUR_PX = 1.15
_SMALLEST_BLUR_PX = 0.15


def strong_intensity(image: torch.Tensor, generator: torch.Generator, *, strength: float = 0.25) -> torch.Tensor:
    """Random brightness and contrast for most images, a random blur for half of them, each image on its own.

    With probability 0.8 an image's contrast is multiplied by a factor from [1 - strength, 1 + strength] around its
    mean, and its mean is moved by up to ± strength; with probability 0.5 it is blurred by a Gaussian of 0.15 to 1.15
    px.

    Args:
        image: (B, C, *S), intensities in [-1, 1]; the result may leave that range by a little.
        generator: of the draws, on the image's device.
        strength: 0 changes nothing, and blurs nothing.

    Returns:
        (B, C, *S).

    Raises:
        ValueError: If ``strength`` is not in [0, 1].

    Source: the color jitter and blur of DACS, arXiv:2007.08702, on one channel.
    """
    if not 0 <= strength <= 1:
        raise ValueError(f"strength must lie in [0, 1], got {strength}")
    if strength == 0:
        return image
    count = len(image)
    draws = torch.rand(5, count, generator=generator, device=image.device)
    is_jittered, is_blurred = draws[0] < 0.8, draws[1] < 0.5
    shape = (count, *[1] * (image.ndim - 1))
    contrast = torch.where(is_jittered, 1 + strength * (2 * draws[2] - 1), 1.0).reshape(shape)
    brightness = torch.where(is_jittered, strength * (2 * draws[3] - 1), 0.0).reshape(shape)
    mean = image.mean(dim=tuple(range(1, image.ndim)), keepdim=True)
    changed = (image - mean) * contrast + mean + brightness
    sigma_px = _SMALLEST_BLUR_PX + (_LARGEST_BLUR_PX - _SMALLEST_BLUR_PX) * draws[4]
    return torch.stack(
        [
            _blur(one, float(sigma)) if blurred else one
            for one, sigma, blurred in zip(changed, sigma_px.tolist(), is_blurred.tolist(), strict=True)
        ]
    )


def _blur(image: torch.Tensor, sigma_px: float) -> torch.Tensor:
    """(C, *S) convolved with a Gaussian along every axis, borders continued."""
    kernel = gaussian_1d(torch.tensor(sigma_px), truncated=3.0).to(image)
    kernel = kernel / kernel.sum()
    reach = len(kernel) // 2
    rows = image
    for axis in range(1, image.ndim):
        lines = rows.movedim(axis, -1)
        flat = functional.pad(lines.reshape(-1, 1, lines.shape[-1]), (reach, reach), mode="replicate")
        rows = functional.conv1d(flat, kernel.reshape(1, 1, -1)).reshape(lines.shape).movedim(-1, axis)
    return rows
