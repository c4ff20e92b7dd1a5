"""The plots of a report, as SVG that takes its colors and font from the page it stands in."""

from __future__ import annotations

import io
import math
import re
import textwrap
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullFormatter

from medkd.report import numbers

Floats = npt.NDArray[np.float64]

# Matplotlib writes literal colors. These stand for the page's CSS variables, so that one figure fits a light and a
# dark page; a figure saved as a file of its own gets the second column instead.
INK, MUTED, RULE, PAPER = "#010203", "#010204", "#010205", "#010206"
SERIES = ("#020301", "#020302", "#020303", "#020304", "#020305", "#020306")
VARIABLES = {
    INK: ("var(--ink)", "#1d2329"),
    MUTED: ("var(--muted)", "#5c6670"),
    RULE: ("var(--rule)", "#dfe3e8"),
    PAPER: ("var(--paper)", "#ffffff"),
    SERIES[0]: ("var(--series-1)", "#1668b0"),
    SERIES[1]: ("var(--series-2)", "#c8650a"),
    SERIES[2]: ("var(--series-3)", "#1d8062"),
    SERIES[3]: ("var(--series-4)", "#98407f"),
    SERIES[4]: ("var(--series-5)", "#7d6608"),
    SERIES[5]: ("var(--series-6)", "#59636e"),
}
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "medkd",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9.0,
    "text.parse_math": False,
    "axes.unicode_minus": True,
    "path.simplify": False,
}
MAX_POINTS = 160
BOX_WIDTH_INCHES = 4.9
LABEL_LENGTH = 26


