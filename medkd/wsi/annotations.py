"""Regions drawn on a slide: QuPath's GeoJSON, and masks made from it.

A polygon is a tuple of rings, the first its outline and the others its holes; a ring is an array (N, 2) of x and y in
level-0 pixels that does not repeat its first point. A point belongs to a polygon when a ray from it crosses the rings
an odd number of times, so the direction in which a ring was drawn does not matter.
"""

from __future__ import annotations

import json
import logging
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from medkd.data.atomic import atomic_write
from medkd.errors import InputError

logger = logging.getLogger(__name__)

Ring = NDArray[np.float64]
Polygon = tuple[Ring, ...]

_HAVE_NO_AREA = {"Point", "MultiPoint", "LineString", "MultiLineString"}
_FARTHEST = 1e12  # level-0 pixels; no NaN, no infinity
_EXPORT_AGAIN = "export the annotations from QuPath as GeoJSON"


@dataclass(frozen=True, eq=False)
class Annotation:
    """One annotated region.

    Attributes:
        name: its class; empty where it has none.
        polygons: its parts, in level-0 pixels.
    """

    name: str
    polygons: tuple[Polygon, ...]

    @property
    def area(self) -> float:
        """Level-0 pixels covered, holes left out."""
        return sum(polygon_area(polygon) for polygon in self.polygons)


def polygon_area(polygon: Polygon) -> float:
    """Area of a polygon without its holes, in the square of its unit."""
    areas = [_ring_area(ring) for ring in polygon]
    return areas[0] - sum(areas[1:])


def read_annotations(path: str | Path, *, offset: tuple[float, float] = (0.0, 0.0)) -> list[Annotation]:
    """Read the regions of a GeoJSON file as QuPath writes it.

    A FeatureCollection, a list of features and a single feature are understood; the class is
    ``properties.classification.name``, or ``properties.name`` where there is none. Points and lines have no area and
    are left out with a message.

    Args:
        path: the file.
        offset: added to every x and y. QuPath's origin is the corner of the slide's non-empty area, so give
            ``slide.bounds[:2]``.

    Raises:
        InputError: naming the file and the feature that cannot be used.
    """
    path = Path(path)
    annotations, skipped = [], 0
    for position, feature in enumerate(_features(path, _read_json(path))):
        where = f"{path}: feature {position + 1}"
        name = _class_name(where, feature)
        geometry = feature.get("geometry")
        polygons = tuple(_polygons(f"{where} ({name})" if name else where, geometry, offset))
        if polygons:
            annotations.append(Annotation(name, polygons))
        else:
            skipped += 1
    if skipped:
        logger.info("%s: %d of its features are points or lines, which have no area: left out", path, skipped)
    return annotations


def write_annotations(
    path: str | Path, annotations: Iterable[Annotation], *, offset: tuple[float, float] = (0.0, 0.0)
) -> None:
    """Write regions as GeoJSON that QuPath opens as annotations; the file appears whole or not at all.

    Args:
        path: the file.
        annotations: regions in level-0 pixels.
        offset: subtracted from every x and y: ``slide.bounds[:2]``, as QuPath's origin is there.
    """
    with atomic_write(path, "w") as file:
        file.write('{"type": "FeatureCollection", "features": [')
        for position, annotation in enumerate(annotations):
            file.write(",\n" if position else "\n")
            json.dump(_feature(annotation, offset, f"{annotation.name} {position}"), file)
        file.write("\n]}\n")


def rasterize(
    annotations: Sequence[Annotation],
    shape: tuple[int, int],
    downsample: float,
    *,
    classes: Sequence[str] | None = None,
    origin: tuple[float, float] = (0.0, 0.0),
) -> NDArray[np.uint8]:
    """The map of the regions: a pixel belongs to the region that holds its center; holes stay empty.

    Where regions overlap the smaller one is seen, whatever their order in the file.

    Args:
        annotations: regions in level-0 pixels.
        shape: (height, width) of the map.
        downsample: level-0 pixels per pixel of the map.
        classes: the map holds 1 + the index of the region's name here, and regions of other names are left out;
            without it every region is 1.
        origin: x and y of the map's corner in level-0 pixels.

    Returns:
        uint8 (height, width); 0 where there is no region.
    """
    if classes is not None and len(classes) > 255:
        raise ValueError("a map holds at most 255 classes")
    painted = np.zeros(shape, np.uint8)
    for annotation in sorted(annotations, key=lambda region: region.area, reverse=True):
        if classes is None:
            value = 1
        elif annotation.name in classes:
            value = 1 + classes.index(annotation.name)
        else:
            continue
        for polygon in annotation.polygons:
            _paint(painted, [(ring - origin) / downsample for ring in polygon], value)
    return painted


