"""How well scores separate two classes: the area under the ROC curve, with intervals over patients."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_matrix
from sklearn.metrics import roc_auc_score

from medkd.metrics.statistics import Interval, resampling_blocks, resampling_weights

Array = npt.NDArray[np.float64]
Codes = npt.NDArray[np.intp]

_LEAST_DEFINED = 0.5  # share of resamples that must hold both classes for an interval to mean something


def roc_auc(scores: npt.ArrayLike, labels: npt.ArrayLike) -> float:
    """Area under the ROC curve: the chance that a positive scores above a negative, ties counting half.

    Args:
        scores: (N,) larger means more positive; a NaN is an error, since it is no answer.
        labels: (N,) True or 1 for positive.

    Returns:
        In [0, 1]; NaN unless both classes occur.

    Raises:
        ValueError: for lengths that differ, scores that are NaN, labels other than 0 and 1.
    """
    values, positive = _checked(scores, labels)
    if np.isnan(values).any():
        count = int(np.isnan(values).sum())
        raise ValueError(f"{count} of {len(values)} scores are NaN; leave these cases out, and say so")
    if positive.all() or not positive.any():
        return math.nan
    return float(roc_auc_score(positive, values))


def auc_interval(
    scores: npt.ArrayLike,
    labels: npt.ArrayLike,
    *,
    patients: npt.ArrayLike | None = None,
    strata: npt.ArrayLike | None = None,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Area under the ROC curve with a percentile bootstrap interval over patients.

    A resampled patient brings all its tiles or slides, positive and negative. Resamples without one of the classes
    have no AUC and are left out; where that is more than half of them, there is no interval.

    Args:
        scores: (N,) larger means more positive; NaN is left out and counted in ``n_nan``.
        labels: (N,) True or 1 for positive.
        patients: (N,) whose each is. None: each is its own patient.
        strata: (N,) the model each score is of. Scores of several models (folds, seeds) are on several scales: only
            those of one are compared, and the AUC is the share of all such pairs in the right order.
        confidence: coverage, in (0, 1).
        resamples: bootstrap samples.
        seed: of the resampling.

    Returns:
        AUC and interval; the bounds are NaN with fewer than two patients, the AUC too with fewer than two classes.

    Raises:
        ValueError: for lengths that differ, labels other than 0 and 1, a confidence or number of resamples out of
            range.

    Source: Efron 1979; Rutter 2000, Academic Radiology 7(6), for resampling patients rather than their parts.
    """
    table = _Table.of([scores], labels, patients, strata)
    return table.interval(np.array([1.0]), confidence, resamples, seed)


