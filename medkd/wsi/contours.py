"""Outlines of masks that rasterize back to exactly the same mask, found band by band.

Outlines run along pixel edges, so pixel (row y, column x) is the square from (x, y) to (x + 1, y + 1). Only places
where an outline turns are kept in memory, not pixels, so the mask may be larger than memory. Pixels that touch at a
corner alone are apart (4-connected). Every ring is simple, holes lie inside their region and may touch it in single
points: what QuPath and other readers of GeoJSON call valid.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_BAND_PIXELS = 1 << 22  # mask pixels looked at at once

Ring = NDArray[np.float64]  # (n, 2) x, y; not closed
Region = list[Ring]  # the outline, then the holes
Rows = Callable[[int, int], NDArray[np.bool_]]  # (start, stop) → these rows of the mask


def trace_regions(mask: NDArray[np.bool_]) -> list[Region]:
    """The regions of a mask: see :func:`trace_rows`.

    Args:
        mask: (h, w) boolean.
    """
    mask = np.asarray(mask, dtype=bool)
    return trace_rows(lambda start, stop: mask[start:stop], mask.shape)


class TooManyCorners(ValueError):  # noqa: N818 - says what there is too much of
    """A mask is too ragged to be traced in the memory allowed."""


def trace_rows(rows: Rows, shape: tuple[int, int], *, most_corners: int | None = None) -> list[Region]:
    """The regions of a mask that is read by bands of rows.

    Args:
        rows: gives rows ``start`` to ``stop`` (excluded) of the mask as (stop - start, w) boolean.
        shape: (h, w) of the mask.
        most_corners: give up where outlines turn more often than this; tracing takes about 300 bytes a corner.

    Returns:
        Per region its outline and its holes, each (n, 2) x, y of the corners in pixels; outlines run clockwise as seen
        on a screen (y down), holes against it. Ordered by the topmost, then leftmost corner.

    Raises:
        TooManyCorners: there are more than ``most_corners``.
    """
    corners = _corners(rows, shape, most_corners)
    if not len(corners.x):
        return []
    rings = _rings(corners)
    outer = [index for index, ring in enumerate(rings) if ring.clockwise]
    holes = [index for index, ring in enumerate(rings) if not ring.clockwise]
    owner = _owners(rings, holes, corners, rows) if holes else {}
    order = sorted(outer, key=lambda index: rings[index].top_left)
    regions: dict[int, Region] = {index: [rings[index].points.astype(np.float64)] for index in order}
    for index in sorted(holes, key=lambda index: rings[index].top_left):
        regions[owner[index]].append(rings[index].points.astype(np.float64))
    return [regions[index] for index in order]


@dataclass(frozen=True, eq=False)
class _Corners:
    """Where outlines turn, in reading order; a point where two regions touch is two corners.

    Attributes:
        x: position.
        y: position.
        across: the corner at the other end of the horizontal edge.
        along: the corner at the other end of the vertical edge.
        leaves_across: whether the way leaves by the horizontal edge; it has the mask on its right-hand side.
        meeting: one number for both corners of a point where two regions touch, -1 elsewhere.
    """

    x: NDArray[np.int64]
    y: NDArray[np.int64]
    across: NDArray[np.int64]
    along: NDArray[np.int64]
    leaves_across: NDArray[np.bool_]
    meeting: NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class _Ring:
    points: NDArray[np.int64]  # (n, 2) x, y
    corners: NDArray[np.int64]  # (n,) indices
    clockwise: bool
    top_left: tuple[int, int]  # y, x of the topmost, then leftmost corner


def coarser(rows: Rows, shape: tuple[int, int], factor: int) -> tuple[Rows, tuple[int, int]]:
    """A mask of pixels that are ``factor`` × ``factor`` pixels of another, set where at least half of them are.

    Args:
        rows: the finer mask, as in :func:`trace_rows`.
        shape: (h, w) of the finer mask.
        factor: whole number.

    Returns:
        Rows and shape of the coarser mask.
    """
    height, width = shape
    across = -(-width // factor)

    def coarse_rows(start: int, stop: int) -> NDArray[np.bool_]:
        fine = rows(start * factor, min(stop * factor, height))
        missing = (stop - start) * factor - len(fine)
        padded = np.pad(fine, ((0, missing), (0, across * factor - width)))
        counts = padded.reshape(stop - start, factor, across, factor).sum((1, 3), dtype=np.int64)
        return np.asarray(2 * counts >= factor * factor)

    return coarse_rows, (-(-height // factor), across)


def _corners(rows: Rows, shape: tuple[int, int], most_corners: int | None) -> _Corners:
    height, width = shape
    count = 0
    band = max(_BAND_PIXELS // max(width, 1), 1)
    found: list[NDArray[np.int64]] = []
    above = np.zeros((1, width), bool)
    for start in range(0, height + 1, band):
        stop = min(start + band, height + 1)
        below = np.asarray(rows(start, min(stop, height)), dtype=bool)
        if stop == height + 1:
            below = np.concatenate([below, np.zeros((1, width), bool)])
        found.append(_corners_of_band(np.concatenate([above, below]), start))
        above = below[-1:]
        count += len(found[-1])
        if most_corners is not None and count > most_corners:
            raise TooManyCorners(f"more than {most_corners} corners")
    y, x, pixels, second = np.concatenate(found).T
    above_right, below_left, below_right = (pixels >> 2 & 1 == 1), (pixels >> 1 & 1 == 1), (pixels & 1 == 1)
    # Where two regions touch, the first corner has the left arm of the horizontal line and the second the right arm.
    # Regions stay apart, so each turns into the vertical arm that bounds the same pixel.
    double = (pixels == 0b0110) | (pixels == 0b1001)
    has_right_arm = np.where(double, second == 1, above_right != below_right)
    has_lower_arm = np.where(double, (second == 1) == below_right, below_left != below_right)
    # Corners on a line pair up in order; in a column, an arm that goes up comes before one that goes down.
    across = _partners(len(x))
    order = np.lexsort((has_lower_arm, y, x))
    along = np.empty_like(across)
    along[order] = order[_partners(len(x))]
    # With the mask to the right, the way along the mask's upper edge goes right and along its lower edge left.
    leaves_across = np.where(has_right_arm, below_right, ~below_left)
    meeting = np.where(double, np.arange(len(x)) - second, -1)
    return _Corners(x, y, across, along, leaves_across, meeting)


def _corners_of_band(rows: NDArray[np.bool_], start: int) -> NDArray[np.int64]:
    """Corners on the lines between consecutive rows: (n, 4) of y, x, the four pixels around as bits, which of two."""
    padded = np.pad(rows, ((0, 0), (1, 1)))
    horizontal = padded[:-1] != padded[1:]  # an edge between the pixel above and the one below
    # A corner is where the horizontal line begins or ends, or where four edges meet.
    above, below = padded[:-1], padded[1:]
    turn = horizontal[:, :-1] != horizontal[:, 1:]
    saddle = (above[:, :-1] == below[:, 1:]) & (above[:, 1:] == below[:, :-1]) & (above[:, :-1] != above[:, 1:])
    y, x = np.nonzero(turn | saddle)
    bits = (
        (above[y, x].astype(np.int64) << 3)
        | (above[y, x + 1].astype(np.int64) << 2)
        | (below[y, x].astype(np.int64) << 1)
        | below[y, x + 1].astype(np.int64)
    )
    twice = np.where(saddle[y, x], 2, 1)
    index = np.repeat(np.arange(len(y)), twice)
    second = np.zeros(len(index), np.int64)
    second[1:] = index[1:] == index[:-1]
    return np.stack([y[index] + start, x[index], bits[index], second], axis=1)


def _partners(count: int) -> NDArray[np.int64]:
    """1, 0, 3, 2, 5, 4 …: what lies in a line pairs up in order."""
    return np.arange(count) ^ 1


def _rings(corners: _Corners) -> list[_Ring]:
    follow = np.where(corners.leaves_across, corners.across, corners.along).tolist()
    meeting = corners.meeting.tolist()
    points = np.stack([corners.x, corners.y], axis=1)
    visited = bytearray(len(follow))
    rings: list[_Ring] = []
    for first in range(len(follow)):
        ring: list[int] = []
        met: dict[int, int] = {}  # meeting point → where in the ring
        corner = first
        while not visited[corner]:
            visited[corner] = 1
            point = meeting[corner]
            if point in met:  # the outline touches itself: what lies between is a ring of its own
                position = met.pop(point)
                rings.append(_ring(points, ring[position:]))
                met = {other: place for other, place in met.items() if place < position}
                del ring[position:]
            if point >= 0:
                met[point] = len(ring)
            ring.append(corner)
            corner = follow[corner]
        if ring:
            rings.append(_ring(points, ring))
    return rings


def _ring(points: NDArray[np.int64], ring: list[int]) -> _Ring:
    index = np.array(ring)
    outline = points[index]
    x, y = outline[:, 0], outline[:, 1]
    # Twice the area, exact in integers; positive for clockwise with y down.
    area = int((x * np.roll(y, -1) - np.roll(x, -1) * y).sum())
    top = int(y.min())
    return _Ring(outline, index, area > 0, (top, int(x[y == top].min())))


def _owners(rings: list[_Ring], holes: list[int], corners: _Corners, rows: Rows) -> dict[int, int]:
    """Hole → its outline: left of a hole's top left pixel is its region, and left of that an edge of the region."""
    ring_of = np.empty(len(corners.x), np.int64)
    for number, ring in enumerate(rings):
        ring_of[ring.corners] = number
    # Vertical edges as (x, top) → ring, sorted so that the one that crosses a row is found by bisection.
    # An edge belongs to the ring of the corner where the way enters it.
    upper = np.flatnonzero(corners.y[corners.along] > corners.y)
    entered = np.where(corners.leaves_across, corners.along, np.arange(len(corners.x)))
    order = np.lexsort((corners.y[upper], corners.x[upper]))
    upper = upper[order]
    stride = int(corners.y.max()) + 1
    keys = corners.x[upper] * stride + corners.y[upper]
    parent: dict[int, int] = {}
    for hole in sorted(holes, key=lambda number: rings[number].top_left):
        y, x = rings[hole].top_left
        row = rows(y, y + 1)[0, :x]
        start = x - int(np.argmin(row[::-1])) if not row.all() else 0
        edge = int(np.searchsorted(keys, start * stride + y, side="right")) - 1
        left = int(ring_of[entered[upper[edge]]])
        parent[hole] = left if rings[left].clockwise else parent[left]
    return parent
