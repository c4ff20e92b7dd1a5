"""What a table of scores supports: intervals over patients and seeds, paired tests, relative scores."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats

Array = npt.NDArray[np.float64]
Codes = npt.NDArray[np.intp]

# Resamples are drawn in blocks of about this many weights, which bounds memory at some tens of MB for any cohort.
_BLOCK_WEIGHTS = 2_000_000


@dataclass(frozen=True)
class Interval:
    """A mean with its bootstrap interval.

    Args:
        estimate: mean of the values; NaN without values.
        low: lower bound; NaN if there is nothing to resample (fewer than two patients and two seeds).
        high: upper bound.
        n: values used.
        n_nan: values left out because they were NaN.
        n_patients: distinct patients among the values used.
        n_seeds: distinct seeds among the values used.
        confidence: coverage aimed at.
    """

    estimate: float
    low: float
    high: float
    n: int
    n_nan: int
    n_patients: int
    n_seeds: int
    confidence: float


@dataclass(frozen=True)
class PairedResult:
    """A paired comparison of two arms; positive differences mean that the first arm has the larger values.

    Args:
        mean_difference: mean of a - b over the pairs.
        low: lower bound of its hierarchical bootstrap interval.
        high: upper bound.
        wilcoxon_p: two-sided Wilcoxon signed-rank test over patient means; NaN without pairs.
        permutation_p: two-sided sign-flip test over patients; NaN without pairs.
        n: pairs used.
        n_nan: pairs left out because one side was NaN.
        n_patients: distinct patients among the pairs used.
        n_seeds: distinct seeds among the pairs used.
        confidence: coverage aimed at.
    """

    mean_difference: float
    low: float
    high: float
    wilcoxon_p: float
    permutation_p: float
    n: int
    n_nan: int
    n_patients: int
    n_seeds: int
    confidence: float


def bootstrap_ci(
    values: npt.ArrayLike,
    *,
    patients: npt.ArrayLike | None = None,
    seeds: npt.ArrayLike | None = None,
    confidence: float = 0.95,
    resamples: int = 5000,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap interval of the mean, over patients and seeds.

    Patients are resampled with replacement and so are seeds, independently and crossed: a resampled patient is taken
    in every resampled seed, with all its slices and classes. Values count equally, so a patient with more of them
    weighs more, in the mean and in the interval alike. With two factors this is the pigeonhole bootstrap: on the wide
    side. With few patients (about ten or fewer) any percentile interval is on the narrow side. Percentile and
    not BCa, since the jackknife that BCa needs is not defined for two crossed factors.

    Args:
        values: (N,) scores; NaN is left out and counted in ``n_nan``.
        patients: (N,) patient of each value. None with ``seeds``: only seeds are resampled; None without: each value is
            its own patient.
        seeds: (N,) training seed of each value. None: one seed.
        confidence: coverage, in (0, 1).
        resamples: bootstrap samples.
        seed: of the resampling; the result does not depend on the order of labeled values.

    Returns:
        Mean and interval; both bounds are NaN if there are fewer than two patients and fewer than two seeds.

    Raises:
        ValueError: for infinite values (penalize or count them first), labels of another length, or a confidence
            or number of resamples out of range.

    Source: Efron 1979; Owen 2007, arXiv:0712.1111 (two crossed factors).
    """
    array = _checked_values("values", values)
    _check_confidence(confidence, resamples)
    patient_codes, seed_codes = _checked_groups(len(array), patients, seeds)
    kept = ~np.isnan(array)
    n_nan = int(len(array) - kept.sum())
    array, patient_codes, seed_codes = array[kept], _compact(patient_codes[kept]), _compact(seed_codes[kept])
    if len(array) == 0:
        return Interval(math.nan, math.nan, math.nan, 0, n_nan, 0, 0, confidence)
    shape = (int(seed_codes.max()) + 1, int(patient_codes.max()) + 1)
    sums, counts = np.zeros(shape), np.zeros(shape)
    np.add.at(sums, (seed_codes, patient_codes), array)
    np.add.at(counts, (seed_codes, patient_codes), 1.0)
    low = high = math.nan
    if max(shape) > 1:
        means = _resampled_means(sums, counts, resamples, np.random.default_rng(seed))
        low, high = (float(q) for q in np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2]))
    return Interval(
        float(array.mean()), low, high, len(array), n_nan, n_patients=shape[1], n_seeds=shape[0], confidence=confidence
    )


