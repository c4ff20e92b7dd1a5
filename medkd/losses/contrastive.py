"""Losses that tell an image's other view from other images."""

from __future__ import annotations

import torch
from torch.nn import functional

from medkd.losses.distillation import require_positive
from medkd.losses.precision import at_least_float32, without_autocast
from medkd.losses.shapes import require_same_shape


def nt_xent(first: torch.Tensor, second: torch.Tensor, temperature: float = 0.5) -> torch.Tensor:
    """Normalized-temperature cross-entropy: each view has to find its partner among all 2B - 1 other views.

    Args:
        first: (B, D) projections of one view of every image; scaled to length 1 here, computed in float32.
        second: (B, D) those of the other view, in the same order.
        temperature: T > 0 by which cosine similarities are divided.

    Returns:
        Scalar, nats: mean over all 2B anchors. Equal projections throughout give log(2B - 1).

    Raises:
        ValueError: If the shapes differ (both are named) or are not (B, D), if B < 2, or if T <= 0.

    Source: Chen et al. 2020, arXiv:2002.05709, equation 1 and algorithm 1.
    """
    require_same_shape("first", first, "second", second)
    require_positive(temperature)
    if first.ndim != 2 or len(first) < 2:
        raise ValueError(
            f"projections must be (B, D) with B >= 2, since others are the negatives: {tuple(first.shape)}"
        )
    views = functional.normalize(at_least_float32(torch.cat([first, second])), dim=1)
    count = len(first)
    with without_autocast(views):
        similarity = views @ views.T / temperature
    itself = torch.eye(2 * count, dtype=torch.bool, device=views.device)
    partner = torch.arange(2 * count, device=views.device).roll(count)
    return functional.cross_entropy(similarity.masked_fill(itself, -torch.inf), partner)
