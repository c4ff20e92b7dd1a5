"""Tile predictions put together: blended class maps of segmentations and coarse heatmaps, in flat memory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from medkd.wsi.class_map import MAX_CLASSES, NOT_PREDICTED, ClassMap
from medkd.wsi.prediction import Heatmap

if TYPE_CHECKING:
    from medkd.wsi.grid import TileGrid

_ROUNDED = 0.5 + 1e-3  # level-0 pixels between a tile's rounded and its exact corner
_BLOCK = 256  # side of the squares that sums are kept in, pixels; a power of two


def blending_window(size: int, overlap: int) -> NDArray[np.float32]:
    """(size, size) weights that fall off linearly over the overlap; those of regular neighbors sum to 1.

    Args:
        size: tile side in pixels.
        overlap: pixels shared with each neighbor.
    """
    near = np.minimum(np.arange(size), np.arange(size)[::-1]) + 0.5
    ramp = np.minimum(near / overlap, 1.0) if overlap else np.ones(size)
    return np.outer(ramp, ramp).astype(np.float32)


class Stitcher:
    """Adds up tiles that come row by row and writes every band of the slide once nothing can touch it any more.

    Only squares that a tile touches, in the rows being worked on, are in memory: at most the slide's width times
    a tile's height, whatever the slide's height.

    Args:
        width: of the map, in pixels.
        height: of the map, in pixels.
        n_classes: channels of a tile's probabilities.
        size: tile side in pixels.
        overlap: pixels shared with each neighboring tile.
        x: level-0 x of the map's left edge.
        y: level-0 y of the map's top edge.
        pixel_level0: side of a map pixel in level-0 pixels.
        heatmap_factor: map pixels per heatmap pixel; a power of two up to 256.
        threshold: one class alone is present from this probability.
        folder: where the class map's file lives.
    """

    def __init__(
        self,
        width: int,
        height: int,
        *,
        n_classes: int,
        size: int,
        overlap: int,
        x: float,
        y: float,
        pixel_level0: float,
        heatmap_factor: int,
        threshold: float = 0.5,
        folder: str | Path | None = None,
    ) -> None:
        if n_classes > MAX_CLASSES - 1:
            raise ValueError(f"at most {MAX_CLASSES - 1} classes fit a class map, got {n_classes}")
        self.class_map = ClassMap(height, width, x=x, y=y, pixel_level0=pixel_level0, folder=folder)
        self._n_classes = n_classes
        self._threshold = threshold
        self._window = blending_window(size, overlap)
        self._factor = heatmap_factor
        shape = (-(-height // heatmap_factor), -(-width // heatmap_factor))
        self._heat = np.zeros((n_classes, *shape), np.float32)
        self._heat_pixels = np.zeros(shape, np.int32)
        self._blocks: dict[tuple[int, int], NDArray[np.float32]] = {}  # (row, column) → (K + 1, 256, 256), weights last

    def add(self, probabilities: NDArray[np.float32], left: int, top: int) -> None:
        """Add a tile: (K, S, S) probabilities with its top left pixel at (left, top); may reach over the map's edge."""
        height, width = self.class_map.shape
        tile_height, tile_width = probabilities.shape[1:]
        y0, y1 = max(top, 0), min(top + tile_height, height)
        x0, x1 = max(left, 0), min(left + tile_width, width)
        for row in range(y0 // _BLOCK, -(-y1 // _BLOCK)):
            for column in range(x0 // _BLOCK, -(-x1 // _BLOCK)):
                block = self._blocks.get((row, column))
                if block is None:
                    block = self._blocks[row, column] = np.zeros((self._n_classes + 1, _BLOCK, _BLOCK), np.float32)
                ya, yb = max(y0, row * _BLOCK), min(y1, (row + 1) * _BLOCK)
                xa, xb = max(x0, column * _BLOCK), min(x1, (column + 1) * _BLOCK)
                here = block[:, ya - row * _BLOCK : yb - row * _BLOCK, xa - column * _BLOCK : xb - column * _BLOCK]
                part = (slice(ya - top, yb - top), slice(xa - left, xb - left))
                window = self._window[part]
                here[:-1] += probabilities[:, part[0], part[1]] * window
                here[-1] += window

    def finish_above(self, top: int) -> None:
        """Write all bands that end at or above row ``top``: no later tile begins higher."""
        for row in sorted({row for row, _ in self._blocks if (row + 1) * _BLOCK <= top}):
            self._write_band(row)

    def finish(self) -> tuple[ClassMap, Heatmap]:
        """Write what is left and return the maps."""
        self.finish_above(self.class_map.shape[0] + _BLOCK)
        return self.class_map, self._heatmap()

    def _heatmap(self) -> Heatmap:
        with np.errstate(invalid="ignore"):
            values = np.where(self._heat_pixels > 0, self._heat / self._heat_pixels, np.float32(np.nan))
        where = self.class_map
        return Heatmap(values.astype(np.float32), where.x, where.y, where.pixel_level0 * self._factor)

    def _write_band(self, row: int) -> None:
        height, width = self.class_map.shape
        rows = min(_BLOCK, height - row * _BLOCK)
        band = np.full((rows, width), NOT_PREDICTED, np.uint8)
        for row_, column in sorted(key for key in self._blocks if key[0] == row):
            block = self._blocks.pop((row_, column))
            weights = block[-1]
            known = weights > 0
            probabilities = np.divide(block[:-1], weights, out=np.zeros_like(block[:-1]), where=known)
            classes = np.where(known, self._classes(probabilities), NOT_PREDICTED).astype(np.uint8)
            columns = min(_BLOCK, width - column * _BLOCK)
            band[:, column * _BLOCK : column * _BLOCK + columns] = classes[:rows, :columns]
            self._add_heat(row, column, probabilities, known)
        self.class_map.write_rows(row * _BLOCK, band)

    def _classes(self, probabilities: NDArray[np.float32]) -> NDArray[np.intp]:
        if self._n_classes > 1:
            return probabilities.argmax(0)
        # One class: 0 where it is present, 1 for "not it".
        return np.where(probabilities[0] >= self._threshold, 0, 1)

    def _add_heat(self, row: int, column: int, probabilities: NDArray[np.float32], known: NDArray[np.bool_]) -> None:
        cells = _BLOCK // self._factor
        top, left = row * cells, column * cells
        height, width = self._heat_pixels.shape
        rows, columns = min(cells, height - top), min(cells, width - left)
        split = (cells, self._factor, cells, self._factor)
        sums = probabilities.reshape(-1, *split).sum((2, 4))
        self._heat[:, top : top + rows, left : left + columns] = sums[:, :rows, :columns]
        self._heat_pixels[top : top + rows, left : left + columns] = known.reshape(split).sum((1, 3))[:rows, :columns]


@dataclass(frozen=True, eq=False)
class Lattice:
    """Where a grid's tiles lie in steps of the grid: exact, although the tiles' own coordinates are rounded.

    Attributes:
        x: level-0 x of the leftmost tile, unrounded.
        y: level-0 y of the topmost tile, unrounded.
        step_level0: distance of neighboring tiles in level-0 pixels.
        cells: (N, 2) column and row of each tile.
        regular: whether every tile lies on the lattice; if not, ``cells`` are the nearest ones.
    """

    x: float
    y: float
    step_level0: float
    cells: NDArray[np.int64]
    regular: bool

    @classmethod
    def of(cls, grid: TileGrid) -> Lattice:
        """The lattice of a grid with at least one tile."""
        step = grid.size_level0 * (grid.size - grid.overlap) / grid.size
        for corner in (np.array(grid.bounds[:2], float), grid.coords.min(0).astype(float)):
            numbers = np.rint((grid.coords - corner) / step)
            regular = bool(np.abs(corner + numbers * step - grid.coords).max() <= _ROUNDED)
            if regular:
                break
        first = numbers.min(0)
        x, y = (corner + first * step).tolist()
        return cls(x, y, step, (numbers - first).astype(np.int64), regular)


def tile_heatmap(grid: TileGrid, probabilities: NDArray[np.float32]) -> Heatmap | None:
    """The heatmap of a classification: one pixel per step of the grid, the mean of the tiles that cover it.

    Args:
        grid: the tiles.
        probabilities: (N, K); NaN rows are left out.

    Returns:
        None without a tile.
    """
    if not len(grid):
        return None
    lattice = Lattice.of(grid)
    covered = max(round(grid.size_level0 / lattice.step_level0), 1)
    room = (np.array(grid.dimensions) - (lattice.x, lattice.y)) / lattice.step_level0  # up to the edge of the slide
    limit = np.maximum(np.ceil(room - 1e-6).astype(np.int64), 1)
    width, height = np.minimum(lattice.cells.max(0) + covered, limit).tolist()
    good = ~np.isnan(probabilities).any(1)
    known, cells = probabilities[good], lattice.cells[good]
    total = np.zeros((height, width, probabilities.shape[1]), np.float64)
    count = np.zeros((height, width, 1), np.int64)
    for down in range(covered):
        for along in range(covered):
            x, y = cells[:, 0] + along, cells[:, 1] + down
            inside = (x < width) & (y < height)
            np.add.at(total, (y[inside], x[inside]), known[inside])
            np.add.at(count, (y[inside], x[inside]), 1)
    with np.errstate(invalid="ignore", divide="ignore"):
        values = np.where(count > 0, total / count, np.nan).astype(np.float32)
    return Heatmap(np.moveaxis(values, 2, 0).copy(), lattice.x, lattice.y, lattice.step_level0)
