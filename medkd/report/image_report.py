"""The report of a classifier's evaluation, and of two of them side by side."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from medkd.metrics.classification import RocCurve, roc_curve
from medkd.metrics.image_scores import ImageScore, in_order, read_image_evaluation
from medkd.report import numbers
from medkd.report.figures import slug, standalone
from medkd.report.image_figures import confusion_plot, reliability_plot, roc_plot
from medkd.report.page import LIMITS, distinct_names, marked, render, write_text

logger = logging.getLogger(__name__)

REPORT_FILE = "report.html"
MISTAKES = 20
MAX_CURVES = 6
DECIMALS = 3
TITLES = {
    "auc": "AUC",
    "balanced_accuracy": "Balanced accuracy",
    "accuracy": "Accuracy",
    "sensitivity": "Sensitivity",
    "specificity": "Specificity",
    "sensitivity_of_roc": "Sensitivity on the ROC curve",
    "ece": "Calibration error (ECE)",
    "brier": "Brier score",
}
SMALLER_IS_BETTER = ("ece", "brier")
COMPARISON_NOTE = (
    "Intervals are percentile bootstraps over patients (over images where no patients are known), with the same "
    "resamples for both models. DeLong's test is given for the AUC of two classes where every image is of another "
    "patient. None is corrected for several comparisons. “No difference shown” means that the interval includes 0, "
    "not that the models are equal."
)


def write_image_report(folder: str | Path) -> Path:
    """Write report.html and figures/ into an evaluation folder of a classifier, from its files only.

    Raises:
        InputError: per_case.csv or summary.json is absent or damaged.
    """
    folder = Path(folder)
    found = image_section(folder)
    (folder / "figures").mkdir(exist_ok=True)
    for plot in found["plots"]:
        write_text(folder / "figures" / f"{plot['file']}.svg", standalone(str(plot["svg"])))
    path = folder / REPORT_FILE
    context = {
        "title": found["headline"],
        "kind": "medkd evaluation · classification",
        "lead": "",
        "source": folder.resolve().name,
        "found": found,
        "limits": LIMITS,
    }
    write_text(path, render("images.html.j2", context))
    logger.info("report written to %s", path)
    return path


def image_section(folder: str | Path) -> dict[str, Any]:
    """What a page shows of an evaluation folder of a classifier.

    Raises:
        InputError: as :func:`write_image_report`.
    """
    folder = Path(folder)
    scores, summary = read_image_evaluation(folder)
    measures, classes = summary["measures"], [str(name) for name in summary["classes"]]
    prefix = slug(folder.name)
    mistakes = sorted((s for s in scores if s.predicted != s.label), key=lambda s: s.probabilities[s.label])
    return {
        "title": folder.name,
        "headline": f"{', '.join(classes)}: {summary.get('datalist', folder.name)}, {summary.get('split', '')} images",
        "cohort": _cohort(summary),
        "tiles": [_tile(key, measures[key]) for key in ("auc", "balanced_accuracy", "ece") if key in measures],
        "rows": [_row(key, measures[key], summary) for key in TITLES if key in measures],
        "classes": [
            {
                "title": name,
                "n": cell["n"],
                "recall": _estimate(cell["recall"]),
                "auc": _estimate(cell["auc"]) if "auc" in cell else None,
            }
            for name, cell in summary["per_class"].items()
        ],
        "has_class_areas": any("auc" in cell for cell in summary["per_class"].values()),
        "plots": marked(_plots(scores, summary, prefix)),
        "mistakes": [
            {
                "case": score.case,
                "patient": score.patient,
                "reference": classes[score.label],
                "predicted": classes[score.predicted],
                "probability": numbers.fixed(score.probabilities[score.label], DECIMALS),
            }
            for score in mistakes[:MISTAKES]
        ],
        "mistakes_title": f"{min(len(mistakes), MISTAKES)} of {numbers.count(len(mistakes), 'mistake')}",
        "statements": _statements(summary),
        "facts": [
            (title, str(summary[key]))
            for title, key in (
                ("Datalist", "datalist"), ("Its hash", "datalist_sha256"), ("Split", "split"), ("Models", "pooled"),
                ("Images that failed", "n_failed"),
            )
            if key in summary
        ],
    }  # fmt: skip


def write_image_comparison(
    eval_a: str | Path,
    eval_b: str | Path,
    rows: Sequence[Mapping[str, Any]],
    scores: tuple[Sequence[ImageScore], Sequence[ImageScore]],
    classes: Sequence[str],
    out: str | Path,
    *,
    cohort: str,
) -> Path:
    """Write a page that compares two classifiers on the images both scored.

    Args:
        eval_a: the evaluation folder of the model in question.
        eval_b: that of the model it is compared with.
        rows: ``measure``, ``a``, ``b``, ``difference``, ``low``, ``high`` and ``p`` (None where there is no test).
        scores: of A and of B, on the same images.
        classes: their names.
        out: the HTML file to write.
        cohort: which images these are.
    """
    names = distinct_names(Path(eval_a), Path(eval_b))
    context = {
        "title": f"{names[0]} against {names[1]}",
        "kind": "medkd comparison · classification",
        "lead": f"Two classifiers, compared image by image. A is {names[0]}, B is {names[1]}.",
        "source": " and ".join(names),
        "cohort": cohort,
        "rows": [_difference_row(row) for row in rows],
        "note": COMPARISON_NOTE,
        "plots": marked(_compared_curves(scores, names, classes)),
        "limits": LIMITS,
    }
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, render("image_comparison.html.j2", context))
    return out


def _difference_row(row: Mapping[str, Any]) -> dict[str, str]:
    low, high, key = row["low"], row["high"], str(row["measure"])
    reading = "no difference shown"
    if not (low <= high):  # NaN: no interval
        reading = "no interval"
    elif low > 0 or high < 0:
        is_better = (low > 0) != (key in SMALLER_IS_BETTER)
        reading = "A is better" if is_better else "B is better"
    return {
        "title": TITLES.get(key, key),
        "a": numbers.fixed(row["a"], DECIMALS),
        "b": numbers.fixed(row["b"], DECIMALS),
        "value": numbers.signed(row["difference"], DECIMALS),
        "interval": f"{numbers.signed(low, DECIMALS)} to {numbers.signed(high, DECIMALS)}" if low <= high else "–",
        "p": "–" if row["p"] is None else numbers.p_value(row["p"]),
        "reading": reading,
    }


def _compared_curves(
    scores: tuple[Sequence[ImageScore], Sequence[ImageScore]], names: tuple[str, str], classes: Sequence[str]
) -> list[dict[str, str]]:
    if len(classes) != 2:
        return []
    curves = [(name, curve) for name, part in zip(names, scores, strict=True) if (curve := _curve(part, 1)) is not None]
    if not curves:
        return []
    title = f"ROC curves, {classes[1]} against {classes[0]}"
    return [{"name": "roc", "file": "roc", "title": title, "svg": roc_plot(curves, name="roc"), "caption": ""}]


def _plots(scores: Sequence[ImageScore], summary: Mapping[str, Any], prefix: str) -> list[dict[str, str]]:
    classes = [str(name) for name in summary["classes"]]
    plots = []
    shown = [1] if len(classes) == 2 else list(range(min(len(classes), MAX_CURVES)))
    curves = [(classes[k], curve) for k in shown if (curve := _curve(scores, k)) is not None]
    point, caption = _fixed_point(summary)
    if curves:
        binary = len(classes) == 2
        title = f"ROC curve, {classes[1]} against {classes[0]}" if binary else "ROC curves, each class against the rest"
        if len(classes) > MAX_CURVES:
            caption = f"The first {MAX_CURVES} classes. {caption}"
        svg = roc_plot(curves, name=f"{prefix}-roc", point=point, label="threshold" if point else "")
        plots.append({"name": f"{prefix}-roc", "file": "roc", "title": title, "svg": svg, "caption": caption})
    plots.append(
        {
            "name": f"{prefix}-reliability",
            "file": "reliability",
            "title": "Reliability",
            "svg": reliability_plot(summary["reliability"], name=f"{prefix}-reliability"),
            "caption": "A point per bin of probability, its area the images in it; on the dashed line probabilities "
            "mean what they say, below it they promise too much.",
        }
    )
    plots.append(
        {
            "name": f"{prefix}-confusion",
            "file": "confusion",
            "title": "Confusion matrix",
            "svg": confusion_plot(summary["confusion"]["counts"], classes, name=f"{prefix}-confusion"),
            "caption": "Images, and their share of the reference class.",
        }
    )
    return plots


def _curve(scores: Sequence[ImageScore], index: int) -> RocCurve | None:
    ordered = in_order(scores)
    labels = [score.label == index for score in ordered]
    if all(labels) or not any(labels):
        return None
    return roc_curve([score.probabilities[index] for score in ordered], labels)


def _fixed_point(summary: Mapping[str, Any]) -> tuple[tuple[float, float] | None, str]:
    measures, point = summary["measures"], summary.get("operating_point") or {}
    if point.get("threshold") is None or "sensitivity" not in measures:
        return None, ""
    place = [measures[key]["estimate"] for key in ("specificity", "sensitivity")]
    if None in place:
        return None, ""
    return (place[0], place[1]), f"The circle is the threshold {point['threshold']:.3f}, {_source(point)}."


def _source(point: Mapping[str, Any]) -> str:
    if point["source"] == "validation":
        return f"chosen on {numbers.count(point['n_chosen_on'], 'validation image')}"
    return "given beforehand"


def _tile(key: str, cell: Mapping[str, Any]) -> dict[str, str]:
    shown = _estimate(cell)
    return {"label": TITLES[key], "value": shown["value"], "detail": f"95 % {shown['interval']}"}


def _row(key: str, cell: Mapping[str, Any], summary: Mapping[str, Any]) -> dict[str, str]:
    return {"title": TITLES[key], **_estimate(cell), "note": _note(key, cell, summary)}


def _note(key: str, cell: Mapping[str, Any], summary: Mapping[str, Any]) -> str:
    point = summary.get("operating_point") or {}
    if key == "auc":
        of = f"of {summary['positive']}" if summary["positive"] else "mean of each class against the rest"
        delong = cell.get("ci95_delong")
        return of + (f"; DeLong {_interval(delong)}" if delong else "")
    if key in ("sensitivity", "specificity"):
        return f"at the threshold {point['threshold']:.3f}, {_source(point)}"
    return {
        "balanced_accuracy": "mean recall of the classes, by the most probable class",
        "accuracy": "by the most probable class",
        "sensitivity_of_roc": f"at specificity {point.get('specificity')}: read off the curve of these very images",
        "ece": "mean gap of probability and share that is right; resampling enlarges it",
        "brier": "mean squared distance to the reference, summed over the classes (0 to 2)",
    }[key]


def _cohort(summary: Mapping[str, Any]) -> str:
    images = numbers.count(summary["n_cases"], "image")
    if not summary["patients_known"]:
        return f"{images}; no patients are known, so each image counts as one."
    return f"{images} of {numbers.count(summary['n_patients'], 'patient')}."


def _statements(summary: Mapping[str, Any]) -> list[str]:
    resamples = numbers.count(summary["resamples"], "resample")
    said = [f"Intervals are percentile bootstraps over {summary['resampled']} ({resamples})."]
    point = summary.get("operating_point")
    if point is not None:
        said.append(point["note"][0].upper() + point["note"][1:] + ".")
    if not summary["patients_known"]:
        said.append("Two images of one patient would make these intervals too narrow; nobody can tell how much.")
    if summary.get("n_failed"):
        said.append(
            f"{numbers.count(summary['n_failed'], 'image')} failed and are in no number; failures.csv names them."
        )
    return said


def _estimate(cell: Mapping[str, Any]) -> dict[str, str]:
    return {"value": numbers.fixed(cell["estimate"], DECIMALS), "interval": _interval(cell["ci95"])}


def _interval(bounds: Sequence[float | None]) -> str:
    low, high = bounds
    if low is None or high is None:
        return numbers.ABSENT
    return f"{numbers.fixed(low, DECIMALS)} to {numbers.fixed(high, DECIMALS)}"