def contains(polygon: Polygon, points: ArrayLike) -> NDArray[np.bool_]:
    """Which points lie inside a polygon and outside its holes.

    Args:
        polygon: its rings.
        points: (N, 2) x and y in the same unit.

    Returns:
        bool (N,).
    """
    points = np.asarray(points, np.float64).reshape(-1, 2)
    inside = np.zeros(len(points), bool)
    outline = polygon[0]
    near = np.flatnonzero(((points >= outline.min(0)) & (points <= outline.max(0))).all(1))
    if not near.size:
        return inside
    heights, row_of_point = np.unique(points[near, 1], return_inverse=True)
    rows, x = _crossings(polygon, heights)
    # Sorted by row, then x, the crossings met before a point in its row are the ones to its left (or on it).
    both_rows = np.concatenate([rows, row_of_point])
    both_x = np.concatenate([x, points[near, 0]])
    is_point = np.arange(len(both_rows)) >= len(rows)
    order = np.lexsort((is_point, both_x, both_rows))
    crossed = np.cumsum(~is_point[order])  # rows are crossed an even number of times, so earlier rows do not matter
    parity = np.empty(len(order), np.int64)
    parity[order] = crossed % 2
    inside[near] = parity[len(rows) :] == 1
    return inside


def _paint(painted: NDArray[np.uint8], rings: list[Ring], value: int) -> None:
    """Set the pixels whose centers lie within the rings, which are in the map's own pixels."""
    height, width = painted.shape
    outline = np.concatenate(rings)
    left, top = np.maximum(np.floor(outline.min(0)).astype(np.int64), 0)
    right, bottom = np.minimum(np.ceil(outline.max(0)).astype(np.int64), (width, height))
    if right <= left or bottom <= top:
        return
    rows, x = _crossings(rings, np.arange(top, bottom) + 0.5)
    columns = np.clip(np.ceil(x - 0.5).astype(np.int64), left, right) - left
    toggles = np.zeros((bottom - top, right - left + 1), np.int32)
    np.add.at(toggles, (rows, columns), 1)
    inside = np.cumsum(toggles[:, :-1], axis=1) % 2 == 1
    painted[top:bottom, left:right][inside] = value


