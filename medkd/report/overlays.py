"""Pictures of single cases: the image, the reference and the prediction, as PNG."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import matplotlib as mpl
import nibabel as nib
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.patheffects import AbstractPathEffect, Stroke, withStroke

# Okabe and Ito's colors for the color-blind, lightened where the original is too dark for a grayscale image.
CLASS_COLORS = ("#56b4e9", "#f5a31a", "#2fd3a0", "#f0e442", "#e68ac0", "#ff7f50", "#b9a2ff")
BACKDROP = "#15181d"
INK = "#e8eaed"
FAINT = "#9aa3ad"
PANEL_INCHES = 2.9
DPI = 120

STYLE: Any = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 8.8,
    "text.parse_math": False,
}

Array = npt.NDArray[np.generic]


@dataclass(frozen=True)
class Slice:
    """One slice as it is displayed: rows downward, columns to the right.

    Attributes:
        image: (H, W) gray values.
        prediction: (H, W) integer labels.
        reference: (H, W) integer labels, or None when there is none.
        spacing: size of a pixel along (rows, columns), in mm or in any common unit.
        caption: what is shown, in a few words.
        left: letter for the anatomical direction at the left edge (R, A), empty when unknown.
        top: the same for the upper edge (A, S).
    """

    image: Array
    prediction: Array
    reference: Array | None
    spacing: tuple[float, float] = (1.0, 1.0)
    caption: str = ""
    left: str = ""
    top: str = ""


def overlay(
    image_slice: Array,
    prediction: Array,
    reference: Array | None,
    *,
    labels: Mapping[int, str],
    spacing_mm: tuple[float, float] | None = None,
    title: str = "",
) -> bytes:
    """Draw a slice beside the same slice with reference (filled) and prediction (outlined).

    Args:
        image_slice: (H, W) gray values as they are to be displayed.
        prediction: (H, W) integer labels.
        reference: (H, W) integer labels, or None.
        labels: value → name of the classes to draw; 0 is background and never drawn.
        spacing_mm: size of a pixel along (rows, columns) in mm; None draws square pixels.
        title: one line above the picture.

    Returns: a PNG file's bytes, equal for equal input.

    Raises:
        ValueError: the arrays are not 2-D or differ in shape.
    """
    shapes = [np.shape(image_slice), np.shape(prediction)] + ([] if reference is None else [np.shape(reference)])
    if len(shapes[0]) != 2 or len(set(shapes)) != 1:
        raise ValueError(f"image, prediction and reference must be 2-D and of one shape, not {shapes}")
    return _draw([Slice(image_slice, prediction, reference, spacing_mm or (1.0, 1.0))], labels, title)


def overlay_volume(
    image: Array,
    prediction: Array,
    reference: Array | None,
    *,
    labels: Mapping[int, str],
    affine: Array | None = None,
    title: str = "",
) -> bytes:
    """Draw a volume's two most telling slices: the largest structure, and the largest disagreement.

    Slices are taken across the axis with the coarsest voxels (axial when all are alike) and turned to the
    radiological convention: patient's right at the left of an axial picture, anterior at its top.

    Args:
        image: (X, Y, Z) gray values in NIfTI axis order, or (H, W) for a plain picture.
        prediction: integer labels of the same shape.
        reference: integer labels of the same shape, or None.
        labels: value → name of the classes to draw; 0 is background and never drawn.
        affine: (4, 4) voxel → RAS mm; None leaves the axes as they are and draws square pixels.
        title: one line above the picture.

    Returns: a PNG file's bytes, equal for equal input.

    Raises:
        ValueError: the arrays are neither 2-D nor 3-D, or differ in shape.
    """
    if image.ndim == 2:
        return overlay(image, prediction, reference, labels=labels, title=title)
    shapes = [image.shape, prediction.shape] + ([] if reference is None else [reference.shape])
    if image.ndim != 3 or len(set(shapes)) != 1:
        raise ValueError(f"image, prediction and reference must be 3-D and of one shape, not {shapes}")
    orientation = None if affine is None else nib.orientations.io_orientation(affine)
    if orientation is not None and np.isnan(orientation).any():
        raise ValueError("the affine has an axis without a direction")
    volumes = [_to_ras(volume, orientation) for volume in (image, prediction, reference)]
    spacing = _ras_spacing(affine, orientation)
    axis = int(np.argmax(spacing)) if max(spacing) > 1.05 * min(spacing) else 2
    chosen = _telling_slices(volumes[1], volumes[2], axis)
    slices = [_cut(volumes, axis, index, spacing, caption, affine is not None) for index, caption in chosen]
    return _draw(slices, labels, title)


def _to_ras(volume: Array | None, orientation: npt.NDArray[np.float64] | None) -> Array | None:
    if volume is None or orientation is None:
        return volume
    turned: Array = nib.orientations.apply_orientation(volume, orientation)
    return turned


def _ras_spacing(affine: Array | None, orientation: npt.NDArray[np.float64] | None) -> tuple[float, float, float]:
    if affine is None or orientation is None:
        return (1.0, 1.0, 1.0)
    stored = np.linalg.norm(np.asarray(affine, dtype=np.float64)[:3, :3], axis=0)
    spacing = [1.0, 1.0, 1.0]
    for stored_axis, ras_axis in enumerate(orientation[:, 0].astype(int)):
        spacing[ras_axis] = float(stored[stored_axis])
    return (spacing[0], spacing[1], spacing[2])


def _telling_slices(prediction: Array | None, reference: Array | None, axis: int) -> list[tuple[int, str]]:
    assert prediction is not None
    others = tuple(i for i in range(3) if i != axis)
    found = np.count_nonzero(prediction, axis=others)
    if reference is None:
        return [(int(found.argmax()) if found.any() else len(found) // 2, "largest cross-section of the prediction")]
    size = np.count_nonzero(reference, axis=others)
    error = np.count_nonzero(np.not_equal(prediction, reference), axis=others)
    if size.any():
        first = (int(size.argmax()), "largest cross-section of the reference")
    elif found.any():
        first = (int(found.argmax()), "the reference is empty; largest cross-section of the prediction")
    else:
        first = (len(found) // 2, "reference and prediction are both empty; middle slice")
    second = (int(error.argmax()), "largest disagreement")
    return [first, second] if error.any() and second[0] != first[0] else [first]


def _cut(
    volumes: Sequence[Array | None],
    axis: int,
    index: int,
    spacing: tuple[float, float, float],
    caption: str,
    is_oriented: bool,
) -> Slice:
    columns, rows = (i for i in range(3) if i != axis)
    planes: list[Array | None] = []
    for volume in volumes:
        plane = None if volume is None else np.take(volume, index, axis=axis).T  # rows: the later axis
        # RAS axes grow to the right, to the front and upward: both display axes run the other way.
        planes.append(plane if plane is None or not is_oriented else plane[::-1, ::-1])
    image, prediction, reference = planes
    assert image is not None
    assert prediction is not None
    left, top = ("RA"[columns], "AS"[rows - 1]) if is_oriented else ("", "")
    where = f"{caption} (slice {index + 1} of {_length(volumes[0], axis)})"
    return Slice(image, prediction, reference, (spacing[rows], spacing[columns]), where, left, top)


def _length(volume: Array | None, axis: int) -> int:
    assert volume is not None
    return volume.shape[axis]


def _draw(slices: Sequence[Slice], labels: Mapping[int, str], title: str) -> bytes:
    drawn = _classes_drawn(slices, labels)
    legend_rows = math.ceil((len(drawn) + 2) / 5)
    top, bottom = (0.34 if title else 0.08), 0.22 + 0.22 * legend_rows + 0.06
    columns = 2 * len(slices)
    width, height = columns * PANEL_INCHES, PANEL_INCHES + top + bottom
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(width, height), dpi=DPI, facecolor=BACKDROP)
        gap = 0.05
        for number, plane in enumerate(_crop(slices)):
            for side in (0, 1):
                left = (2 * number + side) * PANEL_INCHES + gap
                box = (left / width, bottom / height, (PANEL_INCHES - 2 * gap) / width, PANEL_INCHES / height)
                axes = figure.add_axes(box)
                _show(axes, plane)
                if side:
                    _mark_labels(axes, plane, drawn)
            figure.text(
                (2 * number * PANEL_INCHES + gap) / width,
                (bottom - 0.06) / height,
                plane.caption,
                color=FAINT,
                va="top",
            )
        if title:
            figure.text(gap / width, 1 - 0.07 / height, title, color=INK, fontsize=10, va="top", weight="bold")
        _legend(figure, drawn, has_reference=any(plane.reference is not None for plane in slices))
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", facecolor=BACKDROP, metadata={"Software": None})
    return buffer.getvalue()


def _classes_drawn(slices: Sequence[Slice], labels: Mapping[int, str]) -> dict[int, tuple[str, str]]:
    present: set[int] = set()
    for plane in slices:
        for array in (plane.prediction, plane.reference):
            present |= set() if array is None else {int(value) for value in np.unique(array)}
    classes = sorted(value for value in labels if value != 0)
    colored = {value: CLASS_COLORS[i % len(CLASS_COLORS)] for i, value in enumerate(classes)}
    # Small label sets keep a steady legend; large ones name only what is visible.
    return {v: (str(labels[v]), colored[v]) for v in classes if len(classes) <= 7 or v in present}


def _crop(slices: Sequence[Slice]) -> list[Slice]:
    """Cut all slices to the structures and their surroundings: small ones would otherwise be a few pixels."""
    labels = [array for plane in slices for array in (plane.prediction, plane.reference) if array is not None]
    marked = np.logical_or.reduce([array != 0 for array in labels])
    if not marked.any():
        return list(slices)
    positions, spacing = np.nonzero(marked), slices[0].spacing
    window_mm = 1.6 * max((int(np.ptp(p)) + 1) * s for p, s in zip(positions, spacing, strict=True))
    bounds = []
    for place, step, length in zip(positions, spacing, marked.shape, strict=True):
        extent = min(length, max(math.ceil(window_mm / step), 24))
        center = (int(place.min()) + int(place.max()) + 1) / 2
        start = min(max(0, round(center - extent / 2)), length - extent)
        bounds.append(slice(start, start + extent))
    window = (bounds[0], bounds[1])
    return [
        replace(
            plane,
            image=plane.image[window],
            prediction=plane.prediction[window],
            reference=None if plane.reference is None else plane.reference[window],
        )
        for plane in slices
    ]


def _show(axes: Axes, plane: Slice) -> None:
    gray = np.nan_to_num(np.asarray(plane.image, dtype=np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    low, high = np.percentile(gray, (1, 99.5))
    row_mm, column_mm = plane.spacing
    height, width = gray.shape
    extent = (0.0, width * column_mm, height * row_mm, 0.0)
    axes.imshow(gray, cmap="gray", vmin=low, vmax=max(high, low + 1e-6), extent=extent, interpolation="nearest")
    axes.set_axis_off()
    axes.set_anchor("C")
    halo: list[AbstractPathEffect] = [withStroke(linewidth=2, foreground=BACKDROP)]
    for x, y, letter, align in ((0.03, 0.5, plane.left, "left"), (0.5, 0.975, plane.top, "center")):
        vertical = "center" if align == "left" else "top"
        text = axes.text(x, y, letter, color=INK, ha=align, va=vertical, transform=axes.transAxes, fontsize=8.8)
        text.set_path_effects(halo)


def _mark_labels(axes: Axes, plane: Slice, drawn: Mapping[int, tuple[str, str]]) -> None:
    row_mm, column_mm = plane.spacing
    height, width = plane.prediction.shape
    # One pixel of padding closes outlines that touch the border.
    x = (np.arange(-1, width + 1) + 0.5) * column_mm
    y = (np.arange(-1, height + 1) + 0.5) * row_mm
    for value, (_, color) in drawn.items():
        if plane.reference is not None and (plane.reference == value).any():
            mask = np.pad((plane.reference == value).astype(float), 1)
            axes.contourf(x, y, mask, levels=[0.5, 2], colors=[color], alpha=0.42, antialiased=True)
    for value, (_, color) in drawn.items():
        if (plane.prediction == value).any():
            mask = np.pad((plane.prediction == value).astype(float), 1)
            lines = axes.contour(x, y, mask, levels=[0.5], colors=[color], linewidths=1.3)
            lines.set_path_effects(
                [Stroke(linewidth=2.4, foreground=BACKDROP), Stroke(linewidth=1.3, foreground=color)]
            )
    axes.set_xlim(0, width * column_mm)
    axes.set_ylim(height * row_mm, 0)


def _legend(figure: Figure, drawn: Mapping[int, tuple[str, str]], *, has_reference: bool) -> None:
    handles: list[Patch | Line2D] = [Patch(facecolor=color, label=name) for name, color in drawn.values()]
    if has_reference:
        handles.append(Patch(facecolor=FAINT, alpha=0.5, label="filled: reference"))
    handles.append(Line2D([], [], color=INK, linewidth=1.5, label="outlined: prediction"))
    legend = figure.legend(
        handles=handles, loc="lower left", ncols=5, frameon=False, handlelength=1.4, columnspacing=1.4,
        borderaxespad=0.2, bbox_to_anchor=(0.0, 0.0),
    )  # fmt: skip
    for text in legend.get_texts():
        text.set_color(INK)
