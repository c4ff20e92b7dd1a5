"""DenseFCN, the fully convolutional DenseNet that CMEDL distills into.

Source: Jégou et al., arXiv:1611.09326, in the size of CMEDL, arXiv:2107.07985: four layers in every block, growth 12.
The same authors' release has five layers in the encoder's blocks, hence 1,740,578 parameters.
Differs: logits come out; the release applies a sigmoid.
"""

from __future__ import annotations

import torch
from monai.networks.layers.factories import Conv, Dropout, Pool
from monai.networks.layers.utils import get_norm_layer
from torch import nn


class DenseBlock(nn.Module):
    """Layers that each see the input and the outputs of all layers before them.

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels of the input.
        growth: channels that each layer adds.
        layers: number of layers.
        keeps_input: whether the input is part of the output, which then has ``in_channels + layers * growth`` channels
            in place of ``layers * growth``.
        dropout: probability of dropping a whole channel of a layer's output.
        norm: MONAI's name of a normalization.
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        growth: int,
        layers: int,
        *,
        keeps_input: bool,
        dropout: float,
        norm: str,
    ) -> None:
        super().__init__()
        self.keeps_input = keeps_input
        self.layers = nn.ModuleList(
            _pre_activated(spatial_dims, in_channels + i * growth, growth, 3, dropout, norm) for i in range(layers)
        )

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(B, C, *S) → (B, C', *S)."""
        grown = [features]
        for layer in self.layers:
            grown.append(layer(torch.cat(grown, dim=1)))
        return torch.cat(grown if self.keeps_input else grown[1:], dim=1)


class TransitionUp(nn.Module):
    """Doubles the resolution and appends the encoder's features of that resolution.

    Args:
        spatial_dims: 2 or 3.
        channels: channels that are upsampled, and their number afterwards.
    """

    def __init__(self, spatial_dims: int, channels: int) -> None:
        super().__init__()
        self.upsample = Conv["convtrans", spatial_dims](channels, channels, kernel_size=3, stride=2)

    def forward(self, features: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
        """(B, C, *S) and (B, C', *S') → (B, C + C', *S') for S' of 2 S or 2 S + 1."""
        features = self.upsample(features)
        for axis in range(2, skip.dim()):
            features = features.narrow(axis, 0, skip.shape[axis])
        return torch.cat([features, skip], dim=1)


class DenseFCN(nn.Module):
    """Dense blocks on the way down and up: 1,374,194 parameters for 1 channel and 2 classes.

    Args:
        spatial_dims: 2 or 3.
        in_channels: image channels.
        out_channels: classes with background.
        growth: channels that each layer adds.
        layers: layers of every dense block.
        first_width: channels of the first convolution.
        levels: resolutions below the first; sides must be at least 2 ** levels.
        dropout: probability of dropping a whole channel after every convolution but the first and the last.
        norm: MONAI's name of a normalization.

    Attributes:
        hint_layers: the last two dense blocks, at half and at full resolution.
    """

    def __init__(
        self,
        spatial_dims: int = 2,
        in_channels: int = 1,
        out_channels: int = 2,
        *,
        growth: int = 12,
        layers: int = 4,
        first_width: int = 48,
        levels: int = 5,
        dropout: float = 0.2,
        norm: str = "batch",
    ) -> None:
        super().__init__()

        def block(inputs: int, *, keeps_input: bool) -> DenseBlock:
            return DenseBlock(spatial_dims, inputs, growth, layers, keeps_input=keeps_input, dropout=dropout, norm=norm)

        grown = growth * layers
        self.first = Conv["conv", spatial_dims](in_channels, first_width, kernel_size=3, padding=1)
        widths = [first_width + grown * level for level in range(levels + 1)]
        self.down = nn.ModuleList(block(width, keeps_input=True) for width in widths[:-1])
        self.pool = nn.ModuleList(
            _pre_activated(spatial_dims, width, width, 1, dropout, norm).append(Pool["MAX", spatial_dims](2))
            for width in widths[1:]
        )
        self.bottleneck = block(widths[-1], keeps_input=False)
        self.transitions = nn.ModuleList(TransitionUp(spatial_dims, grown) for _ in range(levels))
        self.up = nn.ModuleList(
            block(grown + skip, keeps_input=index == levels - 1) for index, skip in enumerate(reversed(widths[1:]))
        )
        self.head = Conv["conv", spatial_dims](2 * grown + widths[1], out_channels, kernel_size=1)
        self.hint_layers: tuple[str, ...] = tuple(f"up.{i}" for i in range(max(levels - 2, 0), levels))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """(B, C, *S) → logits (B, K, *S)."""
        features = self.first(image)
        skips: list[torch.Tensor] = []
        for block, pool in zip(self.down, self.pool):  # noqa: B905 - TorchScript knows no strict
            features = block(features)
            skips.append(features)
            features = pool(features)
        features = self.bottleneck(features)
        for transition, block in zip(self.transitions, self.up):  # noqa: B905 - TorchScript knows no strict
            features = block(transition(features, skips.pop()))
        return self.head(features)


def _pre_activated(
    spatial_dims: int, in_channels: int, out_channels: int, kernel_size: int, dropout: float, norm: str
) -> nn.Sequential:
    return nn.Sequential(
        get_norm_layer(norm, spatial_dims, in_channels),
        nn.ReLU(inplace=True),
        Conv["conv", spatial_dims](in_channels, out_channels, kernel_size, padding=kernel_size // 2),
        Dropout["dropout", spatial_dims](dropout),
    )
