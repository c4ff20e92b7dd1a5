"""Losses between a student's and a teacher's outputs."""

from __future__ import annotations

import torch

from medkd.losses.precision import at_least_float32
from medkd.losses.shapes import require_same_shape


def soft_target_kl(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float | torch.Tensor
) -> torch.Tensor:
    """KL divergence from the teacher's softened distribution to the student's, times T².

    The T² keeps gradient sizes comparable across temperatures. Sum over classes, mean over everything else.

    Args:
        student_logits: (B, K, *S); computed in float32, in float64 if given so.
        teacher_logits: (B, K, *S); receives no gradient.
        temperature: T > 0; a 0-dim tensor if learned.

    Returns:
        Scalar, nats × T²; 0 exactly when the distributions agree.

    Raises:
        ValueError: If shapes differ (both are named) or T <= 0.

    Source: Hinton et al. 2015, arXiv:1503.02531, section 2.
    """
    require_same_shape("student_logits", student_logits, "teacher_logits", teacher_logits)
    require_positive(temperature)
    student = torch.log_softmax(at_least_float32(student_logits) / temperature, dim=1)
    teacher = torch.log_softmax(at_least_float32(teacher_logits.detach()) / temperature, dim=1)
    divergence = (teacher.exp() * (teacher - student)).sum(dim=1).mean()
    return divergence * temperature**2


def softened_mse(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float, *, t_squared: bool = True
) -> torch.Tensor:
    """Squared difference of softened probabilities: sum over classes, mean over everything else.

    Without the T² its gradient at T = 20 is about 400 times smaller than with it, so that a weight near 1 does nothing.

    Args:
        student_logits: (B, K, *S); computed in float32, in float64 if given so.
        teacher_logits: (B, K, *S); receives no gradient.
        temperature: T > 0.
        t_squared: multiply by T², as for soft targets.

    Returns:
        Scalar; 0 exactly when the distributions agree.

    Raises:
        ValueError: If shapes differ (both are named) or T <= 0.

    Source: ACT-Net, arXiv:2207.01900, the KD term; the T² is our reading, see docs/methods/act_net.md.
    """
    require_same_shape("student_logits", student_logits, "teacher_logits", teacher_logits)
    require_positive(temperature)
    student = torch.softmax(at_least_float32(student_logits) / temperature, dim=1)
    teacher = torch.softmax(at_least_float32(teacher_logits.detach()) / temperature, dim=1)
    distance = (student - teacher).square().sum(dim=1).mean()
    return distance * temperature**2 if t_squared else distance


def require_positive(temperature: float | torch.Tensor) -> None:
    """Raise ValueError unless the temperature is above 0."""
    if not float(temperature) > 0:
        raise ValueError(f"temperature must be > 0, got {float(temperature)}")