def _crossings(rings: Sequence[Ring], heights: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Where horizontal lines cross rings: index of the line and x of every crossing.

    Args:
        rings: (N, 2) each.
        heights: y of the lines, increasing.
    """
    start = np.concatenate(rings)
    end = np.concatenate([np.roll(ring, -1, axis=0) for ring in rings])
    # An edge owns its upper end and not its lower one, so that a line through a corner is crossed once or twice.
    first = np.searchsorted(heights, np.minimum(start[:, 1], end[:, 1]), "left")
    last = np.searchsorted(heights, np.maximum(start[:, 1], end[:, 1]), "left")
    counts = last - first
    edges = np.repeat(np.arange(len(start)), counts)
    within = np.arange(len(edges)) - np.repeat(np.cumsum(counts) - counts, counts)
    rows = first[edges] + within
    a, b = start[edges], end[edges]
    x = a[:, 0] + (heights[rows] - a[:, 1]) * (b[:, 0] - a[:, 0]) / (b[:, 1] - a[:, 1])
    return rows, x


def _ring_area(ring: Ring) -> float:
    x, y = (ring - ring[0]).T  # differences keep their digits far from the origin
    return float(abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2)


def _feature(annotation: Annotation, offset: tuple[float, float], seed: str) -> dict[str, Any]:
    polygons = [
        [[*(ring - offset).tolist(), (ring[0] - offset).tolist()] for ring in polygon]
        for polygon in annotation.polygons
    ]
    single = len(polygons) == 1
    properties: dict[str, Any] = {"objectType": "annotation"}
    if annotation.name:
        properties["classification"] = {"name": annotation.name}
    return {
        "type": "Feature",
        "id": str(uuid.uuid5(uuid.NAMESPACE_OID, seed)),
        "geometry": {
            "type": "Polygon" if single else "MultiPolygon",
            "coordinates": polygons[0] if single else polygons,
        },
        "properties": properties,
    }


def _read_json(path: Path) -> Any:
    if path.is_dir():
        raise InputError(path, "is a folder, not a GeoJSON file", "give the file")
    try:
        return json.loads(path.read_bytes().decode("utf-8-sig"))  # with NaN, which QuPath writes among measurements
    except FileNotFoundError:
        raise InputError(path, "does not exist", "check the path of the annotations") from None
    except OSError as error:
        raise InputError(path, f"cannot be read ({error.strerror})", "check the path and its permissions") from None
    except RecursionError:
        raise InputError(path, "is nested too deeply for GeoJSON", _EXPORT_AGAIN) from None
    except ValueError as error:
        raise InputError(path, f"is not GeoJSON ({error})", _EXPORT_AGAIN) from None


def _features(path: Path, content: Any) -> Iterator[Mapping[str, Any]]:
    if isinstance(content, dict) and content.get("type") == "Feature":
        content = [content]
    elif isinstance(content, dict):
        content = content.get("features")
    if not isinstance(content, list):
        raise InputError(path, "holds no GeoJSON features", _EXPORT_AGAIN)
    for position, feature in enumerate(content):
        if not isinstance(feature, dict) or feature.get("type") != "Feature":
            raise InputError(f"{path}: feature {position + 1}", "is not a GeoJSON feature", _EXPORT_AGAIN)
        yield feature


def _class_name(where: str, feature: Mapping[str, Any]) -> str:
    properties = feature.get("properties") or {}
    if not isinstance(properties, dict):
        raise InputError(where, "has properties that are not an object", _EXPORT_AGAIN)
    classification = properties.get("classification")
    name = classification.get("name") if isinstance(classification, dict) else classification
    if name is None:
        name = properties.get("name")
    if name is not None and not isinstance(name, str):
        raise InputError(where, f"has a class that is not a name ({name!r})", "give its class in QuPath")
    return (name or "").strip()


def _polygons(where: str, geometry: Any, offset: tuple[float, float]) -> Iterator[Polygon]:
    if not isinstance(geometry, dict):
        raise InputError(where, "has no geometry", "delete or redraw it")
    kind, coordinates = geometry.get("type"), geometry.get("coordinates")
    if kind == "GeometryCollection":
        parts = geometry.get("geometries")
        for part in _non_empty_list(where, "geometries", parts):
            yield from _polygons(where, part, offset)
    elif kind == "Polygon":
        yield _polygon(where, coordinates, offset)
    elif kind == "MultiPolygon":
        for part in _non_empty_list(where, "polygons", coordinates):
            yield _polygon(where, part, offset)
    elif kind not in _HAVE_NO_AREA:
        raise InputError(where, f"has a geometry of type {kind!r}", "draw it as a polygon")


def _polygon(where: str, rings: Any, offset: tuple[float, float]) -> Polygon:
    return tuple(_ring(where, ring, offset) for ring in _non_empty_list(where, "rings", rings))


def _ring(where: str, positions: Any, offset: tuple[float, float]) -> Ring:
    points = [_position(where, position) for position in _non_empty_list(where, "points", positions)]
    ring = np.array(points, np.float64)
    if len(ring) > 1 and (ring[0] == ring[-1]).all():
        ring = ring[:-1]
    if len(ring) < 3:
        raise InputError(where, f"has a ring of {len(ring)} points, which encloses nothing", "delete or redraw it")
    return ring + offset


def _position(where: str, position: Any) -> tuple[float, float]:
    if isinstance(position, list) and len(position) >= 2:
        x, y = position[:2]
        if all(type(value) in (int, float) and abs(value) < _FARTHEST for value in (x, y)):
            return float(x), float(y)
    raise InputError(where, f"has a point that is not a pair of numbers ({str(position)[:40]})", "delete or redraw it")


def _non_empty_list(where: str, what: str, value: Any) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise InputError(where, f"has no {what}", "delete or redraw it")
    return value
