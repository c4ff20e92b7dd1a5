"""``medkd compare``: two evaluations of the same cases, in pairs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medkd.errors import InputError
from medkd.metrics.image_scores import is_image_evaluation
from medkd.metrics.statistics import PairedResult
from medkd.report import cohort, write_comparison
from medkd.report.run_folder import read_evaluation
from medkd.workflows.image_compare import ImageComparison, compare_images


@dataclass(frozen=True)
class Difference:
    """One measure compared in pairs; the difference is A − B.

    Attributes:
        measure: its key, with the unit of distances: ``dice``, ``hd95_mm``, …
        title: as people read it.
        is_distance: whether smaller is better.
        mean_a: over the cases both scored; a missed structure counts the image diagonal.
        mean_b: of the other.
        result: the test.
    """

    measure: str
    title: str
    is_distance: bool
    mean_a: float
    mean_b: float
    result: PairedResult


@dataclass(frozen=True)
class Comparison:
    """Two evaluations compared.

    Attributes:
        cases: how many cases both scored.
        only_in_one: how many are in one of them only, and in no difference.
        differences: per measure.
        report: the page, if one was asked for.
    """

    cases: int
    only_in_one: int
    differences: list[Difference]
    report: Path | None


def compare(eval_a: str | Path, eval_b: str | Path, out: str | Path | None = None) -> Comparison | ImageComparison:
    """Compare two evaluation folders case by case; those of classifiers as ``compare_images`` does.

    Args:
        eval_a: the model in question.
        eval_b: what it is compared with.
        out: the HTML page to write, if any.

    Raises:
        InputError: a folder cannot be read, or the two have no case in common.
    """
    if is_image_evaluation(eval_a) or is_image_evaluation(eval_b):
        return compare_images(eval_a, eval_b, out)
    first, second = [read_evaluation(eval_a)], [read_evaluation(eval_b)]
    units = cohort.unit(first), cohort.unit(second)
    if units[0] != units[1]:
        raise InputError(
            eval_b, f"measures in {units[1]}, {eval_a} in {units[0]}", "evaluate both on the same datalist"
        )
    cases = [{score.case for score in evaluation[0].scores} for evaluation in (first, second)]
    if not cases[0] & cases[1]:
        raise InputError(eval_a, f"has no case in common with {eval_b}", "compare evaluations of the same datalist")
    differences = [_difference(first, second, measure, units[0]) for measure in cohort.MEASURES]
    report = None
    if out is not None:
        results = {difference.measure: difference.result for difference in differences}
        report = write_comparison(eval_a, eval_b, results, out)
    return Comparison(len(cases[0] & cases[1]), len(cases[0] ^ cases[1]), differences, report)


def _difference(first: list[Any], second: list[Any], measure: cohort.Measure, unit: str) -> Difference:
    shared = cohort.shared_values(first, second, measure)
    means = [math.fsum(pair[side].value for pair in shared) / len(shared) if shared else math.nan for side in (0, 1)]
    title = f"{measure.title}, {unit}" if measure.is_distance else measure.title
    key = f"{measure.key}_{unit}" if measure.is_distance else measure.key
    return Difference(key, title, measure.is_distance, means[0], means[1], cohort.paired(shared))
