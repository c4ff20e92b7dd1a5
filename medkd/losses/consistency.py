"""Agreement between two views of the same images."""

from __future__ import annotations

import torch

from medkd.losses.shapes import require_same_shape


def probability_mse(logits: torch.Tensor, target_logits: torch.Tensor) -> torch.Tensor:
    """Mean over all elements of (softmax(logits) - softmax(target))².

    Args:
        logits: (B, K, *S); computed in float32.
        target_logits: (B, K, *S); receives no gradient.

    Returns:
        Scalar in [0, 2 / K].

    Raises:
        ValueError: If the shapes differ.

    Source: Tarvainen and Valpola 2017, arXiv:1703.01780; the consistency term of mean teacher for segmentation.
    """
    require_same_shape("logits", logits, "target_logits", target_logits)
    target = torch.softmax(target_logits.detach().float(), dim=1)
    return (torch.softmax(logits.float(), dim=1) - target).square().mean()
