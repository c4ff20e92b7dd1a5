"""The rows, sentences and plots about evaluated arms, ready for a template."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from medkd.metrics.statistics import PairedResult
from medkd.report import cohort, figures, numbers
from medkd.report.cohort import ASSD, DICE, HD95, SURFACE_DICE, CaseValue, Measure, Statistics
from medkd.report.run_folder import Arm, Evaluation

FEW_PATIENTS = 10
MAX_CASE_ROWS = 300
MISSED_RULE = (
    "A missed structure counts Dice 0. Its distance is infinite: left out of the mean, and counted as the image "
    "diagonal in the penalized mean and in paired differences, so that missing never helps."
)
Row = dict[str, Any]


def estimate(found: Statistics, decimals: int) -> Row:
    """A mean and its interval as two cells; infinity where every value is infinite, a dash where there is none."""
    if not found.n:
        return {"value": numbers.INFINITY if found.n_infinite else numbers.ABSENT, "interval": numbers.ABSENT}
    return {"value": numbers.fixed(found.mean, decimals), "interval": bounds(found.low, found.high, decimals)}


def bounds(low: float, high: float, decimals: int) -> str:
    """``[0.790, 0.831]``, or a dash where there are too few patients for an interval."""
    if not (math.isfinite(low) and math.isfinite(high)):
        return numbers.ABSENT
    return f"[{numbers.fixed(low, decimals)}, {numbers.fixed(high, decimals)}]"


def arm_table(arms: Sequence[Arm], main: Arm | None) -> Row:
    """The table of arms: quality with intervals, cost in columns with one unit each."""
    parameters, parameter_prefix = numbers.scaled_column([arm.parameters for arm in arms])
    macs, mac_prefix = numbers.scaled_column([arm.macs for arm in arms])
    latencies = [arm.latency_ms for arm in arms]
    fastest = min((value for value in latencies if value), default=1.0)
    rows = []
    for index, arm in enumerate(arms):
        counts = cohort.counts(arm.evaluations)
        rows.append(
            {
                "title": arm.title,
                "is_main": arm is main,
                "series": index % len(figures.SERIES) + 1,
                "dice": estimate(cohort.statistics(cohort.case_values(arm.evaluations, DICE)), DICE.decimals),
                "hd95": estimate(cohort.statistics(cohort.case_values(arm.evaluations, HD95)), HD95.decimals),
                "missed": f"{counts.missed} of {counts.structures - counts.empty}" if counts.cases else numbers.ABSENT,
                "has_missed": counts.missed > 0,
                "parameters": parameters[index],
                "macs": macs[index],
                "latency": numbers.fixed(arm.latency_ms, 1 if fastest < 100 else 0),
            }
        )
    return {
        "arms": rows,
        "parameter_prefix": f", {parameter_prefix}" if parameter_prefix else "",
        "mac_prefix": f", {mac_prefix}" if mac_prefix else "",
    }


def class_table(arms: Sequence[Arm]) -> list[Row]:
    """Per arm, a row per class and one for the mean over classes."""
    table = []
    for arm in arms:
        names: list[str | None] = [*cohort.class_names(arm.evaluations)]
        rows = [_class_row(arm.evaluations, name) for name in ([*names, None] if len(names) > 1 else names)]
        if rows:
            table.append({"title": arm.title, "rows": rows})
    return table


def _class_row(evaluations: Sequence[Evaluation], name: str | None) -> Row:
    def found(measure: Measure, *, is_penalized: bool = False) -> Statistics:
        return cohort.statistics(cohort.case_values(evaluations, measure, class_name=name, is_penalized=is_penalized))

    dice, counts = found(DICE), cohort.counts(evaluations, name)
    return {
        "title": "mean over classes" if name is None else name,
        "dice": estimate(dice, DICE.decimals),
        "sd": numbers.fixed(dice.sd, DICE.decimals),
        "median": numbers.fixed(dice.median, DICE.decimals),
        "hd95": estimate(found(HD95), HD95.decimals),
        "penalized": numbers.fixed(found(HD95, is_penalized=True).mean, HD95.decimals),
        "surface_dice": numbers.fixed(found(SURFACE_DICE).mean, SURFACE_DICE.decimals),
        "assd": numbers.fixed(found(ASSD).mean, ASSD.decimals),
        "missed": counts.missed,
        "false_positive": counts.false_positive,
        "empty": counts.empty,
        "structures": counts.structures,
    }


def case_table(arms: Sequence[Arm]) -> Row:
    """Every case's Dice and HD95 in every arm (means over classes and seeds), the worst of the first arm on top."""
    columns: list[str] = []
    values: dict[tuple[str, str], dict[str, list[CaseValue]]] = {}
    unit = cohort.unit([e for arm in arms for e in arm.evaluations])
    for arm in arms:
        for measure in (DICE, HD95):
            column = f"{arm.title}: {measure.title}{f' {unit}' if measure.is_distance else ''}"
            columns.append(column)
            for value in cohort.case_values(arm.evaluations, measure):
                values.setdefault((value.case, value.patient), {}).setdefault(column, []).append(value)
    rows = []
    for (case, patient), found in values.items():
        cells = [_case_cell(found.get(column), HD95 if i % 2 else DICE) for i, column in enumerate(columns)]
        dice = _mean(found.get(columns[0]))
        rows.append((-1.0 if dice is None or math.isnan(dice) else dice, case, patient, cells))
    rows.sort(key=lambda row: row[:2])
    shown = rows[:MAX_CASE_ROWS]
    cut = "" if len(shown) == len(rows) else f", the {len(shown)} worst of {len(rows)}"
    caption = f"Dice and HD95, means over classes{cut}"
    return {
        "columns": columns,
        "caption": caption,
        "rows": [{"case": case, "patient": patient, "cells": cells} for _, case, patient, cells in shown],
    }


