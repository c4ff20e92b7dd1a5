"""The evaluation folder of a classifier: per_case.csv with every image's probabilities, and summary.json."""

from __future__ import annotations

import csv
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from medkd.errors import InputError
from medkd.metrics.cases import PER_CASE_FILE, SUMMARY_FILE
from medkd.metrics.classification import RESAMPLES, Classified, delong_interval
from medkd.metrics.statistics import Interval

PROBABILITY = "prob_"
_COLUMNS = ("case", "patient", "class", "predicted", "label")
ThresholdSource = Literal["given", "validation"]


@dataclass(frozen=True)
class ImageScore:
    """One image as a classifier saw it.

    Attributes:
        case: its name.
        patient: whose it is.
        label: its reference class.
        probabilities: one per class.
    """

    case: str
    patient: str
    label: int
    probabilities: tuple[float, ...]

    @property
    def predicted(self) -> int:
        """The most probable class; the first of equals."""
        return max(range(len(self.probabilities)), key=self.probabilities.__getitem__)


@dataclass(frozen=True)
class OperatingPoint:
    """How a threshold on the positive class's probability came about.

    Attributes:
        threshold: positive where the probability is at least this; None where none was fixed beforehand.
        source: ``given`` by the user or chosen on the ``validation`` cases.
        specificity: what was aimed at, and where the ROC curve is read.
        n_chosen_on: validation images it was chosen on.
    """

    threshold: float | None = None
    source: ThresholdSource | None = None
    specificity: float = 0.9
    n_chosen_on: int | None = None


def classified(scores: Sequence[ImageScore], point: OperatingPoint | None = None) -> Classified:
    """The scores, by case, as a table to measure on.

    Raises:
        ValueError: without scores, with a case twice, or with different numbers of classes.
    """
    ordered = in_order(scores)
    point = point or OperatingPoint()
    return Classified(
        [score.probabilities for score in ordered],
        [score.label for score in ordered],
        patients=[score.patient for score in ordered],
        threshold=point.threshold if len(ordered[0].probabilities) == 2 else None,
        specificity=point.specificity,
    )


def in_order(scores: Sequence[ImageScore]) -> list[ImageScore]:
    """The scores by case.

    Raises:
        ValueError: as :func:`classified`.
    """
    ordered = sorted(scores, key=lambda score: score.case)
    if not ordered:
        raise ValueError("no image was scored")
    for former, latter in pairwise(ordered):
        if former.case == latter.case:
            raise ValueError(f"case {latter.case} is there twice")
    if len({len(score.probabilities) for score in ordered}) > 1:
        raise ValueError("the scores have different numbers of classes")
    return ordered


def summarize_images(
    scores: Sequence[ImageScore],
    classes: Mapping[int, str],
    *,
    point: OperatingPoint | None = None,
    patients_known: bool = True,
    seed: int = 0,
) -> dict[str, Any]:
    """The content of summary.json.

    Args:
        scores: of all images, in any order; the result does not depend on it.
        classes: class → name, from 0 without gaps.
        point: the threshold and the specificity aimed at.
        patients_known: whether ``patient`` is more than the image's own name; only said, and DeLong's interval given
            where it is not.
        seed: of the bootstrap over patients.

    Returns:
        Nested dicts of plain Python values; None stands for what is not defined.

    Raises:
        ValueError: as :func:`classified`.
    """
    point = point or OperatingPoint()
    table = classified(scores, point)
    intervals = table.intervals(seed=seed)
    names = [classes[index] for index in range(table.classes)]
    counts = Counter(int(label) for label in table.labels)
    measures = {name: _cell(interval) for name, interval in intervals.items() if ":" not in name}
    per_class = {
        name: {"n": counts[index], "recall": _cell(intervals.get(f"recall:{index}"))}
        | ({"auc": _cell(intervals.get(f"auc:{index}"))} if table.classes > 2 else {})
        for index, name in enumerate(names)
    }
    binary = table.classes == 2
    if binary and table.independent and not math.isnan(intervals["auc"].estimate):
        delong = delong_interval(table.probabilities[:, 1], table.labels)
        measures["auc"]["ci95_delong"] = [_number(delong.low), _number(delong.high)]
    return {
        "task": "classification",
        "classes": names,
        "positive": names[1] if binary else None,
        "n_cases": len(table.labels),
        "n_patients": table.n_patients if patients_known else None,
        "patients_known": patients_known,
        "resampled": "patients" if patients_known else "images, since no patients are known",
        "resamples": RESAMPLES,
        "measures": measures,
        "per_class": per_class,
        "operating_point": _point(point) if binary else None,
        "confusion": {
            "rows": "reference",
            "columns": "most probable class",
            "classes": names,
            "counts": table.confusion().tolist(),
        },
        "reliability": table.calibration.table(),
    }


