"""``medkd evaluate`` with classifiers: probabilities of every image of a split against the classes of the datalist."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medkd.data.datalists import Datalist
from medkd.deploy.bundle import LoadedBundle
from medkd.deploy.predict_images import classify_images, require_classifier
from medkd.errors import ConfigError, InputError
from medkd.metrics.classification import roc_curve
from medkd.metrics.image_scores import ImageScore, OperatingPoint, summarize_images, write_image_evaluation
from medkd.report.image_report import write_image_report
from medkd.workflows.evaluation_tasks import Split, Task, evaluation_tasks
from medkd.workflows.failures import Failure, note, one_line, prepare_out, write_failures

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImagesEvaluated:
    """What ``evaluate`` found of classifiers.

    Attributes:
        scores: of all images that could be scored.
        summary: what summary.json holds; empty if none could.
        failures: the images that failed.
    """

    scores: list[ImageScore]
    summary: dict[str, Any]
    failures: list[Failure]


def evaluate_images(
    bundles: list[LoadedBundle],
    listed: Datalist,
    out: Path,
    *,
    split: Split = "test",
    threshold: float | None = None,
    specificity: float = 0.9,
    overwrite: bool = False,
) -> ImagesEvaluated:
    """Score classifiers on a split; write per_case.csv, summary.json, report.html, figures/ and, if any, failures.csv.

    Of two classes, sensitivity and specificity are at a threshold that no test image had a part in: the one given, or,
    for ``split="test"`` of a datalist with labelled validation images of both classes, the lowest that reaches
    ``specificity`` on those. Without either, the summary only says what sensitivity the ROC curve of these very cases
    has at that specificity.

    Args:
        bundles: loaded bundles that classify; several are pooled as :mod:`medkd.workflows.evaluate` says.
        listed: the datalist, whose labels are classes.
        out: output folder; must be absent or empty unless ``overwrite``.
        split: which images.
        threshold: positive where the probability of class 1 is at least this.
        specificity: what a threshold aims at.
        overwrite: allow a folder that is not empty.

    Raises:
        ConfigError, InputError: bundles, datalist or folder cannot be used; nothing was written.
    """
    classes = _common_classes(bundles, listed)
    if threshold is not None and len(classes) != 2:
        raise ConfigError("--threshold", f"{len(classes)} classes have no one threshold", "leave it out")
    for option, value in (("--threshold", threshold), ("--specificity", specificity)):
        if value is not None and not 0 <= value <= 1:
            raise ConfigError(option, f"{value} is not from 0 to 1", "give a probability")
    tasks, how = evaluation_tasks(bundles, listed, split)
    prepare_out(out, overwrite=overwrite)
    start = time.perf_counter()
    failures: list[Failure] = []
    point = OperatingPoint(threshold, "given" if threshold is not None else None, specificity)
    if threshold is None and len(classes) == 2 and split == "test":
        point = _chosen_on_validation(bundles, listed, specificity, failures)
    n_failed_before = len(failures)
    scores = _score(tasks, failures)
    logger.info("%d images in %.1f s", len(scores), time.perf_counter() - start)
    summary: dict[str, Any] = {}
    if scores:
        known = (listed.model_extra or {}).get("patients_known", True) is not False
        summary = summarize_images(scores, classes, point=point, patients_known=known) | {
            "models": [str(bundle.path) for bundle in bundles],
            "pooled": how,
            "datalist": listed.name or str(listed.path),
            "datalist_sha256": listed.sha256,
            "split": split,
            "n_failed": len(failures) - n_failed_before,
        }
        write_image_evaluation(out, scores, summary)
        write_image_report(out)
    write_failures(out, failures)
    return ImagesEvaluated(scores, summary, failures)


def _common_classes(bundles: Sequence[LoadedBundle], listed: Datalist) -> dict[int, str]:
    """The classes, which the datalist and every bundle must share, names and order included."""
    if not listed.classifies:
        raise ConfigError(listed.where, "has label maps or no labels", "list the class of each image as an integer")
    for bundle in bundles:
        if (names := require_classifier(bundle)) != listed.label_names:
            problem = f"has the classes {names}, the datalist has {listed.label_names}"
            raise ConfigError(bundle.path, problem, "evaluate it on a datalist of its own task")
    return listed.label_names


def _chosen_on_validation(
    bundles: list[LoadedBundle], listed: Datalist, specificity: float, failures: list[Failure]
) -> OperatingPoint:
    """The lowest threshold that is specific enough on the validation images of these models, if they have any."""
    if listed.folds and len(bundles) > 1:
        return OperatingPoint(specificity=specificity)  # each has its own validation, none is that of their mean
    fold = bundles[0].fold if listed.folds else None
    items = [item for item in listed.section("validation", fold=fold, for_training=False) if "label" in item]
    if len({item["label"] for item in items}) < 2:
        return OperatingPoint(specificity=specificity)
    scores = _score([Task(item, bundles) for item in items], failures)
    labels = [score.label for score in scores]
    if len(set(labels)) < 2:
        return OperatingPoint(specificity=specificity)
    _, threshold = roc_curve([score.probabilities[1] for score in scores], labels).at_specificity(specificity)
    if not np.isfinite(threshold):
        logger.warning("no threshold reaches a specificity of %g on the validation images", specificity)
        return OperatingPoint(specificity=specificity)
    return OperatingPoint(threshold, "validation", specificity, len(scores))


def _score(tasks: Sequence[Task], failures: list[Failure]) -> list[ImageScore]:
    """Mean probabilities of each task's models."""
    groups: dict[tuple[int, ...], list[Task]] = {}
    for task in tasks:
        groups.setdefault(tuple(id(bundle) for bundle in task.bundles), []).append(task)
    scores = []
    for group in groups.values():
        paths = [str(task.item["image"]) for task in group]
        for task, *results in zip(group, *(classify_images(one, paths) for one in group[0].bundles), strict=True):
            try:
                scores.append(_image_score(task.item, results))
            except Exception as error:
                note(failures, Failure(str(task.item["case"]), str(task.item["image"]), one_line(error)))
    return scores


def _image_score(item: Mapping[str, Any], results: Sequence[Any]) -> ImageScore:
    if not isinstance(item.get("label"), int):
        raise InputError(item["image"], "has no class to score against", "list its label, or leave it out")
    for result in results:
        if isinstance(result, Exception):
            raise result
    mean = np.mean(results, axis=0)
    return ImageScore(str(item["case"]), str(item["patient"]), int(item["label"]), tuple(float(p) for p in mean))
