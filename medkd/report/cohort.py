"""What a report says about an arm's scores: means with intervals, counts of empty and missed, paired differences."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from medkd.metrics.cases import CaseScore
from medkd.metrics.statistics import PairedResult, bootstrap_ci, paired_test
from medkd.report.run_folder import Evaluation


@dataclass(frozen=True)
class Measure:
    """A score that is reported.

    Attributes:
        key: as in PairedResult mappings: dice, hd95, surface_dice, assd.
        title: as people read it.
        decimals: digits after the point.
        is_distance: in mm or px, smaller is better, infinite where a structure was missed.
        of: reads it from a CaseScore; infinite distances stay infinite.
        penalized: the same with the image diagonal in place of infinity.
    """

    key: str
    title: str
    decimals: int
    is_distance: bool
    of: Callable[[CaseScore], float]
    penalized: Callable[[CaseScore], float]


DICE = Measure("dice", "Dice", 3, False, lambda s: s.dice, lambda s: s.dice)
SURFACE_DICE = Measure("surface_dice", "Surface Dice", 3, False, lambda s: s.surface_dice, lambda s: s.surface_dice)
HD95 = Measure("hd95", "HD95", 1, True, lambda s: s.hd95, lambda s: s.hd95_penalized)
ASSD = Measure("assd", "ASSD", 2, True, lambda s: s.assd, lambda s: s.assd_penalized)
MEASURES = (DICE, HD95, SURFACE_DICE, ASSD)


@dataclass(frozen=True)
class Statistics:
    """Mean of the finite values with its interval: ``n`` of them over ``n_patients``, beside ``n_infinite`` others."""

    mean: float
    low: float
    high: float
    sd: float
    median: float
    n: int
    n_patients: int
    n_infinite: int


@dataclass(frozen=True)
class Counts:
    """What stands behind the means: structures are counted once per case and seed."""

    cases: int
    patients: int
    seeds: int
    structures: int
    empty: int
    missed: int
    false_positive: int
    failed: int


@dataclass(frozen=True)
class CaseValue:
    """One case's value of a measure: the mean over its classes that are not empty, and whether one was missed."""

    seed: int
    patient: str
    case: str
    value: float
    is_missed: bool


def class_names(evaluations: Sequence[Evaluation]) -> list[str]:
    """The classes scored, by label value."""
    found = {score.class_index: score.class_name for evaluation in evaluations for score in evaluation.scores}
    return [found[index] for index in sorted(found)]


def case_values(
    evaluations: Sequence[Evaluation], measure: Measure, *, class_name: str | None = None, is_penalized: bool = False
) -> list[CaseValue]:
    """Every case's value, by seed and case; NaN where all its structures are empty, inf where one was missed."""
    read = measure.penalized if is_penalized else measure.of
    values = []
    for seed, evaluation in enumerate(evaluations):
        cases: dict[tuple[str, str], list[CaseScore]] = {}
        for score in sorted(evaluation.scores, key=lambda s: (s.case, s.class_index)):
            if class_name is None or score.class_name == class_name:
                cases.setdefault((score.patient, score.case), []).append(score)
        for (patient, case), scores in cases.items():
            defined = [read(score) for score in scores if not math.isnan(read(score))]
            mean = math.fsum(defined) / len(defined) if defined else math.nan
            values.append(CaseValue(seed, patient, case, mean, any(score.missed for score in scores)))
    return sorted(values, key=lambda value: (value.seed, value.case))


def patient_means(values: Sequence[CaseValue]) -> dict[str, float]:
    """Mean of each patient's finite values over cases and seeds; patients without one are absent."""
    grouped: dict[str, list[float]] = {}
    for value in values:
        if math.isfinite(value.value):
            grouped.setdefault(value.patient, []).append(value.value)
    return {patient: math.fsum(found) / len(found) for patient, found in sorted(grouped.items())}


def statistics(values: Sequence[CaseValue]) -> Statistics:
    """Mean, bootstrap interval over patients (and seeds, where there are several), SD and median of finite values."""
    finite = [value for value in values if math.isfinite(value.value)]
    array = np.array([value.value for value in finite], dtype=np.float64)
    seeds = [value.seed for value in finite] if len({value.seed for value in finite}) > 1 else None
    mean = bootstrap_ci(array, patients=[value.patient for value in finite], seeds=seeds)
    sd = float(array.std(ddof=1)) if len(array) > 1 else math.nan
    median = float(np.median(array)) if len(array) else math.nan
    infinite = sum(math.isinf(value.value) for value in values)
    return Statistics(mean.estimate, mean.low, mean.high, sd, median, mean.n, mean.n_patients, infinite)


def counts(evaluations: Sequence[Evaluation], class_name: str | None = None) -> Counts:
    """Count cases, patients and structures, and how many were empty, missed, invented, or failed."""
    scores = [s for e in evaluations for s in e.scores if class_name in (None, s.class_name)]
    return Counts(
        cases=len({score.case for score in scores}),
        patients=len({score.patient for score in scores}),
        seeds=len(evaluations),
        structures=len(scores),
        empty=sum(score.empty for score in scores),
        missed=sum(score.missed for score in scores),
        false_positive=sum(score.false_positive for score in scores),
        failed=len({case for evaluation in evaluations for case in evaluation.failed_cases}),
    )


def shared_values(
    subject: Sequence[Evaluation], baseline: Sequence[Evaluation], measure: Measure, *, class_name: str | None = None
) -> list[tuple[CaseValue, CaseValue]]:
    """(Subject, baseline) of every case and seed that both scored; a missed structure counts the image diagonal."""
    first, second = (
        {
            (value.seed, value.case): value
            for value in case_values(arm, measure, class_name=class_name, is_penalized=True)
            if not math.isnan(value.value)
        }
        for arm in (subject, baseline)
    )
    return [(first[key], second[key]) for key in sorted(first.keys() & second.keys())]


def paired(shared: Sequence[tuple[CaseValue, CaseValue]]) -> PairedResult:
    """Test subject − baseline over what both scored."""
    seeds = [ours.seed for ours, _ in shared]
    return paired_test(
        np.array([ours.value for ours, _ in shared], dtype=np.float64),
        np.array([theirs.value for _, theirs in shared], dtype=np.float64),
        patients=[ours.patient for ours, _ in shared],
        seeds=seeds if len(set(seeds)) > 1 else None,
    )


def patient_pairs(shared: Sequence[tuple[CaseValue, CaseValue]]) -> dict[str, tuple[float, float]]:
    """Each patient's (baseline, subject) means over cases and seeds."""
    ours = patient_means([pair[0] for pair in shared])
    theirs = patient_means([pair[1] for pair in shared])
    return {patient: (theirs[patient], ours[patient]) for patient in ours}


def unit(evaluations: Sequence[Evaluation]) -> str:
    """``mm``, or ``px`` for data without spacing."""
    return next((score.unit for evaluation in evaluations for score in evaluation.scores), "mm")
