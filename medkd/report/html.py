"""One self-contained HTML page about a run, or about two evaluations side by side.

The page loads nothing and runs nothing: its style, its figures and its pictures are inside, and it says so to the
browser with a content security policy. Every name that comes from a file is escaped.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from medkd.errors import InputError
from medkd.metrics.statistics import PairedResult
from medkd.report import cohort, figures, numbers, tables
from medkd.report.curves import curve_section
from medkd.report.facts import environment_facts, method_settings, run_command, run_facts
from medkd.report.gallery import galleries
from medkd.report.image_report import image_section
from medkd.report.page import LIMITS, distinct_names, marked, render, write_text
from medkd.report.run_folder import Arm, RunFolder, read_evaluation, read_run_folder
from medkd.report.synthetic import synthetic_gallery
from medkd.report.translations import translation_gallery

logger = logging.getLogger(__name__)

REPORT_FILE = "report.html"
MAX_CONFIG_CHARACTERS = 200_000
DIFFERENCE_NOTE = (
    "Differences are taken patient by patient. The interval is a bootstrap over patients (and seeds, where there are "
    "several); both tests are two-sided and not corrected for several comparisons. A missed structure counts the "
    "image diagonal. “No difference shown” means that the interval includes 0, not that the models are equal."
)


def write_report(run_dir: str | Path) -> Path:
    """Rebuild report.html, and the plots in figures/, from the files of a run folder.

    Absent files leave their section out, and the page says so; the same files give the same page, byte by byte.

    Args:
        run_dir: the run folder; see `medkd.report.run_folder.read_run_folder` for what it may hold.

    Returns: the path of report.html.

    Raises:
        InputError: the folder, or a file in it, cannot be read.
    """
    run = read_run_folder(run_dir)
    context = _report_context(run)
    plots = [*context["plots"], *context["curves"], *(p for found in context["image_results"] for p in found["plots"])]
    (run.path / "figures").mkdir(exist_ok=True)
    for plot in plots:
        write_text(run.path / "figures" / f"{plot['name']}.svg", figures.standalone(str(plot["svg"])))
    path = run.path / REPORT_FILE
    write_text(path, render("report.html.j2", context))
    logger.info("report written to %s", path)
    return path


def write_comparison(
    eval_a: str | Path,
    eval_b: str | Path,
    result: PairedResult | Mapping[str, PairedResult],
    out: str | Path,
    *,
    title_a: str | None = None,
    title_b: str | None = None,
) -> Path:
    """Write a page that compares two evaluation folders case by case.

    Args:
        eval_a: the evaluation folder of the model in question.
        eval_b: that of the model it is compared with; differences are A − B.
        result: the test of the mean Dice, or several tests by measure (``dice``, ``hd95_mm``, …), as they were
            printed: the page shows these same numbers.
        out: the HTML file to write.
        title_a: what to call A; its folder's name when None.
        title_b: what to call B.

    Returns: ``out``.

    Raises:
        InputError: a folder cannot be read, or the two have no case in common.
    """
    folders = (Path(eval_a), Path(eval_b))
    names = distinct_names(*folders)
    arms = [
        Arm(side, title or name, evaluations=[read_evaluation(folder)])
        for side, title, name, folder in zip("ab", (title_a, title_b), names, folders, strict=True)
    ]
    results = {"dice": result} if isinstance(result, PairedResult) else dict(result)
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, render("comparison.html.j2", _comparison_context(arms[0], arms[1], results)))
    return out


def _report_context(run: RunFolder) -> dict[str, Any]:
    notes = run.notes or {}
    evaluated = [arm for arm in run.arms if arm.evaluations]
    pairs = tables.compared_arms(run.arms)
    main = next((arm for arm in run.arms if arm.compare_with), run.arms[0] if len(run.arms) == 1 else None)
    differences, plots = [], [tables.box_plot(run.arms, cohort.DICE), tables.box_plot(run.arms, cohort.HD95)]
    plots.append(tables.cost_plot(run.arms))
    for subject, baseline in pairs:
        rows, plot = tables.compare(subject, baseline)
        differences += rows
        plots.append(plot)
    facts = run_facts(run)
    title = str(notes.get("title") or facts.get("Method") or run.path.resolve().name)
    shown, left_out = galleries(run.arms)
    provenance = [(key.capitalize(), str(notes[key])) for key in ("real", "simulated") if notes.get(key)]
    return {
        "title": title,
        "kind": f"medkd run report · {run.path.resolve().name}",
        "lead": _lead(run),
        "source": run.path.resolve().name,
        "evaluated": bool(evaluated),
        "tiles": _tiles(main, run.arms, pairs, differences) if main and main.evaluations else [],
        **(tables.arm_table(run.arms, main) if run.arms else {"arms": [], "parameter_prefix": "", "mac_prefix": ""}),
        "unit": cohort.unit([e for arm in evaluated for e in arm.evaluations]),
        "cohort": _cohort_line(evaluated),
        "table_note": _table_note(run.arms),
        "differences": tables.grouped(differences),
        "difference_note": DIFFERENCE_NOTE,
        "plots": marked([plot for plot in plots if plot]),
        "class_table": tables.class_table(evaluated),
        "case_table": tables.case_table(evaluated) if evaluated else None,
        "statements": [*tables.statements(run.arms), *_strings(notes.get("statements"))],
        "provenance": provenance,
        "deviations": _strings(notes.get("deviations")),
        "limits": [*LIMITS, *_strings(notes.get("limits"))],
        "galleries": shown,
        "left_out": left_out,
        "translations": translation_gallery(run.translations),
        "synthetic": synthetic_gallery(run.sheets),
        "image_results": [image_section(folder) for folder in run.image_evaluations],
        **curve_section(run),
        "facts": list(facts.items()),
        "command": run_command(run),
        "settings": method_settings(run.config or {}),
        "config": _config_text(run.config),
        "log": "\n".join(run.log),
        "environment": environment_facts(run.environment or {}),
    }


def _comparison_context(subject: Arm, baseline: Arm, results: Mapping[str, PairedResult]) -> dict[str, Any]:
    arms = [subject, baseline]
    cases = [{score.case for e in arm.evaluations for score in e.scores} for arm in arms]
    if not cases[0] & cases[1]:
        raise InputError(
            subject.evaluations[0].folder,
            f"has no case in common with {baseline.evaluations[0].folder}",
            "compare evaluations of the same datalist",
        )
    unit = cohort.unit(subject.evaluations)
    title = f"{subject.title} − {baseline.title}"
    measures = {key: next((m for m in cohort.MEASURES if key in (m.key, f"{m.key}_{unit}")), None) for key in results}
    rows = [_result_row(title, key, measures[key], subject, result) for key, result in results.items()]
    plots = []
    for measure in (cohort.DICE, cohort.HD95):
        given = next((results[key] for key, found in measures.items() if found is measure), None)
        result = given or tables.difference(subject, baseline, measure, title)[1]
        plots += [tables.box_plot(arms, measure), tables.paired_plot(subject, baseline, measure, result)]
    names = cohort.class_names(subject.evaluations)
    return {
        "title": f"{subject.title} against {baseline.title}",
        "kind": "medkd comparison",
        "lead": "Two models, compared case by case. Differences are the first minus the second.",
        "source": f"{subject.evaluations[0].folder.name} and {baseline.evaluations[0].folder.name}",
        "tiles": _comparison_tiles(arms, rows),
        "cohort": f"{numbers.count(len(cases[0] & cases[1]), 'case')} in both evaluations; "
        f"{len(cases[0] ^ cases[1])} in only one of them, which are in no difference.",
        "differences": tables.grouped(rows),
        "difference_note": DIFFERENCE_NOTE,
        "plots": marked([plot for plot in plots if plot]),
        "class_differences": tables.grouped(tables.class_differences(subject, baseline)) if len(names) > 1 else [],
        "class_table": tables.class_table(arms),
        "case_table": tables.case_table(arms),
        "unit": unit,
        "statements": tables.statements(arms),
        "limits": list(LIMITS),
    }


def _result_row(
    title: str, key: str, measure: cohort.Measure | None, subject: Arm, result: PairedResult
) -> dict[str, Any]:
    """A test that was handed in as a table row; one of an unknown measure is shown under its own key."""
    if measure is None:
        return tables.difference_row(title, key, result, 3, higher_is_better=True)
    label = tables.measure_label(measure, subject)
    return tables.difference_row(title, label, result, measure.decimals, higher_is_better=not measure.is_distance)


def _tiles(
    main: Arm, arms: Sequence[Arm], pairs: Sequence[tuple[Arm, Arm]], differences: Sequence[Mapping[str, Any]]
) -> list[dict[str, str]]:
    """The main arm's few numbers a reader looks for first."""
    tiles = []
    counts = cohort.counts(main.evaluations)
    for measure in (cohort.DICE, cohort.HD95):
        found = cohort.statistics(cohort.case_values(main.evaluations, measure))
        cell = tables.estimate(found, measure.decimals)
        unit = f" {cohort.unit(main.evaluations)}" if measure.is_distance and found.n else ""
        detail = f"{counts.missed} missed" if measure.is_distance else f"n = {found.n_patients}"
        tiles.append(
            {
                "label": f"{measure.title}, {main.title}",
                "value": f"{cell['value']}{unit}",
                "detail": f"95 % {cell['interval']}, {detail}",
            }
        )
    if pairs and pairs[0][0] is main:
        baseline, row = pairs[0][1], differences[0]
        detail = f"95 % {row['interval']}: {row['reading']}"
        tiles.append({"label": f"Dice against {baseline.title}", "value": str(row["mean"]), "detail": detail})
    largest = max(arms, key=lambda arm: arm.parameters or 0.0)
    if main.parameters and largest.parameters and largest.parameters > main.parameters:
        size = numbers.si(main.parameters)
        tiles.append(
            {
                "label": f"Smaller than {largest.title}",
                "value": numbers.ratio(largest.parameters, main.parameters),
                "detail": f"{size} against {numbers.si(largest.parameters)} parameters",
            }
        )
    return tiles


