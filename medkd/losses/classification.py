"""Supervised classification losses."""

from __future__ import annotations

import torch
from torch.nn import functional


def cross_entropy_loss(logits: torch.Tensor, label: torch.Tensor, *, label_smoothing: float = 0.0) -> torch.Tensor:
    """Cross-entropy of one class per image, mean over the batch.

    Args:
        logits: (B, K); computed in float32.
        label: (B,) or (B, 1) class indices in [0, K).
        label_smoothing: share of the target spread evenly over all classes, in [0, 1).

    Returns:
        Scalar, nats.

    Raises:
        ValueError: If the shapes do not match.
    """
    target = label.squeeze(1) if label.ndim == 2 and label.shape[1] == 1 else label
    if logits.ndim != 2 or target.shape != logits.shape[:1]:
        raise ValueError(f"logits {tuple(logits.shape)} and label {tuple(label.shape)} are not (B, K) and (B,)")
    return functional.cross_entropy(logits.float(), target.long(), label_smoothing=label_smoothing)
