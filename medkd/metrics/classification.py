"""How good a classifier is: ROC curve, DeLong, operating points, calibration, each with a bootstrap over patients."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.stats import norm, rankdata

from medkd.metrics.calibration import Calibration, measure_calibration
from medkd.metrics.statistics import Interval, resampling_blocks, resampling_weights

Array = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Labels = npt.NDArray[np.intp]

RESAMPLES = 2000
BINS = 15
_SLACK = 1e-9  # a specificity of 0.9 is reached by 9 of 10
_LEAST_DEFINED = 0.5  # share of resamples that must define a measure for its interval to mean something


@dataclass(frozen=True, eq=False)
class RocCurve:
    """Operating points of "positive where the score is at least the threshold", thresholds decreasing.

    Attributes:
        thresholds: (M,) the first is infinite: nothing is positive.
        sensitivity: (M,) increasing from 0 to 1.
        specificity: (M,) decreasing from 1 to 0.
    """

    thresholds: Array
    sensitivity: Array
    specificity: Array

    def at_specificity(self, specificity: float) -> tuple[float, float]:
        """The highest sensitivity of a point with at least this specificity, and that point's threshold.

        Points between two thresholds are not interpolated: no threshold reaches them.

        Raises:
            ValueError: for a specificity outside of [0, 1].
        """
        if not 0 <= specificity <= 1:
            raise ValueError(f"a specificity lies in [0, 1], not at {specificity}")
        last = int(np.flatnonzero(self.specificity >= specificity - _SLACK)[-1])
        first = int(np.flatnonzero(self.sensitivity == self.sensitivity[last])[0])  # as specific as it gets
        return float(self.sensitivity[first]), float(self.thresholds[first])


def roc_curve(scores: npt.ArrayLike, labels: npt.ArrayLike) -> RocCurve:
    """The ROC curve's operating points, one per distinct score.

    Args:
        scores: (N,) finite; larger means more positive.
        labels: (N,) True or 1 for positive.

    Raises:
        ValueError: as for :func:`delong_interval`, or unless both classes occur.
    """
    values, positive = _checked(scores, labels)
    if positive.all() or not positive.any():
        raise ValueError("a ROC curve needs positives and negatives")
    ranking = _Ranking(values, positive)
    up, down = (part[0, ::-1].cumsum() for part in ranking.counts(np.ones((1, len(values)))))
    return RocCurve(
        thresholds=np.concatenate([[np.inf], ranking.distinct[::-1]]),
        sensitivity=np.concatenate([[0.0], up / up[-1]]),
        specificity=np.concatenate([[1.0], 1 - down / down[-1]]),
    )


def delong_interval(scores: npt.ArrayLike, labels: npt.ArrayLike, *, confidence: float = 0.95) -> Interval:
    """Area under the ROC curve with DeLong's interval, for independent cases: one image per patient.

    Args:
        scores: (N,) finite; larger means more positive.
        labels: (N,) True or 1 for positive.
        confidence: coverage, in (0, 1).

    Returns:
        The bounds are cut to [0, 1]. They are NaN with fewer than two cases of a class, and for an area of exactly 0 or
        1, where the estimated variance is 0 and says nothing.

    Raises:
        ValueError: for lengths that differ, scores that are not finite, labels other than 0 and 1.

    Source: DeLong, DeLong and Clarke-Pearson 1988, Biometrics 44(3); midranks as in Sun and Xu 2014.
    """
    values, positive = _checked(scores, labels)
    area, variance = _delong([values], positive)
    low, high = _normal_bounds(area[0], variance[0, 0], confidence)
    n = len(values)
    return Interval(area[0], max(low, 0.0), min(high, 1.0), n, 0, n, 1, confidence)


@dataclass(frozen=True)
class AreaDifference:
    """AUC of one classifier minus that of another on the same independent cases, with DeLong's interval and p-value."""

    difference: float
    low: float
    high: float
    p: float


