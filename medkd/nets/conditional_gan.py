"""A generator of images of a wanted class, and the critic it is trained against."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils.parametrizations import spectral_norm

_SMALLEST_GRID = (4, 7)  # the longer side of the grid a generator starts from lies between these


class ConditionalGenerator(nn.Module):
    """Residual generator whose batch normalization is scaled and shifted by the wanted class.

    A linear layer makes a small grid of the code; each residual block doubles it; one self-attention block works where
    the shorter side is 32 or a little less. The architecture of the paper was not available: this is a reconstruction
    out of the parts that were common in its time.

    Args:
        classes: K.
        size_px: side of the images, or (height, width): 4 to 7 times a power of two, as 32, 48, 96, 256, (256, 128).
        latent: length of the noise.
        width: filters of the last block; they double toward the code, up to ``8 * width``.
        attention_side: the self-attention block works where the shorter side is at most that; 0 leaves it out. Its time
            and memory grow with the fourth power of the side.

    Attributes:
        latent: length of the noise.
        classes: K.
        size_px: (height, width).

    Raises:
        ValueError: If the size cannot be reached by doubling.

    Source: residual blocks and conditional normalization of Miyato and Koyama, arXiv:1802.05637; self-attention of
    Zhang et al., arXiv:1805.08318.
    """

    def __init__(
        self,
        classes: int,
        size_px: int | Sequence[int] = 32,
        *,
        latent: int = 128,
        width: int = 32,
        attention_side: int = 32,
    ) -> None:
        super().__init__()
        self.classes = classes
        self.latent = latent
        self.size_px = _sides(size_px)
        doublings, self.grid = _doublings(self.size_px)
        widths = [width * min(2 ** (doublings - level), 8) for level in range(doublings + 1)]
        self.first_width = widths[0]
        self.expand = nn.Linear(latent, widths[0] * self.grid[0] * self.grid[1])
        self.blocks = nn.ModuleList(_UpBlock(before, after, classes) for before, after in pairwise(widths))
        place = _attention_level(self.grid, doublings, attention_side)
        self.attention = nn.ModuleList(
            SelfAttention(after) if level == place else nn.Identity() for level, after in enumerate(widths[1:], start=1)
        )
        self.norm = nn.BatchNorm2d(widths[-1])
        self.to_image = nn.Conv2d(widths[-1], 3, kernel_size=3, padding=1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d) or module is self.expand:
                nn.init.orthogonal_(module.weight)

    def forward(self, code: torch.Tensor) -> torch.Tensor:
        """(B, latent + K), noise followed by the one-hot class → (B, 3, H, W) in [-1, 1]."""
        noise, condition = code[:, : self.latent], code[:, self.latent :]
        features = self.expand(noise).view(-1, self.first_width, self.grid[0], self.grid[1])
        for block, attention in zip(self.blocks, self.attention):  # noqa: B905 (TorchScript knows no strict)
            features = attention(block(features, condition))
        return torch.tanh(self.to_image(functional.relu(self.norm(features))))


class ConditionalCritic(nn.Module):
    """Spectrally normalized residual critic with a minibatch statistic and two heads: real or not, and which class.

    Args:
        classes: K.
        size_px: side of the images, or (height, width), as the generator's.
        width: filters of the first block; they double with every halving, up to ``8 * width``.
        attention_side: the self-attention block works where the shorter side is at most that, and at most half of the
            image's; 0 leaves it out.
        group: images that share a minibatch statistic; 0 leaves it out.

    Raises:
        ValueError: If the size cannot be reached by doubling.

    Source: Miyato et al., arXiv:1802.05957 (spectral normalization); Odena et al., arXiv:1610.09585 (class head);
    Karras et al., arXiv:1710.10196 (minibatch standard deviation).
    """

    def __init__(
        self,
        classes: int,
        size_px: int | Sequence[int] = 32,
        *,
        width: int = 32,
        attention_side: int = 32,
        group: int = 4,
    ) -> None:
        super().__init__()
        sides = _sides(size_px)
        halvings, grid = _doublings(sides)
        widths = [width * min(2**level, 8) for level in range(halvings + 1)]
        place = halvings - min(_attention_level(grid, halvings, attention_side), halvings - 1)
        blocks: list[nn.Module] = []
        for level, after in enumerate(widths[:halvings]):
            before = 3 if level == 0 else widths[level - 1]
            blocks.append(_DownBlock(before, after, is_first=level == 0))
            if level + 1 == place:
                blocks.append(SelfAttention(after, spectral=True))
        self.blocks = nn.Sequential(*blocks)
        self.statistic = MinibatchDeviation(group) if group else nn.Identity()
        last = widths[halvings - 1] + (1 if group else 0)
        self.last = spectral_norm(nn.Conv2d(last, widths[halvings], kernel_size=3, padding=1))
        self.is_real = spectral_norm(nn.Linear(widths[halvings], 1))
        self.which_class = spectral_norm(nn.Linear(widths[halvings], classes))

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, 3, H, W) in [-1, 1] → logits of being real (B,), logits of the class (B, K)."""
        features = functional.leaky_relu(self.last(self.statistic(self.blocks(image))), 0.2)
        pooled = features.mean(dim=(2, 3)) * math.sqrt(features.shape[2] * features.shape[3])
        return self.is_real(pooled).squeeze(1), self.which_class(pooled)


