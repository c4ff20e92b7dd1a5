"""Unpacking archives that may be damaged or hostile: nothing lands outside the folder, nothing grows without end."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import re
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Generator
from contextlib import closing
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, Any, Literal

from medkd.errors import InputError

MAX_RATIO = 100  # image archives shrink by 1 to 5, text tables by 20
_ALWAYS_ALLOWED_BYTES = 64 * 2**20
_MAX_MEMBERS = 500_000
_MAX_READ_BYTES = 16 * 2**20  # no tar header is that long
_CHUNK_BYTES = 2**20
_UNSAFE_NAME = re.compile(r"^/|^[A-Za-z]:|\\|[\x00-\x1f\x7f]")
_DAMAGE = (tarfile.TarError, zipfile.BadZipFile, EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile, RuntimeError)

Member = tuple[str, int, Callable[[], Any]]  # name in the archive, size it claims, how to open it


def unpack_archive(path: str | Path, folder: str | Path, kind: Literal["tar", "zip", "gz"]) -> list[Path]:
    """Unpack an archive into a folder, all of it or nothing.

    Only files (and the folders they need) are unpacked, under names that stay inside ``folder``. Sizes are limited to
    ``MAX_RATIO`` times the archive's and to the free disk. Modes, owners and times of the archive are ignored.

    Args:
        path: the archive.
        folder: where to; must exist.
        kind: ``tar`` (plain, gzip, bzip2 or xz), ``zip``, or ``gz`` (one file, named as the archive without ``.gz``).

    Returns:
        The new files and folders directly in ``folder``.

    Raises:
        InputError: damaged; a member that leaves the folder, a link or a device; a bomb; no room on the disk;
            something of that name is already there. Nothing is left behind.
    """
    path, folder = Path(path), Path(folder)
    members = {"tar": _tar_members, "zip": _zip_members, "gz": _gz_members}[kind]
    staging = folder / f".{path.name}.unpacking"
    shutil.rmtree(staging, ignore_errors=True)  # of a run that was killed
    try:
        staging.mkdir()
        budget = _Budget(path, folder)
        with closing(members(path)) as found:
            for name, size, opener in found:
                budget.expect(name, size)
                _write_member(path, staging, name, opener, budget)
        new = [folder / entry.name for entry in sorted(staging.iterdir())]
        for target in new:
            if target.exists():
                raise InputError(
                    target, f"is already there, and {path.name} holds it too", "move it away and try again"
                )
        for target in new:
            os.replace(staging / target.name, target)
    except _DAMAGE as error:
        raise InputError(path, f"is damaged ({type(error).__name__})", "delete it and fetch it again") from None
    except OSError as error:
        raise InputError(path, f"cannot be unpacked ({error.strerror or error})", "mend that and try again") from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return new


class _Budget:
    """What an archive may still unpack to: by what it claims before it is read, and by what comes out."""

    def __init__(self, path: Path, folder: Path) -> None:
        self.path = path
        self.allowed = max(_ALWAYS_ALLOWED_BYTES, MAX_RATIO * path.stat().st_size)
        self.free = shutil.disk_usage(folder).free
        self.written = 0
        self.members = 0

    def expect(self, name: str, size: int) -> None:
        """Refuse a member that would take too much."""
        self.members += 1
        if self.members > _MAX_MEMBERS:
            raise InputError(self.path, f"holds more than {_MAX_MEMBERS} files", "unpack it by hand if you trust it")
        if self.written + size > self.allowed:
            problem = f"would unpack to more than {self.allowed >> 20} MiB at {name!a}, as no image archive does"
            raise InputError(self.path, problem, "do not use it")
        if self.written + size > self.free:
            problem = f"needs more than the {self.free >> 20} MiB free on the disk"
            raise InputError(self.path, problem, "free some space or choose another folder")

    def take(self, name: str, size: int) -> None:
        """Count what came out."""
        self.expect(name, size)
        self.members -= 1
        self.written += size


def _tar_members(path: Path) -> Generator[Member, None, None]:
    with open(path, "rb") as raw, tarfile.open(fileobj=_Bounded(path, _decompressed(raw)), mode="r:") as archive:
        while (member := archive.next()) is not None:
            archive.members = []  # type: ignore[attr-defined] # millions of empty members must not fill the memory
            if not (member.isdir() or member.isreg()) or member.issparse():
                raise InputError(path, f"holds {member.name!a}, which is a link or device", "do not use it")
            yield member.name + "/" * member.isdir(), member.size * member.isreg(), _opener(archive, member)


def _opener(archive: tarfile.TarFile, member: tarfile.TarInfo) -> Callable[[], IO[bytes]]:
    def open_member() -> IO[bytes]:
        file = archive.extractfile(member)
        if file is None:
            raise tarfile.ReadError(member.name)
        return file

    return open_member


def _zip_members(path: Path) -> Generator[Member, None, None]:
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            if stat.S_IFMT(info.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise InputError(path, f"holds {info.filename!a}, which is a link or device", "do not use it")
            if info.flag_bits & 1:
                raise InputError(path, f"holds {info.filename!a}, which is encrypted", "unpack it by hand")
            yield info.filename, info.file_size, partial(archive.open, info)


def _gz_members(path: Path) -> Generator[Member, None, None]:
    yield path.name.removesuffix(".gz"), 0, partial(gzip.open, path)  # its size shows only as it unpacks


def _write_member(path: Path, staging: Path, name: str, opener: Callable[[], Any], budget: _Budget) -> None:
    parts = PurePosixPath(name).parts
    if _UNSAFE_NAME.search(name) or ".." in parts or not parts:
        raise InputError(path, f"holds {name!a}, which would lie outside its folder", "do not use it")
    target = staging.joinpath(*parts)
    if name.endswith("/"):
        target.mkdir(parents=True, exist_ok=True)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with opener() as source, open(target, "xb") as file:
        while chunk := source.read(_CHUNK_BYTES):
            budget.take(name, len(chunk))
            file.write(chunk)


def _decompressed(raw: IO[bytes]) -> Any:
    start = raw.read(6)
    raw.seek(0)
    if start.startswith(b"\x1f\x8b"):
        return gzip.GzipFile(fileobj=raw)
    if start.startswith(b"BZh"):
        return bz2.BZ2File(raw)
    return lzma.LZMAFile(raw) if start == b"\xfd7zXZ\x00" else raw


class _Bounded(io.RawIOBase):
    """A stream from which no single read may be huge: a tar header says itself how long it is."""

    def __init__(self, path: Path, stream: Any) -> None:
        super().__init__()
        self.path = path
        self.stream = stream

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= _MAX_READ_BYTES:
            raise InputError(self.path, f"has a header of {size} bytes", "do not use it")
        return self.stream.read(size)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self.stream.seek(offset, whence)

    def tell(self) -> int:
        return self.stream.tell()