def _comparison_tiles(arms: Sequence[Arm], rows: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    tiles = []
    for arm in arms:
        dice = cohort.statistics(cohort.case_values(arm.evaluations, cohort.DICE))
        detail = f"95 % {tables.bounds(dice.low, dice.high, 3)}, n = {dice.n_patients}"
        tiles.append({"label": f"Dice, {arm.title}", "value": numbers.fixed(dice.mean, 3), "detail": detail})
    for row in rows[:2]:
        detail = f"95 % {row['interval']}: {row['reading']}"
        tiles.append({"label": f"{row['measure']}, difference", "value": str(row["mean"]), "detail": detail})
    return tiles


def _lead(run: RunFolder) -> str:
    told = (run.notes or {}).get("lead")
    if told:
        return str(told)
    if not run.metrics:
        return ""
    last = max(run.metrics, key=lambda point: point.iteration)
    losses = [p.value for p in run.metrics if p.name == "loss" and p.split == "train" and math.isfinite(p.value)]
    loss = f"; last training loss {losses[-1]:.4g}" if losses else ""
    return f"{numbers.count(last.epoch, 'epoch')}, {numbers.count(last.iteration, 'iteration')} recorded{loss}."


def _cohort_line(evaluated: Sequence[Arm]) -> str:
    if not evaluated:
        return "The models are listed; none was evaluated yet."
    counts = cohort.counts(evaluated[0].evaluations)
    seeds = f", {numbers.count(counts.seeds, 'training seed')}" if counts.seeds > 1 else ""
    return (
        f"n = {numbers.count(counts.patients, 'patient')}, {numbers.count(counts.cases, 'case')}{seeds}. "
        "Means over classes, with 95 % bootstrap intervals."
    )


def _table_note(arms: Sequence[Arm]) -> str:
    note = "HD95 is the mean of the finite cases; missed structures stand beside it and enter the penalized mean below."
    if any(arm.parameters is None or arm.macs is None or arm.latency_ms is None for arm in arms):
        note += f" {numbers.ABSENT} means not measured."
    return note


def _config_text(config: Mapping[str, Any] | None) -> str:
    text = json.dumps(config, indent=2, ensure_ascii=False) if config else ""
    cut = len(text) > MAX_CONFIG_CHARACTERS
    return text[:MAX_CONFIG_CHARACTERS] + ("\n… cut here; the rest is in config.json" if cut else "")


def _strings(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else [str(item) for item in value or []]
