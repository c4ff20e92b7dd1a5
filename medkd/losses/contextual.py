"""Contextual similarity of two feature maps that show different patients: no pixel needs a partner."""

from __future__ import annotations

import torch
from torch.utils.checkpoint import checkpoint

from medkd.losses.precision import at_least_float32, without_autocast

_EPSILON = 1e-5  # of the relative distance and of the logarithm
_SHORTEST = 1e-6  # a patch nearer than this to the mean has no direction


def contextual_loss(
    generated: torch.Tensor, reference: torch.Tensor, *, bandwidth: float = 0.5, chunk: int = 1024
) -> torch.Tensor:
    """-log of how well the reference's patches are all found among the generated ones.

    With d the cosine distance of patches, both centered on the mean patch of the reference image: d'_ij = d_ij /
    (min_k d_ik + 1e-5), CX_ij = softmax over j of (1 - d'_ij) / bandwidth, and the loss is the mean over images of
    -log(mean_j max_i CX_ij + 1e-5). It is -1e-5, not 0, for identical images, and not symmetric. The mean patch is
    that of each reference image alone, so images of a batch do not depend on each other. A patch at that mean has no
    direction: its cosines count as 0 and it receives no gradient, hence constant images have a finite loss.

    Rows of the patch-by-patch matrix are taken ``chunk`` at a time and recomputed for the gradient, so that memory
    is that of a few (chunk, patches) matrices whatever the map's size.

    Args:
        generated: (B, C, *S) features of the generated images; computed in float32, in float64 if given so.
        reference: (B, C, *R) features of real images; another number of patches is allowed.
        bandwidth: of the softmax, > 0.
        chunk: generated patches compared at a time.

    Returns:
        Scalar.

    Raises:
        ValueError: If the shapes do not match, or ``bandwidth`` or ``chunk`` is not positive.
        FloatingPointError: If features are not finite: it says whose and how many.

    Source: Mechrez et al. 2018, arXiv:1803.02077.
    """
    _check(generated, reference, bandwidth, chunk)
    losses = [
        _image_loss(at_least_float32(x).flatten(1).t(), at_least_float32(y).flatten(1).t(), bandwidth, chunk)
        for x, y in zip(generated, reference, strict=True)
    ]
    return torch.stack(losses).mean()


def _check(generated: torch.Tensor, reference: torch.Tensor, bandwidth: float, chunk: int) -> None:
    if generated.ndim < 3 or reference.ndim < 3 or generated.shape[:2] != reference.shape[:2]:
        raise ValueError(
            "generated and reference must be (B, C, *S) features with one B and C, got "
            f"{tuple(generated.shape)} and {tuple(reference.shape)}"
        )
    if not generated.numel() or not reference.numel():
        raise ValueError(f"no features to compare in {tuple(generated.shape)} and {tuple(reference.shape)}")
    if not bandwidth > 0 or chunk < 1:
        raise ValueError(f"bandwidth must be > 0 and chunk >= 1, got {bandwidth} and {chunk}")
    for name, features in (("generated", generated), ("reference", reference)):
        if wrong := int((~torch.isfinite(features.detach())).sum()):
            raise FloatingPointError(
                f"contextual loss: {wrong} of {features.numel()} {name} features {tuple(features.shape)} "
                "are NaN or infinite"
            )


def _image_loss(x: torch.Tensor, y: torch.Tensor, bandwidth: float, chunk: int) -> torch.Tensor:
    """Loss of one image from its (N, C) patches and the reference's (M, C)."""
    mean = y.mean(dim=0)
    x, y = _directions(x - mean), _directions(y - mean)
    if len(x) <= chunk:
        best = _best_similarity(x, y, bandwidth)
    else:
        best = torch.zeros_like(y[:, 0])  # similarities are not negative
        for rows in x.split(chunk):
            similarity = checkpoint(_best_similarity, rows, y, bandwidth, use_reentrant=False, preserve_rng_state=False)
            best = torch.maximum(best, similarity)
    return -torch.log(best.mean() + _EPSILON)


def _directions(patches: torch.Tensor) -> torch.Tensor:
    length = torch.linalg.vector_norm(patches, dim=1, keepdim=True)
    return torch.where(length > _SHORTEST, patches / length.clamp_min(_SHORTEST), 0.0)


def _best_similarity(x: torch.Tensor, y: torch.Tensor, bandwidth: float) -> torch.Tensor:
    """(M,) largest CX_ij over the rows i of x, which hold whole softmax rows since y is complete."""
    with without_autocast(x):
        similarity = x @ y.t()
    # Row by row softmax((1 - d') / bandwidth) = softmax((cosine - nearest) / (bandwidth * (d_nearest + epsilon))): what
    # is subtracted is constant in a row. It takes a third of the matrices, and is exact where distances are tiny.
    nearest = similarity.max(dim=1, keepdim=True).values
    # Rounding must not make a distance negative: it becomes a denominator.
    scale = 1.0 / (bandwidth * ((1.0 - nearest).clamp_min(0.0) + _EPSILON))
    return torch.softmax((similarity - nearest) * scale, dim=1).max(dim=0).values