def _mean(values: Sequence[CaseValue] | None) -> float | None:
    return None if not values else math.fsum(value.value for value in values) / len(values)


def _case_cell(values: Sequence[CaseValue] | None, measure: Measure) -> str:
    mean = _mean(values)
    if mean is not None and math.isnan(mean):
        return "n/a (both empty)"
    if mean is not None and math.isinf(mean):
        return "∞ (missed)" if any(value.is_missed for value in values or ()) else "∞ (invented)"
    return numbers.fixed(mean, measure.decimals)


def difference_row(title: str, measure: str, result: PairedResult, decimals: int, *, higher_is_better: bool) -> Row:
    """One paired comparison as a table row."""
    return {
        "title": title,
        "measure": measure,
        "mean": numbers.signed(result.mean_difference, decimals),
        "interval": signed_bounds(result, decimals),
        "patients": result.n_patients,
        "wilcoxon": numbers.p_value(result.wilcoxon_p),
        "permutation": numbers.p_value(result.permutation_p),
        "reading": reading(result, higher_is_better=higher_is_better),
    }


def grouped(rows: Sequence[Row]) -> list[Row]:
    """The rows with ``span``: how many from here on share a title; 0 on those after the first."""
    titles = [row["title"] for row in rows]
    spans = [0] * len(rows)
    start = 0
    for place, title in enumerate(titles):
        start = place if title != titles[start] else start
        spans[start] += 1
    return [{**row, "span": span} for row, span in zip(rows, spans, strict=True)]


def signed_bounds(result: PairedResult, decimals: int) -> str:
    """``[+0.010, +0.052]``."""
    if not (math.isfinite(result.low) and math.isfinite(result.high)):
        return numbers.ABSENT
    return f"[{numbers.signed(result.low, decimals)}, {numbers.signed(result.high, decimals)}]"


def reading(result: PairedResult, *, higher_is_better: bool) -> str:
    """What the interval supports, in words."""
    if not (math.isfinite(result.low) and math.isfinite(result.high)):
        return "too few patients to tell"
    if result.low <= 0 <= result.high:
        return "no difference shown"
    return "better" if (result.low > 0) == higher_is_better else "worse"


