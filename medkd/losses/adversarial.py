"""What a critic minimizes, and a network that wants to fool it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional

from medkd.losses.precision import at_least_float32

Logits = torch.Tensor | Sequence[torch.Tensor]


def least_squares(logits: Logits, real: bool) -> torch.Tensor:
    """Mean squared distance of a critic's outputs from 1 (real) or 0 (fake).

    A critic minimizes it on real images with ``real=True`` plus on generated ones with ``real=False`` (CycleGAN takes
    half of that sum, UNIT the sum); a generator minimizes it on its own images with ``real=True``.

    Args:
        logits: the critic's raw outputs, any shape; of several scales a list, over which the loss is summed.
            Computed in float32, in float64 if given so.
        real: what the critic is to say, or is to be made to say.

    Returns:
        Scalar.

    Raises:
        ValueError: If a list or a map is empty.

    Source: Mao et al. 2017, arXiv:1611.04076, with a = 0, b = c = 1 and without the factor 1/2.
    """
    return torch.stack([(scale - float(real)).square().mean() for scale in _scales("logits", logits)]).sum()


def domain_bce(logits: Logits, is_source: bool) -> torch.Tensor:
    """Binary cross-entropy of a domain critic's logits; the source domain is class 0, the target domain class 1.

    Args:
        logits: the critic's raw outputs, any shape; a list is summed over. Computed in float32, in float64 if given so.
        is_source: the domain that the critic is to name, or, to fool it, is to be made to name.

    Returns:
        Scalar, nats.

    Raises:
        ValueError: If a list or a map is empty.

    Source: Tsai et al. 2018, arXiv:1802.10349, with the class numbers of its code.
    """
    # Cross-entropy of one logit is softplus(-z) for class 1 and softplus(z) for class 0.
    sign = 1.0 if is_source else -1.0
    return torch.stack([functional.softplus(sign * scale).mean() for scale in _scales("logits", logits)]).sum()


def hinge(logits: Logits, real: bool) -> torch.Tensor:
    """What a critic minimizes: mean of max(0, 1 - z) on real images, of max(0, 1 + z) on generated ones.

    A generator minimizes :func:`hinge_to_fool` instead.

    Args:
        logits: the critic's raw outputs z, any shape; a list is summed over. Computed in float32, in float64 if given
            so.
        real: whether the images are real.

    Returns:
        Scalar, >= 0.

    Raises:
        ValueError: If a list or a map is empty.

    Source: Lim and Ye 2017, arXiv:1705.02894; Miyato et al. 2018, arXiv:1802.05957.
    """
    sign = 1.0 if real else -1.0
    return torch.stack([functional.relu(1.0 - sign * scale).mean() for scale in _scales("logits", logits)]).sum()


def hinge_to_fool(logits: Logits) -> torch.Tensor:
    """What a generator minimizes against a critic of :func:`hinge`: the mean of -z on its images.

    Args:
        logits: as for :func:`hinge`.

    Returns:
        Scalar, unbounded below.

    Raises:
        ValueError: If a list or a map is empty.
    """
    return torch.stack([-scale.mean() for scale in _scales("logits", logits)]).sum()


def critic_accuracy(real_logits: Logits, fake_logits: Logits, *, threshold: float = 0.5) -> torch.Tensor:
    """Share of a critic's outputs on the right side of the threshold, real and fake counting half each.

    Near 1: the critic wins and its gradient carries little; a critic that says one thing of everything has 0.5.

    Args:
        real_logits: outputs for real images, any shape, or a list of scales, which count equally.
        fake_logits: outputs for generated images.
        threshold: above it is "real": 0.5 for `least_squares`, 0 for `hinge` and for `domain_bce` ("real" is then the
            target domain).

    Returns:
        0-dim float32 tensor in [0, 1], without gradient.

    Raises:
        ValueError: If a list or a map is empty.
    """
    right = [(scale > threshold).float().mean() for scale in _scales("real_logits", real_logits)]
    wrong = [(scale > threshold).float().mean() for scale in _scales("fake_logits", fake_logits)]
    return ((torch.stack(right).mean() + 1.0 - torch.stack(wrong).mean()) / 2).detach()


def _scales(name: str, logits: Logits) -> list[torch.Tensor]:
    scales = [logits] if isinstance(logits, torch.Tensor) else list(logits)
    if not scales or any(scale.numel() == 0 for scale in scales):
        raise ValueError(f"{name} must hold values at every scale, got {[tuple(scale.shape) for scale in scales]}")
    return [at_least_float32(scale) for scale in scales]
