"""Labels that a network gives itself, and losses that survive their mistakes."""

from __future__ import annotations

import torch
from torch.nn import functional

from medkd.losses.precision import at_least_float32, without_autocast
from medkd.losses.shapes import require_label_map, require_same_shape

IGNORE = -1  # label of an element that no loss counts


def class_thresholds(
    confidence: torch.Tensor, prediction: torch.Tensor, *, classes: int, portion: float
) -> torch.Tensor:
    """Confidence of each class above which its ``portion`` most confident elements lie.

    Without ties exactly floor(portion × n) of a class's n elements are above. A class that is never predicted has
    threshold 1, which nothing exceeds.

    Args:
        confidence: probability of the predicted class, any shape: all target images, or a sample of their elements.
        prediction: the predicted classes, in [0, classes), of the same shape.
        classes: K.
        portion: in [0, 1]; CBST raises it from 0.2 or 0.3 to 0.5 over its rounds.

    Returns:
        (K,) of the dtype of ``confidence``, float32 at least.

    Raises:
        ValueError: If the shapes differ or ``portion`` is out of range.

    Source: Zou et al. 2018, arXiv:1810.07911 (exp(-k_c) there).
    """
    require_same_shape("confidence", confidence, "prediction", prediction)
    if not 0 <= portion <= 1:
        raise ValueError(f"portion must lie in [0, 1], got {portion}")
    confidence = at_least_float32(confidence.detach())
    thresholds = torch.ones(classes, dtype=confidence.dtype, device=confidence.device)
    for index in range(classes):
        values = confidence[prediction == index].sort(descending=True).values
        kept = int(portion * len(values) + 1e-9)  # 0.3 * 10 is 2.9999… in floating point
        if kept < len(values):
            thresholds[index] = values[kept]
        elif len(values):
            thresholds[index] = torch.nextafter(values[-1], torch.zeros_like(values[-1]))
    return thresholds


def class_balanced_pseudo_labels(probabilities: torch.Tensor, thresholds: torch.Tensor) -> torch.Tensor:
    """The class whose probability exceeds its threshold by the largest factor; `IGNORE` where none does.

    With one threshold for all, this keeps the confident elements; thresholds of `class_thresholds` keep the same share
    of each class, so that rare and hard ones are not crowded out.

    Args:
        probabilities: (B, K, *S).
        thresholds: (K,), > 0.

    Returns:
        (B, *S) int64 in {`IGNORE`, 0, …, K - 1}.

    Raises:
        ValueError: If the shapes do not match or a threshold is not positive.

    Source: Zou et al. 2018, arXiv:1810.07911.
    """
    if probabilities.ndim < 2 or tuple(thresholds.shape) != (probabilities.shape[1],):
        raise ValueError(
            f"thresholds must be (K,) for probabilities (B, K, *S) {tuple(probabilities.shape)}, "
            f"got {tuple(thresholds.shape)}"
        )
    if not bool((thresholds > 0).all()):
        raise ValueError(f"thresholds must be > 0, got {thresholds.tolist()}")
    probabilities = at_least_float32(probabilities.detach())
    limits = thresholds.to(probabilities).reshape(1, -1, *[1] * (probabilities.ndim - 2))
    best = (probabilities / limits).argmax(dim=1)
    exceeded = (probabilities > limits).any(dim=1)  # the largest factor is above 1 exactly if any is
    return torch.where(exceeded, best, IGNORE)


