"""NIfTI voxels, read in one pass that checks the header, the geometry and every byte.

A ``.nii`` has no checksum: damage to its voxel values cannot be seen, only damage to its structure. A ``.nii.gz`` has
one, and it is compared.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from medkd.data.byte_stream import ByteStream
from medkd.data.nifti_header import NiftiHeader, check_compression_matches_name, read_header
from medkd.errors import InputError

SUFFIXES = (".nii", ".nii.gz", ".hdr", ".hdr.gz", ".img", ".img.gz")
_MAX_PADDING_BYTES = 4096
_MAX_EXTENSION_BYTES = 1 << 25
# No scan larger than this packs so well. Empty masks do, but hardly above a gigabyte.
_BOMB_RATIO = 200
_BOMB_BYTES = 1 << 25
_MASK_BOMB_BYTES = 1 << 30


@dataclass(frozen=True)
class Voxels:
    """The values of a file.

    Attributes:
        array: (X, Y, Z, frames), Fortran order, writable.
        extremes: the smallest and the largest value of every frame, both NaN where it holds a NaN.
        header: the file's header.
    """

    array: npt.NDArray[Any]
    extremes: list[tuple[float, float]]
    header: NiftiHeader


def is_nifti_name(path: Path) -> bool:
    """Whether the file's name has a NIfTI ending."""
    return path.name.lower().endswith(SUFFIXES)


def read_nifti_header(path: Path) -> NiftiHeader:
    """Read and check a header without its voxels.

    Raises:
        InputError: as :func:`read_nifti`, for what the header shows.
    """
    with ByteStream(_files_of(path)[0]) as stream:
        return read_header(stream)


def read_nifti(
    path: Path, frames: tuple[int, int] | None = None, *, exact: bool = False, may_be_empty: bool = False
) -> Voxels:
    """Read voxels; every byte of the file is read and what can be verified is.

    Args:
        path: ``.nii``, ``.nii.gz``, or either half of a ``.hdr``/``.img`` pair.
        frames: first frame and number of frames; ``None`` for a file that holds one.
        may_be_empty: it could be a mask, whose gzip stream may be far smaller than an image's.
        exact: keep a stored integer type and give float64 for floats and scaled values; otherwise all float32.

    Raises:
        InputError: missing, truncated or damaged; a header that does not fit the data; an image type or geometry that
            is refused; frames that are not there, or several and no choice.
    """
    header_path, voxel_path = _files_of(path)
    with ByteStream(header_path) as stream:
        header = read_header(stream)
        if voxel_path == header_path:
            return _read_voxels(stream, header, frames, exact, _MASK_BOMB_BYTES if may_be_empty else _BOMB_BYTES)
        stream.finish(_MAX_EXTENSION_BYTES, zeros_only=False)
    with ByteStream(voxel_path) as stream:
        check_compression_matches_name(stream)
        return _read_voxels(stream, header, frames, exact, _MASK_BOMB_BYTES if may_be_empty else _BOMB_BYTES)


def _files_of(path: Path) -> tuple[Path, Path]:
    """The file with the header and the file with the voxels."""
    lower = path.name.lower()
    for mine, other in ((".hdr", ".img"), (".img", ".hdr")):
        for packed in ("", ".gz"):
            if lower.endswith(mine + packed):
                stem = path.name[: -len(mine + packed)]
                partner = _partner(path, stem, other)
                return (path, partner) if mine == ".hdr" else (partner, path)
    return path, path


def _partner(path: Path, stem: str, suffix: str) -> Path:
    upper = suffix.upper()
    for name in (suffix, upper, f"{suffix}.gz", f"{upper}.GZ"):
        candidate = path.with_name(stem + name)
        if candidate.exists():
            return candidate
    if not path.exists():
        raise InputError(path, "does not exist", "check the path")
    raise InputError(path, f"has no {stem}{suffix} beside it", "keep the .hdr and the .img of a pair in one folder")


def _check_size(stream: ByteStream, header: NiftiHeader, needed: int, bomb_bytes: int) -> None:
    """Refuse before anything is allocated what the file cannot hold, or what no memory can."""
    promised = header.offset + math.prod(header.shape) * header.voxel_type.itemsize
    size = "x".join(map(str, header.shape))
    if promised > stream.most_bytes:
        problem = f"is truncated or its header is wrong: {size} voxels need {promised} bytes, it has {stream.size}"
        raise InputError(stream.path, problem + (" compressed" if stream.compressed else ""), "copy it again")
    if stream.compressed and promised > max(bomb_bytes, _BOMB_RATIO * stream.size):
        problem = f"would unpack {stream.size} bytes to {promised}, as no scan does"
        raise InputError(stream.path, problem, "if it is genuine, store it uncompressed (.nii)")
    if needed > _memory_bytes():
        problem = f"needs {needed / 2**30:.1f} GiB in memory ({size} voxels), more than this machine has"
        raise InputError(stream.path, problem, "crop or resample it")


def _memory_bytes() -> float:
    try:
        return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, ValueError, OSError):
        return math.inf  # a system that does not tell


def _read_voxels(
    stream: ByteStream, header: NiftiHeader, frames: tuple[int, int] | None, exact: bool, bomb_bytes: int
) -> Voxels:
    if frames is None and header.frames > 1:
        problem = f"is 4-D with {header.frames} frames, not one volume"
        raise InputError(stream.path, problem, "choose one (frame=), or split it with `medkd data make --frames all`")
    first, count = frames or (0, 1)
    if not 0 <= first < first + count <= header.frames:
        frame = first if first >= header.frames else first + count - 1
        held = f"{header.frames} frame{'s' if header.frames > 1 else ''}"
        raise InputError(stream.path, f"holds {held} and no frame {frame}", "count frames from 0")
    stored = header.voxel_type
    kept: np.dtype[Any] = np.dtype(np.float64 if exact else np.float32)
    if exact and stored.kind in "iu" and header.scaling is None:
        kept = stored.newbyteorder("=")
    per_frame = math.prod(header.shape[:3])
    _check_size(stream, header, count * per_frame * kept.itemsize, bomb_bytes)
    values = np.empty((count, per_frame), kept)
    stream.skip(header.offset + first * per_frame * stored.itemsize)
    extremes = [_fill(frame, stream, header) for frame in values]
    stream.skip((header.frames - first - count) * per_frame * stored.itemsize)
    stream.finish(_MAX_PADDING_BYTES)
    array = values.reshape(-1).reshape((*header.shape[:3], count), order="F")
    return Voxels(array, extremes, header)


def _fill(frame: npt.NDArray[Any], stream: ByteStream, header: NiftiHeader) -> tuple[float, float]:
    """Convert one frame block by block, while its bytes are in the cache, and return its extremes."""
    stored = header.voxel_type
    raw_extremes = stored.kind in "iu" and stored.isnative and header.scaling is None  # integers are faster to compare
    lows, highs, start = [], [], 0
    with np.errstate(over="ignore", invalid="ignore"):  # what float32 cannot hold becomes infinite, and is refused
        for block in stream.blocks(frame.size * stored.itemsize, stored.itemsize):
            raw = np.frombuffer(block, stored)
            part = frame[start : start + raw.size]
            if header.scaling is None:
                part[...] = raw
            else:
                slope, intercept = header.scaling
                part[...] = raw * np.float64(slope) + intercept
            seen = raw if raw_extremes else part
            lows.append(seen.min())
            highs.append(seen.max())
            start += raw.size
    return np.min(lows).item(), np.max(highs).item()
