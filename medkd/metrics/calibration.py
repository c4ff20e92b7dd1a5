"""Whether probabilities mean what they say: reliability table, expected calibration error, Brier score."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]

# Half-precision softmax outputs miss a sum of 1 by up to about this.
_SUM_TOLERANCE = 5e-3


@dataclass(frozen=True, eq=False)
class Calibration:
    """Reliability table of the top class and the Brier sum, which several cases can pool.

    Bin i holds the samples whose confidence lies in (i / bins, (i + 1) / bins]; 0 belongs to the first.

    Args:
        count: (bins,) samples per bin.
        confidence_sum: (bins,) sum of the top class's probabilities.
        correct_sum: (bins,) samples whose top class is the reference.
        brier_sum: sum over samples of the squared distance to the one-hot reference.
    """

    count: Counts
    confidence_sum: Array
    correct_sum: Array
    brier_sum: float

    @property
    def n(self) -> int:
        """Samples: voxels for segmentation, images for classification."""
        return int(self.count.sum())

    @property
    def expected_calibration_error(self) -> float:
        """Mean over samples of their bin's |accuracy - confidence|, in [0, 1]; NaN without samples."""
        return float(np.abs(self.correct_sum - self.confidence_sum).sum() / self.n) if self.n else float("nan")

    @property
    def maximum_calibration_error(self) -> float:
        """Largest |accuracy - confidence| of a filled bin, in [0, 1]; NaN without samples."""
        filled = self.count > 0
        gaps = np.abs(self.correct_sum - self.confidence_sum)[filled] / self.count[filled]
        return float(gaps.max()) if self.n else float("nan")

    @property
    def brier_score(self) -> float:
        """Mean over samples of the sum over classes of (p - onehot)², in [0, 2]; NaN without samples."""
        return self.brier_sum / self.n if self.n else float("nan")

    def table(self) -> list[dict[str, float | int | None]]:
        """A row per bin: low, high, count, confidence and accuracy (None where the bin is empty)."""
        edges = np.linspace(0.0, 1.0, len(self.count) + 1)
        return [
            {
                "low": float(edges[i]),
                "high": float(edges[i + 1]),
                "count": int(count),
                "confidence": float(self.confidence_sum[i] / count) if count else None,
                "accuracy": float(self.correct_sum[i] / count) if count else None,
            }
            for i, count in enumerate(self.count)
        ]


def measure_calibration(
    probabilities: npt.ArrayLike,
    reference: npt.ArrayLike,
    *,
    bins: int = 15,
    class_axis: int = 0,
    where: npt.ArrayLike | None = None,
) -> Calibration:
    """Reliability of the predicted class, in equal-width bins of confidence.

    Most voxels of a segmentation are easy background; restrict it by ``where`` to the region that matters, and say so.

    Args:
        probabilities: (C, *S) probabilities of one segmentation; with ``class_axis=1``, (N, C) of a classification or
            (B, C, *S) of a batch of segmentations.
        reference: integer classes in 0..C-1, the shape of ``probabilities`` without the class axis.
        bins: number of bins.
        class_axis: which axis holds the classes.
        where: boolean, shape of ``reference``: the samples to count; None counts all.

    Returns:
        The table, from which the expected and the maximum calibration error and the Brier score follow.

    Raises:
        ValueError: for other shapes or dtypes, classes out of range, or rows that are not probabilities (logits).

    Source: Guo et al. 2017, arXiv:1706.04599, equations 2, 3 and 5; Brier 1950 (sum over classes).
    """
    by_class, labels = _checked_samples(probabilities, reference, class_axis, where)
    if bins < 1:
        raise ValueError(f"bins must be at least 1, not {bins}")
    confidence = by_class.max(axis=0).astype(np.float64)
    correct = by_class.argmax(axis=0) == labels
    of_reference = np.take_along_axis(by_class, labels[None], axis=0)[0].astype(np.float64)
    squares = np.einsum("cn,cn->n", by_class, by_class, dtype=np.float64)
    bin_of = np.searchsorted(np.linspace(0.0, 1.0, bins + 1)[1:-1], confidence, side="left")
    return Calibration(
        count=np.bincount(bin_of, minlength=bins).astype(np.int64),
        confidence_sum=np.bincount(bin_of, weights=confidence, minlength=bins).astype(np.float64),
        correct_sum=np.bincount(bin_of, weights=correct, minlength=bins).astype(np.float64),
        brier_sum=float((squares - 2.0 * of_reference + 1.0).sum()),  # Σ(p - onehot)² = Σp² - 2 p[y] + 1
    )


def pool_calibration(cases: Sequence[Calibration]) -> Calibration:
    """The table over all samples of several cases (the mean of their calibration errors would be another thing).

    Raises:
        ValueError: without cases, or if they have different numbers of bins.
    """
    if len({len(case.count) for case in cases}) != 1:
        raise ValueError("pool_calibration needs one or more cases with the same number of bins")
    return Calibration(
        count=np.sum([case.count for case in cases], axis=0),
        confidence_sum=np.sum([case.confidence_sum for case in cases], axis=0),
        correct_sum=np.sum([case.correct_sum for case in cases], axis=0),
        brier_sum=float(sum(case.brier_sum for case in cases)),
    )


def _checked_samples(
    probabilities: npt.ArrayLike, reference: npt.ArrayLike, class_axis: int, where: npt.ArrayLike | None
) -> tuple[npt.NDArray[np.floating[Any]], npt.NDArray[np.intp]]:
    """(C, N) probabilities and (N,) classes of the samples to count."""
    given, labels = np.asarray(probabilities), np.asarray(reference)
    if not np.issubdtype(given.dtype, np.floating):
        raise ValueError(f"probabilities must be floating point, not {given.dtype}")
    if given.ndim < 1 or not -given.ndim <= class_axis < given.ndim:
        raise ValueError(f"probabilities {given.shape} have no axis {class_axis} for the classes")
    by_class = np.moveaxis(given, class_axis, 0)
    if not np.issubdtype(labels.dtype, np.integer) or labels.shape != by_class.shape[1:]:
        raise ValueError(
            f"reference must hold integer classes in the shape {by_class.shape[1:]}, not {labels.dtype} {labels.shape}"
        )
    if where is None:
        by_class, labels = by_class.reshape(len(by_class), -1), labels.reshape(-1)
    else:
        counted = np.asarray(where)
        if counted.dtype != np.bool_ or counted.shape != labels.shape:
            raise ValueError(f"where must be boolean in the shape of reference, not {counted.dtype} {counted.shape}")
        by_class, labels = by_class[:, counted], labels[counted]
    if labels.size and not 0 <= labels.min() <= labels.max() < len(by_class):
        raise ValueError(f"reference has classes {labels.min()}..{labels.max()}, probabilities 0..{len(by_class) - 1}")
    sums = by_class.sum(axis=0, dtype=np.float32)
    if not (np.all(by_class >= 0) and np.all(np.abs(sums - 1) <= _SUM_TOLERANCE)):  # NaN fails both
        raise ValueError("probabilities must be at least 0 and sum to 1 over the classes; apply the softmax first")
    return by_class, labels.astype(np.intp)