def masked_cross_entropy(
    logits: torch.Tensor, label: torch.Tensor, *, weight: torch.Tensor | None = None, ignore: int = IGNORE
) -> torch.Tensor:
    """Cross-entropy over the labeled elements: the sum of weight × loss over their number.

    It is divided by the number of labeled elements, not by the sum of weights: a weight of 0.1 everywhere is a loss
    of a tenth. Without any labeled element it is 0, with a gradient of 0.

    Args:
        logits: (B, K, *S); computed in float32, in float64 if given so.
        label: (B, 1, *S) or (B, *S) class indices in [0, K), or ``ignore``.
        weight: (B, *S) or (B, 1, *S), or (B,) one per image; receives no gradient. None: 1.
        ignore: label of elements left out.

    Returns:
        Scalar, nats.

    Raises:
        ValueError: If the shapes do not match.
    """
    target = require_label_map(logits, label)
    losses = functional.cross_entropy(at_least_float32(logits), target, ignore_index=ignore, reduction="none")
    if weight is not None:
        losses = losses * _element_weights(weight, target).to(losses)
    return losses.sum() / (target != ignore).sum().clamp_min(1)


def symmetric_cross_entropy(
    logits: torch.Tensor,
    label: torch.Tensor,
    *,
    cross_weight: float = 0.1,
    reverse_weight: float = 1.0,
    ignore: int = IGNORE,
) -> torch.Tensor:
    """cross_weight × CE + reverse_weight × reverse CE, over the labeled elements.

    The reverse term is -sum_c p_c log(y_c) with y the one-hot label clipped at 1e-4, so 9.2 × (1 - p of the label): it
    is bounded, and a wrong label can only pull so hard.

    Args:
        logits: (B, K, *S); computed in float32, in float64 if given so.
        label: (B, 1, *S) or (B, *S) class indices in [0, K), or ``ignore``.
        cross_weight: of the cross-entropy.
        reverse_weight: of the reverse cross-entropy.
        ignore: label of elements left out.

    Returns:
        Scalar, nats; 0 with a gradient of 0 if nothing is labeled.

    Raises:
        ValueError: If the shapes do not match.

    Source: Wang et al. 2019, arXiv:1908.06112, with the weights of Zhang et al. 2021, arXiv:2101.10979 (ProDA).
    """
    target = require_label_map(logits, label)
    labeled = target != ignore
    probabilities = torch.softmax(at_least_float32(logits), dim=1)
    agreement = probabilities.gather(1, torch.where(labeled, target, 0).unsqueeze(1)).squeeze(1)
    floor = torch.log(torch.tensor(1e-4, dtype=probabilities.dtype, device=probabilities.device))
    reverse = (torch.where(labeled, 1.0 - agreement, 0.0) * -floor).sum() / labeled.sum().clamp_min(1)
    return cross_weight * masked_cross_entropy(logits, label, ignore=ignore) + reverse_weight * reverse


