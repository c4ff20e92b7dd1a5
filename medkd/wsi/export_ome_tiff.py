"""Heatmaps as pyramidal OME-TIFF, which QuPath and OpenSlide open at the slide's physical scale."""

from __future__ import annotations

import io
import uuid
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medkd.data.atomic import atomic_write
from medkd.wsi.prediction import SlidePrediction

_TILE = 256
_NAMESPACE = uuid.UUID("0b6a3f0e-51b5-5d53-9f2b-0c1f8a5d7e92")
NOT_PREDICTED = 0
"""Grey level of what was not predicted; 1 to 255 are probabilities 0 to 1."""


def encode(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Probabilities 0..1 as grey levels 1..255, NaN as 0."""
    levels = np.rint(np.nan_to_num(values, nan=0.0) * 254) + 1
    return np.where(np.isnan(values), NOT_PREDICTED, levels).astype(np.uint8)


def write_ome_tiff(prediction: SlidePrediction, path: Path) -> dict[str, Any] | None:
    """Write one 8-bit channel per class, tiled, zlib-compressed, with a pyramid in SubIFDs; nothing without a heatmap.

    The image begins at the corner that QuPath shows as the slide's own, so that both can be laid over each other.

    Returns:
        ``mpp`` (µm per heatmap pixel), ``x`` and ``y`` (level-0 position of its first pixel), ``width``, ``height``.
    """
    if prediction.heatmap is None:
        return None
    import tifffile

    canvas, x, y = _canvas(prediction)
    mpp = prediction.heatmap.pixel_level0 * prediction.grid.slide_mpp
    levels = [canvas]
    while max(levels[-1].shape[1:]) > _TILE:
        levels.append(_half(levels[-1]))
    options: dict[str, Any] = {
        "photometric": "minisblack",
        "tile": (_TILE, _TILE),
        "compression": "zlib",
        "software": False,
    }
    content = io.BytesIO()
    with tifffile.TiffWriter(content, ome=True, bigtiff=False) as tiff:
        for number, values in enumerate(levels):
            scale = 2**number * mpp
            tiff.write(
                encode(values),
                **options,
                resolution=(1e4 / scale, 1e4 / scale),
                resolutionunit="CENTIMETER",
                subifds=len(levels) - 1 if number == 0 else None,
                subfiletype=1 if number else 0,
                metadata=_metadata(prediction, mpp) if number == 0 else None,
            )
    with atomic_write(path, "wb") as file:
        file.write(content.getbuffer())
    return {"file": path.name, "mpp": mpp, "x": x, "y": y, "width": canvas.shape[2], "height": canvas.shape[1]}


def _metadata(prediction: SlidePrediction, mpp: float) -> dict[str, Any]:
    name = f"{prediction.grid.slide_fingerprint} {prediction.classes} heatmap"
    return {
        "axes": "CYX",
        # tifffile's own would hold this machine's address and the time.
        "UUID": f"urn:uuid:{uuid.uuid5(_NAMESPACE, name)}",
        "Creator": "medkd",
        "Name": "medkd heatmap",
        "Description": f"grey level {NOT_PREDICTED}: not predicted; 1 to 255: probability 0 to 1",
        "Channel": {"Name": list(prediction.classes)},
        "PhysicalSizeX": mpp,
        "PhysicalSizeXUnit": "µm",
        "PhysicalSizeY": mpp,
        "PhysicalSizeYUnit": "µm",
    }


def _canvas(prediction: SlidePrediction) -> tuple[NDArray[np.float32], float, float]:
    """The heatmap on an image that covers the slide as QuPath shows it, and the level-0 position of its corner."""
    heatmap = prediction.heatmap
    assert heatmap is not None
    left, top, width, height = prediction.grid.bounds
    pixel = heatmap.pixel_level0
    column, row = round((heatmap.x - left) / pixel), round((heatmap.y - top) / pixel)
    x, y = heatmap.x - column * pixel, heatmap.y - row * pixel  # within half a pixel of the corner
    rows, columns = max(int(np.ceil(height / pixel)), 1), max(int(np.ceil(width / pixel)), 1)
    canvas = np.full((len(prediction.classes), rows, columns), np.nan, np.float32)
    h, w = heatmap.values.shape[1:]
    y0, x0 = max(row, 0), max(column, 0)
    y1, x1 = min(row + h, rows), min(column + w, columns)
    if y1 > y0 and x1 > x0:
        canvas[:, y0:y1, x0:x1] = heatmap.values[:, y0 - row : y1 - row, x0 - column : x1 - column]
    return canvas, x, y


def _half(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Mean of the known values of 2 × 2 pixels."""
    channels, height, width = values.shape
    padded = np.pad(values, ((0, 0), (0, height % 2), (0, width % 2)), constant_values=np.nan)
    blocks = padded.reshape(channels, (height + 1) // 2, 2, (width + 1) // 2, 2)
    known = (~np.isnan(blocks)).sum((2, 4))
    return np.where(known > 0, np.nansum(blocks, (2, 4)) / np.maximum(known, 1), np.nan).astype(np.float32)
