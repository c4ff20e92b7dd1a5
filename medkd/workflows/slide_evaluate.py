"""``medkd slide evaluate``: predictions of whole slides against what pathologists drew.

Tiles: the AUC of their probabilities against the class of their centers. Slides: the AUC of their highest tile
probability against whether anything was drawn. Lesions: CAMELYON16's FROC. All intervals resample patients.
"""

from __future__ import annotations

import csv
import json
import logging
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from medkd.data.atomic import atomic_write
from medkd.errors import InputError
from medkd.metrics.froc import (
    FALSE_POSITIVES_PER_SLIDE,
    Lesions,
    SlideDetections,
    find_detections,
    find_lesions,
    froc_intervals,
    match_detections,
)
from medkd.metrics.roc import auc_interval, roc_auc
from medkd.metrics.statistics import Interval
from medkd.workflows.failures import Failure, note, one_line, prepare_out, write_failures
from medkd.wsi.annotations import Annotation, rasterize, read_annotations
from medkd.wsi.grid import TileGrid
from medkd.wsi.tile_labels import label_tiles

logger = logging.getLogger(__name__)

LESION_MAP_UM = 8.0  # per pixel of the map that lesions are counted on; CAMELYON16 uses 7.8
_NORMAL_WORDS = {"0", "healthy", "negative", "no", "normal"}
_OUTSIDE = "(outside)"
_DIAGONAL = math.sqrt(2)


@dataclass(frozen=True)
class SlideEvaluation:
    """What ``slide evaluate`` found.

    Attributes:
        summary: what summary.json holds; empty if no slide could be scored.
        failures: the slides that could not.
    """

    summary: dict[str, Any]
    failures: list[Failure]


@dataclass(frozen=True)
class _Task:
    """One slide: where its prediction lies, what was drawn, and whose it is."""

    name: str
    summary: Path
    annotations: Path | None
    patient: str


@dataclass(frozen=True, eq=False)
class _Scored:
    """One slide, scored."""

    name: str
    patient: str
    tumor: bool
    score: float
    probabilities: NDArray[np.float64]
    labels: NDArray[np.int64]
    detections: SlideDetections
    lesions: Lesions
    failed_tiles: int


def evaluate_slides(
    predictions: str | Path,
    annotations: str | Path,
    out: str | Path,
    *,
    patients: str | Path | None = None,
    normal: Collection[str] = (),
    positive: str | None = None,
    rule: Literal["center", "fraction"] = "center",
    min_fraction: float = 0.5,
    overwrite: bool = False,
) -> SlideEvaluation:
    """Score a folder of slide predictions and write summary.csv, summary.json and per_slide.csv.

    A slide without an annotation file is normal only where that is said, by ``normal`` or in the table's ``label``
    column; otherwise nothing is evaluated. An annotation file without any region says normal too. A slide in which no
    tissue was found has the score 0, and none of its lesions is found. Failed tiles are left out and counted.

    Args:
        predictions: what `medkd slide predict` wrote: <slide>.json beside <slide>.csv.
        annotations: <slide>.geojson, as QuPath writes it.
        out: output folder; must be absent or empty unless ``overwrite``.
        patients: CSV with the columns slide, patient and, if wanted, label ("normal" or another class).
        normal: names of further slides known to be normal.
        positive: the class looked for; the predictions' last class by default.
        rule: how a tile gets its class, see :func:`medkd.wsi.tile_labels.label_tiles`.
        min_fraction: for ``rule="fraction"``.
        overwrite: allow a folder that is not empty.

    Raises:
        ConfigError, InputError: folders, the table, or annotations that are missing; nothing was written.
    """
    table = _read_table(Path(patients)) if patients is not None else {}
    declared = {*normal, *(name for name, row in table.items() if row.get("label", "").lower() in _NORMAL_WORDS)}
    tasks, failures = _find_tasks(Path(predictions), Path(annotations), table, declared)
    positive = positive or _last_class(tasks)
    out = Path(out)
    prepare_out(out, overwrite=overwrite)
    for failure in failures:
        logger.error("%s: %s", failure.case, failure.error)
    scored: list[_Scored] = []
    for number, task in enumerate(tasks, start=1):
        try:
            scored.append(_score(task, positive, declared, rule, min_fraction))
        except Exception as error:
            note(failures, Failure(task.name, str(task.summary), one_line(error)))
        else:
            logger.info("%d/%d %s", number, len(tasks), task.name)
    summary: dict[str, Any] = {}
    if scored:
        summary = _summarize(scored) | {
            "positive": positive, "rule": rule, "min_fraction": min_fraction if rule == "fraction" else None,
            "n_failed": len(failures), "patients_known": bool(table),
        }  # fmt: skip
        _write(out, summary, scored)
    write_failures(out, failures)
    return SlideEvaluation(summary, failures)


