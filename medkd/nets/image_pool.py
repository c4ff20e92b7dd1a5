"""A memory of generated images, so that a critic also sees what a generator made some steps ago."""

from __future__ import annotations

import torch
from torch import nn


class ImagePool(nn.Module):
    """Exchange half of the images handed in for older ones, once the pool is full.

    While it is being filled, every image is kept and handed back. Then each image is, with probability one half, handed
    back as it is, and otherwise kept in place of a random older one, which is handed back instead.

    The images are part of the state dict (one tensor (N, C, *S) as extra state), so that a resumed run goes on with
    the same pool.

    Args:
        size: images kept; 0 hands every image back.

    Raises:
        ValueError: If ``size`` is negative.

    Source: Shrivastava et al. 2017, arXiv:1612.07828, section 2.3; CycleGAN keeps 50 images.
    """

    def __init__(self, size: int = 50) -> None:
        super().__init__()
        if size < 0:
            raise ValueError(f"size must not be negative, got {size}")
        self.size = size
        self._kept: list[torch.Tensor] = []

    def __len__(self) -> int:
        """Images kept now."""
        return len(self._kept)

    @torch.no_grad()
    def exchange(self, images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Hand in images, take as many back.

        Args:
            images: (B, C, *S); every call with the same C and S.
            generator: decides; on its own device.

        Returns:
            (B, C, *S), detached.

        Raises:
            ValueError: If the images are of another shape than those kept.
        """
        images = images.detach()
        if not self.size:
            return images
        if self._kept and self._kept[0].shape != images.shape[1:]:
            raise ValueError(f"the pool keeps {tuple(self._kept[0].shape)}, it was given {tuple(images.shape[1:])}")
        count = len(images)
        is_kept = (torch.rand(count, generator=generator, device=generator.device) < 0.5).tolist()
        places = torch.randint(self.size, (count,), generator=generator, device=generator.device).tolist()
        handed_back = []
        for image, keep, place in zip(images, is_kept, places, strict=True):
            if len(self._kept) < self.size:
                self._kept.append(image.clone())
                handed_back.append(image)
            elif keep:
                handed_back.append(self._kept[place].to(image))
                self._kept[place] = image.clone()
            else:
                handed_back.append(image)
        return torch.stack(handed_back)

    def get_extra_state(self) -> torch.Tensor:
        """The kept images, (N, C, *S); an empty tensor when there are none."""
        return torch.stack(self._kept) if self._kept else torch.empty(0)

    def set_extra_state(self, state: torch.Tensor) -> None:
        """Put kept images back.

        Raises:
            ValueError: If there are more than this pool keeps.
        """
        if len(state) > self.size:
            raise ValueError(f"{len(state)} kept images do not fit into a pool of {self.size}")
        self._kept = [image.clone() for image in state]