def compared_arms(arms: Sequence[Arm]) -> list[tuple[Arm, Arm]]:
    """(Subject, baseline) of every comparison that was asked for; if none was, every arm against the first."""
    evaluated = {arm.name: arm for arm in arms if arm.evaluations}
    pairs = [(arm, evaluated[name]) for arm in evaluated.values() for name in arm.compare_with if name in evaluated]
    if pairs or any(arm.compare_with for arm in arms):
        return pairs
    found = list(evaluated.values())
    return [(arm, found[0]) for arm in found[1:]]


def compare(subject: Arm, baseline: Arm) -> tuple[list[Row], Row]:
    """A comparison's table rows (Dice and HD95), and its paired plot of Dice."""
    title = f"{subject.title} − {baseline.title}"
    rows = [difference(subject, baseline, measure, title) for measure in (DICE, HD95)]
    return [row for row, _ in rows], paired_plot(subject, baseline, DICE, rows[0][1])


def difference(
    subject: Arm, baseline: Arm, measure: Measure, title: str, *, class_name: str | None = None
) -> tuple[Row, PairedResult]:
    """One paired comparison as a table row, and its result."""
    result = cohort.paired(
        cohort.shared_values(subject.evaluations, baseline.evaluations, measure, class_name=class_name)
    )
    label = measure_label(measure, subject)
    better = not measure.is_distance
    return difference_row(title, label, result, measure.decimals, higher_is_better=better), result


def measure_label(measure: Measure, arm: Arm) -> str:
    """``Dice``; ``HD95, mm``."""
    return f"{measure.title}, {cohort.unit(arm.evaluations)}" if measure.is_distance else measure.title


def class_differences(subject: Arm, baseline: Arm) -> list[Row]:
    """Paired differences of Dice and HD95 in every class."""
    return [
        difference(subject, baseline, measure, name, class_name=name)[0]
        for name in cohort.class_names(subject.evaluations)
        for measure in (DICE, HD95)
    ]


def paired_plot(subject: Arm, baseline: Arm, measure: Measure, result: PairedResult) -> Row:
    """The paired plot of one measure with its title and caption; ``result`` gives the mean and the band."""
    pairs = cohort.patient_pairs(cohort.shared_values(subject.evaluations, baseline.evaluations, measure))
    has_interval = math.isfinite(result.low) and math.isfinite(result.high)
    pairing = figures.Pairing(
        baseline.title,
        subject.title,
        pairs,
        estimate=result.mean_difference if math.isfinite(result.mean_difference) else None,
        low=result.low if has_interval else None,
        high=result.high if has_interval else None,
        higher_is_better=not measure.is_distance,
    )
    signs = [(after - before) * (-1 if measure.is_distance else 1) for before, after in pairs.values()]
    better, worse = sum(s > 0 for s in signs), sum(s < 0 for s in signs)
    name = figures.slug(f"paired-{measure.key}-{subject.name}-{baseline.name}")
    return {
        "title": f"{measure.title}: {subject.title} against {baseline.title}",
        "svg": figures.paired_plot(pairing, measure_label(measure, subject), name=name),
        "name": name,
        "caption": f"Each line is a patient: blue where {subject.title} is better ({better}), orange where it is worse "
        f"({worse}). Dashed: mean difference; band: its 95 % interval.",
    }


def box_plot(arms: Sequence[Arm], measure: Measure) -> Row | None:
    """The distribution of a measure over patients in every evaluated arm."""
    unit = cohort.unit([e for arm in arms for e in arm.evaluations])
    samples = [_sample(arm, index, measure) for index, arm in enumerate(arms) if arm.evaluations]
    if not any(sample.values for sample in samples):
        return None
    label = f"{measure.title}, {unit}" if measure.is_distance else measure.title
    return {
        "title": f"{measure.title} over patients",
        "svg": figures.box_plot(samples, label, name=f"box-{measure.key}"),
        "name": f"box-{measure.key}",
        "caption": "Dots: patients. Box: quartiles. Diamond: mean with its 95 % interval."
        + (" Infinite distances are counted at the right, not drawn." if any(s.note for s in samples) else ""),
    }


