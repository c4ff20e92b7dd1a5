"""Agreement between two views of the same images."""

from __future__ import annotations

import torch

from medkd.losses.precision import at_least_float32
from medkd.losses.shapes import require_same_shape


def probability_mse(logits: torch.Tensor, target_logits: torch.Tensor) -> torch.Tensor:
    """Mean over all elements of (softmax(logits) - softmax(target))².

    Args:
        logits: (B, K, *S); computed in float32, in float64 if given so.
        target_logits: (B, K, *S); receives no gradient.

    Returns:
        Scalar in [0, 2 / K].

    Raises:
        ValueError: If the shapes differ.

    Source: Tarvainen and Valpola 2017, arXiv:1703.01780; the consistency term of mean teacher for segmentation.
    """
    require_same_shape("logits", logits, "target_logits", target_logits)
    target = torch.softmax(at_least_float32(target_logits.detach()), dim=1)
    return (torch.softmax(at_least_float32(logits), dim=1) - target).square().mean()


def self_information_consistency(logits: torch.Tensor, target_logits: torch.Tensor) -> torch.Tensor:
    """Squared difference of p log2 p: sum over classes, mean over everything else.

    Each class's term is squared before summing, so this is not a difference of entropies, and it is not divided by
    the log of the number of classes.

    Args:
        logits: (B, K, *S); computed in float32, in float64 if given so.
        target_logits: (B, K, *S); receives no gradient.

    Returns:
        Scalar, bits².

    Raises:
        ValueError: If the shapes differ.

    Source: Zhao et al. 2021, arXiv:2203.12454 (inter-domain consistency of MT-UDA), with the 1e-8 of its code.
    """
    require_same_shape("logits", logits, "target_logits", target_logits)
    target = _self_information(target_logits.detach())
    return (_self_information(logits) - target).square().sum(dim=1).mean()


def _self_information(logits: torch.Tensor) -> torch.Tensor:
    probabilities = torch.softmax(at_least_float32(logits), dim=1)
    return probabilities * torch.log2(probabilities + 1e-8)