def paired_test(
    a: npt.ArrayLike,
    b: npt.ArrayLike,
    *,
    patients: npt.ArrayLike | None = None,
    seeds: npt.ArrayLike | None = None,
    confidence: float = 0.95,
    resamples: int = 5000,
    seed: int = 0,
) -> PairedResult:
    """Compare two arms scored on the same cases.

    The interval is `bootstrap_ci` of a - b. Both tests treat patients as the independent unit and seeds as fixed: the
    Wilcoxon test ranks each patient's mean difference (zeros dropped, scipy's "wilcox"), the permutation test
    flips the sign of all differences of a patient together, over all sign patterns where these are no more than
    ``resamples``, else over as many random ones (its p-value then counts the observed pattern as one of them).

    Args:
        a: (N,) scores of the first arm.
        b: (N,) scores of the second arm on the same cases; a pair with a NaN is left out and counted.
        patients: (N,) patient of each pair. None with ``seeds``: seeds are resampled and are the unit of the tests;
            None without: each pair is its own patient.
        seeds: (N,) training seed of each pair. None: one seed.
        confidence: coverage of the interval, in (0, 1).
        resamples: bootstrap samples and sign patterns.
        seed: of both.

    Raises:
        ValueError: as `bootstrap_ci`, or if ``a`` and ``b`` have different lengths.

    Source: Wilcoxon 1945; Fisher 1935 (sign flips), Phipson and Smyth 2010 (p-value of random permutations).
    """
    first, second = _checked_values("a", a), _checked_values("b", b)
    if len(first) != len(second):
        raise ValueError(f"a has {len(first)} values and b {len(second)}; they must be scores of the same cases")
    differences = first - second
    interval = bootstrap_ci(
        differences, patients=patients, seeds=seeds, confidence=confidence, resamples=resamples, seed=seed
    )
    patient_codes, seed_codes = _checked_groups(len(differences), patients, seeds)
    unit_codes = seed_codes if patients is None and seeds is not None else patient_codes
    kept = ~np.isnan(differences)
    codes = _compact(unit_codes[kept])
    sums = np.bincount(codes, weights=differences[kept]).astype(np.float64)
    return PairedResult(
        interval.estimate,
        interval.low,
        interval.high,
        wilcoxon_p=_wilcoxon_p(sums / np.bincount(codes)) if len(sums) else math.nan,
        permutation_p=_sign_flip_p(sums, resamples, np.random.default_rng(seed)) if len(sums) else math.nan,
        n=interval.n,
        n_nan=interval.n_nan,
        n_patients=interval.n_patients,
        n_seeds=interval.n_seeds,
        confidence=confidence,
    )


def relative_score(student: float, reference: float) -> float:
    """The student's score in percent of a reference's: 100 × student / reference ("relative accuracy").

    Say beside the number which reference it is: the teacher, or a model of the student's size trained on all labels.
    For segmentation use the mean Dice.

    Args:
        student: a score for which larger is better, at least 0.
        reference: the same score of the reference, above 0.

    Raises:
        ValueError: if a score is negative, NaN or infinite, or the reference is 0.
    """
    if not (math.isfinite(student) and math.isfinite(reference) and student >= 0 and reference > 0):
        raise ValueError(f"relative score of {student} against {reference}: needs finite scores, reference above 0")
    return 100.0 * student / reference


