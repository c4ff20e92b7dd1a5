"""Critics of segmentation outputs and of features."""

from __future__ import annotations

import torch
from monai.networks.layers.factories import Conv
from torch import nn


class OutputCritic(nn.Module):
    """AdaptSegNet's critic of probability or self-information maps.

    Five 4×4 convolutions of stride 2, LeakyReLU 0.2 between them, no norm; logits come out.
    Source: arXiv:1802.10349, section 3.2, and its release.

    Args:
        in_channels: channels of the map: the classes.
        width: filters of the first convolution, doubled by every further one.
        spatial_dims: 2 or 3.
        layers: convolutions before the last one; sides are at least 2 ** (layers + 1).
    """

    def __init__(self, in_channels: int, width: int = 64, *, spatial_dims: int = 2, layers: int = 4) -> None:
        super().__init__()
        convolution = Conv["conv", spatial_dims]
        stack, channels = _halving(spatial_dims, in_channels, width, layers)
        self.layers = nn.Sequential(*stack, convolution(channels, 1, kernel_size=4, stride=2, padding=1))
        self.smallest_side = 2 ** (layers + 1)

    def forward(self, output: torch.Tensor) -> torch.Tensor:
        """(B, K, *S) → logits (B, 1, *S / 2 ** (layers + 1)).

        Raises:
            ValueError: If a side is too small.
        """
        require_sides(output, self.smallest_side)
        return self.layers(output)


class FeatureCritic(nn.Module):
    """A critic of feature maps: 4×4 convolutions of stride 2 with LeakyReLU 0.2, then one of 1×1 to a single channel.

    The papers of self-ensembling critics print no architecture; this one is ours.

    Args:
        in_channels: channels of the feature map.
        width: filters of the first convolution, doubled by every further one.
        spatial_dims: 2 or 3.
        layers: convolutions of stride 2; sides are at least 2 ** layers. Choose fewer for small maps.
    """

    def __init__(self, in_channels: int, width: int = 64, *, spatial_dims: int = 2, layers: int = 4) -> None:
        super().__init__()
        stack, channels = _halving(spatial_dims, in_channels, width, layers)
        self.layers = nn.Sequential(*stack, Conv["conv", spatial_dims](channels, 1, kernel_size=1))
        self.smallest_side = 2**layers

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(B, C, *S) → logits (B, 1, *S / 2 ** layers).

        Raises:
            ValueError: If a side is too small.
        """
        require_sides(features, self.smallest_side)
        return self.layers(features)


def _halving(spatial_dims: int, in_channels: int, width: int, layers: int) -> tuple[list[nn.Module], int]:
    """Convolutions that each halve the resolution, and their last width."""
    stack: list[nn.Module] = []
    channels = in_channels
    for layer in range(layers):
        out_channels = width * 2**layer
        stack += [
            Conv["conv", spatial_dims](channels, out_channels, kernel_size=4, stride=2, padding=1),
            nn.LeakyReLU(0.2, inplace=True),
        ]
        channels = out_channels
    return stack, channels


def require_sides(features: torch.Tensor, smallest: int) -> None:
    """Raise ValueError if a side of (B, C, *S) is below ``smallest`` pixels."""
    if min(features.shape[2:]) < smallest:
        raise ValueError(
            f"the critic needs sides of at least {smallest}, got {tuple(features.shape)}: give it fewer layers"
        )
