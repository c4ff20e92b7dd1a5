"""Augmentation of whole batches of small photographs with plain torch operations, fast on one core."""

from __future__ import annotations

import math

import torch
from torch.nn import functional

MEAN, STD = (0.45, 0.25, 0.12), (0.27, 0.16, 0.10)


def normalized(images: torch.Tensor) -> torch.Tensor:
    """(B, 3, H, W) uint8, or floating point from 0 to 1, → float32, about zero mean and unit variance."""
    values = images.float() / 255 if images.dtype == torch.uint8 else images
    mean, std = (torch.tensor(part).view(1, 3, 1, 1) for part in (MEAN, STD))
    return (values - mean) / std


def strong_view(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A view for SimCLR: crops of 30 to 100 % of the area, any rotation, strong colors, gray, blur; normalized."""
    views = _warped(images.float() / 255, generator, area=(0.3, 1.0), degrees=180.0)
    views = _colored(views, generator, strength=0.4)
    count = len(views)
    gray = _uniform(count, generator) < 0.2
    views = torch.where(gray, views.mean(dim=1, keepdim=True), views)
    blurred = _blurred(views)
    return normalized(torch.where(_uniform(count, generator) < 0.5, blurred, views).clamp(0, 1))


def weak_view(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A view for training on labels: flips, any rotation, crops of 80 to 100 %, mild colors; normalized."""
    views = _warped(images.float() / 255, generator, area=(0.8, 1.0), degrees=180.0)
    return normalized(_colored(views, generator, strength=0.1).clamp(0, 1))


def other_camera(images: torch.Tensor) -> torch.Tensor:
    """The same photographs as another camera might show them: gamma, a colder white balance, a vignette; 0 to 1."""
    values = (images.float() / 255) ** 0.8 * torch.tensor([0.85, 0.95, 1.3]).view(1, 3, 1, 1)
    side = torch.linspace(-1, 1, images.shape[-1])
    squared = side[:, None] ** 2 + side[None, :] ** 2
    return (values * (1 - 0.35 * squared).clamp(min=0)).clamp(0, 1)


def _uniform(
    count: int, generator: torch.Generator, low: float = 0.0, high: float = 1.0, width: int = 1
) -> torch.Tensor:
    return low + (high - low) * torch.rand(count, width, 1, 1, generator=generator)


def _warped(
    images: torch.Tensor, generator: torch.Generator, *, area: tuple[float, float], degrees: float
) -> torch.Tensor:
    """Crop, rotate and flip, each image in its own way, in one interpolation."""
    count = len(images)
    size = _uniform(count, generator, *area).view(-1).sqrt()
    angle = _uniform(count, generator, -degrees, degrees).view(-1) * (math.pi / 180)
    mirror = 1 - 2 * (_uniform(count, generator).view(-1) < 0.5).float()
    shift = (2 * torch.rand(count, 2, generator=generator) - 1) * (1 - size)[:, None]
    cosine, sine = size * angle.cos(), size * angle.sin()
    rows = [torch.stack([cosine * mirror, -sine, shift[:, 0]], 1), torch.stack([sine * mirror, cosine, shift[:, 1]], 1)]
    grid = functional.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, padding_mode="zeros", align_corners=False)


def _colored(images: torch.Tensor, generator: torch.Generator, *, strength: float) -> torch.Tensor:
    """Change brightness, contrast, saturation and the balance of the channels."""
    count = len(images)
    low, high = 1 - strength, 1 + strength
    images = images * _uniform(count, generator, low, high)
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    images = mean + (images - mean) * _uniform(count, generator, low, high)
    gray = images.mean(dim=1, keepdim=True)
    images = gray + (images - gray) * _uniform(count, generator, low, high)
    return (images * _uniform(count, generator, 1 - strength / 2, 1 + strength / 2, width=3)).clamp(0, 1)


def _blurred(images: torch.Tensor) -> torch.Tensor:
    line = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16
    kernel = (line[:, None] * line[None, :]).expand(3, 1, 5, 5)
    return functional.conv2d(functional.pad(images, (2, 2, 2, 2), mode="replicate"), kernel, groups=3)
