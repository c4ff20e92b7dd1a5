"""The bytes of a file, plain or gzip-compressed, verified while they are read.

A gzip member ends with a CRC-32 and a length. They protect the data only if the stream is read to its end, which most
image readers skip: they stop at the last voxel they need.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from isal import igzip_lib

from medkd.errors import InputError

GZIP_MAGIC = b"\x1f\x8b"
MAX_DEFLATE_RATIO = 1032  # deflate cannot pack more bytes than this into one
_READ_BYTES = 1 << 20
_GZIP_RESERVED_FLAGS = 0xE0
_BLOCK_BYTES = 1 << 18  # decoded blocks stay in the processor's cache until they are converted
_REMEDY = "copy or download it again"


class ByteStream:
    """Reads a file front to back; what is compressed is decompressed and its checksums are compared.

    Args:
        path: the file. Its first two bytes, not its name, say whether it is compressed.

    Raises:
        InputError: missing, a folder, unreadable or empty. While reading: truncated, damaged or followed by garbage.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = open_file(path)
        self.size = os.fstat(self._file.fileno()).st_size
        start = self._read(len(GZIP_MAGIC))
        self._file.seek(0)
        self.compressed = start == GZIP_MAGIC
        self._chunks = self._decompressed() if self.compressed else self._plain()
        self._rest = memoryview(b"")

    def __enter__(self) -> ByteStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    @property
    def most_bytes(self) -> int:
        """An upper bound of the number of decoded bytes."""
        return self.size * MAX_DEFLATE_RATIO if self.compressed else self.size

    def peek(self, size: int) -> bytes:
        """The next bytes, up to ``size`` of them, without moving on; fewer only at the end."""
        while len(self._rest) < size:
            chunk = next(self._chunks, None)
            if chunk is None:
                break
            self._rest = memoryview(bytes(self._rest) + chunk)
        return bytes(self._rest[:size])

    def blocks(self, size: int, item_bytes: int = 1) -> Iterator[memoryview]:
        """The next ``size`` bytes in blocks that hold whole items.

        Args:
            size: a multiple of ``item_bytes``.
            item_bytes: no item of this size is cut in two.

        Raises:
            InputError: the file ends before.
        """
        missing = size
        while missing:
            if len(self._rest) < item_bytes:
                chunk = next(self._chunks, None)
                if chunk is None:
                    raise InputError(self.path, f"ends {missing - len(self._rest)} bytes too early", _REMEDY)
                self._rest = memoryview(bytes(self._rest) + chunk) if len(self._rest) else memoryview(chunk)
                continue
            length = min(missing, len(self._rest)) // item_bytes * item_bytes
            block, self._rest = self._rest[:length], self._rest[length:]
            missing -= length
            yield block

    def skip(self, size: int) -> None:
        """Leave out ``size`` bytes.

        Raises:
            InputError: the file ends before.
        """
        for _ in self.blocks(size):
            pass

    def finish(self, max_surplus: int, *, zeros_only: bool = True) -> None:
        """Read to the end, so that every checksum has been compared.

        Args:
            max_surplus: how many bytes may follow what was read.
            zeros_only: they must be padding.

        Raises:
            InputError: damaged, or more than padding follows.
        """
        surplus = 0
        rest: memoryview | bytes | None = self._rest
        while rest is not None:
            surplus += len(rest)
            if surplus > max_surplus or (zeros_only and any(rest)):
                remedy = f"its header does not fit its data: {_REMEDY}, or convert the original scan again"
                raise InputError(self.path, "holds more data than its header says", remedy)
            rest = next(self._chunks, None)
        self._rest = memoryview(b"")

    def _read(self, size: int) -> bytes:
        try:
            return self._file.read(size)
        except OSError as error:
            raise InputError(self.path, f"cannot be read ({error.strerror})", "check the disk") from None

    def _plain(self) -> Iterator[bytes]:
        while chunk := self._read(_BLOCK_BYTES):
            yield chunk

    def _decompressed(self) -> Iterator[bytes]:
        """Every member of a gzip file; a member is left only after its CRC-32 and length were found right."""
        rest = self._read(_READ_BYTES)
        while rest:
            if rest[3:4] and rest[3] & _GZIP_RESERVED_FLAGS:
                raise InputError(self.path, "is damaged: its gzip header has unknown flags", _REMEDY)
            decoder = igzip_lib.IgzipDecompressor(igzip_lib.DECOMP_GZIP)
            while True:
                try:
                    chunk = decoder.decompress(rest, _BLOCK_BYTES)
                except igzip_lib.IsalError as error:  # type: ignore[misc]  # its stub declares an instance
                    raise InputError(self.path, f"is damaged: its gzip stream is broken ({error})", _REMEDY) from None
                if chunk:
                    yield chunk
                if decoder.eof:
                    break
                rest = b""
                if decoder.needs_input:
                    rest = self._read(_READ_BYTES)
                    if not rest:
                        raise InputError(self.path, "is truncated: its gzip stream does not end", _REMEDY)
            rest = self._next_member(decoder.unused_data)

    def _next_member(self, rest: bytes) -> bytes:
        """The start of the next member; zeros after a member are padding, which gzip allows."""
        while True:
            rest = rest.lstrip(b"\0")
            more = self._read(_READ_BYTES) if len(rest) < len(GZIP_MAGIC) else b""
            rest += more
            if not more:
                break
        if rest and not rest.startswith(GZIP_MAGIC):
            raise InputError(self.path, "is followed by garbage after its gzip stream", _REMEDY)
        return rest


def open_file(path: Path) -> BinaryIO:
    """Open a regular, non-empty file for reading.

    Raises:
        InputError: with a message of its own for a file that is missing, a folder, unreadable or empty.
    """
    try:
        if path.is_dir():
            raise InputError(path, "is a folder, not a file", "name the file")
        if path.exists() and not path.is_file():
            raise InputError(path, "is not a regular file", "name a file on disk")
        file = path.open("rb", buffering=0)
    except FileNotFoundError:
        raise InputError(path, "does not exist", "check the path") from None
    except PermissionError:
        raise InputError(path, "may not be read (no permission)", "ask for read access") from None
    except OSError as error:
        raise InputError(path, f"cannot be opened ({error.strerror})", "check the path and the disk") from None
    if os.fstat(file.fileno()).st_size == 0:
        file.close()
        raise InputError(path, "is empty (0 bytes)", _REMEDY)
    return file