class ConditionalBatchNorm(nn.Module):
    """Batch normalization scaled by 1 + A c and shifted by B c for a condition c, both 0 at the start.

    Args:
        channels: C.
        condition: length of c.
    """

    def __init__(self, channels: int, condition: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels, affine=False)
        self.modulation = nn.Linear(condition, 2 * channels, bias=False)
        nn.init.normal_(self.modulation.weight, std=0.02)

    def forward(self, features: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) and (B, condition) → (B, C, H, W)."""
        scale, shift = self.modulation(condition)[:, :, None, None].chunk(2, dim=1)
        return self.norm(features) * (1.0 + scale) + shift


class SelfAttention(nn.Module):
    """Every position looks at all others (at half the resolution), added with a weight that starts at 0.

    Args:
        channels: C.
        spectral: normalize the weights spectrally, as in a critic.

    Source: Zhang et al. 2018, arXiv:1805.08318; keys and values pooled as in its release.
    """

    def __init__(self, channels: int, *, spectral: bool = False) -> None:
        super().__init__()
        inner = max(channels // 8, 1)

        def convolution(before: int, after: int) -> nn.Module:
            layer = nn.Conv2d(before, after, kernel_size=1, bias=False)
            return spectral_norm(layer) if spectral else layer

        self.query = convolution(channels, inner)
        self.key = convolution(channels, inner)
        self.value = convolution(channels, max(channels // 2, 1))
        self.out = convolution(max(channels // 2, 1), channels)
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) → (B, C, H, W), H and W at least 2."""
        height, width = features.shape[2], features.shape[3]
        query = self.query(features).flatten(2)
        key = functional.max_pool2d(self.key(features), 2).flatten(2)
        value = functional.max_pool2d(self.value(features), 2).flatten(2)
        weights = torch.softmax(query.transpose(1, 2) @ key, dim=-1)  # (B, positions, positions / 4)
        seen = (value @ weights.transpose(1, 2)).unflatten(2, (height, width))
        return features + self.weight * self.out(seen)


