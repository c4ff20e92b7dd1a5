"""Shape checks that the losses share: a silent broadcast is a wrong loss."""

from __future__ import annotations

import torch


def require_same_shape(name_a: str, a: torch.Tensor, name_b: str, b: torch.Tensor) -> None:
    """Raise ValueError naming both shapes unless they are equal."""
    if a.shape != b.shape:
        raise ValueError(f"{name_a} and {name_b} must have one shape, got {tuple(a.shape)} and {tuple(b.shape)}")


def require_label_map(logits: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """Return ``label`` as int64 (B, *S) for logits (B, K, *S); raise ValueError where it does not fit."""
    expected = (logits.shape[0], *logits.shape[2:])
    squeezed = label.squeeze(1) if label.ndim == logits.ndim and label.shape[1] == 1 else label
    if tuple(squeezed.shape) != expected:
        raise ValueError(
            f"label must be (B, 1, *S) or (B, *S) for logits {tuple(logits.shape)}, got {tuple(label.shape)}"
        )
    return squeezed.long()