def _read_table(path: Path) -> dict[str, dict[str, str]]:
    """Slide name → row."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            columns, rows = list(reader.fieldnames or []), list(reader)
    except OSError as error:
        raise InputError(path, f"cannot be read ({error.strerror})", "check the path") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(path, f"is not a CSV table ({error})", "save it as CSV, UTF-8") from None
    for needed in ("slide", "patient"):
        if needed not in columns:
            raise InputError(path, f"has no column {needed!r}", "its first line must be: slide,patient[,label]")
    table: dict[str, dict[str, str]] = {}
    for line, row in enumerate(rows, start=2):
        name = Path((row["slide"] or "").strip()).name
        if not name or not (row["patient"] or "").strip():
            raise InputError(f"{path}: line {line}", "lacks a slide or a patient", "give both")
        for known in {name, Path(name).stem}:
            if known in table and table[known]["patient"] != row["patient"].strip():
                raise InputError(f"{path}: line {line}", f"{name} has two patients", "list every slide once")
            table[known] = {key: (value or "").strip() for key, value in row.items() if key is not None}
    return table


def _find_tasks(
    predictions: Path, annotations: Path, table: Mapping[str, Mapping[str, str]], declared: Collection[str]
) -> tuple[list[_Task], list[Failure]]:
    for folder, what in ((predictions, "predictions"), (annotations, "annotations")):
        if not folder.is_dir():
            raise InputError(folder, "is not a folder", f"name the folder of {what}")
    found = [path for path in sorted(predictions.glob("*.json")) if path.with_suffix(".csv").is_file()]
    if not found:
        raise InputError(predictions, "has no slide prediction", "name the --out of `medkd slide predict`")
    drawn = {path.stem: path for path in sorted(annotations.glob("*.geojson"))}
    tasks = []
    for path in found:
        name = path.stem
        if name not in drawn and name not in declared:
            remedy = f"add {annotations / name}.geojson, or declare the slide normal in the patients' table"
            raise InputError(path, f"there is no annotation of {name}, and it is not declared normal", remedy)
        if table and name not in table:
            raise InputError(path, f"{name} has no patient in the table", "add its line")
        tasks.append(_Task(name, path, drawn.get(name), table[name]["patient"] if table else name))
    predicted = {task.name for task in tasks}
    missing = [
        Failure(name, str(path), "is annotated but has no prediction; predict it, or leave its annotation out")
        for name, path in drawn.items()
        if name not in predicted
    ]
    return tasks, missing


def _last_class(tasks: Sequence[_Task]) -> str:
    for task in tasks:
        classes = _read_summary(task.summary).get("classes")
        if isinstance(classes, list) and classes:
            return str(classes[-1])
    raise InputError(tasks[0].summary, "names no class", "predict again, or give the class to look for")


def _read_summary(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(path, f"cannot be read ({error})", "predict the slide again") from None
    if not isinstance(content, dict):
        raise InputError(path, "is not a slide prediction", "predict the slide again")
    return content


def _score(task: _Task, positive: str, declared: Collection[str], rule: Any, min_fraction: float) -> _Scored:
    facts = _read_summary(task.summary)
    grid, probabilities = _read_tiles(task.summary, facts, positive)
    regions = _regions(task, facts, positive, declared)
    labels = np.zeros(len(grid), np.int64)
    if regions:
        classes = [_OUTSIDE, positive]
        labels = label_tiles(
            grid, regions, classes=classes, rule=rule, min_fraction=min_fraction, outside=_OUTSIDE
        )  # fmt: skip
    downsample = LESION_MAP_UM / grid.slide_mpp
    width, height = grid.dimensions
    shape = (math.ceil(height / downsample), math.ceil(width / downsample))
    lesions = find_lesions(rasterize(regions, shape, downsample) > 0, LESION_MAP_UM)
    # Tiles that touch, diagonally too, are one spot.
    points, values = find_detections(grid.centers, probabilities, radius=1.01 * _DIAGONAL * grid.size_level0)
    return _Scored(
        name=task.name,
        patient=task.patient,
        tumor=bool(regions),
        score=float(np.nanmax(probabilities)) if np.isfinite(probabilities).any() else 0.0,
        probabilities=probabilities,
        labels=labels,
        detections=match_detections(task.name, task.patient, points, values, lesions, downsample=downsample),
        lesions=lesions,
        failed_tiles=int(np.isnan(probabilities).sum()),
    )


def _regions(task: _Task, facts: Mapping[str, Any], positive: str, declared: Collection[str]) -> list[Annotation]:
    if task.annotations is None:
        return []
    bounds = facts.get("bounds") or (0, 0)
    drawn = read_annotations(task.annotations, offset=(float(bounds[0]), float(bounds[1])))
    wanted = [Annotation(positive, region.polygons) for region in drawn if region.name.lower() == positive.lower()]
    if drawn and not wanted and task.name not in declared:
        names = ", ".join(sorted({region.name or "(unnamed)" for region in drawn}))
        raise InputError(
            task.annotations, f"has no region of class {positive}, only {names}", "name the class looked for"
        )
    if wanted and task.name in declared:
        raise InputError(
            task.annotations, f"has {positive}, but the slide is declared normal", "correct one of the two"
        )
    return wanted


def _read_tiles(path: Path, facts: Mapping[str, Any], positive: str) -> tuple[TileGrid, NDArray[np.float64]]:
    """The tiles of a prediction and their probability of the class looked for; NaN where a tile failed."""
    file = path.with_suffix(".csv")
    with file.open(newline="", encoding="utf-8") as handle:
        reader = csv.DictReader(handle)
        columns, rows = list(reader.fieldnames or []), list(reader)
    column = f"prob_{positive}"
    for needed in ("x", "y", column):
        if needed not in columns:
            raise InputError(file, f"has no column {needed}", f"its columns are {', '.join(columns) or 'none'}")
    try:
        coords = np.array([[int(row["x"]), int(row["y"])] for row in rows], dtype=np.int64).reshape(-1, 2)
        probabilities = np.array([float(row[column]) for row in rows], dtype=np.float64)
        tile = facts["tile"]
        grid = TileGrid(
            coords=coords,
            tissue_fraction=np.full(len(coords), np.nan, np.float32),
            size=int(tile["size"]),
            mpp=float(facts["mpp"]),
            overlap=int(tile["overlap"]),
            size_level0=float(tile["size_level0"]),
            slide_name=path.stem,
            slide_fingerprint=str(facts["fingerprint"]),
            slide_mpp=float(facts["slide_mpp"]),
            dimensions=(int(facts["dimensions"][0]), int(facts["dimensions"][1])),
            bounds=tuple(int(part) for part in facts["bounds"]),  # type: ignore[arg-type]
        )
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise InputError(path, f"is not complete ({error!r})", "predict the slide again") from None
    counted = facts.get("counts", {}).get("tiles", len(coords))
    if counted != len(coords):
        raise InputError(file, f"has {len(coords)} tiles, its summary says {counted}", "predict the slide again")
    return grid, probabilities


def _summarize(scored: Sequence[_Scored]) -> dict[str, Any]:
    tiles = [(value, label, slide.patient) for slide in scored for value, label in _known_tiles(slide)]
    values, labels, owners = (list(column) for column in zip(*tiles, strict=True)) if tiles else ([], [], [])
    slides = [slide.detections for slide in scored]
    score, sensitivities = froc_intervals(slides)
    metrics: dict[str, Interval] = {
        "tile_auc": auc_interval(values, labels, patients=owners),
        "slide_auc": auc_interval(
            [slide.score for slide in scored], [slide.tumor for slide in scored],
            patients=[slide.patient for slide in scored],
        ),
        "froc_score": score,
        **{f"sensitivity_at_{at:g}_fp": interval for at, interval in sensitivities.items()},
    }  # fmt: skip
    return {
        "metrics": {name: _plain(asdict(interval)) for name, interval in metrics.items()},
        "n_slides": len(scored),
        "n_tumor_slides": sum(slide.tumor for slide in scored),
        "n_patients": len({slide.patient for slide in scored}),
        "n_tiles": sum(len(slide.labels) for slide in scored),
        "n_failed_tiles": sum(slide.failed_tiles for slide in scored),
        "n_ambiguous_tiles": sum(int((slide.labels < 0).sum()) for slide in scored),
        "n_slides_without_tiles": sum(not len(slide.labels) for slide in scored),
        "n_lesions": sum(len(slide.detections.lesions) for slide in scored),
        "n_isolated_lesions": sum(len(slide.lesions.isolated) for slide in scored),
        "slide_score": "highest tile probability",
        "false_positives_per_slide": list(FALSE_POSITIVES_PER_SLIDE),
    }


def _known_tiles(slide: _Scored) -> Iterable[tuple[float, int]]:
    kept = (slide.labels >= 0) & ~np.isnan(slide.probabilities)
    return zip(slide.probabilities[kept].tolist(), slide.labels[kept].tolist(), strict=True)


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has no NaN."""
    return {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in values.items()}


