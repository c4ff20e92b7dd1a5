"""NIfTI-1 and NIfTI-2 headers: what the voxels are and where they lie, or a refusal in one line."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from nibabel.nifti1 import Nifti1Header
from nibabel.nifti2 import Nifti2Header
from nibabel.spatialimages import HeaderDataError

from medkd.data.byte_stream import ByteStream
from medkd.data.geometry import (
    Affine,
    axes_difference,
    check_affine,
    describe,
    origin_difference,
    same_spacing,
    spacing_of,
)
from medkd.errors import InputError

logger = logging.getLogger(__name__)

_VOXEL_TYPES = {
    2: "u1", 256: "i1", 4: "i2", 512: "u2", 8: "i4", 768: "u4", 1024: "i8", 1280: "u8", 16: "f4", 64: "f8",
}  # fmt: skip
_REFUSED_TYPES = {1: "one bit", 32: "complex", 128: "RGB color", 1536: "128-bit float", 1792: "complex",
                  2048: "complex", 2304: "RGBA color"}  # fmt: skip
_HEADERS = {348: (Nifti1Header, 352, (b"n+1\0", b"ni1\0")), 540: (Nifti2Header, 544, (b"n+2\0", b"ni2\0"))}
_UNITS = {1: "meters", 3: "micrometers"}
# A quaternion's fourth number is recovered from the other three, which are float32: near half a turn that costs 1.4e-3.
_QFORM_DIRECTION_TOLERANCE = 2e-3
_CONVERT = "convert the original scan again"


@dataclass(frozen=True)
class NiftiHeader:
    """What reading needs from a header.

    Attributes:
        shape: (X, Y, Z) or (X, Y, Z, frames).
        voxel_type: as stored, with its byte order.
        offset: bytes before the first voxel in the file that holds the voxels.
        scaling: slope and intercept; ``None`` when values are stored as they are.
        affine: (4, 4), voxel to RAS mm.
    """

    shape: tuple[int, ...]
    voxel_type: np.dtype[Any]
    offset: int
    scaling: tuple[float, float] | None
    affine: Affine

    @property
    def frames(self) -> int:
        """How many volumes the file holds."""
        return self.shape[3] if len(self.shape) == 4 else 1


def read_header(stream: ByteStream) -> NiftiHeader:
    """Check the header at the start of a stream, which stays where it is.

    Raises:
        InputError: not NIfTI, or a header whose image type or geometry is refused.
    """
    check_compression_matches_name(stream)
    path = stream.path
    start = stream.peek(4)
    sizes = {int.from_bytes(start, order): (kind, order) for kind, order in (("<", "little"), (">", "big"))}  # type: ignore[arg-type]
    size = next((known for known in _HEADERS if known in sizes), 0)
    if not size:
        _refuse_other_content(stream)
        if len(start) == 4:
            raise InputError(path, "is not a NIfTI file", "give .nii, .nii.gz, a .hdr/.img pair or a DICOM folder")
    header_type, first_voxel, magics = _HEADERS[size or 348]
    block = stream.peek(size or 348)
    if len(block) < (size or 348):
        raise InputError(path, f"is truncated: {len(block)} bytes are too few for a header", "copy it again")
    fields = header_type(block, endianness=sizes[size][0], check=False)
    magic = bytes(np.asarray(fields["magic"]).tobytes())[:4]
    if magic not in magics:
        what = "an Analyze 7.5 file, which does not say left from right" if not magic.strip(b"\0") else "not NIfTI"
        raise InputError(path, f"is {what}", f"{_CONVERT} to NIfTI")
    single = magic == magics[0]
    if single == path.name.lower().removesuffix(".gz").endswith(".hdr"):
        problem = f"its header says {'one file' if single else 'a .hdr/.img pair'}, its name the other"
        raise InputError(path, problem, "give the file the ending it was written with")
    header = NiftiHeader(
        shape=_shape(fields, path),
        voxel_type=_voxel_type(fields, path),
        offset=_offset(fields, path, first_voxel if single else 0),
        scaling=_scaling(fields, path),
        affine=_affine(fields, path),
    )
    return header


def check_compression_matches_name(stream: ByteStream) -> None:
    """Refuse a file whose name and content disagree about compression, as every other reader would stumble on it."""
    named_gz = stream.path.name.lower().endswith(".gz")
    if named_gz and not stream.compressed:
        _refuse_other_content(stream)
        raise InputError(stream.path, "is not gzip-compressed as its name says", "copy it again, or rename it to .nii")
    if stream.compressed and not named_gz:
        raise InputError(stream.path, "is gzip-compressed but its name does not say so", "rename it to .nii.gz")


def _refuse_other_content(stream: ByteStream) -> None:
    """A message of its own for what people most often have instead of an image."""
    start = stream.peek(512)
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise InputError(stream.path, "is a web page, not an image", "download it again (an error page was saved)")
    if text.startswith(b"version https://git-lfs"):
        raise InputError(stream.path, "is a Git LFS pointer, not an image", "fetch its content with `git lfs pull`")
    if start[128:132] == b"DICM":
        raise InputError(stream.path, "is a DICOM file, not NIfTI", "name the folder that holds its series")
    if start and all(byte in b"\t\n\r\f" or 32 <= byte < 127 for byte in start):
        raise InputError(stream.path, "is a text file, not an image", "name a NIfTI file")


def _shape(fields: Any, path: Path) -> tuple[int, ...]:
    dims = [int(value) for value in fields["dim"]]
    if not 1 <= dims[0] <= 7 or min(dims[1 : dims[0] + 1]) < 1:
        raise InputError(path, f"its header gives impossible dimensions {dims}", _CONVERT)
    shape = dims[1 : dims[0] + 1]
    size = "x".join(map(str, shape))
    while len(shape) > 3 and shape[-1] == 1:
        shape.pop()
    if len(shape) < 3:
        raise InputError(path, f"is {len(shape)}-D ({size}), not a volume", "stack slices, or store X x Y x 1")
    if len(shape) > 4:
        raise InputError(path, f"is {len(shape)}-D ({size}), not a volume", "store each channel as a file of its own")
    return tuple(shape)


def _voxel_type(fields: Any, path: Path) -> np.dtype[Any]:
    code = int(fields["datatype"])
    if code not in _VOXEL_TYPES:
        name = _REFUSED_TYPES.get(code, f"unknown (code {code})")
        raise InputError(path, f"its voxel type is {name}", "store one integer or float number per voxel")
    return np.dtype(_VOXEL_TYPES[code]).newbyteorder(fields.endianness)


def _offset(fields: Any, path: Path, smallest: int) -> int:
    offset = float(fields["vox_offset"])
    if offset == 0:
        return smallest
    if not math.isfinite(offset) or offset != int(offset) or offset < smallest:
        raise InputError(path, f"its header puts the voxels at byte {offset:g}, not {smallest} or more", _CONVERT)
    return int(offset)


def _scaling(fields: Any, path: Path) -> tuple[float, float] | None:
    slope, intercept = float(fields["scl_slope"]), float(fields["scl_inter"])
    if slope == 0 or math.isnan(slope):
        return None  # the standard's way to say that values are stored as they are
    if math.isinf(slope) or not math.isfinite(intercept):
        raise InputError(path, f"its values are scaled by {slope:g} and shifted by {intercept:g}", _CONVERT)
    return None if (slope, intercept) == (1.0, 0.0) else (slope, intercept)


def _affine(fields: Any, path: Path) -> Affine:
    """The one affine of the header; what contradicts itself is refused rather than guessed."""
    unit = int(fields["xyzt_units"]) & 7
    if unit in _UNITS:
        raise InputError(path, f"its lengths are in {_UNITS[unit]}, not mm", "scale its affine to mm")
    sform_code, qform_code = int(fields["sform_code"]), int(fields["qform_code"])
    sform = np.asarray(fields.get_sform(), dtype=np.float64) if sform_code > 0 else None
    qform = _qform(fields, path) if qform_code > 0 else None
    if sform is not None:
        check_affine(sform, path, "sform affine")
    if sform is None and qform is None:
        problem = "does not say how it lies in the patient (sform and qform codes are both 0)"
        remedy = "convert the original scan again, or, if you know that its affine is right, set one of the codes to 1"
        raise InputError(path, problem, remedy)
    if sform is None or qform is None:
        affine = sform if sform is not None else qform
        assert affine is not None
        _check_pixdim(fields, affine, path)
        return affine
    return _agreed_affine(sform, qform, path)


def _qform(fields: Any, path: Path) -> Affine:
    pixdim = np.asarray(fields["pixdim"], dtype=np.float64)
    if not np.isfinite(pixdim[:4]).all() or (pixdim[1:4] <= 0).any():
        raise InputError(path, f"its qform has voxel size {[float(value) for value in pixdim[1:4]]} mm", _CONVERT)
    fields["pixdim"][0] = -1 if pixdim[0] < 0 else 1  # the standard reads 0 as 1
    try:
        qform = np.asarray(fields.get_qform(), dtype=np.float64)
    except (HeaderDataError, ValueError):
        raise InputError(path, "its qform quaternion is not a rotation", _CONVERT) from None
    check_affine(qform, path, "qform affine")
    return qform


def _check_pixdim(fields: Any, affine: Affine, path: Path) -> None:
    pixdim = [abs(float(value)) for value in fields["pixdim"][1:4]]
    spacing = spacing_of(affine)
    if not same_spacing(pixdim, spacing):
        problem = f"its affine has voxel size {describe(spacing)} mm, its pixdim {describe(pixdim)} mm"
        raise InputError(path, problem, "write the right one into both")


def _agreed_affine(sform: Affine, qform: Affine, path: Path) -> Affine:
    difference = axes_difference(sform, qform, _QFORM_DIRECTION_TOLERANCE) or origin_difference(sform, qform)
    if difference is None:
        return sform
    if max(abs(size - 1) for size in spacing_of(sform)) < 1e-6:
        # Some public datasets (ACDC) carry an sform of unit voxels beside a qform with the true size; MONAI and ITK
        # take the qform too. Only when nothing but the size differs.
        resized = sform @ np.diag([*spacing_of(qform), 1.0])
        same = axes_difference(resized, qform, _QFORM_DIRECTION_TOLERANCE) or origin_difference(resized, qform)
        if same is None:
            logger.debug("%s: sform of unit voxels ignored, qform used", path)
            return qform
    remedy = "keep the right one and write it into both, or convert the original scan again"
    raise InputError(path, f"its sform and qform disagree: {difference}", remedy)
