"""Tiles of a slide in batches, read ahead by threads, in an order and with pixels that do not depend on them."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from medkd.wsi.grid import TileGrid
    from medkd.wsi.slides import Slide

_READ_AHEAD = 2  # batches waiting beside those being read


@dataclass(frozen=True, eq=False)
class TileBatch:
    """Some tiles.

    Attributes:
        indices: (B,) which tiles of the grid, of those that could be read.
        pixels: (B, S, S, 3) uint8.
        failed: indices of tiles with missing pixels, and why.
    """

    indices: NDArray[np.int64]
    pixels: NDArray[np.uint8]
    failed: list[tuple[int, str]]


def tile_batches(
    slide: Slide, grid: TileGrid, *, batch_size: int, threads: int, order: NDArray[np.int64] | None = None
) -> Generator[TileBatch]:
    """Read a grid's tiles; at most ``threads`` + 2 batches are in memory at once.

    Args:
        slide: the slide.
        grid: its tiles.
        batch_size: tiles per batch.
        threads: how many batches to read at a time beside the caller's work; 0 reads in the caller's thread.
        order: (N,) in which order; row by row by default.

    Yields:
        Batches in that order. A tile with a pixel that could not be read is in ``failed`` only.
    """
    order = np.lexsort((grid.coords[:, 0], grid.coords[:, 1])) if order is None else order
    parts = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    if threads < 1:
        for part in parts:
            yield _read(slide, grid, part)
        return
    with ThreadPoolExecutor(threads, thread_name_prefix="tiles") as pool:
        waiting: deque[Future[TileBatch]] = deque()
        try:
            for part in parts:
                waiting.append(pool.submit(_read, slide, grid, part))
                if len(waiting) >= threads + _READ_AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _read(slide: Slide, grid: TileGrid, part: NDArray[np.int64]) -> TileBatch:
    size = (grid.size, grid.size)
    pixels = np.empty((len(part), grid.size, grid.size, 3), np.uint8)
    read: list[int] = []
    failed: list[tuple[int, str]] = []
    for index in part:
        x, y = grid.coords[index]
        region = slide.read_region(float(x), float(y), size, mpp=grid.mpp)
        if region.valid is None or region.valid.all():
            pixels[len(read)] = region.pixels
            read.append(int(index))
        else:
            missing = 1 - float(region.valid.mean())
            failed.append((int(index), f"{100 * missing:.1f} % of its pixels could not be read"))
    return TileBatch(np.array(read, np.int64), pixels[: len(read)], failed)
