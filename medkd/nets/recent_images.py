"""The last images that a method saw, so that it can look at more of a domain than one batch."""

from __future__ import annotations

import torch
from torch import nn


class RecentImages(nn.Module):
    """Keeps the last ``size`` images.

    They are part of the state dict (one tensor (N, C, *S), oldest first, as extra state), so that a resumed run goes on
    with the same ones.

    Args:
        size: images kept, at least 1. As many as a domain has: a pass over all of it.

    Raises:
        ValueError: If ``size`` is below 1.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        if size < 1:
            raise ValueError(f"size must be at least 1, got {size}")
        self.size = size
        self._kept: list[torch.Tensor] = []

    def __len__(self) -> int:
        """Images kept now."""
        return len(self._kept)

    @torch.no_grad()
    def add(self, images: torch.Tensor) -> None:
        """Keep the images of a batch, (B, C, *S), in place of the oldest.

        Raises:
            ValueError: If they are of another shape than those kept.
        """
        if self._kept and self._kept[0].shape != images.shape[1:]:
            raise ValueError(f"images must be {tuple(self._kept[0].shape)} as before, got {tuple(images.shape[1:])}")
        self._kept = [*self._kept, *images.detach().clone()][-self.size :]

    def batches(self, batch_size: int, device: torch.device) -> list[torch.Tensor]:
        """The kept images in batches (B, C, *S) of at most ``batch_size`` on ``device``, oldest first."""
        return [part.to(device) for part in torch.stack(self._kept).split(batch_size)] if self._kept else []

    def get_extra_state(self) -> torch.Tensor:
        """The kept images, (N, C, *S); an empty tensor when there are none."""
        return torch.stack(self._kept) if self._kept else torch.empty(0)

    def set_extra_state(self, state: torch.Tensor) -> None:
        """Put kept images back."""
        self._kept = [image.clone() for image in state][-self.size :]
