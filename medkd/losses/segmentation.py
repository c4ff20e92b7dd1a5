"""Supervised segmentation losses."""

from __future__ import annotations

import torch
from monai.losses import DiceCELoss

from medkd.losses.precision import at_least_float32
from medkd.losses.shapes import require_label_map

_BATCH_WISE, _SAMPLE_WISE = (
    DiceCELoss(
        to_onehot_y=True,
        softmax=True,
        squared_pred=True,
        batch=batch,
        smooth_nr=1e-5,
        smooth_dr=1e-5,
        lambda_dice=0.5,
        lambda_ce=0.5,
    )
    for batch in (True, False)
)


def dice_ce_loss(logits: torch.Tensor, label: torch.Tensor, *, per_sample: bool = False) -> torch.Tensor:
    """0.5 (cross-entropy + soft Dice), the supervised term of the mean-teacher family.

    Dice has a squared denominator, covers all classes with background, and is taken over the whole batch: a slice
    without a structure then does not disturb it. That couples the samples of a batch; ``per_sample`` does not.

    Args:
        logits: (B, K, *S); computed in float32, in float64 if given so.
        label: (B, 1, *S) or (B, *S) class indices in [0, K).
        per_sample: take Dice per sample and class instead of over the batch.

    Returns:
        Scalar.

    Raises:
        ValueError: If the shapes do not match.

    Source: Milletari et al. 2016, arXiv:1606.04797, with the constants of the mean-teacher code for segmentation.
    """
    target = require_label_map(logits, label).unsqueeze(1)
    return (_SAMPLE_WISE if per_sample else _BATCH_WISE)(at_least_float32(logits), target)
