"""Intensity scales between networks that were trained on different ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn


class SignedToStandard(nn.Module):
    """Turn images in [-1, 1], as generators make them, into what a classifier takes: (image in [0, 1] - mean) / std.

    Args:
        mean: of every channel, of intensities in [0, 1].
        std: likewise.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(list(mean)).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(list(std)).view(-1, 1, 1), persistent=False)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) → (B, C, H, W)."""
        return ((image + 1.0) / 2.0 - self.mean.to(image.device)) / self.std.to(image.device)