def delong_difference(
    a: npt.ArrayLike, b: npt.ArrayLike, labels: npt.ArrayLike, *, confidence: float = 0.95
) -> AreaDifference:
    """Compare two correlated ROC curves: AUC of ``a`` minus AUC of ``b``.

    Args:
        a: (N,) scores of the first classifier.
        b: (N,) of the second, on the same cases.
        labels: (N,) True or 1 for positive.
        confidence: coverage, in (0, 1).

    Returns:
        Bounds and p are NaN where they are not defined; p is 1 where the two rank all cases alike.

    Raises:
        ValueError: as :func:`delong_interval`.

    Source: as there.
    """
    (first, positive), (second, _) = _checked(a, labels), _checked(b, labels)
    areas, covariance = _delong([first, second], positive)
    difference = float(areas[0] - areas[1])
    variance = float(covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1])
    if variance <= 1e-15:
        alike = difference == 0
        return AreaDifference(difference, *((0.0, 0.0, 1.0) if alike else (math.nan, math.nan, math.nan)))
    p = float(2 * norm.sf(abs(difference) / math.sqrt(variance)))
    return AreaDifference(difference, *_normal_bounds(difference, variance, confidence), p)


class Classified:
    """Class probabilities of images with their reference, and what can be measured on them.

    For two classes, class 1 is the positive one: ``auc``, ``sensitivity_of_roc`` and, with a threshold, ``sensitivity``
    and ``specificity`` are of its probability. For more, ``auc`` is the mean of the one-vs-rest areas of the classes
    that occur (macro) and ``auc:<k>`` is that of class k.

    Args:
        probabilities: (N, K), rows summing to 1.
        labels: (N,) reference classes in 0..K-1.
        patients: (N,) whose each is; None: each is its own patient.
        threshold: of the positive class's probability, fixed beforehand; two classes only.
        specificity: where ``sensitivity_of_roc`` is read off each curve.

    Raises:
        ValueError: for other shapes or values, or a threshold with more than two classes.
    """

    def __init__(
        self,
        probabilities: npt.ArrayLike,
        labels: npt.ArrayLike,
        *,
        patients: npt.ArrayLike | None = None,
        threshold: float | None = None,
        specificity: float = 0.9,
    ) -> None:
        self.probabilities: Array = np.asarray(probabilities, dtype=np.float64)
        self.labels: Labels = np.asarray(labels, dtype=np.intp)
        self.calibration: Calibration = measure_calibration(self.probabilities, self.labels, bins=BINS, class_axis=1)
        if not self.calibration.n:
            raise ValueError("no image was scored")
        people = np.arange(len(self.labels)) if patients is None else np.asarray(patients)
        if people.shape != self.labels.shape:
            raise ValueError(f"patients {people.shape} must have one entry per image {self.labels.shape}")
        self.patients: Labels = np.unique(people, return_inverse=True)[1]
        self.classes = self.probabilities.shape[1]
        self.predicted: Labels = self.probabilities.argmax(axis=1)
        if threshold is not None and self.classes != 2:
            raise ValueError("a threshold is of the positive one of two classes")
        if not 0 <= specificity <= 1:
            raise ValueError(f"a specificity lies in [0, 1], not at {specificity}")
        self.threshold, self.specificity = threshold, specificity
        self._present = [k for k in range(self.classes) if (self.labels == k).any()]
        self._rankings = {
            k: _Ranking(self.probabilities[:, k], self.labels == k)
            for k in ([1] if self.classes == 2 else self._present)
            if 0 < (self.labels == k).sum() < len(self.labels)
        }
        edges = np.linspace(0.0, 1.0, BINS + 1)[1:-1]
        confidence = self.probabilities.max(axis=1)
        in_bin = np.eye(BINS)[np.searchsorted(edges, confidence, side="left")]
        self._gaps = in_bin * ((self.predicted == self.labels) - confidence)[:, None]
        self._squares = ((self.probabilities - np.eye(self.classes)[self.labels]) ** 2).sum(axis=1)

    @property
    def n_patients(self) -> int:
        """Distinct patients."""
        return int(self.patients.max()) + 1

    @property
    def independent(self) -> bool:
        """Whether every image is of another patient, as DeLong's interval supposes."""
        return self.n_patients == len(self.labels)

    def confusion(self) -> npt.NDArray[np.int64]:
        """(K, K) images by reference (rows) and most probable class (columns)."""
        table = np.zeros((self.classes, self.classes), dtype=np.int64)
        np.add.at(table, (self.labels, self.predicted), 1)
        return table

    def measures(self, weights: npt.ArrayLike | None = None) -> dict[str, Array]:
        """Every measure for (R, N) weights of the images; (1,) without. NaN where weights leave it undefined."""
        given = np.ones((1, len(self.labels))) if weights is None else np.asarray(weights, dtype=np.float64)
        total = given.sum(axis=1)
        found: dict[str, Array] = {}
        undefined = np.full(len(given), np.nan)
        areas = {k: ranking.area(given) for k, ranking in self._rankings.items()}
        if self.classes == 2:
            found["auc"] = areas.get(1, undefined)
            ranking = self._rankings.get(1)
            found["sensitivity_of_roc"] = undefined if ranking is None else ranking.sensitivity(given, self.specificity)
        else:
            found["auc"] = np.mean(list(areas.values()), axis=0) if areas else undefined
            found |= {f"auc:{k}": area for k, area in areas.items()}
        recalls = {k: self._share(given, self.labels == k, self.predicted == k) for k in self._present}
        found["balanced_accuracy"] = np.mean(list(recalls.values()), axis=0)
        found["accuracy"] = _divide(given @ (self.predicted == self.labels), total)
        if self.threshold is not None:
            called = self.probabilities[:, 1] >= self.threshold
            found["sensitivity"] = self._share(given, self.labels == 1, called)
            found["specificity"] = self._share(given, self.labels == 0, ~called)
        found["ece"] = _divide(np.abs(given @ self._gaps).sum(axis=1), total)
        found["brier"] = _divide(given @ self._squares, total)
        return found | {f"recall:{k}": recall for k, recall in recalls.items()}

    def intervals(self, *, confidence: float = 0.95, resamples: int = RESAMPLES, seed: int = 0) -> dict[str, Interval]:
        """Every measure with a percentile bootstrap interval over patients.

        A resampled patient brings all images. Resamples that leave a measure undefined are left out of its interval;
        where that is half of them, or with one patient, there is none.

        Source: Efron 1979; Rutter 2000, Academic Radiology 7(6).
        """
        values = {name: float(value[0]) for name, value in self.measures().items()}
        resampled = self._resampled(resamples, seed)
        return {name: self._interval(value, resampled[name], confidence, resamples) for name, value in values.items()}

    def differences(
        self, other: Classified, *, confidence: float = 0.95, resamples: int = RESAMPLES, seed: int = 0
    ) -> dict[str, Interval]:
        """Measures of this classifier minus those of another one of the same images, from the same resamples.

        Raises:
            ValueError: if labels or patients differ.
        """
        if not (np.array_equal(self.labels, other.labels) and np.array_equal(self.patients, other.patients)):
            raise ValueError("the two must be of the same images in the same order")
        own, theirs = self.measures(), other.measures()
        first, second = (one._resampled(resamples, seed) for one in (self, other))
        return {
            name: self._interval(
                float(own[name][0] - theirs[name][0]), first[name] - second[name], confidence, resamples
            )
            for name in own
            if name in theirs
        }

    def _share(self, weights: Array, among: Bools, of: Bools) -> Array:
        return _divide(weights @ (among & of), weights @ among)

    def _resampled(self, resamples: int, seed: int) -> Mapping[str, Array]:
        generator = np.random.default_rng(seed)
        parts = [
            self.measures(resampling_weights(self.n_patients, size, generator)[:, self.patients])
            for size in resampling_blocks(resamples, self.n_patients + 4 * len(self.labels))
        ]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _interval(self, estimate: float, resampled: Array, confidence: float, resamples: int) -> Interval:
        if not 0 < confidence < 1 or resamples < 1:
            raise ValueError(f"confidence {confidence} must lie between 0 and 1, resamples {resamples} be at least 1")
        defined = resampled[~np.isnan(resampled)]
        low = high = math.nan
        if self.n_patients > 1 and not math.isnan(estimate) and len(defined) > _LEAST_DEFINED * resamples:
            low, high = (float(q) for q in np.quantile(defined, [(1 - confidence) / 2, (1 + confidence) / 2]))
        return Interval(estimate, low, high, len(self.labels), 0, self.n_patients, 1, confidence)


