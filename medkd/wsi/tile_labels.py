"""Classes for tiles, from the regions somebody drew."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from medkd.errors import ConfigError
from medkd.wsi.annotations import Annotation, contains, rasterize
from medkd.wsi.grid import TileGrid, area_fractions

_LINES_PER_TILE = 32  # how finely the share of a tile that a region covers is measured


def label_tiles(
    grid: TileGrid,
    annotations: Sequence[Annotation],
    *,
    classes: Sequence[str],
    rule: Literal["center", "fraction"] = "center",
    min_fraction: float = 0.5,
    outside: str | None = None,
) -> NDArray[np.int64]:
    """Give every tile the class of the annotation it lies in.

    Where annotations overlap the smaller one counts. Holes count as outside.

    Args:
        grid: the tiles.
        annotations: regions in level-0 pixels.
        classes: the names; annotations of other names are ignored.
        rule: ``center`` takes the annotation that holds the tile's center. ``fraction`` takes the class with the
            largest share of the tile when that is at least ``min_fraction``; a tile with less of it is ambiguous.
        min_fraction: see ``rule``.
        outside: the class of tiles that no annotation touches (center rule: whose center none holds).

    Returns:
        int64 (N,): index into ``classes``; -1 for ambiguous tiles, and for those outside where ``outside`` is None.

    Raises:
        ConfigError: ``outside`` is none of the classes, or the fraction is none.
    """
    if outside is not None and outside not in classes:
        raise ConfigError("outside class", f"{outside} is none of the classes", f"use one of {', '.join(classes)}")
    if not 0 < min_fraction <= 1:
        raise ConfigError("annotation fraction", f"{min_fraction} is no share of a tile", "give a number up to 1")
    background = -1 if outside is None else list(classes).index(outside)
    if rule == "center":
        return _label_by_center(grid, annotations, classes, background)
    return _label_by_fraction(grid, annotations, classes, min_fraction, background)


def _label_by_center(
    grid: TileGrid, annotations: Sequence[Annotation], classes: Sequence[str], background: int
) -> NDArray[np.int64]:
    labels = np.full(len(grid), background, np.int64)
    for annotation in sorted(annotations, key=lambda region: region.area, reverse=True):
        if annotation.name in classes:
            for polygon in annotation.polygons:
                labels[contains(polygon, grid.centers)] = list(classes).index(annotation.name)
    return labels


def _label_by_fraction(
    grid: TileGrid, annotations: Sequence[Annotation], classes: Sequence[str], min_fraction: float, background: int
) -> NDArray[np.int64]:
    labels = np.full(len(grid), background, np.int64)
    spans = [_vertical_span(annotation) for annotation in annotations]
    pixel = grid.size_level0 / _LINES_PER_TILE
    for top in np.unique(grid.coords[:, 1]):
        bottom = top + grid.size_level0
        near = [region for region, (low, high) in zip(annotations, spans, strict=True) if low < bottom and high > top]
        if not near:
            continue
        tiles = np.flatnonzero(grid.coords[:, 1] == top)
        x = grid.coords[tiles, 0]
        left = int(x.min())
        width = math.ceil((x.max() - left) / pixel) + _LINES_PER_TILE + 1
        band = rasterize(near, (_LINES_PER_TILE, width), pixel, classes=classes, origin=(left, float(top)))
        shares = np.stack(
            [
                area_fractions(band == 1 + index, pixel, x - left, np.zeros(1, np.int64), grid.size_level0)
                for index in range(len(classes))
            ]
        )
        largest = shares.argmax(0)
        share = shares.max(0)
        labels[tiles] = np.where(share >= min_fraction, largest, np.where(share > 0, -1, background))
    return labels


def _vertical_span(annotation: Annotation) -> tuple[float, float]:
    y = np.concatenate([polygon[0][:, 1] for polygon in annotation.polygons])
    return float(y.min()), float(y.max())
