"""MRRN, the incremental multiple-resolution residual network that CMEDL distills into.

Source: Jiang et al., IEEE TMI 38:134–144, 2019 (doi:10.1109/TMI.2018.2857800), in the size of CMEDL, arXiv:2107.07985.
The wiring follows the same authors' later release, whose count of parameters is CMEDL's: 38,935,012 for 1 channel and
2 classes, with its auxiliary head.

That release computes three things that reach no output, so that 182,752 parameters have no gradient: the updates of
the third residual stream by the bottom level's second unit (131,328) and of the second stream by the next level's
(32,896) are overwritten, and one convolution block (18,528) is never called. We repair them without a new parameter:

Differs: a residual stream is added to the first decoder feature of its resolution and width, where the release
overwrites it.
Differs: the block that the release never calls feeds the auxiliary head, which so supervises the decoder's pooled
stream; in the release the head sees the same features as the main head. Its 18,594 parameters (block and head) have a
gradient only where :meth:`MRRN.forward_with_auxiliary` is trained.
Kept: the last decoder level takes the first pooled residual stream in place of the upsampled decoder feature, which is
dropped; the count leaves no room for another width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from monai.networks.blocks import Convolution
from monai.networks.layers.factories import Conv, Dropout, Pool
from torch import nn
from torch.nn import functional


class ResidualUnit(nn.Module):
    """A convolution block added to its input."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(B, C, *S) → (B, C, *S)."""
        return features + self.block(features)


class FullResolutionUnit(nn.Module):
    """Merges a residual stream into the pooled stream, and the result back into the residual stream.

    Args:
        spatial_dims: 2 or 3.
        pooled_width: channels of the pooled stream that comes in.
        width: channels of the pooled stream that goes out.
        stream_width: channels of the residual stream.
        scale: how many times finer the residual stream is, a power of 2.
        dropout: probability of dropping a whole channel of the pooled residual stream.
        norm: MONAI's name of a normalization.
    """

    def __init__(
        self,
        spatial_dims: int,
        pooled_width: int,
        width: int,
        stream_width: int,
        *,
        scale: int,
        dropout: float,
        norm: str,
    ) -> None:
        super().__init__()
        self.mode = "bilinear" if spatial_dims == 2 else "trilinear"
        self.pool = nn.Sequential(Pool["MAX", spatial_dims](scale), Dropout["dropout", spatial_dims](dropout))
        self.block = nn.Sequential(
            _block(spatial_dims, pooled_width + stream_width, width, norm), _block(spatial_dims, width, width, norm)
        )
        self.adjust = Conv["conv", spatial_dims](width, stream_width, kernel_size=1)

    def forward(self, pooled: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, C, *S) and (B, C', *S') → the same two streams, updated."""
        pooled = self.block(torch.cat([self.pool(residual), pooled], dim=1))
        update = _resize(self.adjust(pooled), residual, self.mode)
        return pooled, residual + update


class Stage(nn.Module):
    """The units of one resolution: one per residual stream, the finest first and last.

    Args:
        spatial_dims: 2 or 3.
        pooled_width: channels of the pooled stream that comes in.
        level: how often the pooled stream was halved, at least 1.
        widths: channels of the residual streams, finest first, and of the pooled streams: the pooled stream of
            ``level`` has ``widths[level]``.
        dropout: see :class:`FullResolutionUnit`.
        norm: MONAI's name of a normalization.
    """

    def __init__(
        self, spatial_dims: int, pooled_width: int, level: int, widths: Sequence[int], *, dropout: float, norm: str
    ) -> None:
        super().__init__()
        self.streams = [0, *reversed(range(level))] if level > 1 else [0, 0, 0]
        inputs = [pooled_width] + [widths[level]] * (len(self.streams) - 1)
        self.units = nn.ModuleList(
            FullResolutionUnit(
                spatial_dims,
                width,
                widths[level],
                widths[stream],
                scale=2 ** (level - stream),
                dropout=dropout,
                norm=norm,
            )
            for stream, width in zip(self.streams, inputs, strict=True)
        )

    def forward(
        self, pooled: torch.Tensor, residuals: list[torch.Tensor], skip: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The pooled stream and all residual streams, updated; ``skip`` is added to what the first unit makes."""
        residuals = list(residuals)
        for index, unit in enumerate(self.units):
            stream = self.streams[index]
            pooled, residual = unit(pooled, residuals[stream])
            residuals[stream] = residual
            if index == 0 and skip is not None:
                pooled = pooled + skip
        return pooled, residuals