class _Ranking:
    """Scores sorted once: a resample changes only how often each case counts."""

    def __init__(self, scores: Array, positive: Bools) -> None:
        self._order = np.argsort(scores, kind="stable")
        self.distinct, self._starts = np.unique(scores[self._order], return_index=True)
        self._positive = positive[self._order]

    def counts(self, weights: Array) -> tuple[Array, Array]:
        """(R, M) weight of positives and of negatives at every distinct score, scores increasing."""
        ordered = weights[:, self._order]
        up, down = (np.add.reduceat(ordered * own, self._starts, axis=1) for own in (self._positive, ~self._positive))
        return up, down

    def area(self, weights: Array) -> Array:
        up, down = self.counts(weights)
        wins = np.einsum("rm,rm->r", up, np.cumsum(down, axis=1) - 0.5 * down)
        return _divide(wins, up.sum(axis=1) * down.sum(axis=1))

    def sensitivity(self, weights: Array, specificity: float) -> Array:
        """(R,) the highest sensitivity at no less than this specificity; 0 where no score is so specific."""
        up, down = (part[:, ::-1].cumsum(axis=1) for part in self.counts(weights))
        allowed = down <= (1 - specificity + _SLACK) * down[:, -1:]
        reached = np.where(allowed, up, 0.0).max(axis=1)
        return np.where(down[:, -1] > 0, _divide(reached, up[:, -1]), np.nan)


