"""Ramps and decays as pure functions of progress in [0, 1] or of a step count."""

from __future__ import annotations

import math
from dataclasses import dataclass


def sigmoid_ramp_up(position: float, length: float) -> float:
    """Rise smoothly from exp(-5) at 0 to 1 at ``length``: exp(-5 (1 - position / length)²).

    Args:
        position: where we are, in the unit of ``length`` (steps, epochs or progress); clipped to [0, length].
        length: where the ramp ends; 0 means no ramp.

    Returns:
        The factor in [exp(-5), 1]. It is 0.0067 at the start, not 0.

    Raises:
        ValueError: If ``length`` is negative.

    Source: Laine and Aila 2017, arXiv:1610.02242, section 3; used by mean teacher, arXiv:1703.01780.
    """
    if length < 0:
        raise ValueError(f"length must not be negative, got {length}")
    if length == 0:
        return 1.0
    remaining = 1.0 - min(max(position, 0.0), length) / length
    return math.exp(-5.0 * remaining * remaining)


def ema_decay(step: int, decay: float) -> float:
    """Decay of an exponential moving average with a warm start: min(1 - 1 / (step + 1), decay).

    At step 0 the decay is 0, so the average becomes a copy; early on it is a running mean.

    Args:
        step: number of optimizer updates before this one, from 0.
        decay: the final decay in [0, 1).

    Raises:
        ValueError: If ``step`` is negative or ``decay`` is outside [0, 1).

    Source: Tarvainen and Valpola 2017, arXiv:1703.01780, released code.
    """
    if step < 0:
        raise ValueError(f"step must not be negative, got {step}")
    if not 0.0 <= decay < 1.0:
        raise ValueError(f"decay must be in [0, 1), got {decay}")
    return min(1.0 - 1.0 / (step + 1), decay)


@dataclass(frozen=True)
class LinearDecay:
    """A learning rate's factor: 1 until ``start``, then straight down to 0 at ``stop``; for torch's ``LambdaLR``.

    Args:
        start: step after which it falls.
        stop: step at which it is 0.

    Raises:
        ValueError: If not 0 <= start < stop.

    Source: Zhu et al. 2017, arXiv:1703.10593, section 4: constant for half of the training, then linear.
    """

    start: int
    stop: int

    def __post_init__(self) -> None:
        """Check the steps."""
        if not 0 <= self.start < self.stop:
            raise ValueError(f"start and stop must be 0 <= start < stop, got {self.start} and {self.stop}")

    def __call__(self, step: int) -> float:
        """The factor after ``step`` steps, in [0, 1]."""
        return min(1.0, max(0.0, (self.stop - step) / (self.stop - self.start)))
