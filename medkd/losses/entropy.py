"""How sure a network is, as a map and as something to minimize."""

from __future__ import annotations

import math

import torch

from medkd.losses.precision import at_least_float32

_EPSILON = 1e-30  # keeps the logarithm and its gradient finite where a probability underflows to 0


def entropy_map(probabilities: torch.Tensor) -> torch.Tensor:
    """Entropy of each element's class probabilities.

    Args:
        probabilities: (B, K, *S), sums over K of 1; computed in float32, in float64 if given so.

    Returns:
        (B, *S), nats, in [0, log K].

    Raises:
        ValueError: If there is no class dimension or fewer than two classes.
    """
    _require_classes("probabilities", probabilities)
    probabilities = at_least_float32(probabilities)
    return -(probabilities * torch.log(probabilities + _EPSILON)).sum(dim=1)


def mean_entropy(logits: torch.Tensor) -> torch.Tensor:
    """Mean entropy of the predictions, nats: what TENT and the first term of SHOT minimize.

    Args:
        logits: (B, K, *S); computed in float32, in float64 if given so.

    Returns:
        Scalar in [0, log K].

    Raises:
        ValueError: If there are fewer than two classes.

    Source: Wang et al. 2021, arXiv:2006.10726.
    """
    return entropy_map(_softmax(logits)).mean()


def normalized_entropy(logits: torch.Tensor) -> torch.Tensor:
    """Mean entropy of the predictions over that of a uniform one: what MinEnt minimizes.

    It favors the class that is already most likely, so small lesions can vanish: watch the Dice of each class.

    Args:
        logits: (B, K, *S); computed in float32, in float64 if given so.

    Returns:
        Scalar in [0, 1].

    Raises:
        ValueError: If there are fewer than two classes.

    Source: Vu et al. 2019, arXiv:1811.12833.
    """
    return mean_entropy(logits) / math.log(logits.shape[1])


def weighted_self_information(logits: torch.Tensor) -> torch.Tensor:
    """-p log2(p) / log2 K of each class: the map that AdvEnt shows its critic. Its sum over K is the entropy in [0, 1].

    Args:
        logits: (B, K, *S); computed in float32, in float64 if given so.

    Returns:
        (B, K, *S).

    Raises:
        ValueError: If there are fewer than two classes.

    Source: Vu et al. 2019, arXiv:1811.12833.
    """
    probabilities = _softmax(logits)
    return -probabilities * torch.log2(probabilities + _EPSILON) / math.log2(logits.shape[1])


def charbonnier_entropy(logits: torch.Tensor, eta: float = 2.0) -> torch.Tensor:
    """Mean of (h² + 1e-8)^eta with h the entropy in [0, 1]: presses on unsure elements more than on sure ones.

    Args:
        logits: (B, K, *S); computed in float32, in float64 if given so.
        eta: > 0; above 0.5 unsure elements weigh more.

    Returns:
        Scalar.

    Raises:
        ValueError: If there are fewer than two classes or ``eta`` is not positive.

    Source: Yang and Soatto 2020, arXiv:2004.05498.
    """
    if not eta > 0:
        raise ValueError(f"eta must be > 0, got {eta}")
    entropy = entropy_map(_softmax(logits)) / math.log(logits.shape[1])
    return (entropy.square() + 1e-8).pow(eta).mean()


def diversity(logits: torch.Tensor) -> torch.Tensor:
    """Entropy of the mean prediction over the batch and all positions: high when every class is used. To be maximized.

    Args:
        logits: (B, K, *S); computed in float32, in float64 if given so.

    Returns:
        Scalar, nats, in [0, log K].

    Raises:
        ValueError: If there are fewer than two classes.

    Source: Liang et al. 2020, arXiv:2002.08546.
    """
    probabilities = _softmax(logits)
    return entropy_map(probabilities.transpose(0, 1).flatten(1).mean(dim=1).unsqueeze(0)).squeeze()


def uniform_divergence(logits: torch.Tensor) -> torch.Tensor:
    """Mean KL divergence from the uniform distribution to the prediction: a regularizer against overconfidence.

    Args:
        logits: (B, K, *S); computed in float32, in float64 if given so.

    Returns:
        Scalar, nats; 0 where all classes are equally likely.

    Raises:
        ValueError: If there are fewer than two classes.

    Source: Zou et al. 2019, arXiv:1908.09822 (MRKLD), without its constant.
    """
    _require_classes("logits", logits)
    log_probabilities = torch.log_softmax(at_least_float32(logits), dim=1)
    return -log_probabilities.mean() - math.log(logits.shape[1])


def confidence(probabilities: torch.Tensor) -> torch.Tensor:
    """Probability of the most likely class: (B, K, *S) -> (B, *S).

    Raises:
        ValueError: If there is no class dimension or fewer than two classes.
    """
    _require_classes("probabilities", probabilities)
    return probabilities.max(dim=1).values


def confident_share(probabilities: torch.Tensor, threshold: float) -> torch.Tensor:
    """Share of each image's elements whose confidence is at least ``threshold``, the weight of a pseudo-labeled image.

    Args:
        probabilities: (B, K, *S).
        threshold: DACS has 0.968.

    Returns:
        (B,) float32, without gradient. Per image, so that images of a batch do not depend on each other.

    Raises:
        ValueError: If there is no class dimension or fewer than two classes.

    Source: Tranheden et al. 2021, arXiv:2007.08702 (there over the whole batch).
    """
    sure = confidence(probabilities.detach()) >= threshold
    return sure.reshape(len(sure), -1).float().mean(dim=1)


def _softmax(logits: torch.Tensor) -> torch.Tensor:
    _require_classes("logits", logits)
    return torch.softmax(at_least_float32(logits), dim=1)


def _require_classes(name: str, values: torch.Tensor) -> None:
    if values.ndim < 2 or values.shape[1] < 2:
        raise ValueError(f"{name} must be (B, K, *S) with two classes or more, got {tuple(values.shape)}")
