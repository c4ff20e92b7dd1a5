"""A label image of a whole slide that lives in a file and is written and read by bands of rows."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

NOT_PREDICTED = 255
MAX_CLASSES = 255


class ClassMap:
    """(height, width) class indices in a sparse temporary file that vanishes with the object.

    Rows that were never written cost no disk space and read as ``NOT_PREDICTED``. Reading and writing go through
    the page cache, never through this process's own memory, so size does not matter.

    Args:
        height: rows.
        width: columns.
        x: level-0 x of the left edge, in pixels.
        y: level-0 y of the top edge, in pixels.
        pixel_level0: side of a pixel in level-0 pixels.
        folder: where the file lives; the system's folder for temporary files by default.
    """

    def __init__(
        self, height: int, width: int, *, x: float, y: float, pixel_level0: float, folder: str | Path | None = None
    ) -> None:
        self.shape = (height, width)
        self.x, self.y, self.pixel_level0 = x, y, pixel_level0
        self._file = tempfile.TemporaryFile(dir=folder, prefix="medkd-slide-")  # noqa: SIM115 - lives as long as self
        self._file.truncate(height * width)

    def write_rows(self, start: int, classes: NDArray[np.uint8]) -> None:
        """Write rows ``start`` and following; ``classes`` is (rows, width) with ``NOT_PREDICTED`` where unknown."""
        # Stored inverted: the zeros that a sparse file reads as mean "not predicted".
        data = memoryview(np.ascontiguousarray(~classes).tobytes())
        offset = start * self.shape[1]
        while data:
            written = os.pwrite(self._file.fileno(), data, offset)
            data, offset = data[written:], offset + written

    def rows(self, start: int, stop: int) -> NDArray[np.uint8]:
        """Rows ``start`` to ``stop`` (excluded), as (rows, width) uint8."""
        start, stop = max(start, 0), min(stop, self.shape[0])
        size, width = max(stop - start, 0) * self.shape[1], self.shape[1]
        data = os.pread(self._file.fileno(), size, start * width) if size else b""
        return ~np.frombuffer(data, np.uint8).reshape(-1, width)

    def close(self) -> None:
        """Give the disk space back."""
        self._file.close()