class MRRN(nn.Module):
    """Residual streams of several resolutions beside an encoder and a decoder.

    Args:
        spatial_dims: 2 or 3.
        in_channels: image channels.
        out_channels: classes with background.
        stream_width: channels of the full-resolution residual stream.
        widths: channels of the pooled levels, at least two; every side is at least 2 ** len(widths).
        dropout: probability of dropping a whole channel of a pooled residual stream.
        norm: MONAI's name of a normalization.

    Attributes:
        hint_layers: the last two residual units, both at full resolution.

    Raises:
        ValueError: If there are fewer than two widths.
    """

    def __init__(
        self,
        spatial_dims: int = 2,
        in_channels: int = 1,
        out_channels: int = 2,
        *,
        stream_width: int = 32,
        widths: Sequence[int] = (64, 128, 256, 512),
        dropout: float = 0.5,
        norm: str = "batch",
    ) -> None:
        super().__init__()
        if len(widths) < 2:
            raise ValueError(f"MRRN needs two or more widths, got {list(widths)}")
        all_widths, depth = (stream_width, *widths), len(widths)
        self.mode = "bilinear" if spatial_dims == 2 else "trilinear"

        def block(inputs: int) -> Convolution:
            return _block(spatial_dims, inputs, stream_width, norm)

        def stage(pooled_width: int, level: int) -> Stage:
            return Stage(spatial_dims, pooled_width, level, all_widths, dropout=dropout, norm=norm)

        self.first = nn.Sequential(block(in_channels), *(ResidualUnit(block(stream_width)) for _ in range(3)))
        self.stream = Convolution(
            spatial_dims, stream_width, stream_width, kernel_size=1, norm=None, act=("relu", {"inplace": True})
        )
        self.pool = Pool["MAX", spatial_dims](2)
        self.encoder = nn.ModuleList(stage(all_widths[level - 1], level) for level in range(1, depth + 1))
        self.decoder = nn.ModuleList(stage(all_widths[level + 1], level) for level in range(depth - 1, 1, -1))
        self.last_stage = stage(widths[0], 1)
        self.merge = block(stream_width + widths[0])
        self.refine = nn.Sequential(*(ResidualUnit(block(stream_width)) for _ in range(3)))
        self.head = Conv["conv", spatial_dims](stream_width, out_channels, kernel_size=1)
        self.auxiliary_block = block(widths[0])
        self.auxiliary_head = Conv["conv", spatial_dims](stream_width, out_channels, kernel_size=1)
        self.hint_layers: tuple[str, ...] = ("refine.1", "refine.2")

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """(B, C, *S) → logits (B, K, *S)."""
        pooled, stream = self._streams(image)
        return self.head(self.refine(self.merge(torch.cat([stream, pooled], dim=1))))

    @torch.jit.export
    def forward_with_auxiliary(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, C, *S) → logits (B, K, *S) of the main and of the auxiliary head."""
        pooled, stream = self._streams(image)
        logits = self.head(self.refine(self.merge(torch.cat([stream, pooled], dim=1))))
        return logits, self.auxiliary_head(self.auxiliary_block(pooled))

    def _streams(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The decoder's pooled stream, upsampled, and the full-resolution residual stream."""
        pooled = self.first(image)
        residuals = [self.stream(pooled)]
        for level, stage in enumerate(self.encoder):
            if level > 0:
                residuals.append(pooled)
            pooled, residuals = stage(self.pool(pooled), residuals)
        for stage in self.decoder:
            skip = residuals.pop()
            pooled, residuals = stage(_resize(pooled, skip, self.mode), residuals, skip)
        pooled, residuals = self.last_stage(residuals[1], residuals[:1])
        return _resize(pooled, image, self.mode), residuals[0]


def _block(spatial_dims: int, in_channels: int, out_channels: int, norm: str) -> Convolution:
    return Convolution(
        spatial_dims, in_channels, out_channels, norm=norm, act=("relu", {"inplace": True}), adn_ordering="NA"
    )


def _resize(features: torch.Tensor, like: torch.Tensor, mode: str) -> torch.Tensor:
    return functional.interpolate(features, size=like.shape[2:], mode=mode, align_corners=True)
