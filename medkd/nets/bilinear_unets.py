"""The U-Nets of CMEDL and of MT-UDA: max pooling, bilinear upsampling, BatchNorm.

Source: CMEDL, arXiv:2107.07985, whose count of parameters :func:`cmedl_unet` has; MT-UDA, arXiv:2203.12454, and its
release for :func:`mt_uda_unet`.
Differs: odd sides are padded by replication on the way up (MONAI's ``UpCat``); the releases pad with zeros or fail.
Differs: CMEDL's upsampling is followed by convolutions alone, MT-UDA's by none but has a 1×1 convolution before it; the
MT-UDA configuration asks for transposed convolutions, but its decoder never sees that flag.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from monai.networks.blocks import Convolution
from monai.networks.layers.factories import Conv, Pool
from monai.networks.nets.basic_unet import UpCat
from torch import nn

Norm = str | tuple[str, dict[str, object]] | None


class BilinearUNet(nn.Module):
    """A U-Net with max pooling and linear upsampling (``align_corners``), of any depth.

    Args:
        spatial_dims: 2 or 3 (trilinear).
        in_channels: image channels.
        out_channels: classes with background.
        widths: filters of every level, from full resolution down; at least 2 levels.
        dropout: probability in [0, 1) between the two convolutions of every encoder level.
        negative_slope: of the LeakyReLU; 0 is ReLU.
        halves: a 1×1 convolution halves the channels before each upsampling, and a decoder level is as wide as the
            encoder's (MT-UDA). Otherwise all channels are kept and a decoder level is as wide as the encoder's
            next higher resolution (CMEDL).
        head_kernel_size: kernel of the last convolution, in pixels.
        norm: MONAI's name of a normalization, or None.

    Attributes:
        hint_layers: the last two decoder levels, at half and at full resolution.

    Raises:
        ValueError: If there are fewer than two widths, or not one dropout per width.
    """

    def __init__(
        self,
        spatial_dims: int = 2,
        in_channels: int = 1,
        out_channels: int = 2,
        widths: Sequence[int] = (64, 128, 256, 512, 512),
        *,
        dropout: Sequence[float] | None = None,
        negative_slope: float = 0.0,
        halves: bool = False,
        head_kernel_size: int = 1,
        norm: Norm = "batch",
    ) -> None:
        super().__init__()
        dropout = (0.0,) * len(widths) if dropout is None else tuple(dropout)
        if len(widths) < 2 or len(dropout) != len(widths):
            raise ValueError(f"a U-Net needs two or more widths and one dropout each, got {widths} and {dropout}")
        act = ("leakyrelu", {"negative_slope": negative_slope, "inplace": True})
        if not negative_slope:
            act = ("relu", {"inplace": True})
        inputs = (in_channels, *widths)
        self.encoder = nn.ModuleList(
            nn.Sequential(
                Convolution(spatial_dims, before, width, act=act, norm=norm, dropout=rate or None, adn_ordering="NAD"),
                Convolution(spatial_dims, width, width, act=act, norm=norm, adn_ordering="NAD"),
            )
            for before, width, rate in zip(inputs, widths, dropout, strict=False)
        )
        self.pool = Pool["MAX", spatial_dims](kernel_size=2)
        self.decoder = nn.ModuleList()
        width = widths[-1]
        for level in reversed(range(len(widths) - 1)):
            out = widths[level] if halves else widths[max(level - 1, 0)]
            self.decoder.append(
                UpCat(
                    spatial_dims,
                    width,
                    widths[level],
                    out,
                    act,
                    norm,
                    bias=True,
                    upsample="nontrainable",
                    pre_conv="default" if halves else None,
                    halves=halves,
                )
            )
            width = out
        self.head = Conv["conv", spatial_dims](
            width, out_channels, kernel_size=head_kernel_size, padding=head_kernel_size // 2
        )
        levels = len(self.decoder)
        self.hint_layers: tuple[str, ...] = tuple(f"decoder.{i}" for i in range(max(levels - 2, 0), levels))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """(B, C, *S) → logits (B, K, *S); every side of S is at least 2 ** (levels - 1)."""
        features = image
        skips: list[torch.Tensor] = []
        for index, level in enumerate(self.encoder):
            if index > 0:
                skips.append(features)
                features = self.pool(features)
            features = level(features)
        for level in self.decoder:
            features = level(features, skips.pop())
        return self.head(features)


def cmedl_unet(*, in_channels: int = 1, out_channels: int = 2, spatial_dims: int = 2) -> BilinearUNet:
    """CMEDL's U-Net: 13,394,242 parameters for 1 channel and 2 classes."""
    return BilinearUNet(spatial_dims, in_channels, out_channels)


def mt_uda_unet(*, in_channels: int = 1, out_channels: int = 5, spatial_dims: int = 2) -> BilinearUNet:
    """MT-UDA's U-Net: 28,956,229 parameters for 1 channel and 5 classes."""
    return BilinearUNet(
        spatial_dims,
        in_channels,
        out_channels,
        widths=(64, 128, 256, 512, 1024),
        dropout=(0.05, 0.1, 0.2, 0.3, 0.5),
        negative_slope=0.01,
        halves=True,
        head_kernel_size=3,
    )
