"""Reading a run folder: everything a report shows comes from these files, and what is absent is left out."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medkd.errors import InputError
from medkd.metrics.cases import PER_CASE_FILE, CaseScore, read_per_case
from medkd.metrics.image_scores import is_image_evaluation
from medkd.report.synthetic import find_sheets
from medkd.report.translations import TRANSLATIONS_FILE, Translated, read_translations

if TYPE_CHECKING:
    from medkd.data.datalist_rules import Section

LOG_LINES = 40
METRIC_COLUMNS = ("iteration", "epoch", "split", "name", "value")
SECTIONS: dict[str, Section] = {
    "labeled": "training",
    "unlabeled": "unlabeled",
    "validation": "validation",
    "test": "test",
}
RERUN = "write the file again, or remove it to leave its section out"


@dataclass(frozen=True)
class MetricPoint:
    """One row of metrics.csv."""

    iteration: int
    epoch: int
    split: str
    name: str
    value: float


@dataclass(frozen=True)
class Evaluation:
    """One evaluation folder: one model, scored on a set of cases."""

    folder: Path
    scores: list[CaseScore]
    pictures: list[Path]
    failed_cases: list[str]


@dataclass(frozen=True)
class Arm:
    """A model of the run, what it costs and how it was evaluated (a folder per seed).

    Attributes:
        name: its key.
        title: what people call it.
        parameters: number of weights, None if unknown.
        macs: multiply-accumulate operations per volume, None if unknown.
        latency_ms: time per volume in ms, None if unknown.
        compare_with: names of the arms it is compared with in pairs.
        evaluations: one per seed.
        metrics: its own training curves, where it has some.
    """

    name: str
    title: str
    parameters: float | None = None
    macs: float | None = None
    latency_ms: float | None = None
    compare_with: tuple[str, ...] = ()
    evaluations: list[Evaluation] = field(default_factory=list)
    metrics: list[MetricPoint] = field(default_factory=list)


@dataclass(frozen=True)
class RunFolder:
    """The content of a run folder; ``None`` and empty lists stand for files that are absent.

    ``datalist`` names the datalist and counts its patients by section, in the fold that was trained.
    """

    path: Path
    config: dict[str, Any] | None
    environment: dict[str, Any] | None
    notes: dict[str, Any] | None
    datalist: dict[str, Any]
    metrics: list[MetricPoint]
    log: list[str]
    arms: list[Arm]
    translations: list[Translated] = field(default_factory=list)
    sheets: list[Path] = field(default_factory=list)
    image_evaluations: list[Path] = field(default_factory=list)


def read_run_folder(path: str | Path) -> RunFolder:
    """Read the files of a run folder that a report shows.

    Args:
        path: the folder. It may hold config.json, datalist.json, environment.json, metrics.csv, translations.npz and
            log.txt as training writes them;
            notes.json: ``{"title", "lead", "real", "simulated", "statements": [], "deviations": [], "limits": [],
            "run": {"method", "bundle", "datalist", "labeled", "unlabeled", "seeds", "command", …}}``, all optional;
            arms.json: a list of ``{"arm", "title", "parameters", "macs", "latency_ms", "evaluation", "metrics",
            "compare_with"}``, all but "arm" optional. "evaluation" is an evaluation folder inside the run folder, or
            a list of them, one per seed; "metrics" the arm's own metrics.csv. Without arms.json, every folder of
            evaluation/ that has a per_case.csv is an arm.

    Raises:
        InputError: the folder or a file in it cannot be read, or arms.json points outside of it.
    """
    path = Path(path)
    if not path.is_dir():
        raise InputError(path, "is not a folder", "give a run folder, as medkd train makes it")
    config = _read_object(path / "config.json")
    return RunFolder(
        path=path,
        config=config,
        environment=_read_object(path / "environment.json"),
        notes=_read_object(path / "notes.json"),
        datalist=_read_datalist(path / "datalist.json", config or {}),
        metrics=read_metrics(path / "metrics.csv"),
        log=_read_log(path / "log.txt"),
        arms=_read_arms(path),
        translations=read_translations(path / TRANSLATIONS_FILE),
        sheets=find_sheets(path),
        image_evaluations=[folder for folder in _evaluation_folders(path) if is_image_evaluation(folder)],
    )


def read_evaluation(folder: str | Path) -> Evaluation:
    """Read an evaluation folder: per_case.csv, worst_cases/*.png and, where cases failed, failures.csv.

    Raises:
        InputError: per_case.csv is absent or damaged.
    """
    folder = Path(folder)
    failed: list[str] = []
    failures = folder / "failures.csv"
    if failures.is_file():
        with failures.open(newline="", encoding="utf-8", errors="replace") as file:
            failed = [row[0] for row in list(csv.reader(file))[1:] if row]
    pictures = sorted((folder / "worst_cases").glob("*.png"))
    return Evaluation(folder, read_per_case(folder), pictures, failed)


def read_metrics(path: Path) -> list[MetricPoint]:
    """Read a metrics.csv; an absent file gives no rows, and a last line that is still being written is left out.

    Raises:
        InputError: the file is not such a table.
    """
    if not path.is_file():
        return []
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(path, f"cannot be read ({error})", RERUN) from error
    complete = text[: text.rfind("\n") + 1]
    reader = csv.DictReader(complete.splitlines())
    if complete and (missing := [c for c in METRIC_COLUMNS if c not in (reader.fieldnames or ())]):
        raise InputError(path, f"has no column {', '.join(missing)}", RERUN)
    points = []
    for row in reader:
        try:
            point = MetricPoint(
                int(row["iteration"]), int(row["epoch"]), row["split"], row["name"], float(row["value"] or math.nan)
            )
        except (TypeError, ValueError) as error:
            raise InputError(path, f"line {reader.line_num} is damaged ({error})", RERUN) from error
        points.append(point)
    return points


def _read_datalist(path: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    if not path.is_file():
        return {}
    from medkd.data.datalists import read_datalist  # here, since medkd.data imports MONAI, which takes seconds

    datalist = read_datalist(path, check_files=False)
    fold = config.get("fold")
    found: dict[str, Any] = {"datalist": datalist.name}
    for key, section in SECTIONS.items():
        items = datalist.section(section, fold=fold if isinstance(fold, int) else None)
        found[key] = len({item["patient"] or item["case"] for item in items})
    return found


def _read_object(path: Path) -> dict[str, Any] | None:
    content = _read_json(path)
    if content is None:
        return None
    if not isinstance(content, dict):
        raise InputError(path, "must hold a JSON object", RERUN)
    return content


def _read_json(path: Path) -> Any:
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(path, f"is not valid JSON ({error})", RERUN) from error


def _read_log(path: Path) -> list[str]:
    if not path.is_file():
        return []
    with path.open("rb") as file:
        file.seek(0, 2)
        file.seek(max(0, file.tell() - 200 * LOG_LINES))
        return file.read().decode("utf-8", errors="replace").splitlines()[-LOG_LINES:]


def _read_arms(run_dir: Path) -> list[Arm]:
    path = run_dir / "arms.json"
    entries = _read_json(path)
    if entries is None:
        return _found_arms(run_dir)
    if not isinstance(entries, list) or not all(isinstance(e, dict) and isinstance(e.get("arm"), str) for e in entries):
        raise InputError(path, 'must be a list of objects with an "arm"', RERUN)
    arms = [_read_arm(run_dir, path, entry) for entry in entries]
    names = [arm.name for arm in arms]
    if len(set(names)) < len(names):
        raise InputError(path, "names an arm twice", RERUN)
    for arm in arms:
        if unknown := [name for name in arm.compare_with if name not in names or name == arm.name]:
            raise InputError(path, f"{arm.name} is to be compared with {unknown[0]}, which is not another arm", RERUN)
    return arms


def _read_arm(run_dir: Path, path: Path, entry: Mapping[str, Any]) -> Arm:
    folders = entry.get("evaluation") or []
    folders = [folders] if isinstance(folders, str) else folders
    evaluations = [_inside(run_dir, folder, path) for folder in folders]
    metrics = entry.get("metrics")
    return Arm(
        name=entry["arm"],
        title=str(entry.get("title") or entry["arm"]),
        parameters=_quantity(entry, "parameters", path),
        macs=_quantity(entry, "macs", path),
        latency_ms=_quantity(entry, "latency_ms", path),
        compare_with=tuple(_strings(entry.get("compare_with"))),
        # An arm that is listed before it is evaluated is shown with what is known of it.
        evaluations=[read_evaluation(folder) for folder in evaluations if (folder / PER_CASE_FILE).is_file()],
        metrics=read_metrics(_inside(run_dir, metrics, path)) if metrics else [],
    )


def _found_arms(run_dir: Path) -> list[Arm]:
    return [
        Arm(folder.name, folder.name, evaluations=[read_evaluation(folder)])
        for folder in _evaluation_folders(run_dir)
        if not is_image_evaluation(folder)
    ]


def _evaluation_folders(run_dir: Path) -> list[Path]:
    root = run_dir / "evaluation"
    return [folder for folder in (root, *sorted(root.glob("*/"))) if (folder / PER_CASE_FILE).is_file()]


def _inside(run_dir: Path, relative: Any, path: Path) -> Path:
    if not isinstance(relative, str):
        raise InputError(path, f"has {relative!r} where a path is needed", RERUN)
    target = run_dir / relative
    if not target.resolve().is_relative_to(run_dir.resolve()):
        raise InputError(path, f"points outside the run folder ({relative})", "keep evaluations inside the run folder")
    return target


def _quantity(entry: Mapping[str, Any], key: str, path: Path) -> float | None:
    value = entry.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise InputError(path, f"{entry['arm']}: {key} must be a number of at least 0, not {value!r}", RERUN)
    return float(value)


def _strings(value: Any) -> Sequence[str]:
    return [value] if isinstance(value, str) else [str(item) for item in value or []]
