"""The directories of a TIFF: what they say of its images, and whether the file holds all they point to."""

from __future__ import annotations

import logging
import os
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
import tifffile
from numpy.typing import NDArray

from medkd.errors import InputError

logger = logging.getLogger(__name__)

COPY_AGAIN = "copy it again from where it was scanned"
"""The remedy for what is damaged."""
TIFF_VENDORS = ("aperio", "generic-tiff", "leica", "philips", "trestle", "ventana")
"""OpenSlide's names of the formats that are TIFFs of tiles."""

_JPEG, _RGB, _YCBCR = 7, 2, 6
_LARGEST_TILE = 1 << 26  # pixels
_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
_MAGIC = {b"II*\0": "<", b"MM\0*": ">", b"II+\0": "<", b"MM\0+": ">"}
_DIRECTORIES_AT_MOST = 10_000


class TiffDirectory(NamedTuple):
    """One tiled or striped image of a TIFF.

    Attributes:
        size: (width, height) in pixels.
        tile: (width, height) of a tile; (0, 0) where the image is stored in strips.
        is_rgb_jpeg: whether the tiles are 8-bit color JPEG.
        photometric: 2 RGB, 6 YCbCr.
        tables: JPEG tables without their first and last marker.
        offsets: of every tile in the file.
        counts: bytes of every tile.
    """

    size: tuple[int, int]
    tile: tuple[int, int]
    is_rgb_jpeg: bool
    photometric: int
    tables: bytes
    offsets: NDArray[np.int64]
    counts: NDArray[np.int64]

    @property
    def is_complete(self) -> bool:
        """Whether it lists as many tiles as its size needs."""
        wanted = -(-self.size[0] // self.tile[0]) * -(-self.size[1] // self.tile[1])
        return len(self.offsets) == len(self.counts) == wanted


def read_directories(path: Path) -> list[TiffDirectory]:
    """The images of a TIFF, in their order; an empty list where tifffile does not understand the file."""
    try:
        with tifffile.TiffFile(path) as tiff:
            return [_directory(page) for page in tiff.pages if isinstance(page, tifffile.TiffPage)]
    except Exception as error:  # of any kind on odd files; OpenSlide, which opened this one, then reads it alone
        logger.info("%s: tiles are read through OpenSlide only (%s)", path, error)
        return []


def require_whole(path: Path, directories: Sequence[TiffDirectory]) -> None:
    """Refuse a file that ends before its tiles do, has none, or says they are of impossible size.

    Raises:
        InputError: naming how many are missing, or the size.
    """
    size = path.stat().st_size
    for directory in directories:
        if directory.tile[0] * directory.tile[1] > _LARGEST_TILE:  # OpenSlide would end the process when it runs out
            problem = f"is damaged: it says that a tile has {directory.tile[0]} × {directory.tile[1]} pixels"
            raise InputError(path, problem, COPY_AGAIN)
    total = sum(len(directory.counts) for directory in directories)
    lost = sum(int(np.sum(directory.offsets > size - directory.counts)) for directory in directories)
    if lost:
        raise cut_short(path, f"{lost} of its {total} tiles and strips lie beyond its end")
    if total and not any(directory.counts.any() for directory in directories if directory.tile[0]):
        raise InputError(path, "holds no pixels: all its tiles are empty", COPY_AGAIN)


def _directory(page: tifffile.TiffPage) -> TiffDirectory:
    is_rgb_jpeg = (
        page.is_tiled
        and int(page.compression) == _JPEG
        and page.photometric is not None
        and int(page.photometric) in (_RGB, _YCBCR)
        and page.samplesperpixel == 3
        and page.bitspersample == 8
        and int(page.planarconfig or 1) == 1
    )
    return TiffDirectory(
        size=(page.imagewidth, page.imagelength),
        tile=(page.tilewidth, page.tilelength),
        is_rgb_jpeg=is_rgb_jpeg,
        photometric=int(page.photometric or 0),
        tables=page.jpegtables[2:-2] if page.jpegtables else b"",
        offsets=np.asarray(page.dataoffsets, np.int64),
        counts=np.asarray(page.databytecounts, np.int64),
    )


def cut_short(path: Path, problem: str) -> InputError:
    """The error of a file whose end is missing."""
    return InputError(path, f"is truncated: {problem}", COPY_AGAIN)


def is_tiff(head: bytes) -> bool:
    """Whether a file that begins with ``head`` calls itself a TIFF or BigTIFF."""
    return head[:4] in _MAGIC


def missing_part(path: Path) -> str:
    """What of a TIFF's directories and tag values lies beyond the end of the file; empty if nothing does.

    Walks the chain of directories without reading the values. Tiles are not looked at (see ``require_whole``).
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        head = file.read(16)
        order, big = _MAGIC[head[:4]], b"+" in head[2:4]
        if len(head) < (16 if big else 8):
            return f"its header has {len(head)} bytes"
        position = struct.unpack_from(order + ("Q" if big else "I"), head, 8 if big else 4)[0]
        seen: set[int] = set()
        while position and position not in seen and len(seen) < _DIRECTORIES_AT_MOST:
            seen.add(position)
            problem, position = _walk_directory(file, size, order, big, position)
            if problem:
                return f"{problem} (directory {len(seen)})"
    return ""


def _walk_directory(file: IO[bytes], size: int, order: str, big: bool, position: int) -> tuple[str, int]:
    """What is missing of one directory, and where the next one is."""
    count_format, entry_bytes, pointer = (order + "Q", 20, "Q") if big else (order + "H", 12, "I")
    count_bytes, pointer_bytes = struct.calcsize(count_format), struct.calcsize(pointer)
    file.seek(position)
    packed = file.read(count_bytes)
    entries = struct.unpack(count_format, packed)[0] if len(packed) == count_bytes else 0
    end = position + count_bytes + entries * entry_bytes + pointer_bytes
    if len(packed) < count_bytes or end > size:
        return f"its directory at byte {position} lies beyond its {size} bytes", 0
    table = file.read(entries * entry_bytes + pointer_bytes)
    for at in range(0, entries * entry_bytes, entry_bytes):
        tag, kind, count = struct.unpack_from(order + "HH" + pointer, table, at)
        length = _BYTES.get(kind, 0) * count
        value = struct.unpack_from(order + pointer, table, at + 4 + pointer_bytes)[0]
        if length > pointer_bytes and value + length > size:
            return f"the value of its tag {tag} ends at byte {value + length} of {size}", 0
    return "", struct.unpack_from(order + pointer, table, entries * entry_bytes)[0]
