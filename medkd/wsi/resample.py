"""From the pixels of one pyramid level to pixels of any size, with nothing shifted.

The filter, for r source pixels per target pixel along an axis:

- r within 10 % above a whole number n (or 0.5 % below): means over n consecutive pixels, as a further level of the
  pyramid would hold them, then linear interpolation between these at the centers of the target pixels. This includes
  enlargement (n = 1). Where r is whole and the result begins on a pixel border, it is the block mean itself; with
  r = 1, the source itself.
- otherwise: means over n pixels around every place, n being r rounded (up where that would leave out over 10 %), then
  linear interpolation between these at the centers of the target pixels.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

LEVEL_FITS = 1.005
"""What is coarser than asked for by this factor at most still counts as not coarser."""
_LEFT_OUT = 1.1  # target pixels may lie this much further apart than the means are wide
_ALMOST_WHOLE = 1e-6  # source pixels; below what float64 can tell at the far end of a large slide
_BYTES_IN_16_BITS = 65535 // 255

_threads_before_fork = 1


def _rest_before_fork() -> None:
    """Send OpenCV's threads home: a forked loader worker inherits their pool without them, and would wait forever."""
    global _threads_before_fork
    _threads_before_fork = cv2.getNumThreads()
    cv2.setNumThreads(1)


def _go_on_after_fork() -> None:
    cv2.setNumThreads(_threads_before_fork)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_rest_before_fork, after_in_parent=_go_on_after_fork)


@dataclass(frozen=True)
class _Axis:
    """How one axis is resampled: blocks of pixels, then sliding boxes of blocks, then interpolation.

    Attributes:
        low: first source pixel needed.
        length: source pixels needed, a multiple of ``block``.
        block: pixels per block; blocks begin at ``low``.
        box: blocks per sliding box.
        first: center of the first target pixel, in blocks from ``low``.
        step: blocks between the centers of target pixels.
    """

    low: int
    length: int
    block: int
    box: int
    first: float
    step: float

    @property
    def exact(self) -> bool:
        """Whether every target pixel is one block."""
        return self.box == 1 and abs(self.first - 0.5) < _ALMOST_WHOLE and abs(self.step - 1) < _ALMOST_WHOLE


class Resampling:
    """How target pixels are made from the pixels of a level.

    Args:
        start: x, y of the upper left corner of the result, in source pixels.
        scale: source pixels per target pixel along x and y.
        size: (width, height) of the result.

    Attributes:
        box: x, y, width, height of the source pixels needed.
    """

    def __init__(self, start: tuple[float, float], scale: tuple[float, float], size: tuple[int, int]) -> None:
        self._size = size
        on_border = min(scale) > 0.5 and all(_is_whole(value) for value in (*start, *scale))
        self._x, self._y = (_axis(*one, on_border) for one in zip(start, scale, size, strict=True))
        self.box = self._x.low, self._y.low, self._x.length, self._y.length

    def pixels(self, source: NDArray[np.uint8], origin: tuple[float, float]) -> NDArray[np.uint8]:
        """The target pixels, rounded.

        Args:
            source: (h, w, 3), the pixels of ``box``.
            origin: x, y where ``source`` really begins; within a pixel of ``box``.

        Returns:
            (height, width, 3); may share memory with ``source``.
        """
        blocks = self._blocks(source)
        if self._is_exact(origin):
            return _uint8(blocks)
        padded = cv2.cvtColor(blocks, cv2.COLOR_RGB2RGBA)  # OpenCV is twice as fast on four channels
        area = self._x.box * self._y.box
        sums = padded
        if area > 1:
            depth = cv2.CV_16U if area <= _BYTES_IN_16_BITS else cv2.CV_32F
            sums = cv2.boxFilter(padded, depth, (self._x.box, self._y.box), anchor=(0, 0), normalize=False)
        sampled = self._sampled(sums, origin)
        means = cv2.convertScaleAbs(sampled, alpha=1 / area) if area > 1 else sampled
        return _uint8(cv2.cvtColor(means, cv2.COLOR_RGBA2RGB))

    def mask(self, source: NDArray[np.bool_], origin: tuple[float, float]) -> NDArray[np.bool_]:
        """Where the target pixels are made of pixels of ``source`` alone; arguments as for ``pixels``."""
        shares = self._blocks(source.astype(np.float32))
        if not self._is_exact(origin):
            shares = self._sampled(cv2.boxFilter(shares, -1, (self._x.box, self._y.box), anchor=(0, 0)), origin)
        pixels = self._x.block * self._x.box * self._y.block * self._y.box
        return np.asarray(shares > 1 - 0.5 / (pixels * 256))  # what lacks less than that is the same grey level

    def _blocks(self, source: cv2.typing.MatLike) -> cv2.typing.MatLike:
        if self._x.block == self._y.block == 1:
            return source
        size = self._x.length // self._x.block, self._y.length // self._y.block
        return cv2.resize(source, size, interpolation=cv2.INTER_AREA)

    def _shift(self, origin: tuple[float, float]) -> tuple[float, float]:
        """How much later than ``origin`` the source should begin, in blocks."""
        return (self._x.low - origin[0]) / self._x.block, (self._y.low - origin[1]) / self._y.block

    def _is_exact(self, origin: tuple[float, float]) -> bool:
        return self._x.exact and self._y.exact and max(map(abs, self._shift(origin))) < _ALMOST_WHOLE

    def _sampled(self, boxes: cv2.typing.MatLike, origin: tuple[float, float]) -> cv2.typing.MatLike:
        # A target pixel's center is at first + i * step, that of the box with index k at k + box / 2.
        shift = self._shift(origin)
        first = [axis.first + late - axis.box / 2 for axis, late in zip((self._x, self._y), shift, strict=True)]
        matrix = np.array([[self._x.step, 0.0, first[0]], [0.0, self._y.step, first[1]]])
        flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
        return cv2.warpAffine(boxes, matrix, self._size, flags=flags, borderMode=cv2.BORDER_REPLICATE)


def _axis(start: float, scale: float, count: int, on_border: bool) -> _Axis:
    if on_border:
        block = round(scale)
        return _Axis(round(start), count * block, block, 1, 0.5, 1.0)
    whole = max(1, math.floor(scale * LEVEL_FITS))
    if scale / whole <= _LEFT_OUT:
        block, box = whole, 1
    else:
        block, box = 1, round(scale) if scale / round(scale) <= _LEFT_OUT else round(scale) + 1
    center, step = (start + scale / 2) / block, scale / block
    low = math.floor(center - box / 2 + _ALMOST_WHOLE)
    high = math.ceil(center + (count - 1) * step + box / 2 - _ALMOST_WHOLE)
    return _Axis(low * block, max(box, high - low) * block, block, box, center - low, step)


def _is_whole(value: float) -> bool:
    return abs(value - round(value)) < _ALMOST_WHOLE


def _uint8(image: cv2.typing.MatLike) -> NDArray[np.uint8]:
    return np.asarray(image, np.uint8)