@dataclass(frozen=True)
class Line:
    """One curve of a panel: ``x`` and ``y`` (N,), a series number that fixes its color, and its split."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    series: int = 0
    is_validation: bool = False


@dataclass(frozen=True)
class Sample:
    """One arm's values, a value per patient, with the mean's interval.

    Attributes:
        title: the arm as people call it.
        values: (N,) finite values.
        estimate: their mean; None draws no mean.
        low: lower end of the mean's interval.
        high: its upper end.
        series: number that fixes the color.
        note: said at the right edge (such as how many are infinite).
    """

    title: str
    values: Sequence[float]
    estimate: float | None = None
    low: float | None = None
    high: float | None = None
    series: int = 0
    note: str = ""


@dataclass(frozen=True)
class Pairing:
    """Two arms' values on the same patients, with the interval of the mean difference (second − first).

    ``values`` maps a patient to (first, second); both finite.
    """

    first: str
    second: str
    values: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    estimate: float | None = None
    low: float | None = None
    high: float | None = None
    higher_is_better: bool = True


def series_color(number: int) -> str:
    """The color of the n-th series; the palette repeats after six."""
    return SERIES[number % len(SERIES)]


def curve_panel(title: str, lines: Sequence[Line], *, x_label: str = "iteration") -> str:
    """Draw one quantity against training time.

    Long curves are averaged in at most 160 windows, with a band from each window's lowest to highest value.
    Non-finite points are left out. A quantity that is positive and spans more than two decades gets a log axis.

    Args:
        title: the quantity's name, used for the picture's description.
        lines: its curves.
        x_label: unit of the x axis.

    Returns: SVG for an HTML page.
    """
    with mpl.rc_context(STYLE):
        figure, axes = new_figure(3.3, 2.0, left=0.52, right=0.1, bottom=0.42, top=0.1)
        finite: list[float] = []
        for line in lines:
            x, y = _finite(line.x, line.y)
            finite += y.tolist()
            _draw_curve(axes, line, x, y)
        if finite and min(finite) > 0 and max(finite) / min(finite) > 100:
            axes.set_yscale("log")
            axes.yaxis.set_minor_formatter(NullFormatter())
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        else:
            _set_ticks(axes.yaxis, 4)
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _thousands(value)))
        axes.set_xlabel(x_label)
        finish_axes(axes, grid="y")
        return to_svg(figure, f"curve-{title}", f"Curve of {title} over training")


def box_plot(samples: Sequence[Sample], axis_label: str, *, name: str) -> str:
    """Draw each arm's distribution over patients: points, quartile box, and the mean with its interval.

    Args:
        samples: one per arm, drawn downward.
        axis_label: quantity and unit.
        name: unique on the page.

    Returns: SVG for an HTML page.
    """
    with mpl.rc_context(STYLE):
        label_width = 0.2 + 0.075 * max(len(shorten(s.title)) for s in samples)
        height = 0.62 + 0.52 * len(samples)
        figure, axes = new_figure(BOX_WIDTH_INCHES, height, left=label_width, right=0.15, bottom=0.5, top=0.08)
        for row, sample in enumerate(samples):
            _draw_box(axes, row, sample)
        axes.set_yticks(range(len(samples)), [shorten(sample.title) for sample in samples])
        axes.set_ylim(len(samples) - 0.4, -0.5)
        axes.set_xlabel(axis_label)
        _set_ticks(axes.xaxis, 5)
        finish_axes(axes, grid="x")
        axes.tick_params(axis="y", labelcolor=INK)
        return to_svg(figure, name, f"Distribution of {axis_label} over patients")


def paired_plot(pairing: Pairing, axis_label: str, *, name: str) -> str:
    """Draw every patient's change between two arms, and the sorted differences with their mean and interval.

    Args:
        pairing: the two arms' values by patient.
        axis_label: quantity and unit.
        name: unique on the page.

    Returns: SVG for an HTML page.
    """
    patients = sorted(pairing.values)
    pairs = np.array([pairing.values[patient] for patient in patients], dtype=np.float64).reshape(-1, 2)
    difference = pairs[:, 1] - pairs[:, 0]
    gain = difference if pairing.higher_is_better else -difference
    colors = [SERIES[0] if g > 0 else SERIES[1] if g < 0 else MUTED for g in gain]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(BOX_WIDTH_INCHES, 2.9))
        slopes = figure.add_axes((0.115, 0.17, 0.36, 0.8))
        for pair, color in zip(pairs, colors, strict=True):
            slopes.plot((0, 1), pair, color=color, linewidth=1.0, alpha=0.65, marker="o", markersize=3.2)
        slopes.set_xlim(-0.25, 1.25)
        slopes.set_xticks((0, 1), (_two_lines(pairing.first), _two_lines(pairing.second)))
        slopes.set_ylabel(axis_label)
        _set_ticks(slopes.yaxis, 5)
        finish_axes(slopes, grid="y")
        slopes.tick_params(axis="x", labelcolor=INK)
        sorted_axes = figure.add_axes((0.625, 0.17, 0.365, 0.8))
        _draw_differences(sorted_axes, difference, colors, pairing)
        return to_svg(figure, name, f"{axis_label}: {pairing.second} against {pairing.first}, patient by patient")


def cost_plot(points: Sequence[tuple[Sample, float]], axis_label: str, *, name: str) -> str:
    """Draw quality against size: each arm's mean with its interval over its number of parameters (log axis).

    Args:
        points: an arm's sample with its estimate, and its parameters.
        axis_label: quantity and unit of the estimate.
        name: unique on the page.

    Returns: SVG for an HTML page.
    """
    with mpl.rc_context(STYLE):
        figure, axes = new_figure(BOX_WIDTH_INCHES, 2.75, left=0.6, right=0.15, bottom=0.5, top=0.1)
        sizes = [size for _, size in points]
        axes.set_xscale("log")
        axes.set_xlim(min(sizes) / 3, max(sizes) * 3)
        taken: list[tuple[float, float]] = []
        for sample, size in sorted(points, key=lambda point: (point[1], point[0].estimate or 0.0)):
            color = series_color(sample.series)
            x = size * 1.05 ** sum(size == other for other, _ in taken)  # equal sizes stand side by side
            taken.append((size, sample.estimate or 0.0))
            if sample.low is not None and sample.high is not None:
                axes.plot((x, x), (sample.low, sample.high), color=color, linewidth=2, alpha=0.55)
            axes.plot((x,), (sample.estimate or 0.0,), color=color, marker="D", markersize=6, linestyle="none")
            is_right = math.log(size) > (math.log(axes.get_xlim()[0]) + math.log(axes.get_xlim()[1])) / 2
            axes.annotate(
                shorten(sample.title), (x, sample.estimate or 0.0), xytext=(-8 if is_right else 8, 0), color=INK,
                textcoords="offset points", ha="right" if is_right else "left", va="center",
            )  # fmt: skip
        axes.set_xlabel("parameters")
        axes.set_ylabel(axis_label)
        low, high = (math.ceil(math.log10(axes.get_xlim()[0])), math.floor(math.log10(axes.get_xlim()[1])))
        axes.xaxis.set_major_locator(FixedLocator([10.0**p for p in range(low, high + 1)]))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _thousands(value)))
        axes.xaxis.set_minor_formatter(NullFormatter())
        _set_ticks(axes.yaxis, 5)
        finish_axes(axes, grid="both")
        return to_svg(figure, name, f"{axis_label} against the number of parameters")


def slug(text: str) -> str:
    """A name that is fit for files and ids, and different for different texts."""
    kept = re.sub(r"[^A-Za-z0-9_-]+", "-", text)[:80]
    return kept if kept == text else f"{kept}-{zlib.crc32(text.encode()):08x}"


def standalone(svg: str) -> str:
    """Turn a page's SVG into a file of its own: literal colors, a system font, the namespace."""
    for variable, color in VARIABLES.values():
        svg = svg.replace(variable, color)
    svg = svg.replace("var(--sans)", "'Helvetica Neue', Arial, sans-serif")
    return svg.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)


