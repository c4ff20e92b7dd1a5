"""Heatmaps as pictures: one to read, with the tissue and a legend, and one to lay over the slide."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
from numpy.typing import NDArray

from medkd.data.atomic import atomic_write
from medkd.wsi.prediction import SlidePrediction

if TYPE_CHECKING:
    from medkd.wsi.slides import Slide

_COLORMAP = "RdYlBu_r"  # blue to red, told apart with any color vision, and no color is that of gray tissue
_OPACITY = 0.6
_FAINT = 0.25  # opacity of probability 0 in the overlay
_LEGEND_STOPS = 6
_THUMBNAIL = 1200  # pixels, longest side of the tissue in the picture
_MICROMETERS = (10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000)


def shown_class(prediction: SlidePrediction) -> int:
    """The class that one-channel pictures show: the only one of interest, or -1 for "any but the first"."""
    reported = prediction.reported_classes
    return reported[0] if len(reported) == 1 else -1


def shown_name(prediction: SlidePrediction) -> str:
    """What the pictures' legend says."""
    index = shown_class(prediction)
    return prediction.classes[index] if index >= 0 else f"any class but {prediction.classes[0]}"


def _shown_values(prediction: SlidePrediction) -> NDArray[np.float32]:
    """(h, w) probability, NaN where nothing was predicted."""
    assert prediction.heatmap is not None
    values = prediction.heatmap.values
    index = shown_class(prediction)
    if index >= 0:
        return values[index]
    return values[1:].max(0) if prediction.activation == "sigmoid" else 1 - values[0]


def write_picture(prediction: SlidePrediction, slide: Slide, path: Path, *, name: str) -> None:
    """Write the slide with the heatmap over it, a legend, a scale bar and what it shows, as PNG.

    Args:
        prediction: what to show; without a heatmap, the slide alone is shown and the picture says so.
        slide: the slide.
        path: the file.
        name: what to call the slide.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    width, height = slide.dimensions
    thumbnail = slide.thumbnail(_THUMBNAIL)
    aspect = height / width
    figure = Figure(figsize=(9.0, float(np.clip(7.0 * aspect + 1.2, 3.0, 16.0))), dpi=130, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    gray = cv2.cvtColor(thumbnail, cv2.COLOR_RGB2GRAY)
    axes.imshow(gray, cmap="gray", vmin=0, vmax=255, extent=(0, width, height, 0), interpolation="bilinear")
    heatmap = prediction.heatmap
    if heatmap is None:
        axes.set_title(f"{name}: nothing predicted", fontsize=11)
    else:
        values = _shown_values(prediction)
        right = heatmap.x + values.shape[1] * heatmap.pixel_level0
        bottom = heatmap.y + values.shape[0] * heatmap.pixel_level0
        image = axes.imshow(
            np.ma.masked_invalid(values), cmap=_COLORMAP, vmin=0, vmax=1, alpha=_OPACITY, interpolation="nearest",
            extent=(heatmap.x, right, bottom, heatmap.y),
        )  # fmt: skip
        axes.set_title(f"{name}: {shown_name(prediction)}", fontsize=11)
        bar = figure.colorbar(image, ax=axes, fraction=0.04, pad=0.02)
        bar.set_label(f"probability of {shown_name(prediction)}")
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_xlabel(_caption(prediction), fontsize=9)
    _scale_bar(axes, width, height, prediction.grid.slide_mpp)
    canvas.draw()
    drawn = cv2.cvtColor(np.asarray(canvas.buffer_rgba()), cv2.COLOR_RGBA2BGR)
    with atomic_write(path, "wb") as file:
        file.write(cv2.imencode(".png", drawn)[1].tobytes())


def _caption(prediction: SlidePrediction) -> str:
    done = int(prediction.predicted.sum())
    grid = prediction.grid
    failed = f", {len(prediction.failed)} failed" if prediction.failed else ""
    return f"{done} tiles of {grid.size} px at {grid.mpp:g} µm per pixel{failed}"


def _scale_bar(axes: Any, width: int, height: int, mpp: float) -> None:
    fitting = [length for length in _MICROMETERS if length / mpp <= 0.25 * width]
    if not fitting:
        return
    length = fitting[-1]
    pixels = length / mpp
    x, y, thick = 0.03 * width, 0.97 * height, 0.008 * height
    axes.add_patch(
        _rectangle(x - 0.01 * width, y - 0.055 * height, pixels + 0.02 * width, 0.075 * height, "white", 0.75)
    )
    axes.add_patch(_rectangle(x, y - thick, pixels, thick, "black", 1.0))
    text = f"{length / 1000:g} mm" if length >= 1000 else f"{length} µm"
    axes.text(x + pixels / 2, y - 1.5 * thick, text, ha="center", va="bottom", fontsize=8)


def _rectangle(x: float, y: float, width: float, height: float, color: str, alpha: float) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((x, y), width, height, facecolor=color, edgecolor="none", alpha=alpha)


def write_overlay(prediction: SlidePrediction, path: Path) -> dict[str, Any] | None:
    """Write the heatmap alone as RGBA PNG, one pixel per heatmap pixel.

    Transparent where nothing was predicted, faint where the probability is low.

    Returns:
        Where it lies on the slide (x, y, width and height in level-0 pixels), the class, and colors of the
        probabilities 0, 0.2, … 1 as ``legend``; None without a heatmap, and then nothing is written.
    """
    heatmap = prediction.heatmap
    if heatmap is None:
        return None
    from matplotlib import colormaps, colors

    values = _shown_values(prediction)
    picture = (colormaps[_COLORMAP](np.nan_to_num(values)) * 255).round().astype(np.uint8)
    opacity = _FAINT + (1 - _FAINT) * np.nan_to_num(values)  # where nothing was found, the tissue shows
    picture[..., 3] = np.where(np.isnan(values), 0, np.rint(255 * opacity))
    fine, content = cv2.imencode(".png", cv2.cvtColor(picture, cv2.COLOR_RGBA2BGRA))
    assert fine
    with atomic_write(path, "wb") as file:
        file.write(content.tobytes())
    height, width = values.shape
    return {
        "file": path.name,
        "x": heatmap.x,
        "y": heatmap.y,
        "width": width * heatmap.pixel_level0,
        "height": height * heatmap.pixel_level0,
        "class": shown_name(prediction),
        "legend": [colors.to_hex(colormaps[_COLORMAP](stop)) for stop in np.linspace(0, 1, _LEGEND_STOPS)],
    }
