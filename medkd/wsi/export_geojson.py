"""Predictions as GeoJSON that QuPath opens: tiles with their probabilities, and outlines of what was found.

Coordinates are level-0 pixels counted from the corner that QuPath shows as the image's own, which is the corner of the
non-empty area where the slide file names one. Written feature by feature, so that size does not matter.
"""

from __future__ import annotations

import colorsys
import json
import logging
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from medkd.data.atomic import atomic_write
from medkd.wsi.class_map import ClassMap
from medkd.wsi.contours import Region, TooManyCorners, coarser, trace_regions, trace_rows
from medkd.wsi.prediction import SlidePrediction

logger = logging.getLogger(__name__)

_MOST_CORNERS = 2_000_000  # of one class
_NAMESPACE = uuid.UUID("6f1d35d2-9d1b-5f0e-8f6b-6a2f4b1f5c11")  # any fixed one: the same prediction has the same ids
_QUIET = (190, 190, 190)  # color of the class that means "nothing here"


def class_colors(classes: Sequence[str]) -> list[tuple[int, int, int]]:
    """Red, green, blue of each class; of several, the first is gray and the others are far apart."""
    colors = [
        tuple(round(255 * part) for part in colorsys.hsv_to_rgb(i * 0.381966, 0.85, 0.9)) for i in range(len(classes))
    ]
    return [_QUIET, *colors[: len(classes) - 1]] if len(classes) > 1 else colors  # type: ignore[list-item, return-value]


def write_geojson(prediction: SlidePrediction, path: Path, *, threshold: float = 0.5) -> dict[str, int]:
    """Write a FeatureCollection of outlines (``annotation``) and, of a classification, tiles (``tile``).

    Outlines run along pixel edges: of the class map for a segmentation, of the tiles for a classification. Of several
    classes, the outlines are of those tiles where a class is the most probable and has at least ``threshold``.
    A class map whose outlines turn more than two million times is outlined at half, a quarter … the resolution.

    Args:
        prediction: what to write.
        path: the file.
        threshold: smallest probability of an outlined tile.

    Returns:
        How many features of each kind, ``annotation`` and ``tile``.
    """
    counts = {"annotation": 0, "tile": 0}
    with atomic_write(path) as file:
        file.write('{"type":"FeatureCollection","features":[')
        first = True
        for feature in _features(prediction, threshold):
            counts[feature["properties"]["objectType"]] += 1
            file.write("\n" if first else ",\n")
            _write_feature(file, feature)
            first = False
        file.write("\n]}\n")
    return counts


def _write_feature(file: IO[str], feature: dict[str, Any]) -> None:
    file.write(json.dumps(feature, separators=(",", ":"), ensure_ascii=False, allow_nan=False))


def _features(prediction: SlidePrediction, threshold: float) -> Iterator[dict[str, Any]]:
    colors = class_colors(prediction.classes)
    if prediction.class_map is not None:
        yield from _outlines_of_pixels(prediction, colors)
    elif prediction.heatmap is not None:
        yield from _outlines_of_tiles(prediction, colors, threshold)
    if prediction.task == "classification":
        yield from _tiles(prediction, colors)


def _outlines_of_pixels(prediction: SlidePrediction, colors: list[tuple[int, int, int]]) -> Iterator[dict[str, Any]]:
    class_map = prediction.class_map
    assert class_map is not None
    for index in prediction.reported_classes:
        regions, factor = _traced(class_map, index)
        if factor > 1:
            logger.warning("%s is too ragged: outlined at %d × %d pixels", prediction.classes[index], factor, factor)
        place = (class_map.x, class_map.y, class_map.pixel_level0 * factor)
        yield from _outlines(prediction, regions, index, colors, place)


