"""``medkd evaluate``: per-case metrics of one or several bundles on a datalist.

Several bundles are pooled. On ``--split validation`` of a datalist with folds, each bundle scores the cases of the
fold it held out (``fold`` in its metadata.json), so that every case is scored once, by a model that never saw its
patient. On any other split the bundles are an ensemble: their class probabilities are averaged.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from medkd.data.atomic import atomic_write
from medkd.data.datalists import Datalist, read_datalist
from medkd.data.volumes import Volume, check_pair, read_label, read_volume
from medkd.deploy.bundle import LoadedBundle, load_bundle
from medkd.deploy.metadata import classifies
from medkd.deploy.predict import predict_ensemble, require_segmentation
from medkd.errors import ConfigError, InputError, MedkdError
from medkd.metrics import CaseScore, score_case, summarize, write_evaluation
from medkd.report import overlay_volume, picture_name, representative_cases
from medkd.workflows.devices import choose_device
from medkd.workflows.evaluation_tasks import Split, Task, evaluation_tasks
from medkd.workflows.failures import Failure, is_out_of_memory, note, one_line, prepare_out, write_failures
from medkd.workflows.image_evaluate import ImagesEvaluated, evaluate_images

logger = logging.getLogger(__name__)

PICTURES = "worst_cases"


@dataclass(frozen=True)
class Evaluated:
    """What ``evaluate`` found.

    Attributes:
        scores: of all cases and classes that could be scored.
        summary: what summary.json holds; empty if no case could be scored.
        failures: the cases that failed.
    """

    scores: list[CaseScore]
    summary: dict[str, Any]
    failures: list[Failure]


def evaluate(
    models: Sequence[str | Path],
    datalist: str | Path,
    out: str | Path,
    *,
    split: Split = "test",
    dataset_dir: str | Path | None = None,
    device: str = "auto",
    trust: str | None = None,
    overwrite: bool = False,
    tolerance_mm: float = 1.0,
    threshold: float | None = None,
    specificity: float | None = None,
) -> Evaluated | ImagesEvaluated:
    """Score bundles on a split and write per_case.csv, summary.json, worst_cases/ and, if any failed, failures.csv.

    Bundles that classify images are scored as :func:`medkd.workflows.image_evaluate.evaluate_images` says.

    Args:
        models: bundle folders, or run folders with one.
        datalist: the datalist.
        out: output folder; must be absent or empty unless ``overwrite``.
        split: which cases.
        dataset_dir: the folder the datalist's paths start from.
        device: auto, cpu or cuda[:N].
        trust: hash of a bundle whose code is beyond the allow-list.
        overwrite: allow a folder that is not empty.
        tolerance_mm: of the surface Dice.
        threshold: classifiers of two classes: positive where the probability is at least this.
        specificity: classifiers: where the ROC curve is read and what a threshold aims at; 0.9 by default.

    Raises:
        ConfigError, InputError: bundles, datalist or folder cannot be used; nothing was written.
    """
    listed = read_datalist(datalist, dataset_dir, check_files=False)
    if trust is not None and len(models) > 1:
        raise ConfigError("--trust", "is the hash of one bundle", "evaluate one model at a time")
    bundles = [load_bundle(model, trust=trust, device=choose_device(device)) for model in models]
    if any(classifies(bundle.metadata) for bundle in bundles):
        return evaluate_images(
            bundles, listed, Path(out), split=split, overwrite=overwrite, threshold=threshold,
            specificity=0.9 if specificity is None else specificity,
        )  # fmt: skip
    for option, value in (("--threshold", threshold), ("--specificity", specificity)):
        if value is not None:
            raise ConfigError(option, f"{bundles[0].path} does not classify images", "leave it out")
    for bundle in bundles:
        require_segmentation(bundle)
    labels = _common_labels(bundles, listed)
    tasks, how = evaluation_tasks(bundles, listed, split)
    out = Path(out)
    prepare_out(out, overwrite=overwrite)
    scores: list[CaseScore] = []
    failures: list[Failure] = []
    for number, task in enumerate(tasks, start=1):
        start = time.perf_counter()
        case = str(task.item["case"])
        try:
            scores += _score(task, labels, tolerance_mm)
        except Exception as error:
            if not isinstance(error, MedkdError) and not is_out_of_memory(error):
                logger.debug("%s failed", case, exc_info=True)
            note(failures, Failure(case, str(task.item["image"]), one_line(error)))
        else:
            logger.info("%d/%d %s: %.1f s", number, len(tasks), case, time.perf_counter() - start)
    summary: dict[str, Any] = {}
    if scores:
        extra = {
            "models": [str(bundle.path) for bundle in bundles],
            "pooled": how,
            "datalist": listed.name or str(datalist),
            "datalist_sha256": listed.sha256,
            "split": split,
            "n_failed": len(failures),
        }
        write_evaluation(out, scores, **extra)
        summary = {**summarize(scores), **extra}
        _draw(out, tasks, scores, labels)
    write_failures(out, failures)
    return Evaluated(scores, summary, failures)


def _common_labels(bundles: Sequence[LoadedBundle], listed: Datalist) -> dict[int, str]:
    """The classes to score; the datalist's, which every bundle must share."""
    labels = listed.label_names or bundles[0].labels
    if not any(labels):
        raise ConfigError(listed.where, "names no class to score", 'add "labels": {"0": "background", "1": …}')
    for bundle in bundles:
        if bundle.labels and set(bundle.labels) != set(labels):
            raise ConfigError(
                bundle.path,
                f"predicts the labels {bundle.labels}, the datalist has {labels}",
                "evaluate it on a datalist of its own task",
            )
    return labels


def _read(item: Mapping[str, Any], labels: Mapping[int, str]) -> tuple[Volume, Volume]:
    if "label" not in item:
        raise InputError(item["image"], "has no label to score against", "list its label, or leave it out")
    image = read_volume(item["image"], frame=item.get("frame"))
    label = read_label(item["label"], labels=sorted({0, *labels}), frame=item.get("frame"))
    check_pair(image, label)
    return image, label


def _score(task: Task, labels: Mapping[int, str], tolerance_mm: float) -> list[CaseScore]:
    image, label = _read(task.item, labels)
    return score_case(
        predict_ensemble(task.bundles, image),
        label.array,
        case=str(task.item["case"]),
        patient=str(task.item["patient"]),
        labels=labels,
        spacing_mm=image.spacing_mm,
        tolerance_mm=tolerance_mm,
    )


def _draw(out: Path, tasks: Sequence[Task], scores: Sequence[CaseScore], labels: Mapping[int, str]) -> None:
    """Pictures of the worst, the median and the best case; predicting them again is cheaper than keeping all."""
    (out / PICTURES).mkdir(exist_ok=True)
    by_case = {str(task.item["case"]): task for task in tasks}
    for rank, case in representative_cases(scores).items():
        image, label = _read(by_case[case].item, labels)
        prediction: npt.NDArray[np.integer[Any]] = predict_ensemble(by_case[case].bundles, image)
        picture = overlay_volume(
            image.array, prediction, label.array, labels=labels, affine=image.affine, title=f"{rank}: {case}"
        )
        with atomic_write(out / PICTURES / picture_name(rank, case), "wb") as file:
            file.write(picture)
