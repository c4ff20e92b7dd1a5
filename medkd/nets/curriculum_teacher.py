"""Networks that make training images for a classifier: by changing real ones within a bound, or from noise."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional


class PerturbingTeacher(nn.Module):
    """Changes every pixel of an image by at most ε, after the image, its class and noise: clip(x + ε tanh(U(x, y, z))).

    U is a U-Net with two halvings. The final convolution starts large enough for the untrained teacher's changes to
    fill about half of the bound, so that an untrained teacher is a random augmentation of the same strength.

    Args:
        classes: K.
        channels: C of the images.
        width: filters of the first level; doubled at each of the two halvings. A multiple of 4.
        mean: per channel, what was subtracted from images in [0, 1]; one number serves all channels.
        std: per channel, what they were divided by. (0.5, 0.5) stands for images in [-1, 1].

    Source: our reconstruction; a bounded residual as in adversarial training keeps the label plausible.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(
        self,
        classes: int,
        channels: int = 3,
        *,
        width: int = 16,
        mean: Sequence[float] | float = 0.5,
        std: Sequence[float] | float = 0.5,
    ) -> None:
        super().__init__()
        self.classes = classes
        self.register_buffer("mean", _per_channel(mean, channels))
        self.register_buffer("std", _per_channel(std, channels))
        self.first = _block(channels + classes + 1, width)
        self.second = _block(width, 2 * width, stride=2)
        self.third = _block(2 * width, 4 * width, stride=2)
        self.up_second = _block(6 * width, 2 * width)
        self.up_first = _block(3 * width, width)
        self.out = nn.Conv2d(width, channels, kernel_size=3, padding=1)
        nn.init.normal_(self.out.weight, std=1 / math.sqrt(9 * width))

    def noise(self, image: torch.Tensor, generator: torch.Generator | None, std: float = 1.0) -> torch.Tensor:
        """Gaussian z for a batch of images: (B, 1, H, W)."""
        shape = (len(image), 1, *image.shape[2:])
        return std * torch.randn(shape, generator=generator, device=image.device)

    def forward(self, image: torch.Tensor, label: torch.Tensor, noise: torch.Tensor, eps: float) -> torch.Tensor:
        """Change images without changing what they show.

        Args:
            image: (B, C, H, W), normalized by ``mean`` and ``std``.
            label: (B,) classes.
            noise: (B, 1, H, W).
            eps: the largest change of a pixel, as a share of the range [0, 1] before normalization.

        Returns:
            (B, C, H, W), normalized alike; before normalization in [0, 1].
        """
        condition = functional.one_hot(label.long(), self.classes).to(image.dtype)
        condition = condition[:, :, None, None].expand(-1, -1, *image.shape[2:])
        first = self.first(torch.cat([image, condition, noise.to(image.dtype)], dim=1))
        second = self.second(first)
        inner = self.up_second(torch.cat([_resized(self.third(second), second), second], dim=1))
        change = torch.tanh(self.out(self.up_first(torch.cat([_resized(inner, first), first], dim=1))))
        pixels = image * self.std + self.mean + eps * change
        return (pixels.clamp(0.0, 1.0) - self.mean) / self.std


class NoiseTeacher(nn.Module):
    """Makes images of a class from noise alone, for a classifier with its own normalization.

    Args:
        generator: (B, latent + K), noise followed by the one-hot class → (B, C, H, W) in [-1, 1], such as
            :class:`medkd.nets.conditional_gan.ConditionalGenerator`.
        classes: K.
        latent: length of the noise.
        channels: C of the images.
        mean: as for :class:`PerturbingTeacher`.
        std: as for :class:`PerturbingTeacher`.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(
        self,
        generator: nn.Module,
        classes: int,
        *,
        latent: int = 128,
        channels: int = 3,
        mean: Sequence[float] | float = 0.5,
        std: Sequence[float] | float = 0.5,
    ) -> None:
        super().__init__()
        self.generator = generator
        self.classes = classes
        self.latent = latent
        self.register_buffer("mean", _per_channel(mean, channels))
        self.register_buffer("std", _per_channel(std, channels))

    def noise(self, image: torch.Tensor, generator: torch.Generator | None, std: float = 1.0) -> torch.Tensor:
        """Gaussian z for as many images: (B, latent)."""
        return std * torch.randn((len(image), self.latent), generator=generator, device=image.device)

    def forward(self, image: torch.Tensor, label: torch.Tensor, noise: torch.Tensor, eps: float) -> torch.Tensor:
        """Make images; what ``image`` shows and ``eps`` play no part.

        Args:
            image: not looked at.
            label: (B,) wanted classes.
            noise: (B, latent).
            eps: not used.

        Returns:
            (B, C, H, W), normalized by ``mean`` and ``std``.
        """
        condition = functional.one_hot(label.long(), self.classes).to(noise.dtype)
        made = self.generator(torch.cat([noise, condition], dim=1))
        return ((made + 1) / 2 - self.mean) / self.std


def _block(before: int, after: int, *, stride: int = 1) -> nn.Sequential:
    # GroupNorm: the teacher treats each image alone, whatever else is in the batch.
    return nn.Sequential(
        nn.Conv2d(before, after, kernel_size=3, stride=stride, padding=1, bias=False),
        nn.GroupNorm(4, after),
        nn.LeakyReLU(0.1),
    )


def _resized(features: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return functional.interpolate(features, size=like.shape[2:], mode="nearest")


def _per_channel(value: Sequence[float] | float, channels: int) -> torch.Tensor:
    values = [value] * channels if isinstance(value, int | float) else list(value)
    if len(values) != channels:
        raise ValueError(f"{len(values)} values were given for {channels} channels")
    return torch.tensor(values, dtype=torch.float32).view(1, channels, 1, 1)