def _traced(class_map: ClassMap, index: int) -> tuple[list[Region], int]:
    """The regions of a class, and how many pixels a side count as one: 1 unless memory and file would burst."""

    def rows(start: int, stop: int) -> NDArray[np.bool_]:
        return class_map.rows(start, stop) == index

    factor = 1
    while True:
        try:
            coarse_rows, shape = (rows, class_map.shape) if factor == 1 else coarser(rows, class_map.shape, factor)
            return trace_rows(coarse_rows, shape, most_corners=_MOST_CORNERS), factor
        except TooManyCorners:
            factor *= 2


def _outlines_of_tiles(
    prediction: SlidePrediction, colors: list[tuple[int, int, int]], threshold: float
) -> Iterator[dict[str, Any]]:
    heatmap = prediction.heatmap
    assert heatmap is not None
    values = np.nan_to_num(heatmap.values, nan=-1.0)
    for index in prediction.reported_classes:
        mask = values[index] >= threshold
        if prediction.activation == "softmax":
            mask &= values.argmax(0) == index
        place = (heatmap.x, heatmap.y, heatmap.pixel_level0)
        yield from _outlines(prediction, trace_regions(mask), index, colors, place)


def _outlines(
    prediction: SlidePrediction,
    regions: list[Region],
    index: int,
    colors: list[tuple[int, int, int]],
    place: tuple[float, float, float],
) -> Iterator[dict[str, Any]]:
    x, y, pixel = place
    left, top, _, _ = prediction.grid.bounds
    limit = np.array(prediction.grid.dimensions, float)
    micrometers = prediction.grid.slide_mpp
    for number, region in enumerate(regions):
        # The last row of tiles may reach over the edge of the slide; no annotation may.
        rings = [np.clip(ring * pixel + (x, y), 0.0, limit) for ring in region]
        area = (abs(_area(rings[0])) - sum(abs(_area(ring)) for ring in rings[1:])) * micrometers**2
        yield _feature(
            prediction,
            f"region {index} {number}",
            "annotation",
            [_closed(ring - (left, top)) for ring in rings],
            prediction.classes[index],
            colors[index],
            {"Area µm^2": round(area, 2)},
        )


def _tiles(prediction: SlidePrediction, colors: list[tuple[int, int, int]]) -> Iterator[dict[str, Any]]:
    grid = prediction.grid
    left, top, _, _ = grid.bounds
    side = grid.size_level0
    for index in np.flatnonzero(prediction.predicted).tolist():
        x, y = (int(value) for value in grid.coords[index])
        values = prediction.probabilities[index]
        best = int(values.argmax())
        square = np.array([(0, 0), (side, 0), (side, side), (0, side)]) + np.array([x - left, y - top])
        yield _feature(
            prediction,
            f"tile {x} {y}",
            "tile",
            [_closed(square)],
            prediction.classes[best],
            colors[best],
            {f"prob_{name}": round(float(value), 6) for name, value in zip(prediction.classes, values, strict=True)},
        )


def _feature(
    prediction: SlidePrediction,
    name: str,
    kind: str,
    rings: list[list[list[float]]],
    class_name: str,
    color: tuple[int, int, int],
    measurements: dict[str, float],
) -> dict[str, Any]:
    return {
        "type": "Feature",
        "id": str(uuid.uuid5(_NAMESPACE, f"{prediction.grid.slide_fingerprint} {name}")),
        "geometry": {"type": "Polygon", "coordinates": rings},
        "properties": {
            "objectType": kind,
            "classification": {"name": class_name, "color": list(color)},
            "measurements": measurements,
        },
    }


def _closed(ring: Any) -> list[list[float]]:
    points = [[_short(x), _short(y)] for x, y in ring.tolist()]
    return [*points, points[0]]


def _short(value: float) -> float:
    """An int where whole, else two decimals: a hundredth of a pixel."""
    rounded = round(value, 2)
    return int(rounded) if rounded == int(rounded) else rounded


def _area(ring: Any) -> float:
    x, y = ring[:, 0], ring[:, 1]
    return float((x * np.roll(y, -1) - np.roll(x, -1) * y).sum()) / 2
