"""Writes tiled pyramidal TIFFs from tiles that are already JPEG, one after another, so that none is held for long."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import IO, Any

import numpy as np

PHOTOMETRIC_RGB, PHOTOMETRIC_YCBCR = 2, 6
_SHORT, _LONG, _RATIONAL, _ASCII, _UNDEFINED, _LONG8 = 3, 4, 5, 2, 7, 16
_SIZES = {_SHORT: 2, _LONG: 4, _RATIONAL: 8, _ASCII: 1, _UNDEFINED: 1, _LONG8: 8}
_CENTIMETER = 3
_MICROMETERS_PER_CENTIMETER = 10_000
_RATIONAL_PRECISION = 10_000


@dataclass(frozen=True)
class JpegLevel:
    """One image of the pyramid.

    Attributes:
        width: pixels.
        height: pixels.
        tiles: JPEG streams row by row, all of ``tile`` pixels even over the border. An empty one is a tile that is
            not stored. One that is the same object as the one before is stored once.
        tile: (width, height) of a tile in pixels, multiples of 16.
        mpp: µm per pixel (x, y) for the resolution tags; None leaves them out.
        photometric: ``PHOTOMETRIC_YCBCR``, or ``PHOTOMETRIC_RGB`` if the streams hold RGB.
        subsampling: of the color channels (2, 2) or (1, 1).
        tables: quantization and Huffman tables that the streams leave out.
        description: text of the ImageDescription tag; ASCII.
        icc_profile: of the colors; empty leaves it out.
    """

    width: int
    height: int
    tiles: Iterable[bytes]
    tile: tuple[int, int] = (256, 256)
    mpp: tuple[float, float] | None = None
    photometric: int = PHOTOMETRIC_YCBCR
    subsampling: tuple[int, int] = (2, 2)
    tables: bytes = b""
    description: str = ""
    icc_profile: bytes = b""


def write_jpeg_tiff(file: IO[bytes], levels: Iterable[JpegLevel], *, big: bool = False) -> None:
    """Write a little-endian TIFF.

    Args:
        file: open for writing in binary mode, at its beginning.
        levels: finest first.
        big: write a BigTIFF, needed from 4 GB on.

    Raises:
        ValueError: if a level has too few or too many tiles.
    """
    file.write(struct.pack("<2sHHHQ", b"II", 43, 8, 0, 0) if big else struct.pack("<2sHI", b"II", 42, 0))
    pointer = 8 if big else 4  # where the position of the next directory goes
    for number, level in enumerate(levels):
        offsets, counts = _write_tiles(file, level)
        entries = _entries(level, number > 0, offsets, counts, _LONG8 if big else _LONG)
        pointer = _write_directory(file, entries, pointer, big)


def _write_tiles(file: IO[bytes], level: JpegLevel) -> tuple[list[int], list[int]]:
    offsets: list[int] = []
    counts: list[int] = []
    before: bytes | None = None
    for tile in level.tiles:
        if tile is not before:
            position = file.tell() if tile else 0
            file.write(tile)
            before = tile
        offsets.append(position)
        counts.append(len(tile))
    wanted = -(-level.width // level.tile[0]) * -(-level.height // level.tile[1])
    if len(counts) != wanted:
        raise ValueError(f"{level.width} × {level.height} pixels need {wanted} tiles, not {len(counts)}")
    return offsets, counts


def _entries(
    level: JpegLevel, reduced: bool, offsets: list[int], counts: list[int], offset_type: int
) -> list[tuple[int, int, Any]]:
    """Tag, type, value, in the order of their tags."""
    entries: list[tuple[int, int, Any]] = [
        (254, _LONG, [int(reduced)]),
        (256, _LONG, [level.width]),
        (257, _LONG, [level.height]),
        (258, _SHORT, [8, 8, 8]),
        (259, _SHORT, [7]),  # JPEG
        (262, _SHORT, [level.photometric]),
        (277, _SHORT, [3]),
        (284, _SHORT, [1]),  # channels interleaved
        (322, _LONG, [level.tile[0]]),
        (323, _LONG, [level.tile[1]]),
        (324, offset_type, offsets),
        (325, _LONG, counts),
        (530, _SHORT, list(level.subsampling)),
    ]
    if level.description:
        entries.append((270, _ASCII, level.description.encode("ascii") + b"\0"))
    if level.tables:
        entries.append((347, _UNDEFINED, level.tables))
    if level.mpp is not None:
        for tag, mpp in zip((282, 283), level.mpp, strict=True):
            entries.append((tag, _RATIONAL, _rational(_MICROMETERS_PER_CENTIMETER, mpp)))
        entries.append((296, _SHORT, [_CENTIMETER]))
    if level.icc_profile:
        entries.append((34675, _UNDEFINED, level.icc_profile))
    return sorted(entries, key=lambda entry: entry[0])


def _rational(numerator: float, denominator: float) -> list[int]:
    """Of two numbers whose quotient must fit; a denominator of 0 is kept, as broken scanners write it."""
    return [round(numerator * _RATIONAL_PRECISION), round(denominator * _RATIONAL_PRECISION)]


def _write_directory(file: IO[bytes], entries: list[tuple[int, int, Any]], pointer: int, big: bool) -> int:
    """Write values and directory at the end of the file; returns where the position of the next one goes."""
    inline = 8 if big else 4
    layout = "<HHQ" if big else "<HHI"
    packed = []
    for tag, kind, value in entries:
        data = value if isinstance(value, bytes) else _numbers(kind, value)
        count = len(data) // _SIZES[kind]
        if len(data) > inline:
            file.write(b"\0" * (-file.tell() % 8))
            position = file.tell()
            file.write(data)
            data = struct.pack("<Q" if big else "<I", position)
        packed.append(struct.pack(layout, tag, kind, count) + data.ljust(inline, b"\0"))
    file.write(b"\0" * (-file.tell() % 8))
    directory = file.tell()
    file.write(struct.pack("<Q" if big else "<H", len(packed)) + b"".join(packed))
    next_pointer = file.tell()
    file.write(b"\0" * inline)
    end = file.tell()
    file.seek(pointer)
    file.write(struct.pack("<Q" if big else "<I", directory))
    file.seek(end)
    return next_pointer


def _numbers(kind: int, values: list[int]) -> bytes:
    types = {_SHORT: "<u2", _LONG: "<u4", _RATIONAL: "<u4", _LONG8: "<u8"}
    return np.asarray(values, types[kind]).tobytes()
