"""What both readers of pyramid levels speak of: boxes of pixels, and tiles that cannot be decoded."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

logger = logging.getLogger(__name__)


@dataclass(frozen=True, order=True)
class BadTile:
    """A tile of the file that could not be decoded.

    Attributes:
        level: of the pyramid.
        x: left edge in pixels of that level.
        y: top edge in pixels of that level.
        width: pixels of that level.
        height: pixels of that level.
    """

    level: int
    x: int
    y: int
    width: int
    height: int


class Pixels(NamedTuple):
    """A box of one level.

    Attributes:
        rgb: (h, w, 3) uint8.
        valid: (h, w), False where nothing could be decoded or nothing was scanned; None if all is good.
        origin: x, y of the upper left corner in pixels of the level.
    """

    rgb: NDArray[np.uint8]
    valid: NDArray[np.bool_] | None
    origin: tuple[float, float]


def note_bad(path: Path, tile: BadTile, error: Exception, bad: dict[BadTile, None]) -> None:
    """List ``tile`` in ``bad``; the first one of a slide is worth a warning, a thousand are not."""
    if tile in bad:
        return
    level = logging.DEBUG if bad else logging.WARNING
    logger.log(level, "%s: level %d, tile at %d, %d is masked: %s", path, tile.level, tile.x, tile.y, error)
    bad[tile] = None


def cells(
    cell: tuple[int, int], x: int, y: int, width: int, height: int
) -> Iterator[tuple[int, int, int, int, int, int]]:
    """The cells of a grid that a box touches: x, y of the cell, then left, top, right, bottom of their overlap."""
    for cell_y in range(y // cell[1] * cell[1], y + height, cell[1]):
        for cell_x in range(x // cell[0] * cell[0], x + width, cell[0]):
            yield (
                cell_x,
                cell_y,
                max(x, cell_x),
                max(y, cell_y),
                min(x + width, cell_x + cell[0]),
                min(y + height, cell_y + cell[1]),
            )