def new_figure(
    width: float, height: float, *, left: float, right: float, bottom: float, top: float
) -> tuple[Figure, Axes]:
    """Make a figure with one pair of axes and the given margins, all in inches."""
    figure = Figure(figsize=(width, height))
    box = (left / width, bottom / height, (width - left - right) / width, (height - bottom - top) / height)
    return figure, figure.add_axes(box)


def finish_axes(axes: Axes, *, grid: Literal["x", "y", "both"]) -> None:
    """Give axes their grid and the page's colors."""
    axes.grid(True, axis=grid, color=RULE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.patch.set_alpha(0)
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(side == "bottom")
        axes.spines[side].set_color(RULE)
    axes.tick_params(which="both", length=0, labelcolor=MUTED, pad=4)
    axes.xaxis.label.set_color(MUTED)
    axes.yaxis.label.set_color(MUTED)


def _set_ticks(axis: Axis, intervals: int) -> None:
    """Put few ticks on an axis whose limits are final, all with the same number of decimals."""
    axis.set_major_locator(MaxNLocator(intervals))
    places = [float(f"{place:.6g}") for place in axis.get_majorticklocs()]
    decimals = max((len(f"{place:f}".rstrip("0").partition(".")[2]) for place in places), default=0)
    is_tiny = 0 < max(abs(place) for place in places) < 1e-4

    def text(value: float, _: int | None) -> str:
        return f"{value:.2g}".replace("-", numbers.MINUS) if is_tiny else numbers.fixed(value, decimals)

    axis.set_major_formatter(FuncFormatter(text))


def _finite(x: Sequence[float], y: Sequence[float]) -> tuple[Floats, Floats]:
    x_values, y_values = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    keep = np.isfinite(x_values) & np.isfinite(y_values)
    return x_values[keep], y_values[keep]


def _draw_curve(axes: Axes, line: Line, x: Floats, y: Floats) -> None:
    color = series_color(line.series)
    if len(x) > MAX_POINTS:
        size = math.ceil(len(x) / MAX_POINTS)
        windows = [slice(start, start + size) for start in range(0, len(x), size)]
        low = [float(y[window].min()) for window in windows]
        high = [float(y[window].max()) for window in windows]
        x, y = (np.array([values[window].mean() for window in windows]) for values in (x, y))
        axes.fill_between(x, low, high, color=color, alpha=0.16, linewidth=0)
    marker = "o" if line.is_validation or len(x) == 1 else ""
    axes.plot(x, y, color=color, linewidth=1.5, marker=marker, markersize=3.2 if len(x) < 40 else 0)


def _draw_box(axes: Axes, row: int, sample: Sample) -> None:
    color = series_color(sample.series)
    values = np.sort(np.asarray(sample.values, dtype=np.float64))
    if len(values):
        first, median, third = np.percentile(values, (25, 50, 75))
        reach = 1.5 * (third - first)
        inside = values[(values >= first - reach) & (values <= third + reach)]
        axes.plot((inside[0], first), (row, row), color=color, linewidth=1)
        axes.plot((third, inside[-1]), (row, row), color=color, linewidth=1)
        axes.add_patch(Rectangle((first, row - 0.17), third - first, 0.34, facecolor=color, alpha=0.2, linewidth=0))
        axes.add_patch(Rectangle((first, row - 0.17), third - first, 0.34, fill=False, edgecolor=color, linewidth=1))
        axes.plot((median, median), (row - 0.17, row + 0.17), color=color, linewidth=2)
        spread = ((np.arange(len(values)) * 0.618034) % 1 - 0.5) * 0.26  # even, and the same every time
        axes.scatter(values, row + spread, s=9, color=color, alpha=0.75, linewidths=0)
    if sample.estimate is not None and math.isfinite(sample.estimate):
        if sample.low is not None and sample.high is not None:
            axes.plot((sample.low, sample.high), (row + 0.31, row + 0.31), color=INK, linewidth=1.4)
        axes.plot((sample.estimate,), (row + 0.31,), color=INK, marker="D", markersize=3.6)
    if sample.note:
        axes.text(0.995, row - 0.25, sample.note, color=MUTED, ha="right", va="bottom", fontsize=8,
                  transform=axes.get_yaxis_transform())  # fmt: skip


def _draw_differences(axes: Axes, difference: Floats, colors: Sequence[str], pairing: Pairing) -> None:
    order = np.argsort(difference, kind="stable")
    axes.axhline(0, color=MUTED, linewidth=1)
    if pairing.low is not None and pairing.high is not None:
        axes.axhspan(pairing.low, pairing.high, color=INK, alpha=0.1, linewidth=0)
    if pairing.estimate is not None:
        axes.axhline(pairing.estimate, color=INK, linewidth=1.2, linestyle=(0, (4, 2)))
    places = np.arange(len(difference))
    axes.vlines(places, 0, difference[order], color=[colors[i] for i in order], linewidth=1.2, alpha=0.65)
    axes.scatter(places, difference[order], s=12, color=[colors[i] for i in order], linewidths=0)
    axes.set_xticks([])
    axes.set_xlabel("patients, sorted")
    axes.set_ylabel("difference")
    axes.margins(x=0.08)
    _set_ticks(axes.yaxis, 5)
    finish_axes(axes, grid="y")


def shorten(text: str) -> str:
    """A label that fits beside a plot."""
    return text if len(text) <= LABEL_LENGTH else text[: LABEL_LENGTH - 1] + "…"


def _two_lines(text: str) -> str:
    return "\n".join(textwrap.wrap(text, 14, max_lines=2, placeholder="…"))


def _thousands(value: float) -> str:
    for factor, prefix in numbers.SCALES:
        if abs(value) >= factor:
            return f"{value / factor:g} {prefix}"
    return f"{value:g}"


def to_svg(figure: Figure, name: str, description: str) -> str:
    """Write the figure as an SVG element with CSS colors, page-wide unique ids and no dates, links or namespaces."""
    buffer = io.StringIO()
    blank = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=blank)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"| version="1.1"', "", svg)
    svg = re.sub(r' (?:width|height)="[\d.]+pt"', "", svg).replace("xlink:href", "href")
    prefix = slug(name) + "-"
    svg = re.sub(r'\bid="', f'id="{prefix}', svg)
    svg = svg.replace('href="#', f'href="#{prefix}').replace("url(#", f"url(#{prefix}")
    # A hundredth of a point is enough and halves the size; the text between the tags is left alone.
    svg = re.sub(r"<[^>]*>", lambda tag: re.sub(r"(\d\.\d\d)\d+", r"\1", tag[0]), svg)
    for color, (variable, _) in VARIABLES.items():
        svg = svg.replace(color, variable)
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font: \1 var(--sans)", svg)
    label = description.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;").replace(">", "&gt;")
    return svg.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1).strip()
