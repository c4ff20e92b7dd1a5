"""Scores of one case, their summary over a cohort, and the evaluation folder that holds both.

`per_case.csv` has a row per case and class; `summary.json` has, per class and for the mean over classes::

    {"unit": "mm", "tolerance": 1.0, "n_cases": 10, "n_patients": 10, "resamples": 5000,
     "classes": {"<class name>": ROW}, "mean": ROW}

    ROW = {"class_index": 1,                    # not in "mean"
           "n_cases": 10, "n_patients": 10,
           "n_empty": 0,                        # class in neither map: no score
           "n_missed": 1,                       # class in the reference only
           "n_false_positive": 0,               # class in the prediction only
           "n_excluded": 0,                     # only in "mean": structures left out of the per-case means (the empty)
           "dice": STATS, "surface_dice": STATS, "hd95_mm": DISTANCE, "assd_mm": DISTANCE}     # hd95_px, assd_px
    STATS = {"mean", "sd", "median", "ci95": [low, high], "n", "n_infinite", "n_undefined"}
    DISTANCE = STATS + {"penalized_mean", "penalized_ci95": [low, high], "n_penalized"}

Mean, sd, median and ci95 cover the ``n`` finite values. ``n_infinite`` (missed or false positive) and ``n_undefined``
(empty) count the rest. The penalized mean also covers the infinite ones, each as the image diagonal, so that missing a
structure never helps. In "mean", a case's value is the mean over its classes that are not empty (infinite if
one is), and the counts of structures are sums over classes. Non-finite is null in JSON, inf or nan in CSV.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from medkd.errors import InputError
from medkd.metrics.overlap import checked_label_maps, overlap
from medkd.metrics.statistics import bootstrap_ci
from medkd.metrics.surface import checked_spacing, surface_scores

Unit = Literal["mm", "px"]

PER_CASE_FILE = "per_case.csv"
SUMMARY_FILE = "summary.json"
BOOTSTRAP_RESAMPLES = 5000


@dataclass(frozen=True)
class CaseScore:
    """The scores of one class in one case.

    Args:
        case: case id, unique within a datalist.
        patient: patient id.
        class_index: label value.
        class_name: label name.
        dice: in [0, 1]; NaN if the class is in neither map.
        hd95: 95 % Hausdorff distance in ``unit``; inf if the class is in one map only, NaN if in neither.
        surface_dice: in [0, 1]; NaN if the class is in neither map.
        assd: average symmetric surface distance in ``unit``; inf and NaN as ``hd95``.
        volume_ml_pred: predicted volume in ml; None without spacing and in 2-D.
        volume_ml_ref: reference volume in ml; None without spacing and in 2-D.
        unit: of the distances: ``"mm"``, or ``"px"`` without spacing.
        image_diagonal: of the whole image in ``unit``; what a missed structure counts in penalized means.
        voxels_pred: voxels (pixels in 2-D) of the class in the prediction.
        voxels_ref: voxels of the class in the reference.
        tolerance: of the surface Dice, in ``unit``.
    """

    case: str
    patient: str
    class_index: int
    class_name: str
    dice: float
    hd95: float
    surface_dice: float
    assd: float
    volume_ml_pred: float | None
    volume_ml_ref: float | None
    unit: Unit
    image_diagonal: float
    voxels_pred: int
    voxels_ref: int
    tolerance: float

    @property
    def empty(self) -> bool:
        """The class is in neither map."""
        return self.voxels_pred == 0 and self.voxels_ref == 0

    @property
    def missed(self) -> bool:
        """The class is in the reference only."""
        return self.voxels_pred == 0 and self.voxels_ref > 0

    @property
    def false_positive(self) -> bool:
        """The class is in the prediction only."""
        return self.voxels_pred > 0 and self.voxels_ref == 0

    @property
    def hd95_penalized(self) -> float:
        """`hd95`, with the image diagonal in place of inf."""
        return self.image_diagonal if math.isinf(self.hd95) else self.hd95

    @property
    def assd_penalized(self) -> float:
        """`assd`, with the image diagonal in place of inf."""
        return self.image_diagonal if math.isinf(self.assd) else self.assd


def score_case(
    pred: npt.ArrayLike,
    reference: npt.ArrayLike,
    *,
    case: str,
    patient: str,
    labels: Mapping[int, str],
    spacing_mm: Sequence[float] | None,
    tolerance_mm: float = 1.0,
) -> list[CaseScore]:
    """Score every foreground class of one case.

    Args:
        pred: (Z, Y, X) or (Y, X) integer label map.
        reference: integer label map of the same shape.
        case: case id.
        patient: patient id.
        labels: label value to name; the background, 0, is not scored.
        spacing_mm: voxel size along each array axis in mm; None scores in pixels.
        tolerance_mm: of the surface Dice; in pixels without spacing.

    Returns:
        A score per foreground class, by label value.

    Raises:
        ValueError: for other shapes, dtypes or spacings, for two classes of one name or without foreground class.
    """
    pred_map, reference_map = checked_label_maps(pred, reference)
    names = {int(label): name for label, name in sorted(labels.items()) if int(label) != 0}
    if len(set(names.values())) < len(names):
        raise ValueError(f"case {case}: two classes have the same name in {names}")
    has_spacing = spacing_mm is not None
    spacing = checked_spacing(spacing_mm if spacing_mm is not None else (1.0,) * pred_map.ndim, pred_map.ndim)
    has_volume = has_spacing and pred_map.ndim == 3
    voxel_ml = float(np.prod(spacing)) / 1000.0
    counts = overlap(pred_map, reference_map, classes=names)
    surfaces = surface_scores(
        pred_map, reference_map, spacing_mm=tuple(spacing), classes=names, tolerance_mm=tolerance_mm
    )
    return [
        CaseScore(
            case=case,
            patient=patient,
            class_index=label,
            class_name=name,
            dice=counts[label].dice,
            hd95=surfaces[label].hd95,
            surface_dice=surfaces[label].surface_dice,
            assd=surfaces[label].assd,
            volume_ml_pred=counts[label].pred * voxel_ml if has_volume else None,
            volume_ml_ref=counts[label].reference * voxel_ml if has_volume else None,
            unit="mm" if has_spacing else "px",
            image_diagonal=float(np.linalg.norm(spacing * pred_map.shape)),
            voxels_pred=counts[label].pred,
            voxels_ref=counts[label].reference,
            tolerance=float(tolerance_mm),
        )
        for label, name in names.items()
    ]


def summarize(scores: Sequence[CaseScore], *, seed: int = 0) -> dict[str, Any]:
    """The content of summary.json: see the module's docstring.

    Args:
        scores: of all cases, in any order; the result does not depend on it.
        seed: of the bootstrap over patients.

    Returns:
        Nested dicts of plain Python values; None stands for what is not finite or not defined.

    Raises:
        ValueError: without scores, if a case has a class twice, or if units or tolerances differ.
    """
    ordered = _checked_scores(scores)
    by_class: dict[int, list[CaseScore]] = {}
    by_case: dict[str, list[CaseScore]] = {}
    for score in ordered:
        by_class.setdefault(score.class_index, []).append(score)
        by_case.setdefault(score.case, []).append(score)
    rows = {
        group[0].class_name: {"class_index": label, **_summary_row([[score] for score in group], seed)}
        for label, group in sorted(by_class.items())
    }
    mean_row = _summary_row(list(by_case.values()), seed)
    mean_row["n_excluded"] = mean_row["n_empty"]
    return {
        "unit": ordered[0].unit,
        "tolerance": ordered[0].tolerance,
        "n_cases": len(by_case),
        "n_patients": len({score.patient for score in ordered}),
        "resamples": BOOTSTRAP_RESAMPLES,
        "classes": rows,
        "mean": mean_row,
    }


def write_evaluation(folder: str | Path, scores: Sequence[CaseScore], **extra: Any) -> None:
    """Write per_case.csv and summary.json into a folder, each whole or not at all.

    Args:
        folder: made if absent; existing files of these names are replaced.
        scores: of all cases.
        **extra: further top-level entries of summary.json; must be JSON values.

    Raises:
        ValueError: as `summarize`, or if an extra entry has the name of one of its own or holds NaN or inf.
    """
    from medkd.data.atomic import atomic_write  # here, since medkd.data imports MONAI, which takes seconds

    summary = summarize(scores)
    if clash := sorted(summary.keys() & extra.keys()):
        raise ValueError(f"summary.json already has {', '.join(clash)}; choose other names")
    document = json.dumps({**summary, **extra}, indent=2, allow_nan=False)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(folder / PER_CASE_FILE, "w") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(_columns(scores[0].unit))
        writer.writerows(_csv_row(score) for score in _checked_scores(scores))
    with atomic_write(folder / SUMMARY_FILE, "w") as file:
        file.write(document + "\n")


def read_per_case(path: str | Path) -> list[CaseScore]:
    """Read back per_case.csv.

    Args:
        path: the file, or the evaluation folder that holds it.

    Raises:
        InputError: if the file is absent, is not such a table, or a line of it is damaged.
    """
    path = Path(path)
    if path.is_dir():
        path = path / PER_CASE_FILE
    try:
        with path.open(newline="", encoding="utf-8") as file:
            header, *lines = list(csv.reader(file)) or [[]]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(path, f"cannot be read ({error})", "give the folder that medkd evaluate wrote") from error
    unit: Unit = "px" if "hd95_px" in header else "mm"
    if missing := [column for column in _columns(unit) if column not in header]:
        raise InputError(path, f"has no column {', '.join(missing)}", "give the per_case.csv that medkd evaluate wrote")
    scores = []
    for number, line in enumerate(lines, start=2):
        try:
            scores.append(_score_from_row(dict(zip(header, line, strict=True)), unit))
        except ValueError as error:
            raise InputError(path, f"line {number} is damaged ({error})", "run medkd evaluate again") from error
    return scores


def _columns(unit: Unit) -> list[str]:
    volumes = ["volume_ml_pred", "volume_ml_ref"] if unit == "mm" else []
    scores = ["dice", f"hd95_{unit}", "surface_dice", f"assd_{unit}"]
    extra = ["voxels_pred", "voxels_ref", "class_index", f"tolerance_{unit}", f"diagonal_{unit}"]
    return ["case", "patient", "class", *scores, *volumes, *extra]


def _csv_row(score: CaseScore) -> list[str | int]:
    def text(value: float | None) -> str:
        return "" if value is None else repr(float(value))

    measures = [text(value) for value in (score.dice, score.hd95, score.surface_dice, score.assd)]
    volumes = [text(score.volume_ml_pred), text(score.volume_ml_ref)] if score.unit == "mm" else []
    sizes = [score.voxels_pred, score.voxels_ref]
    scale = [text(score.tolerance), text(score.image_diagonal)]
    return [score.case, score.patient, score.class_name, *measures, *volumes, *sizes, score.class_index, *scale]


def _score_from_row(row: Mapping[str, str], unit: Unit) -> CaseScore:
    def volume(column: str) -> float | None:
        return float(row[column]) if row.get(column) else None

    return CaseScore(
        case=row["case"],
        patient=row["patient"],
        class_index=int(row["class_index"]),
        class_name=row["class"],
        dice=float(row["dice"]),
        hd95=float(row[f"hd95_{unit}"]),
        surface_dice=float(row["surface_dice"]),
        assd=float(row[f"assd_{unit}"]),
        volume_ml_pred=volume("volume_ml_pred"),
        volume_ml_ref=volume("volume_ml_ref"),
        unit=unit,
        image_diagonal=float(row[f"diagonal_{unit}"]),
        voxels_pred=int(row["voxels_pred"]),
        voxels_ref=int(row["voxels_ref"]),
        tolerance=float(row[f"tolerance_{unit}"]),
    )


def _checked_scores(scores: Iterable[CaseScore]) -> list[CaseScore]:
    """The scores by case and class; ValueError where a summary would mix or repeat."""
    ordered = sorted(scores, key=lambda score: (score.case, score.class_index))
    if not ordered:
        raise ValueError("no case was scored")
    for former, latter in pairwise(ordered):
        if (former.case, former.class_index) == (latter.case, latter.class_index):
            raise ValueError(f"case {latter.case} has class {latter.class_name} twice")
    for name in ("unit", "tolerance"):
        if len(values := {getattr(score, name) for score in ordered}) > 1:
            raise ValueError(f"the scores mix the {name}s {sorted(values)}")
    return ordered


def _summary_row(groups: Sequence[Sequence[CaseScore]], seed: int) -> dict[str, Any]:
    """One row of the summary; a group is what one case contributes: one class, or all of them."""
    structures = [score for group in groups for score in group]
    patients = [group[0].patient for group in groups]
    unit = structures[0].unit

    def per_case(measure: Callable[[CaseScore], float]) -> list[float]:
        return [_mean_of_defined([measure(score) for score in group]) for group in groups]

    def distance(measure: Callable[[CaseScore], float], penalized: Callable[[CaseScore], float]) -> dict[str, Any]:
        return {
            **_statistics(per_case(measure), patients, seed),
            **_penalized_statistics(per_case(penalized), patients, seed),
        }

    return {
        "n_cases": len(groups),
        "n_patients": len(set(patients)),
        "n_empty": sum(score.empty for score in structures),
        "n_missed": sum(score.missed for score in structures),
        "n_false_positive": sum(score.false_positive for score in structures),
        "dice": _statistics(per_case(lambda score: score.dice), patients, seed),
        "surface_dice": _statistics(per_case(lambda score: score.surface_dice), patients, seed),
        f"hd95_{unit}": distance(lambda score: score.hd95, lambda score: score.hd95_penalized),
        f"assd_{unit}": distance(lambda score: score.assd, lambda score: score.assd_penalized),
    }


def _mean_of_defined(values: Sequence[float]) -> float:
    defined = [value for value in values if not math.isnan(value)]
    return math.fsum(defined) / len(defined) if defined else float("nan")


def _statistics(values: Sequence[float], patients: Sequence[str], seed: int) -> dict[str, Any]:
    array = np.asarray(values, dtype=np.float64)
    kept = np.isfinite(array)
    finite = array[kept]
    interval = bootstrap_ci(
        finite, patients=np.asarray(patients)[kept], resamples=BOOTSTRAP_RESAMPLES, seed=seed, confidence=0.95
    )
    return {
        "mean": _finite_or_none(interval.estimate),
        "sd": _finite_or_none(finite.std(ddof=1)) if len(finite) > 1 else None,
        "median": _finite_or_none(np.median(finite)) if len(finite) else None,
        "ci95": [_finite_or_none(interval.low), _finite_or_none(interval.high)],
        "n": len(finite),
        "n_infinite": int(np.isinf(array).sum()),
        "n_undefined": int(np.isnan(array).sum()),
    }


def _penalized_statistics(values: Sequence[float], patients: Sequence[str], seed: int) -> dict[str, Any]:
    statistics = _statistics(values, patients, seed)
    return {
        "penalized_mean": statistics["mean"],
        "penalized_ci95": statistics["ci95"],
        "n_penalized": statistics["n"],
    }


def _finite_or_none(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
