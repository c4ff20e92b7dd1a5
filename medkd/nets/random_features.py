"""Image features that need no download: a fixed random convolutional network."""

from __future__ import annotations

from itertools import pairwise
from typing import Self

import torch
from torch import nn

_WIDTHS = (8, 16, 32)


class RandomFeatures(nn.Module):
    """Fixed features for KID and FID where no pretrained network may be fetched.

    Three 3×3 convolutions of stride 2 with LeakyReLU; the mean and the standard deviation over space of every channel
    of every layer are the features: 112 numbers that answer to intensity, contrast and texture at three scales. They
    rank generators of the same task; the values compare with no published FID.

    Args:
        channels: of the image.
        seed: of the weights, which are the same on every machine.

    Attributes:
        features: D, the length of a feature vector.

    Source: random-feature Fréchet distances, Naeem et al., arXiv:2002.09797, section 4 (with a random VGG-16).
    """

    def __init__(self, channels: int = 1, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        widths = (channels, *_WIDTHS)
        self.layers = nn.ModuleList(
            nn.utils.skip_init(nn.Conv2d, before, after, 3, stride=2, padding=1, padding_mode="replicate")
            for before, after in pairwise(widths)
        )
        for layer in self.layers:
            nn.init.kaiming_normal_(layer.weight, a=0.2, generator=generator)  # type: ignore[arg-type]
            nn.init.normal_(layer.bias, std=0.1, generator=generator)  # type: ignore[arg-type]
        self.features = 2 * sum(_WIDTHS)
        self.requires_grad_(False).eval()

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) in [-1, 1] → (B, 112)."""
        moments = []
        for layer in self.layers:
            image = nn.functional.leaky_relu(layer(image), 0.2)
            moments += [image.mean(dim=(2, 3)), image.std(dim=(2, 3), correction=0)]
        return torch.cat(moments, dim=1)

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode."""
        return super().train(False)
