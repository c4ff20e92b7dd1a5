"""``medkd compare`` with classifiers: two evaluations of the same images, in pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medkd.errors import InputError
from medkd.metrics.classification import delong_difference
from medkd.metrics.image_scores import ImageScore, OperatingPoint, classified, in_order, read_image_evaluation
from medkd.report.image_report import TITLES, write_image_comparison
from medkd.report.numbers import count

_COMPARED = ("auc", "balanced_accuracy", "accuracy", "sensitivity_of_roc", "ece", "brier")


@dataclass(frozen=True)
class ImageDifference:
    """One measure of two classifiers on the same images; the difference is A − B.

    Attributes:
        measure: its key in summary.json.
        title: as people read it.
        a: of the model in question.
        b: of the other.
        difference: a − b.
        low: lower end of its bootstrap interval; NaN where there is none.
        high: upper end.
        p: of DeLong's test; None where it does not apply.
    """

    measure: str
    title: str
    a: float
    b: float
    difference: float
    low: float
    high: float
    p: float | None


@dataclass(frozen=True)
class ImageComparison:
    """Two evaluations of classifiers compared.

    Attributes:
        cases: images that both scored.
        patients: whose they are.
        only_in_one: images in one of them only, and in no difference.
        differences: per measure.
        report: the page, if one was asked for.
    """

    cases: int
    patients: int
    only_in_one: int
    differences: list[ImageDifference]
    report: Path | None


def compare_images(eval_a: str | Path, eval_b: str | Path, out: str | Path | None = None) -> ImageComparison:
    """Compare two evaluation folders of classifiers on the images that both scored.

    Args:
        eval_a: the model in question.
        eval_b: what it is compared with.
        out: the HTML page to write, if any.

    Raises:
        InputError: a folder cannot be read, the two have other classes, no image in common, or disagree about an
            image's class or patient.
    """
    (first, summary), (second, other) = read_image_evaluation(eval_a), read_image_evaluation(eval_b)
    if summary["classes"] != other["classes"]:
        problem = f"has the classes {other['classes']}, {eval_a} has {summary['classes']}"
        raise InputError(eval_b, problem, "evaluate both on the same datalist")
    mine, theirs = _shared(first, second), _shared(second, first)
    if not mine:
        raise InputError(eval_a, f"has no image in common with {eval_b}", "compare evaluations of the same datalist")
    for one, another in zip(mine, theirs, strict=True):
        if (one.label, one.patient) != (another.label, another.patient):
            problem = f"gives {one.case} another class or patient than {eval_a}"
            raise InputError(eval_b, problem, "evaluate both on the same datalist")
    point = OperatingPoint(specificity=float((summary.get("operating_point") or {}).get("specificity", 0.9)))
    a, b = classified(mine, point), classified(theirs, point)
    values = a.measures(), b.measures()
    intervals = a.differences(b)
    test: float | None = None
    if a.classes == 2 and a.independent and 0 < int(a.labels.sum()) < len(a.labels):
        test = delong_difference(a.probabilities[:, 1], b.probabilities[:, 1], a.labels).p
    differences = [
        ImageDifference(
            name, TITLES[name], float(values[0][name][0]), float(values[1][name][0]), intervals[name].estimate,
            intervals[name].low, intervals[name].high, test if name == "auc" else None,
        )
        for name in _COMPARED
        if name in intervals
    ]  # fmt: skip
    only = len({score.case for score in first} ^ {score.case for score in second})
    report = None
    if out is not None:
        cohort = f"{count(len(mine), 'image')} in both evaluations; {only} in only one of them, which are in no number."
        rows: list[dict[str, Any]] = [vars(difference) for difference in differences]
        report = write_image_comparison(eval_a, eval_b, rows, (mine, theirs), summary["classes"], out, cohort=cohort)
    return ImageComparison(len(mine), a.n_patients, only, differences, report)


def _shared(scores: Sequence[ImageScore], others: Sequence[ImageScore]) -> list[ImageScore]:
    known = {score.case for score in others}
    kept = [score for score in scores if score.case in known]
    return in_order(kept) if kept else []
