"""One network that translates an image into another modality and segments the translation."""

from __future__ import annotations

from typing import Self

import torch
from torch import nn


class TranslateThenSegment(nn.Module):
    """A segmenter behind a frozen generator: one image of the target modality in, logits out.

    Args:
        generator: (B, C, *S) → (B, C', *S); its parameters are frozen here, and it stays in eval mode whatever
            ``train()`` says.
        segmenter: (B, C', *S) → (B, K, *S).
    """

    def __init__(self, generator: nn.Module, segmenter: nn.Module) -> None:
        super().__init__()
        self.generator = generator.requires_grad_(False).eval()
        self.segmenter = segmenter

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """(B, C, *S) → logits (B, K, *S)."""
        return self.segmenter(self.generator(image))

    def train(self, mode: bool = True) -> Self:
        """Set the segmenter's mode; the generator stays in eval mode."""
        super().train(mode)
        self.generator.eval()
        return self