def auc_difference(
    a: npt.ArrayLike,
    b: npt.ArrayLike,
    labels: npt.ArrayLike,
    *,
    patients: npt.ArrayLike | None = None,
    strata: npt.ArrayLike | None = None,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """AUC of ``a`` minus AUC of ``b`` on the same cases, with an interval from the same resampled patients.

    Args:
        a: (N,) scores of the first arm; a case where one of the two is NaN is left out and counted.
        b: (N,) scores of the second arm.
        labels: as for :func:`auc_interval`, like all others.
        patients: as there.
        strata: as there.
        confidence: as there.
        resamples: as there.
        seed: as there.

    Raises:
        ValueError: as there.
    """
    table = _Table.of([a, b], labels, patients, strata)
    return table.interval(np.array([1.0, -1.0]), confidence, resamples, seed)


@dataclass(frozen=True)
class _Table:
    """What a bootstrap of AUCs needs: scores ranked once, since a resample only changes how often patients count."""

    ranked: Sequence[Sequence[tuple[csr_matrix, csr_matrix]]]  # arm → stratum → (patients, ranks) positives, negatives
    n: int
    n_nan: int
    n_patients: int

    @classmethod
    def of(
        cls,
        arms: Sequence[npt.ArrayLike],
        labels: npt.ArrayLike,
        patients: npt.ArrayLike | None,
        strata: npt.ArrayLike | None,
    ) -> _Table:
        checked = [_checked(scores, labels) for scores in arms]
        values, positive = [scores for scores, _ in checked], checked[0][1]
        kept: npt.NDArray[np.bool_] = np.asarray(~np.isnan(np.stack(values)).any(axis=0))
        people = _codes("patients", patients, kept, each=True)
        strata_of = _codes("strata", strata, kept, each=False)
        n_patients = int(people.max(initial=-1)) + 1
        ranked = [
            [
                _counts(scores[kept][own], positive[kept][own], people[own], n_patients)
                for own in (strata_of == stratum for stratum in np.unique(strata_of))
            ]
            for scores in values
        ]
        return cls(ranked, int(kept.sum()), int((~kept).sum()), n_patients)

    def aucs(self, weights: Array) -> Array:
        """(arms, R) for (R, patients) weights; NaN where a resample has no pair."""
        found = []
        for strata in self.ranked:
            wins, pairs = np.zeros(len(weights)), np.zeros(len(weights))
            for ups, downs in strata:
                up, down = weights @ ups, weights @ downs
                wins += np.einsum("rn,rn->r", up, np.cumsum(down, axis=1) - 0.5 * down)
                pairs += up.sum(axis=1) * down.sum(axis=1)
            found.append(np.divide(wins, pairs, out=np.full(len(weights), np.nan), where=pairs > 0))
        return np.stack(found)

    def interval(self, contrast: Array, confidence: float, resamples: int, seed: int) -> Interval:
        if not 0 < confidence < 1 or resamples < 1:
            raise ValueError(f"confidence {confidence} must lie between 0 and 1, resamples {resamples} be at least 1")
        estimate = float((contrast @ self.aucs(np.ones((1, self.n_patients))))[0]) if self.n else math.nan
        low = high = math.nan
        if self.n_patients > 1 and not math.isnan(estimate):
            found = np.concatenate([contrast @ self.aucs(weights) for weights in self._resamples(resamples, seed)])
            found = found[~np.isnan(found)]
            if len(found) > _LEAST_DEFINED * resamples:
                low, high = (float(q) for q in np.quantile(found, [(1 - confidence) / 2, (1 + confidence) / 2]))
        return Interval(estimate, low, high, self.n, self.n_nan, self.n_patients, 1, confidence)

    def _resamples(self, resamples: int, seed: int) -> Iterator[Array]:
        generator = np.random.default_rng(seed)
        widest = max(ups.shape[1] for strata in self.ranked for ups, _ in strata)
        for size in resampling_blocks(resamples, self.n_patients + 3 * widest):
            yield resampling_weights(self.n_patients, size, generator)


def _counts(
    values: Array, positive: npt.NDArray[np.bool_], people: Codes, n_patients: int
) -> tuple[csr_matrix, csr_matrix]:
    """(patients, distinct scores) counts of positives and of negatives, scores increasing."""
    distinct, ranks = np.unique(values, return_inverse=True)
    shape = (n_patients, len(distinct))
    return tuple(csr_matrix((own.astype(float), (people, ranks)), shape=shape) for own in (positive, ~positive))


def _checked(scores: npt.ArrayLike, labels: npt.ArrayLike) -> tuple[Array, npt.NDArray[np.bool_]]:
    values, given = np.asarray(scores, dtype=np.float64), np.asarray(labels)
    if values.ndim != 1 or values.shape != given.shape:
        raise ValueError(f"scores {values.shape} and labels {given.shape} must be two lists of one length")
    if not np.isin(given, (0, 1)).all():
        raise ValueError(f"labels must be 0 or 1, not {np.unique(given)[:5].tolist()}")
    return values, given.astype(bool)


def _codes(name: str, labels: npt.ArrayLike | None, kept: npt.NDArray[np.bool_], *, each: bool) -> Codes:
    """The labels of the values kept, as integers without gaps."""
    if labels is None:
        count = int(kept.sum())
        return np.arange(count) if each else np.zeros(count, dtype=np.intp)
    given = np.asarray(labels)
    if given.shape != kept.shape:
        raise ValueError(f"{name} {given.shape} must have one label per score {kept.shape}")
    return np.unique(given[kept], return_inverse=True)[1]