def _checked_values(name: str, values: npt.ArrayLike) -> Array:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1:
        raise ValueError(f"{name} must be one-dimensional, not {array.shape}; give patients and seeds as labels")
    if infinite := int(np.isinf(array).sum()):
        raise ValueError(
            f"{name} has {infinite} infinite of {len(array)}; count them apart, or use the penalized distances"
        )
    return array


def _check_confidence(confidence: float, resamples: int) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, not {confidence}")
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, not {resamples}")


def _checked_groups(n: int, patients: npt.ArrayLike | None, seeds: npt.ArrayLike | None) -> tuple[Codes, Codes]:
    """(N,) patient and (N,) seed of each value as integer codes in the labels' sorted order."""
    codes = []
    for name, given in (("patients", patients), ("seeds", seeds)):
        if given is None:
            alone = name == "patients" and seeds is None
            codes.append(np.arange(n) if alone else np.zeros(n, dtype=np.intp))
            continue
        labels = np.asarray(given)
        if labels.shape != (n,):
            raise ValueError(f"{name} {labels.shape} must have one label per value ({n},)")
        codes.append(np.unique(labels, return_inverse=True)[1])
    return codes[0], codes[1]


def _compact(codes: Codes) -> Codes:
    """The codes renumbered without gaps, after values were left out."""
    return np.unique(codes, return_inverse=True)[1]


def _resampled_means(sums: Array, counts: Array, resamples: int, generator: np.random.Generator) -> Array:
    """Means of bootstrap samples from the (seeds, patients) tables of sums and counts.

    A resample that happens to take no value (possible only if seeds do not share patients) has no mean and is skipped.
    """
    n_seeds, n_patients = sums.shape
    means = []
    for size in resampling_blocks(resamples, n_seeds + n_patients):
        seed_weights = resampling_weights(n_seeds, size, generator)
        patient_weights = resampling_weights(n_patients, size, generator)
        totals = np.einsum("rp,rp->r", seed_weights @ sums, patient_weights)
        taken = np.einsum("rp,rp->r", seed_weights @ counts, patient_weights)
        means.append(totals[taken > 0] / taken[taken > 0])
    return np.concatenate(means)


def resampling_weights(n: int, resamples: int, generator: np.random.Generator) -> Array:
    """(resamples, n) how often each of n units is drawn in n draws with replacement."""
    draws = generator.integers(n, size=(resamples, n)) + n * np.arange(resamples)[:, None]
    return np.bincount(draws.ravel(), minlength=resamples * n).reshape(resamples, n).astype(np.float64)


def resampling_blocks(resamples: int, width: int) -> Iterator[int]:
    """Sizes that add up to ``resamples``, each small enough for a table of ``width`` columns."""
    block = max(1, _BLOCK_WEIGHTS // width)
    for start in range(0, resamples, block):
        yield min(block, resamples - start)


def _wilcoxon_p(patient_means: Array) -> float:
    if not patient_means.any():
        return 1.0  # no rank to sum: nothing speaks against equality
    return float(stats.wilcoxon(patient_means).pvalue)


def _sign_flip_p(patient_sums: Array, resamples: int, generator: np.random.Generator) -> float:
    n = len(patient_sums)
    # Rounding must not make a pattern look less extreme than its mirror image.
    threshold = abs(patient_sums.sum()) - 1e-12 * np.abs(patient_sums).sum()
    if 2**n <= resamples:
        patterns = (np.arange(2**n)[:, None] >> np.arange(n)) & 1
        return float(np.mean(np.abs((1.0 - 2.0 * patterns) @ patient_sums) >= threshold))
    extreme = 0
    for size in resampling_blocks(resamples, n):
        signs = 1.0 - 2.0 * generator.integers(2, size=(size, n))
        extreme += int(np.sum(np.abs(signs @ patient_sums) >= threshold))
    return (1 + extreme) / (1 + resamples)
