"""Slides that exist as functions only, and grids over them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from medkd.wsi.grid import TileGrid
from medkd.wsi.slides import Region


class FunctionSlide:
    """A slide whose pixel at (x, y) is ``paint(x, y)``; reads at its own resolution only."""

    def __init__(self, width, height, paint: Callable, *, mpp=0.5, bounds=None, holes=()):
        self.dimensions = (width, height)
        self.mpp = mpp
        self.bounds = bounds or (0, 0, width, height)
        self.name = "painted"
        self.path = Path("painted.tiff")
        self.fingerprint = "f" * 64
        self._paint = paint
        self._holes = holes  # x, y, width, height of what cannot be read

    def read_region(self, x, y, size, *, mpp):
        assert mpp == self.mpp
        ys, xs = np.mgrid[int(y) : int(y) + size[1], int(x) : int(x) + size[0]]
        pixels = self._paint(xs, ys).astype(np.uint8)
        valid = np.ones(xs.shape, bool)
        for left, top, width, height in self._holes:
            valid &= ~((xs >= left) & (xs < left + width) & (ys >= top) & (ys < top + height))
        return Region(pixels, None if valid.all() else valid)

    def thumbnail(self, longest_side):
        step = max(max(self.dimensions) // longest_side, 1)
        xs, ys = np.meshgrid(np.arange(0, self.dimensions[0], step), np.arange(0, self.dimensions[1], step))
        return self._paint(xs, ys).astype(np.uint8)


def blobs(xs, ys):
    """Dark islands with holes on a bright ground, in RGB."""
    waves = np.sin(xs / 37.0) * np.cos(ys / 29.0) + 0.4 * np.sin((xs + 2 * ys) / 11.0)
    speck = (xs % 23 < 3) & (ys % 19 < 4)
    level = np.where((waves > 0.35) & ~speck, 60, 220)
    return np.stack([level, np.clip(level + xs % 7, 0, 255), np.clip(level + ys % 5, 0, 255)], axis=-1)


def make_grid(slide, *, size=32, overlap=0, keep=None) -> TileGrid:
    """All tiles over a slide's bounds at its own resolution; ``keep`` selects by (x, y)."""
    step = size - overlap
    left, top, width, height = slide.bounds
    xs = np.arange(left, left + max(width - overlap, 1), step)
    ys = np.arange(top, top + max(height - overlap, 1), step)
    coords = np.stack(np.meshgrid(xs, ys), axis=-1).reshape(-1, 2).astype(np.int64)
    if keep is not None:
        coords = coords[[keep(x, y) for x, y in coords]]
    return TileGrid(
        coords=coords,
        tissue_fraction=np.ones(len(coords), np.float32),
        size=size,
        mpp=slide.mpp,
        overlap=overlap,
        size_level0=float(size),
        slide_name=slide.name,
        slide_fingerprint=slide.fingerprint,
        slide_mpp=slide.mpp,
        dimensions=slide.dimensions,
        bounds=slide.bounds,
    )
