"""DICOM series as volumes: slices in the order in which they lie, or a refusal that says why.

Slices are ordered by their positions along the normal of the slice plane; InstanceNumber and file names play no part.
A series with a gap, a duplicate, another patient, mixed geometry or gantry tilt is refused: whatever is done about
these must be done knowingly.

Rules where DICOM leaves a choice: a series of one slice takes its SliceThickness as voxel size along Z and is refused
without one; MONOCHROME1 (small values are bright) is refused rather than inverted, because the inverted numbers would
no longer mean what the scanner wrote; an enhanced multi-frame file is read frame by frame.
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from medkd.data.dicom_slices import DicomFile, Slice, is_dicom, read_dicom_header, read_planes, slices_of
from medkd.data.geometry import DIRECTION_TOLERANCE, Affine, check_affine, describe, same_spacing
from medkd.errors import InputError

_SPACING_NOISE = 0.02  # of the slice distance; positions are often rounded to 0.01 mm
_SPACING_NOISE_MM = 0.011
_TILT_DEGREES = 0.1
_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
_NOT_IMAGES = {"DICOMDIR", "LICENSE", "README", "VERSION", "LOCKFILE"}
_MAX_LISTED = 10


def read_dicom(path: Path, *, series: str | None = None) -> tuple[npt.NDArray[np.float32], Affine]:
    """Read one series.

    Args:
        path: a folder that holds it (sub-folders are searched too), or one enhanced multi-frame file.
        series: SeriesInstanceUID, where the folder holds several.

    Returns:
        (X, Y, Z) float32 in Fortran order, rescaled slice by slice, and the (4, 4) affine to RAS mm. X runs along the
        rows of a slice, Y down its columns, Z along the normal of the slice plane.

    Raises:
        InputError: no DICOM images; several series; mixed patients; missing, duplicate, truncated or inconsistent
            slices; gantry tilt; pixels that cannot be decoded.
    """
    files = _choose_series(path, _headers(path), series)
    if len({file.patient for file in files}) > 1:
        problem = "mixes several patients in one series"
        raise InputError(path, problem, "sort the files by patient; never merge folders by hand")
    file_of = {file.path: file for file in files}
    slices = [plane for file in files for plane in slices_of(file)]
    _check_consistent(slices)
    slices, step_mm = _in_order(path, slices)
    first = slices[0]
    affine = np.eye(4)
    affine[:3, 0] = first.orientation[0] * first.spacing_mm[1]
    affine[:3, 1] = first.orientation[1] * first.spacing_mm[0]
    affine[:3, 2] = step_mm
    affine[:3, 3] = first.position_mm
    affine = _LPS_TO_RAS @ affine
    check_affine(affine, path)
    return _stack(slices, file_of), affine


def list_series(path: Path) -> dict[str, int]:
    """SeriesInstanceUID of every image series in a folder, with its number of slices.

    Raises:
        InputError: no DICOM images, or a damaged file among them.
    """
    counts: Counter[str] = Counter()
    for file in _headers(path):
        counts[file.series] += file.frames
    return dict(counts)


def _headers(path: Path) -> list[DicomFile]:
    if not path.is_dir():
        if not is_dicom(path):
            remedy = "give .nii, .nii.gz, a .hdr/.img pair, or the folder of a DICOM series"
            raise InputError(path, "is neither NIfTI nor DICOM", remedy)
        header = read_dicom_header(path)
        if header is None:
            raise InputError(path, "is a DICOM object without an image", "name the folder of the image series")
        if "PerFrameFunctionalGroupsSequence" not in header.dataset and header.frames == 1:
            raise InputError(path, "is one slice of a DICOM series", "name the folder that holds the series")
        return [header]
    dicom: list[Path] = []
    other: list[Path] = []
    try:
        for file in _files_below(path):
            (dicom if is_dicom(file) else other).append(file)
    except PermissionError as error:
        raise InputError(error.filename or path, "may not be read (no permission)", "ask for read access") from None
    if not dicom:
        raise InputError(path, "holds no DICOM file", "name a NIfTI file or the folder of a DICOM series")
    _refuse_damaged_companions(dicom, other)
    headers = [header for file in dicom if (header := read_dicom_header(file)) is not None]
    if not headers:
        raise InputError(path, "holds DICOM objects but no image", "name the folder of the image series")
    return headers


def _files_below(folder: Path) -> Iterator[Path]:
    def refuse(error: OSError) -> None:
        raise error

    for parent, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if not name.startswith(".") and name.upper() not in _NOT_IMAGES:
                yield Path(parent, name)


def _refuse_damaged_companions(dicom: Sequence[Path], other: Sequence[Path]) -> None:
    """A file named like the slices that is not DICOM was one once: without it the volume would end too early."""
    endings = {file.suffix.lower() for file in dicom}
    for file in other:
        if file.suffix.lower() in endings:
            problem = f"is not DICOM, though {len(dicom)} files beside it are"
            raise InputError(file, problem, "copy it again, or remove it if it never was a slice")


def _choose_series(path: Path, files: list[DicomFile], series: str | None) -> list[DicomFile]:
    groups: dict[str, list[DicomFile]] = defaultdict(list)
    for file in files:
        groups[file.series].append(file)
    counts = {uid: sum(file.frames for file in group) for uid, group in groups.items()}
    listed = ", ".join(f"{uid} ({count} slices)" for uid, count in list(counts.items())[:_MAX_LISTED])
    listed += f" and {len(counts) - _MAX_LISTED} more" if len(counts) > _MAX_LISTED else ""
    if series is not None:
        if series not in groups:
            raise InputError(path, f"has no series {series}", f"choose one of: {listed}")
        return groups[series]
    if len(groups) > 1:
        patients = len({file.patient for file in files})
        of_patients = f" of {patients} patients" if patients > 1 else ""
        raise InputError(path, f"holds {len(groups)} series{of_patients}", f"choose one with --series: {listed}")
    return files


def _check_consistent(slices: Sequence[Slice]) -> None:
    first = slices[0]
    for plane in slices[1:]:
        for name, same, mine, theirs in (
            ("size", plane.shape == first.shape, plane.shape, first.shape),
            (
                "PixelSpacing",
                same_spacing(plane.spacing_mm, first.spacing_mm),
                plane.spacing_mm,
                first.spacing_mm,
            ),
            (
                "orientation",
                np.abs(plane.orientation - first.orientation).max() <= DIRECTION_TOLERANCE,
                plane.orientation.ravel(),
                first.orientation.ravel(),
            ),
        ):
            if not same:
                problem = f"its {name} {describe(mine)} differs from {describe(theirs)} in {first.where}"
                raise InputError(plane.where, problem, "split the series into ones of equal geometry")


def _in_order(path: Path, slices: list[Slice]) -> tuple[list[Slice], npt.NDArray[np.float64]]:
    """The slices along their normal, and the step from one to the next, LPS mm."""
    normal = np.cross(*slices[0].orientation)
    slices = sorted(slices, key=lambda plane: float(plane.position_mm @ normal))
    if len(slices) == 1:
        thickness = slices[0].thickness_mm
        if not thickness or thickness < 0:
            raise InputError(path, "is one slice without a SliceThickness", "give a series of several slices")
        return slices, normal * thickness
    positions = np.array([plane.position_mm for plane in slices])
    heights = positions @ normal
    steps = np.diff(heights)
    usual = float(np.median(steps[steps > _SPACING_NOISE_MM])) if (steps > _SPACING_NOISE_MM).any() else 0.0
    tolerance = max(_SPACING_NOISE * usual, min(_SPACING_NOISE_MM, usual / 4))
    twins = np.flatnonzero(steps <= tolerance)
    if twins.size:
        pair = f"{slices[twins[0]].where} and {slices[twins[0] + 1].where}"
        copies = "1 slice lies" if twins.size == 1 else f"{twins.size} slices lie"
        problem = f"{copies} where another one does, first {pair}"
        raise InputError(path, problem, "remove the copies, or split repeated acquisitions into one folder each")
    gaps = np.flatnonzero(steps > usual + tolerance)
    short = np.flatnonzero(steps < usual - tolerance)
    if gaps.size or short.size:
        index = int(gaps[0] if gaps.size else short[0])
        missing = round(float((steps[gaps] / usual - 1).sum())) if gaps.size else 0
        what = "slices are unevenly spaced"
        if missing:
            what = "1 slice is missing" if missing == 1 else f"{missing} slices are missing"
        problem = f"{what}: {steps[index]:.6g} mm instead of {usual:.6g} mm after {slices[index].where}"
        raise InputError(path, problem, "export the whole series again, or resample it knowingly")
    step = (positions[-1] - positions[0]) / (len(slices) - 1)
    sideways = positions - positions[0] - np.outer(heights - heights[0], normal)
    drift = float(np.linalg.norm(sideways, axis=1).max())
    tilt = float(np.degrees(np.arctan2(np.linalg.norm(sideways[-1]), heights[-1] - heights[0])))
    if tilt > _TILT_DEGREES and drift > 2 * _SPACING_NOISE_MM:
        problem = f"was scanned with {tilt:.3g} degrees of gantry tilt (its slices are shifted against each other)"
        raise InputError(path, problem, "resample it to a grid with right angles first, for example with dcm2niix")
    if drift > max(0.1 * usual, 10 * _SPACING_NOISE_MM):
        raise InputError(path, f"its slices do not lie on one line: {drift:.3g} mm off", "export the series again")
    return slices, step


def _stack(slices: Sequence[Slice], file_of: dict[Path, DicomFile]) -> npt.NDArray[np.float32]:
    rows, columns = slices[0].shape
    volume = np.empty((len(slices), rows, columns), np.float32)
    places: dict[Path, list[tuple[int, Slice]]] = defaultdict(list)
    for index, plane in enumerate(slices):
        places[plane.path].append((index, plane))
    for path, indexed in places.items():
        planes: Any = read_planes(file_of[path], [plane for _, plane in indexed])
        for (index, _), pixels in zip(indexed, planes, strict=True):
            volume[index] = pixels
    return volume.transpose(2, 1, 0)
