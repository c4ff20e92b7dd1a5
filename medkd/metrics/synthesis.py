"""How near generated images are to real ones: distances of features (FID, KID, density, coverage); in pairs SSIM.

A distance of distributions depends on the network that makes the features: name it beside the number, and compare only
numbers of one network and one number of images. Slices of one patient are no independent images; give the patients.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from scipy.spatial.distance import cdist

from medkd.metrics.statistics import Array, resampling_blocks, resampling_weights

if TYPE_CHECKING:
    import torch

    Values = npt.ArrayLike | torch.Tensor


@dataclass(frozen=True)
class Estimate:
    """A distance of two samples with its bootstrap interval.

    Args:
        value: the estimate from all images; unbiased, hence below 0 at times where the true distance is about 0.
        sd: standard deviation of its bootstrap distribution; NaN if hardly any resample has two different images.
        low: lower bound of the percentile interval; NaN likewise.
        high: upper bound.
        n_a: images of the first sample.
        n_b: images of the second.
        confidence: coverage aimed at.
    """

    value: float
    sd: float
    low: float
    high: float
    n_a: int
    n_b: int
    confidence: float


def fid(features_a: Values, features_b: Values) -> float:
    """Fréchet distance of the Gaussians fitted to two samples of features.

    |mean difference|² + tr(A) + tr(B) - 2 tr((A B)^½) for the unbiased covariances A and B. The last trace is computed
    as the sum of the singular values of the product of the centered samples, so it needs no matrix root and stays
    exact with fewer images than features, where the covariances are singular. The value is biased upward in small
    samples: compare equal numbers of images only, or use `kid`.

    Args:
        features_a: (N, D), array or tensor.
        features_b: (M, D).

    Returns:
        The distance, >= 0 up to rounding, in squared feature units.

    Raises:
        ValueError: If the samples are not (N, D) and (M, D) with two images each, or hold NaN or infinite values.

    Source: Heusel et al. 2017, arXiv:1706.08500.
    """
    a, b = _samples(features_a, features_b)
    mean_difference = a.mean(axis=0) - b.mean(axis=0)
    root_a, root_b = _covariance_factor(a), _covariance_factor(b)
    shared = np.linalg.svd(root_a @ root_b.T, compute_uv=False).sum()
    return float(mean_difference @ mean_difference + (root_a**2).sum() + (root_b**2).sum() - 2.0 * shared)


def kid(
    features_a: Values,
    features_b: Values,
    *,
    patients_a: npt.ArrayLike | None = None,
    patients_b: npt.ArrayLike | None = None,
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> Estimate:
    """Kernel distance: the unbiased squared maximum mean discrepancy under the kernel (x·y / D + 1)³.

    The estimate is the U-statistic over all images, not a mean over random subsets. Its interval is a bootstrap of
    patients; a pair of copies of one image is never counted, since it would look like two identical images.

    Args:
        features_a: (N, D), array or tensor.
        features_b: (M, D).
        patients_a: (N,) patient of each image; None: each image is its own patient.
        patients_b: (M,) the same for the second sample.
        confidence: coverage, in (0, 1).
        resamples: bootstrap samples.
        seed: of the resampling.

    Returns:
        Estimate, in squared kernel units (often shown times 1000).

    Raises:
        ValueError: As `fid`; or if patients do not match the images, are fewer than two, or an option is out of range.

    Source: Bińkowski et al. 2018, arXiv:1801.01401; the U-statistic of Gretton et al. 2012.
    """
    a, b = _samples(features_a, features_b)
    if not 0 < confidence < 1 or resamples < 2:
        raise ValueError(f"confidence must lie in (0, 1) and resamples be >= 2, got {confidence} and {resamples}")
    groups_a, groups_b = _groups("patients_a", patients_a, len(a)), _groups("patients_b", patients_b, len(b))
    kernels = (_kernel(a, a), _kernel(b, b), _kernel(a, b))
    generator = np.random.default_rng(seed)
    draws = []
    for size in resampling_blocks(resamples, len(a) + len(b)):
        weights_a = resampling_weights(int(groups_a.max()) + 1, size, generator)[:, groups_a]
        weights_b = resampling_weights(int(groups_b.max()) + 1, size, generator)[:, groups_b]
        draws.append(_discrepancy(kernels, weights_a, weights_b))
    values = np.concatenate(draws)
    values = values[np.isfinite(values)]  # a resample of one single image has no pair
    sd = low = high = math.nan
    if len(values) > 1:
        sd = float(values.std(ddof=1))
        low, high = (float(bound) for bound in np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2]))
    value = _discrepancy(kernels, np.ones((1, len(a))), np.ones((1, len(b))))[0]
    return Estimate(float(value), sd, low, high, len(a), len(b), confidence)


def density_and_coverage(features_real: Values, features_made: Values, *, neighbors: int = 5) -> tuple[float, float]:
    """How densely generated images lie among the real ones, and how many real ones have a generated one near.

    Every real image has a ball that reaches to its k-th nearest real neighbor. Density is the mean number of balls a
    generated image lies in, over k: about 1 for equal distributions, more if the generator keeps to the crowded parts.
    Coverage is the share of balls with a generated image inside: low if the generator left kinds of images out.

    Args:
        features_real: (N, D), array or tensor.
        features_made: (M, D).
        neighbors: k, in [1, N); the paper recommends 5.

    Returns:
        Density >= 0, coverage in [0, 1].

    Raises:
        ValueError: As `fid`; or if ``neighbors`` is out of range.

    Source: Naeem et al. 2020, arXiv:2002.09797.
    """
    real, made = _samples(features_real, features_made)
    if not 1 <= neighbors < len(real):
        raise ValueError(f"neighbors must lie in [1, {len(real)}), one below the number of real images: {neighbors}")
    # Column 0 of the sorted distances is the image itself.
    radii = np.sort(_distances(real, real), axis=1)[:, neighbors]
    inside = _distances(real, made) < radii[:, None]
    return float(inside.sum() / (neighbors * len(made))), float(inside.any(axis=1).mean())


def ssim(images_a: Values, images_b: Values, *, data_range: float) -> Array:
    """Structural similarity of each pair of images, with MONAI's Gaussian window of 11 and sigma 1.5.

    Only for pairs that show the same thing at the same place: unpaired translations have no such partner.

    Args:
        images_a: (N, C, *S) in two or three spatial dimensions, each side 11 at least; computed in float32.
        images_b: (N, C, *S).
        data_range: largest minus smallest possible value: 2 for images in [-1, 1].

    Returns:
        (N,) in [-1, 1]; 1 for equal images.

    Raises:
        ValueError: If the shapes differ or do not fit, ``data_range`` is not positive, or values are not finite.

    Source: Wang et al. 2004; implementation of MONAI.
    """
    import torch  # the other measures and the rest of this package need neither
    from monai.metrics import SSIMMetric

    a, b = (torch.as_tensor(_array(images)).float() for images in (images_a, images_b))
    if a.shape != b.shape or a.ndim not in (4, 5) or min(a.shape[2:]) < 11:
        raise ValueError(
            "images must be two (N, C, *S) of one shape, sides of 11 at least, "
            f"got {tuple(a.shape)} and {tuple(b.shape)}"
        )
    if not data_range > 0:
        raise ValueError(f"data_range must be > 0, got {data_range}")
    if not bool(torch.isfinite(a).all() and torch.isfinite(b).all()):
        raise ValueError("images hold NaN or infinite values")
    metric = SSIMMetric(spatial_dims=a.ndim - 2, data_range=data_range, reduction="none")
    return np.asarray(metric(a, b).reshape(-1), dtype=np.float64)


def _array(values: Values) -> npt.NDArray[np.floating]:
    detach = getattr(values, "detach", None)  # a tensor may have a gradient or lie on a device
    return np.asarray(values if detach is None else detach().cpu())


def _samples(features_a: Values, features_b: Values) -> tuple[Array, Array]:
    a, b = (_array(features).astype(np.float64) for features in (features_a, features_b))
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2 or not a.shape[1]:
        raise ValueError(f"features must be (N, D) and (M, D) with N, M >= 2, got {a.shape} and {b.shape}")
    for name, sample in (("features_a", a), ("features_b", b)):
        if wrong := int((~np.isfinite(sample)).any(axis=1).sum()):
            raise ValueError(f"{name}: {wrong} of {len(sample)} images have NaN or infinite features")
    return a, b


def _covariance_factor(sample: Array) -> Array:
    """(min(N, D), D) matrix F with FᵀF the unbiased covariance of the (N, D) sample."""
    centered = (sample - sample.mean(axis=0)) / np.sqrt(len(sample) - 1)
    return np.asarray(np.linalg.qr(centered, mode="r")) if len(centered) > centered.shape[1] else centered


def _groups(name: str, patients: npt.ArrayLike | None, n: int) -> npt.NDArray[np.intp]:
    if patients is None:
        return np.arange(n)
    labels = np.asarray(patients)
    if labels.shape != (n,):
        raise ValueError(f"{name} {labels.shape} must have one label per image ({n},)")
    distinct, codes = np.unique(labels, return_inverse=True)
    if len(distinct) < 2:
        raise ValueError(f"{name} names {len(distinct)} patient; an interval needs two")
    return codes


def _distances(a: Array, b: Array) -> Array:
    """(N, M) Euclidean distances."""
    return np.asarray(cdist(a, b))


def _kernel(a: Array, b: Array) -> Array:
    return (a @ b.T / a.shape[1] + 1.0) ** 3


def _discrepancy(kernels: tuple[Array, Array, Array], weights_a: Array, weights_b: Array) -> Array:
    """(R,) unbiased squared discrepancy for (R, N) and (R, M) multiplicities of the images."""
    within_a, within_b = _mean_within(kernels[0], weights_a), _mean_within(kernels[1], weights_b)
    between = np.einsum("rn,rn->r", weights_a, weights_b @ kernels[2].T)
    between /= weights_a.sum(axis=1) * weights_b.sum(axis=1)
    return within_a + within_b - 2.0 * between


def _mean_within(kernel: Array, weights: Array) -> Array:
    """(R,) mean of the kernel over the ordered pairs of different images; NaN for one image alone."""
    total = np.einsum("rn,rn->r", weights @ kernel, weights) - weights**2 @ np.diag(kernel)
    pairs = weights.sum(axis=1) ** 2 - (weights**2).sum(axis=1)
    return np.divide(total, pairs, out=np.full_like(total, np.nan), where=pairs > 0)
