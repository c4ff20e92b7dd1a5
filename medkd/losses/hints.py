"""Agreement of two networks inside, at chosen layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from medkd.losses.precision import at_least_float32


def feature_hint(
    student_features: Sequence[torch.Tensor], teacher_features: Sequence[torch.Tensor], *, stop_gradient: bool = True
) -> torch.Tensor:
    """Squared difference of features, mean over a layer's values, summed over layers.

    Args:
        student_features: one tensor per layer, any shape; computed in float32, in float64 if given so.
        teacher_features: the teacher's at the same layers, of the same shapes.
        stop_gradient: the teacher, and whatever made its input, receive no gradient. Without it both networks can
            satisfy the hint by shrinking their features.

    Returns:
        Scalar.

    Raises:
        ValueError: If there is no layer, the numbers of layers differ, or shapes differ at a layer.

    Source: Jiang et al. 2021, arXiv:2107.07985 (the feature distillation of CMEDL).
    """
    if len(student_features) != len(teacher_features) or not student_features:
        raise ValueError(
            f"hints need the same layers, at least one: {len(student_features)} of the student and "
            f"{len(teacher_features)} of the teacher"
        )
    terms = []
    for layer, (student, teacher) in enumerate(zip(student_features, teacher_features, strict=True)):
        if student.shape != teacher.shape:
            raise ValueError(
                f"features of hint layer {layer} differ: student {tuple(student.shape)}, teacher {tuple(teacher.shape)}"
            )
        target = teacher.detach() if stop_gradient else teacher
        terms.append((at_least_float32(student) - at_least_float32(target)).square().mean())
    return torch.stack(terms).sum()