def write_image_evaluation(folder: str | Path, scores: Sequence[ImageScore], summary: Mapping[str, Any]) -> None:
    """Write per_case.csv and summary.json into a folder, each whole or not at all."""
    from medkd.data.atomic import atomic_write  # here, since medkd.data imports MONAI, which takes seconds

    document = json.dumps(summary, indent=2, allow_nan=False, ensure_ascii=False)
    folder, names = Path(folder), summary["classes"]
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(folder / PER_CASE_FILE) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*_COLUMNS, *(PROBABILITY + name for name in names)])
        for score in in_order(scores):
            shown = [score.case, score.patient, names[score.label], names[score.predicted], score.label]
            writer.writerow([*shown, *(repr(float(value)) for value in score.probabilities)])
    with atomic_write(folder / SUMMARY_FILE) as file:
        file.write(document + "\n")


def is_image_evaluation(folder: str | Path) -> bool:
    """Whether a folder holds the evaluation of a classifier."""
    try:
        with (Path(folder) / PER_CASE_FILE).open(newline="", encoding="utf-8") as file:
            header = next(csv.reader(file), [])
    except (OSError, UnicodeDecodeError, csv.Error):
        return False
    return "predicted" in header and any(column.startswith(PROBABILITY) for column in header)


def read_image_evaluation(folder: str | Path) -> tuple[list[ImageScore], dict[str, Any]]:
    """Read an evaluation folder back: the scores and the summary.

    Raises:
        InputError: a file is absent or damaged.
    """
    folder = Path(folder)
    remedy = "give the folder that medkd evaluate wrote for a classifier"
    path = folder / PER_CASE_FILE
    try:
        with path.open(newline="", encoding="utf-8") as file:
            header, *rows = list(csv.reader(file)) or [[]]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(path, f"cannot be read ({error})", remedy) from error
    if not {"case", "patient", "label", "predicted"} <= set(header):
        raise InputError(path, "is not the table of a classifier", remedy)
    scores = []
    for number, row in enumerate(rows, start=2):
        try:
            scores.append(_score(dict(zip(header, row, strict=True))))
        except ValueError as error:
            raise InputError(path, f"line {number} is damaged ({error})", "run medkd evaluate again") from error
    try:
        summary = json.loads((folder / SUMMARY_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(folder / SUMMARY_FILE, f"cannot be read ({error})", remedy) from error
    classes = summary.get("classes") if isinstance(summary, dict) else None
    if not scores or not isinstance(classes, list) or [PROBABILITY + str(name) for name in classes] != header[5:]:
        raise InputError(folder, "its table and its summary are not of one evaluation", "run medkd evaluate again")
    return scores, summary


def _score(row: Mapping[str, str]) -> ImageScore:
    probabilities = tuple(float(value) for column, value in row.items() if column.startswith(PROBABILITY))
    label = int(row["label"])
    if not 0 <= label < len(probabilities) or not all(0 <= value <= 1 for value in probabilities):
        raise ValueError("a class or a probability out of range")
    return ImageScore(row["case"], row["patient"], label, probabilities)


def _cell(interval: Interval | None) -> dict[str, Any]:
    if interval is None:
        return {"estimate": None, "ci95": [None, None]}
    return {"estimate": _number(interval.estimate), "ci95": [_number(interval.low), _number(interval.high)]}


def _point(point: OperatingPoint) -> dict[str, Any]:
    return {
        "threshold": None if point.threshold is None else _number(point.threshold),
        "source": point.source,
        "specificity": point.specificity,
        "n_chosen_on": point.n_chosen_on,
        "note": (
            "sensitivity and specificity are at the threshold, which no test case had a part in"
            if point.threshold is not None
            else "no threshold was fixed beforehand: sensitivity_of_roc is a property of the ROC curve of these cases, "
            "not what a threshold chosen elsewhere would give"
        ),
    }


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
