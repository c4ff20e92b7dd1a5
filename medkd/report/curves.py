"""The training section of a report: which curves there are, in which order and color."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from medkd.report import figures, numbers
from medkd.report.run_folder import MetricPoint, RunFolder

MAX_PANELS = 18


def curve_section(run: RunFolder) -> dict[str, Any]:
    """What the template shows of the run's metrics.csv and those of its arms: one panel per quantity."""
    sources = [(arm.title, arm.metrics) for arm in run.arms if arm.metrics]
    if run.metrics:
        sources.insert(0, ("This run" if sources else "", run.metrics))
    points = [point for _, metrics in sources for point in metrics]
    names = sorted(dict.fromkeys(point.name for point in points), key=_panel_order)
    panels = [_panel(name, sources) for name in names[:MAX_PANELS]]
    return {
        "curves": panels,
        "curves_left_out": ", ".join(names[MAX_PANELS:]),
        "curve_legend": _legend(sources),
        "training": _training_line(points) if points else "",
    }


def _panel_order(name: str) -> tuple[int, str]:
    if name == "loss":
        return (0, name)
    return (1 if name.endswith("_loss") else 3 if name.startswith("lr") or name.endswith("_weight") else 2, name)


def _panel(name: str, sources: Sequence[tuple[str, Sequence[MetricPoint]]]) -> dict[str, Any]:
    lines, dropped = [], 0
    for index, (title, metrics) in enumerate(sources):
        for split in sorted({point.split for point in metrics}):
            points = [point for point in metrics if point.name == name and point.split == split]
            if not points:
                continue
            is_validation = split != "train"
            lines.append(
                figures.Line(
                    f"{title} {split}".strip(),
                    [point.iteration for point in points],
                    [point.value for point in points],
                    series=index if len(sources) > 1 else int(is_validation),
                    is_validation=is_validation,
                )
            )
            dropped += sum(not math.isfinite(point.value) for point in points)
    return {
        "title": name,
        "name": figures.slug(f"curve-{name}"),
        "svg": Markup(figures.curve_panel(name, lines)),
        "caption": f"{numbers.count(dropped, 'point is', 'points are')} not finite and not drawn." if dropped else "",
    }


def _legend(sources: Sequence[tuple[str, Sequence[MetricPoint]]]) -> list[dict[str, Any]]:
    if len(sources) > 1:
        colors = len(figures.SERIES)
        return [{"title": title, "series": index % colors + 1} for index, (title, _) in enumerate(sources)]
    splits = {point.split != "train" for _, metrics in sources for point in metrics}
    return [{"title": "validation" if split else "training", "series": int(split) + 1} for split in sorted(splits)]


def _training_line(points: Sequence[MetricPoint]) -> str:
    last = max(points, key=lambda point: point.iteration)
    return (
        f"{numbers.count(last.iteration, 'iteration')}, {numbers.count(last.epoch, 'epoch')} recorded. Long curves are "
        "means over windows of iterations, with a band from each window's lowest to its highest value; "
        "dots are validations."
    )