class MinibatchDeviation(nn.Module):
    """Append a channel that says how much the images of a group differ, so that a critic sees a generator collapse.

    Args:
        group: images per group; a batch that it does not divide is one group.
    """

    def __init__(self, group: int = 4) -> None:
        super().__init__()
        self.group = group

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) → (B, C + 1, H, W): the standard deviation over the group, averaged over C, H and W."""
        batch = len(features)
        group = self.group if batch % self.group == 0 else batch
        grouped = features.unflatten(0, (-1, group))
        variance = grouped.var(dim=1, correction=0)
        deviation = (variance + 1e-8).sqrt().mean(dim=(1, 2, 3))
        channel = deviation.repeat_interleave(group)[:, None, None, None].expand(-1, 1, *features.shape[2:])
        return torch.cat([features, channel], dim=1)


def class_codes(
    label: torch.Tensor, latent: int, classes: int, generator: torch.Generator | None = None, *, std: float = 1.0
) -> torch.Tensor:
    """Gaussian noise followed by the one-hot class.

    Args:
        label: (B,) classes in [0, K).
        latent: length of the noise.
        classes: K.
        generator: where the noise comes from, on the labels' device.
        std: standard deviation of the noise.

    Returns:
        (B, latent + K) float32.
    """
    noise = torch.randn(len(label), latent, generator=generator, device=label.device) * std
    return torch.cat([noise, functional.one_hot(label.long(), classes).to(noise.dtype)], dim=1)


class _UpBlock(nn.Module):
    def __init__(self, before: int, after: int, classes: int) -> None:
        super().__init__()
        self.norm_in = ConditionalBatchNorm(before, classes)
        self.norm_out = ConditionalBatchNorm(after, classes)
        self.first = nn.Conv2d(before, after, kernel_size=3, padding=1)
        self.second = nn.Conv2d(after, after, kernel_size=3, padding=1)
        self.skip = nn.Conv2d(before, after, kernel_size=1)

    def forward(self, features: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        inner = functional.relu(self.norm_in(features, condition))
        inner = self.first(functional.interpolate(inner, scale_factor=2.0, mode="nearest"))
        inner = self.second(functional.relu(self.norm_out(inner, condition)))
        # A 1×1 convolution and nearest doubling commute; this order is four times cheaper.
        return inner + functional.interpolate(self.skip(features), scale_factor=2.0, mode="nearest")


class _DownBlock(nn.Module):
    def __init__(self, before: int, after: int, *, is_first: bool) -> None:
        super().__init__()
        self.is_first = is_first
        self.first = spectral_norm(nn.Conv2d(before, after, kernel_size=3, padding=1))
        self.second = spectral_norm(nn.Conv2d(after, after, kernel_size=4, stride=2, padding=1))
        self.skip = spectral_norm(nn.Conv2d(before, after, kernel_size=1))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        # The image itself is not rectified: half of it would be lost.
        inner = features if self.is_first else functional.leaky_relu(features, 0.2)
        inner = self.second(functional.leaky_relu(self.first(inner), 0.2))
        return inner + self.skip(functional.avg_pool2d(features, 2))


def _sides(size_px: int | Sequence[int]) -> tuple[int, int]:
    sides = (size_px, size_px) if isinstance(size_px, int) else tuple(size_px)
    if len(sides) != 2:
        raise ValueError(f"size_px must be one side or (height, width), got {size_px}")
    return int(sides[0]), int(sides[1])


def _doublings(sides: tuple[int, int]) -> tuple[int, tuple[int, int]]:
    """How often the starting grid is doubled, and that grid: its shorter side is 4 to 7."""
    low, high = _SMALLEST_GRID
    for doublings in range(1, 9):
        scale = 2**doublings
        if low <= min(sides) / scale <= high and all(side % scale == 0 for side in sides):
            return doublings, (sides[0] // scale, sides[1] // scale)
    raise ValueError(
        f"images of {sides[0]} × {sides[1]} px: the shorter side must be 4 to 7 times a power of two, at most 1792, "
        "and the longer one a multiple of that power"
    )


def _attention_level(grid: tuple[int, int], doublings: int, largest: int) -> int:
    """After how many doublings the shorter side is the largest that is at most ``largest``; -1 for none."""
    return max((level for level in range(1, doublings + 1) if min(grid) * 2**level <= largest), default=-1)