def class_centroids(features: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean feature of each class, elements weighted by their class probabilities or one-hot labels.

    Args:
        features: (B, D, *S); computed in float32, in float64 if given so.
        weights: (B, K, *S), >= 0.

    Returns:
        (K, D) centroids, 0 for a class without weight, and (K,) sums of weights.

    Raises:
        ValueError: If the shapes do not match.
    """
    if features.ndim < 2 or weights.ndim < 2 or features[:, 0].shape != weights[:, 0].shape:
        raise ValueError(
            "features (B, D, *S) and weights (B, K, *S) must agree outside of dimension 1, got "
            f"{tuple(features.shape)} and {tuple(weights.shape)}"
        )
    rows, shares = _rows(at_least_float32(features)), _rows(at_least_float32(weights).to(at_least_float32(features)))
    with without_autocast(rows):
        sums = shares.t() @ rows
    totals = shares.sum(dim=0)
    return torch.where(totals[:, None] > 0, sums / totals.clamp_min(1e-8)[:, None], 0.0), totals


def prototype_weights(features: torch.Tensor, prototypes: torch.Tensor, tau: float = 1.0) -> torch.Tensor:
    """How near each feature is to each class's prototype: softmax over classes of -(Euclidean distance) / tau.

    Multiplied with fixed soft pseudo labels it lets the features correct them.

    Args:
        features: (B, D, *S); computed in float32, in float64 if given so.
        prototypes: (K, D).
        tau: temperature, > 0.

    Returns:
        (B, K, *S), sums over K of 1.

    Raises:
        ValueError: If the shapes do not match or ``tau`` is not positive.

    Source: Zhang et al. 2021, arXiv:2101.10979.
    """
    if features.ndim < 2 or prototypes.ndim != 2 or features.shape[1] != prototypes.shape[1]:
        raise ValueError(
            f"features (B, D, *S) and prototypes (K, D) must share D, got {tuple(features.shape)} "
            f"and {tuple(prototypes.shape)}"
        )
    if not tau > 0:
        raise ValueError(f"tau must be > 0, got {tau}")
    rows = _rows(at_least_float32(features))
    with without_autocast(rows):
        # The faster product form of cdist loses the small distances, which decide.
        distances = torch.cdist(rows, prototypes.to(rows), compute_mode="donot_use_mm_for_euclid_dist")
    weights = torch.softmax(-distances / tau, dim=1)
    batch, spatial = features.shape[0], features.shape[2:]
    return weights.reshape(batch, *spatial, len(prototypes)).movedim(-1, 1)


def shot_pseudo_labels(
    features: torch.Tensor, probabilities: torch.Tensor, *, minimum_count: int = 0, rounds: int = 1
) -> torch.Tensor:
    """Labels by the nearest class centroid, in cosine distance: first of soft centroids, then of the labels' own.

    Features get a constant 1 appended and are scaled to length 1. Only classes that are predicted more than
    ``minimum_count`` times take part.

    Args:
        features: (N, D) one row per image or sampled voxel; computed in float32, in float64 if given so.
        probabilities: (N, K).
        minimum_count: predictions at or below which a class is left out.
        rounds: times that centroids are recomputed from the labels.

    Returns:
        (N,) int64 in [0, K).

    Raises:
        ValueError: If the shapes do not match or no class is predicted often enough.

    Source: Liang et al. 2020, arXiv:2002.08546, section 3.3.
    """
    if features.ndim != 2 or probabilities.ndim != 2 or len(features) != len(probabilities):
        raise ValueError(
            f"features (N, D) and probabilities (N, K) must share N, got {tuple(features.shape)} "
            f"and {tuple(probabilities.shape)}"
        )
    classes = probabilities.shape[1]
    rows = at_least_float32(features.detach())
    rows = functional.normalize(torch.cat([rows, torch.ones_like(rows[:, :1])], dim=1))
    shares = probabilities.detach().to(rows)
    allowed = torch.bincount(shares.argmax(dim=1), minlength=classes) > minimum_count
    if not bool(allowed.any()):
        raise ValueError(f"no class is predicted more than {minimum_count} times in {len(rows)} elements")
    label = _nearest_centroid(rows, shares, allowed)
    for _ in range(rounds):
        label = _nearest_centroid(rows, functional.one_hot(label, classes).to(rows), allowed)
    return label


def _nearest_centroid(rows: torch.Tensor, shares: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
    centroids, totals = class_centroids(rows, shares)
    with without_autocast(rows):
        similarity = rows @ functional.normalize(centroids).t()
    return similarity.masked_fill(~(allowed & (totals > 0)), -torch.inf).argmax(dim=1)


def _rows(values: torch.Tensor) -> torch.Tensor:
    """(B, C, *S) -> (B × positions, C)."""
    return values.movedim(1, -1).reshape(-1, values.shape[1])


def _element_weights(weight: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    weight = weight.detach()
    if weight.ndim == 1 and len(weight) == len(target):
        return weight.reshape(-1, *[1] * (target.ndim - 1))
    squeezed = weight.squeeze(1) if weight.ndim == target.ndim + 1 and weight.shape[1] == 1 else weight
    if squeezed.shape != target.shape:
        raise ValueError(
            f"weight must be (B,), (B, *S) or (B, 1, *S) for {tuple(target.shape)}, got {tuple(weight.shape)}"
        )
    return squeezed
