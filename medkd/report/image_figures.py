"""The plots of a classifier's report: ROC curves, reliability diagram, confusion matrix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from medkd.metrics.classification import RocCurve
from medkd.report import numbers
from medkd.report.figures import (
    INK,
    MUTED,
    PAPER,
    RULE,
    SERIES,
    STYLE,
    finish_axes,
    new_figure,
    series_color,
    shorten,
    to_svg,
)

SIDE_INCHES = 4.4
MAX_NAMED_CLASSES = 12


def roc_plot(
    curves: Sequence[tuple[str, RocCurve]], *, name: str, point: tuple[float, float] | None = None, label: str = ""
) -> str:
    """Draw ROC curves as the steps they are.

    Args:
        curves: what each is called, and its operating points; the color follows the order.
        name: unique on the page.
        point: (specificity, sensitivity) of a threshold fixed beforehand.
        label: what that point is called.

    Returns: SVG for an HTML page.
    """
    with mpl.rc_context(STYLE):
        figure, axes = _square("false positive rate (1 − specificity)", "sensitivity")
        axes.plot((0, 1), (0, 1), color=MUTED, linewidth=1, linestyle=(0, (2, 3)))
        for number, (title, curve) in enumerate(curves):
            axes.step(
                1 - curve.specificity, curve.sensitivity, where="post", color=series_color(number), linewidth=1.8,
                label=shorten(title),
            )  # fmt: skip
        if point is not None:
            axes.plot(
                (1 - point[0],), (point[1],), color=INK, marker="o", markersize=6, markerfacecolor=PAPER,
                markeredgewidth=1.6, linestyle="none", label=label,
            )  # fmt: skip
        if len(curves) > 1 or point is not None:
            axes.legend(loc="lower right", frameon=False, labelcolor=INK, fontsize=8, handlelength=1.4)
        return to_svg(figure, name, "ROC curve: sensitivity against false positive rate")


def reliability_plot(table: Sequence[Mapping[str, Any]], *, name: str) -> str:
    """Draw how often the most probable class is right against its probability, with the images per bin below.

    Args:
        table: rows of :meth:`medkd.metrics.calibration.Calibration.table`.
        name: unique on the page.

    Returns: SVG for an HTML page.
    """
    filled = [row for row in table if row["count"]]
    with mpl.rc_context(STYLE):
        figure, axes = _square("probability of the most probable class", "share that is right", bottom=1.25)
        axes.tick_params(labelbottom=False)
        axes.set_xlabel("")
        axes.plot((0, 1), (0, 1), color=MUTED, linewidth=1, linestyle=(0, (2, 3)))
        for row in filled:
            low, high = sorted((row["confidence"], row["accuracy"]))
            color = SERIES[1] if row["confidence"] > row["accuracy"] else SERIES[0]
            axes.plot((row["confidence"],) * 2, (low, high), color=color, linewidth=2.4, alpha=0.35)
        most = max((row["count"] for row in filled), default=1)
        axes.scatter(
            [row["confidence"] for row in filled], [row["accuracy"] for row in filled], color=INK, linewidths=0,
            s=[14 + 46 * row["count"] / most for row in filled], zorder=3,
        )  # fmt: skip
        height = figure.get_figheight()
        box = axes.get_position()
        counts = figure.add_axes((box.x0, 0.45 / height, box.width, 0.6 / height))
        for row in filled:
            counts.add_patch(
                Rectangle((row["low"], 0), row["high"] - row["low"], row["count"], color=SERIES[0], alpha=0.45)
            )
        counts.set_xlim(-0.015, 1.015)
        counts.set_ylim(0, most * 1.05)
        counts.set_xticks((0, 0.25, 0.5, 0.75, 1), ("0", "0.25", "0.5", "0.75", "1"))
        counts.set_yticks((most,), (f"{most}",))
        counts.set_xlabel("probability of the most probable class")
        counts.set_ylabel("images")
        finish_axes(counts, grid="y")
        return to_svg(figure, name, "Reliability diagram: share that is right against stated probability")


def confusion_plot(counts: Sequence[Sequence[int]], classes: Sequence[str], *, name: str) -> str:
    """Draw a confusion matrix: counts, shaded by their share of the row.

    Args:
        counts: (K, K) images by reference (rows) and most probable class (columns).
        classes: K names; beyond twelve classes their numbers stand for them.
        name: unique on the page.

    Returns: SVG for an HTML page.
    """
    table = np.asarray(counts, dtype=np.int64)
    shares = table / np.maximum(table.sum(axis=1, keepdims=True), 1)
    size = len(table)
    names = [shorten(text) if size <= MAX_NAMED_CLASSES else str(index) for index, text in enumerate(classes)]
    with mpl.rc_context(STYLE):
        left = 0.45 + 0.075 * max(len(text) for text in names)
        is_long = sum(len(text) for text in names) > 34
        bottom = 0.45 + (0.075 * max(len(text) for text in names) if is_long else 0.15)
        figure, axes = new_figure(left + 3.2, bottom + 2.9, left=left, right=0.1, bottom=bottom, top=0.08)
        for row, column in np.ndindex(table.shape):
            share = float(shares[row, column])
            color = SERIES[0] if row == column else SERIES[1]
            axes.add_patch(Rectangle((column - 0.47, row - 0.47), 0.94, 0.94, color=color, alpha=0.06 + 0.5 * share))
            if size <= MAX_NAMED_CLASSES:
                text = numbers.fixed(float(table[row, column]), 0)
                axes.text(column, row - 0.08, text, ha="center", va="center", color=INK, fontsize=10 if size < 6 else 8)
                if size < 6:
                    percent = f"{100 * share:.0f} %"
                    axes.text(column, row + 0.2, percent, ha="center", va="center", color=MUTED, fontsize=8)
        axes.set_xlim(-0.5, size - 0.5)
        axes.set_ylim(size - 0.5, -0.5)
        axes.set_xticks(range(size), names, rotation=90 if is_long else 0)
        axes.set_yticks(range(size), names)
        axes.set_xlabel("most probable class")
        axes.set_ylabel("reference")
        finish_axes(axes, grid="both")
        axes.grid(False)
        axes.spines["bottom"].set_visible(False)
        axes.tick_params(labelcolor=INK)
        return to_svg(figure, name, "Confusion matrix: reference by row, most probable class by column")


def _square(x_label: str, y_label: str, *, bottom: float = 0.5) -> tuple[Any, Axes]:
    """Axes from 0 to 1 both ways, as wide as high."""
    side = SIDE_INCHES - 0.7
    figure, axes = new_figure(SIDE_INCHES, bottom + side + 0.1, left=0.6, right=0.1, bottom=bottom, top=0.1)
    axes.set_xlim(-0.015, 1.015)
    axes.set_ylim(-0.015, 1.015)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_ticks((0, 0.25, 0.5, 0.75, 1), ("0", "0.25", "0.5", "0.75", "1"))
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    finish_axes(axes, grid="both")
    axes.spines["bottom"].set_color(RULE)
    return figure, axes
