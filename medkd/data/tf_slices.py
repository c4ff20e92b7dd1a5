"""Slices as PnP-AdaNet and SIFA publish them: TensorFlow records, read without TensorFlow.

One file holds one record, one ``tf.train.Example``: ``data_vol`` and ``label_vol`` are 256 × 256 × 3 float32, three
neighboring slices of which the middle one is meant; ``dsize_dim0..2`` and ``lsize_dim0..2`` are sizes. The names and
types are those of the two releases' loaders; SIFA's repository holds five such files, on which this reader was tried.

A record's length has a checksum that is compared. That of its content is not: CRC-32C over 1.6 MB in Python would take
longer than reading the whole release. A truncated or overlong file is refused all the same.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from medkd.errors import InputError

_SHAPE = (256, 256, 3)
_REMEDY = "download it again"
_MASK = 0xA282EAD8


def read_tf_slice(path: Path) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.uint8]]:
    """The middle slice of a record.

    Returns:
        (256, 256) float32 intensities and (256, 256) labels, rows and columns as stored.

    Raises:
        InputError: missing, truncated or damaged; not a record of these releases; labels that are no small integers;
            intensities that are not finite.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(path, f"cannot be read ({error.strerror})", _REMEDY) from None
    try:
        features = dict(_features(_only_record(content)))
        image, label = (_volume(features[name])[:, :, 1] for name in ("data_vol", "label_vol"))
    except KeyError as error:
        raise InputError(path, f"has no {error.args[0]}", "name a file of PnP-AdaNet's or SIFA's release") from None
    except (ValueError, IndexError, struct.error) as error:
        raise InputError(path, f"is not a slice of PnP-AdaNet or SIFA ({error})", _REMEDY) from None
    if not np.isfinite(image).all():
        raise InputError(path, "holds values that are not finite", _REMEDY)
    labels = label.astype(np.uint8)
    if not np.array_equal(labels, label):
        raise InputError(path, "has labels that are no integers from 0 to 255", _REMEDY)
    return image, labels


def _only_record(content: bytes) -> bytes:
    """The content of a TFRecord file with exactly one record: length, its masked CRC-32C, content, CRC."""
    (length,) = struct.unpack_from("<Q", content)
    (checksum,) = struct.unpack_from("<I", content, 8)
    if _masked_crc32c(content[:8]) != checksum:
        raise ValueError("the checksum of its length is wrong")
    if len(content) != length + 16:
        raise ValueError(f"its record has {length} bytes, the file {len(content)}")
    return content[12 : 12 + length]


def _masked_crc32c(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    crc ^= 0xFFFFFFFF
    return (((crc >> 15) | (crc << 17)) + _MASK) & 0xFFFFFFFF


def _features(example: bytes) -> Iterator[tuple[str, bytes]]:
    """Name and first bytes value of the features that hold bytes."""
    for _, features in _messages(example):
        for _, entry in _messages(features):
            parts = dict(_messages(entry))
            for kind, values in _messages(parts[2]):
                if kind == 1:  # bytes_list; sizes are int64_list
                    yield parts[1].decode(), next(value for _, value in _messages(values))


def _messages(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Number and content of the length-delimited fields of a protocol buffer; all fields here are of that kind."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        if tag & 7 != 2:
            raise ValueError("a field is not of the expected kind")
        size, at = _varint(data, at)
        if at + size > len(data):
            raise ValueError("a field is longer than its message")
        yield tag >> 3, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return value, at
        if shift > 63:
            raise ValueError("a number is too long")


def _volume(data: bytes) -> npt.NDArray[np.float32]:
    if len(data) != 4 * int(np.prod(_SHAPE)):
        raise ValueError(f"a slice has {len(data)} bytes, not those of 256 × 256 × 3 float32 numbers")
    return np.frombuffer(data, "<f4").reshape(_SHAPE)