def cost_plot(arms: Sequence[Arm]) -> Row | None:
    """Dice against parameters, where at least two arms of different size have both."""
    points = [
        (_sample(arm, index, DICE), arm.parameters)
        for index, arm in enumerate(arms)
        if arm.parameters and arm.evaluations
    ]
    points = [(sample, size) for sample, size in points if sample.estimate is not None]
    if len({size for _, size in points}) < 2:
        return None
    return {
        "title": "Dice against size",
        "svg": figures.cost_plot(points, "Dice", name="cost"),
        "name": "cost",
        "caption": "Mean over patients with its 95 % interval; parameters on a logarithmic axis.",
    }


def _sample(arm: Arm, index: int, measure: Measure) -> figures.Sample:
    values = cohort.case_values(arm.evaluations, measure)
    found = cohort.statistics(values)
    infinite = sum(math.isinf(value.value) for value in values)
    has_interval = math.isfinite(found.low) and math.isfinite(found.high)
    return figures.Sample(
        arm.title,
        list(cohort.patient_means(values).values()),
        estimate=found.mean if math.isfinite(found.mean) else None,
        low=found.low if has_interval else None,
        high=found.high if has_interval else None,
        series=index,
        note=f"∞ in {numbers.count(infinite, 'case')}" if infinite else "",
    )


def statements(arms: Sequence[Arm]) -> list[str]:
    """What stands behind the numbers, said plainly: n, seeds, missed, empty, failed."""
    evaluated = [arm for arm in arms if arm.evaluations]
    if not evaluated:
        return ["Nothing was evaluated yet: training curves say nothing about patients the network has not seen."]
    counted = {arm.name: cohort.counts(arm.evaluations) for arm in evaluated}
    first = counted[evaluated[0].name]
    names = cohort.class_names(evaluated[0].evaluations)
    seeds = sorted({found.seeds for found in counted.values()})
    lines = [
        f"n = {numbers.count(first.patients, 'patient')} ({numbers.count(first.cases, 'case')}, "
        f"{numbers.count(len(names), 'class', 'classes')}: {', '.join(names)}). A case's score is the mean over its "
        "classes; intervals are 95 % percentile bootstrap over patients" + (" and seeds." if seeds != [1] else ".")
    ]
    if first.patients <= FEW_PATIENTS:
        lines.append("With so few patients such intervals are on the narrow side, and a p-value cannot get small.")
    if seeds == [1]:
        lines.append("One training seed per model: the intervals do not include the variation between trainings.")
    else:
        lines.append(f"Training seeds per model: {', '.join(str(n) for n in seeds)}.")
    missed = _counted_line("Missed (in the reference, nothing predicted)", evaluated, counted, "missed")
    invented = _counted_line("Invented (predicted, not in the reference)", evaluated, counted, "false_positive")
    empty = _counted_line("Empty in both", evaluated, counted, "empty")
    lines.append(f"{missed} {MISSED_RULE}")
    lines.append(f"{invented} They count like missed ones.")
    lines.append(f"{empty} Such structures have no score and enter no mean.")
    if any(found.failed for found in counted.values()):
        lines.append(_counted_line("Cases that failed and are in no number", evaluated, counted, "failed"))
    if _differ_in_cases(evaluated):
        lines.append("The models were not scored on the same cases: compare their paired differences, not their means.")
    if cohort.unit(evaluated[0].evaluations) == "px":
        lines.append("The data have no voxel spacing: distances are in pixels, not in mm.")
    return lines


def _counted_line(title: str, arms: Sequence[Arm], counted: Mapping[str, cohort.Counts], key: str) -> str:
    values = [getattr(counted[arm.name], key) for arm in arms]
    if not any(values):
        return f"{title}: none."
    return f"{title}: " + ", ".join(f"{arm.title} {v}" for arm, v in zip(arms, values, strict=True)) + "."


def _differ_in_cases(arms: Sequence[Arm]) -> bool:
    scored = [{score.case for evaluation in arm.evaluations for score in evaluation.scores} for arm in arms]
    return any(cases != scored[0] for cases in scored)