def _write(out: Path, summary: Mapping[str, Any], scored: Sequence[_Scored]) -> None:
    with atomic_write(out / "per_slide.csv") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(
            ["slide", "patient", "label", "score", "tiles", "tumor_tiles", "failed_tiles", "tile_auc", "lesions",
             "isolated_lesions", "lesions_detected", "detections_outside"]
        )  # fmt: skip
        for slide in scored:
            known = list(_known_tiles(slide))
            auc = roc_auc([value for value, _ in known], [label for _, label in known]) if known else math.nan
            lesions = slide.detections.lesions
            writer.writerow(
                [slide.name, slide.patient, int(slide.tumor), f"{slide.score:.6f}", len(slide.labels),
                 int((slide.labels == 1).sum()), slide.failed_tiles, f"{auc:.4f}", len(lesions),
                 len(slide.lesions.isolated), int((~np.isnan(lesions)).sum()), len(slide.detections.false_positives)]
            )  # fmt: skip
    with atomic_write(out / "summary.csv") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["metric", "estimate", "low", "high", "confidence", "n", "n_patients"])
        for name, interval in summary["metrics"].items():
            numbers = (
                "nan" if interval[key] is None else f"{interval[key]:.4f}" for key in ("estimate", "low", "high")
            )
            writer.writerow([name, *numbers, interval["confidence"], interval["n"], interval["n_patients"]])
    with atomic_write(out / "summary.json") as file:
        json.dump(summary, file, indent=1, allow_nan=False)
        file.write("\n")