def _divide(part: Array, whole: Array) -> Array:
    return np.divide(part, whole, out=np.full(len(whole), np.nan), where=whole > 0)


def _delong(arms: list[Array], positive: Bools) -> tuple[Array, Array]:
    """(A,) areas and their (A, A) covariance."""
    m, n = int(positive.sum()), int((~positive).sum())
    if not m or not n:
        return np.full(len(arms), np.nan), np.full((len(arms), len(arms)), np.nan)
    above = np.empty((len(arms), m))  # share of the negatives that each positive beats
    below = np.empty((len(arms), n))
    for row, scores in enumerate(arms):
        ranks = rankdata(scores)
        above[row] = (ranks[positive] - rankdata(scores[positive])) / n
        below[row] = 1 - (ranks[~positive] - rankdata(scores[~positive])) / m
    areas = above.mean(axis=1)
    if m < 2 or n < 2:
        return areas, np.full((len(arms), len(arms)), np.nan)
    return areas, np.atleast_2d(np.cov(above)) / m + np.atleast_2d(np.cov(below)) / n


def _normal_bounds(estimate: float, variance: float, confidence: float) -> tuple[float, float]:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, not {confidence}")
    if not variance > 0:
        return math.nan, math.nan
    reach = float(norm.ppf((1 + confidence) / 2)) * math.sqrt(variance)
    return estimate - reach, estimate + reach


def _checked(scores: npt.ArrayLike, labels: npt.ArrayLike) -> tuple[Array, Bools]:
    values, given = np.asarray(scores, dtype=np.float64), np.asarray(labels)
    if values.ndim != 1 or values.shape != given.shape:
        raise ValueError(f"scores {values.shape} and labels {given.shape} must be two lists of one length")
    if not np.isfinite(values).all():
        raise ValueError("a score is not finite; leave its case out, and say so")
    if not np.isin(given, (0, 1)).all():
        raise ValueError(f"labels must be 0 or 1, not {np.unique(given)[:5].tolist()}")
    return values, given.astype(bool)
