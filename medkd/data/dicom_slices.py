"""One DICOM file: where its slices lie and what their pixels are.

Only the tags named here are ever read. Names and numbers of patients are compared as bytes and never decoded, printed
or kept.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pydicom
import pydicom.config
from pydicom.uid import UID, MediaStorageDirectoryStorage, RLELossless

from medkd.data.byte_stream import open_file
from medkd.errors import InputError

_PATIENT_TAGS = ("PatientID", "PatientName", "PatientBirthDate")
_HEADER_TAGS = [
    *_PATIENT_TAGS, "SOPClassUID", "SeriesInstanceUID", "Rows", "Columns", "NumberOfFrames", "SamplesPerPixel",
    "PhotometricInterpretation", "PixelSpacing", "ImageOrientationPatient", "ImagePositionPatient", "SliceThickness",
    "RescaleSlope", "RescaleIntercept", "ModalityLUTSequence", "SharedFunctionalGroupsSequence",
    "PerFrameFunctionalGroupsSequence",
]  # fmt: skip
_PIXEL_TAGS = [
    "Rows", "Columns", "NumberOfFrames", "SamplesPerPixel", "PhotometricInterpretation", "PlanarConfiguration",
    "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "PixelData", "FloatPixelData",
    "DoubleFloatPixelData",
]  # fmt: skip
_COPY_AGAIN = "copy it again"

_reading = threading.RLock()
_session_key = os.urandom(16)


@dataclass(frozen=True)
class Slice:
    """One plane of voxels.

    Attributes:
        path: its file.
        frame: its number in a multi-frame file, from 0; ``None`` in a single-frame file.
        shape: rows, columns.
        spacing_mm: distance between rows, between columns.
        orientation: unit vectors along a row and down a column, LPS.
        position_mm: center of the first voxel, LPS.
        thickness_mm: nominal thickness, where given.
        slope: of the stored values.
        intercept: of the stored values.
    """

    path: Path
    frame: int | None
    shape: tuple[int, int]
    spacing_mm: tuple[float, float]
    orientation: npt.NDArray[np.float64]
    position_mm: npt.NDArray[np.float64]
    thickness_mm: float | None
    slope: float
    intercept: float

    @property
    def where(self) -> str:
        """How messages name it."""
        return str(self.path) if self.frame is None else f"{self.path} frame {self.frame}"


@dataclass(frozen=True)
class DicomFile:
    """The header of one DICOM image file, pixels not read yet.

    Attributes:
        path: the file.
        series: SeriesInstanceUID.
        patient: a hash that differs between patients, valid in this process only.
        frames: how many planes it holds.
        dataset: the tags that were read.
    """

    path: Path
    series: str
    patient: bytes
    frames: int
    dataset: pydicom.Dataset


def is_dicom(path: Path) -> bool:
    """Whether the file starts as DICOM files do, with or without the preamble of the standard.

    Raises:
        InputError: missing, unreadable or empty.
    """
    with open_file(path) as file:
        start = file.read(132)
    return start[128:] == b"DICM" or start[:4] in (b"\x08\x00\x00\x00", b"\x08\x00\x05\x00", b"\x08\x00\x08\x00")


def read_dicom_header(path: Path) -> DicomFile | None:
    """Read the header of an image file; ``None`` for DICOM objects that are not images (reports, structures).

    Raises:
        InputError: damaged, or without a series.
    """
    with _quiet_pydicom(path):
        dataset = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=_HEADER_TAGS, force=True)
        if "Rows" not in dataset or "Columns" not in dataset:
            kind = UID(dataset.get("SOPClassUID") or dataset.file_meta.get("MediaStorageSOPClassUID") or "")
            past_series = "SeriesInstanceUID" in dataset  # a header cut off before could have been an image's
            if kind == MediaStorageDirectoryStorage or (past_series and kind and "Image Storage" not in kind.name):
                return None
            raise InputError(path, "is truncated: its header ends before the size of the image", _COPY_AGAIN)
        if not dataset.get("SeriesInstanceUID"):
            raise InputError(path, "has no SeriesInstanceUID", "export the series again")
        patient = hashlib.blake2b(key=_session_key)
        for tag in _PATIENT_TAGS:
            patient.update(_raw_bytes(dataset, tag) + b"\0")
            dataset.pop(tag, None)
        return DicomFile(
            path=path,
            series=str(dataset.SeriesInstanceUID),
            patient=patient.digest(),
            frames=int(dataset.get("NumberOfFrames") or 1),
            dataset=dataset,
        )


def slices_of(file: DicomFile) -> list[Slice]:
    """The planes of a file with their places.

    Raises:
        InputError: color or inverted grey values, values that are not a linear function of the stored ones, missing or
            impossible geometry.
    """
    with _quiet_pydicom(file.path):
        dataset = file.dataset
        if int(dataset.get("SamplesPerPixel") or 1) != 1:
            raise InputError(file.path, "is a color image", "name a series of grey-scale slices")
        photometric = str(dataset.get("PhotometricInterpretation") or "MONOCHROME2").strip()
        if photometric == "MONOCHROME1":
            problem = "is MONOCHROME1: small values are bright, so intensities would be upside down"
            raise InputError(file.path, problem, "convert it to MONOCHROME2 first")
        if photometric != "MONOCHROME2":
            raise InputError(file.path, f"has {photometric} colors", "name a series of grey-scale slices")
        if "ModalityLUTSequence" in dataset:
            raise InputError(file.path, "maps its values through a table", "apply its modality LUT first")
        per_frame = dataset.get("PerFrameFunctionalGroupsSequence")
        if per_frame is None:
            if file.frames > 1:
                problem = f"holds {file.frames} frames without saying where each lies (a cine or screen capture?)"
                raise InputError(file.path, problem, "name an enhanced multi-frame image or a series of slices")
            return [_slice(file, [dataset], None)]
        if len(per_frame) != file.frames:
            problem = f"says it has {file.frames} frames but describes {len(per_frame)}"
            raise InputError(file.path, problem, "export it again")
        shared = [group for item in dataset.get("SharedFunctionalGroupsSequence") or [] for group in _groups(item)]
        return [_slice(file, [*_groups(item), *shared], index) for index, item in enumerate(per_frame)]


def read_planes(file: DicomFile, planes: Sequence[Slice]) -> list[npt.NDArray[np.float32]]:
    """The values of the planes of one file, rescaled: (rows, columns) float32 each, in the order of ``planes``.

    Raises:
        InputError: truncated, damaged, or compressed in a way that cannot be decoded.
    """
    path = file.path
    with _quiet_pydicom(path):
        dataset = pydicom.dcmread(path, specific_tags=_PIXEL_TAGS, force=True)
        syntax = UID(dataset.file_meta.get("TransferSyntaxUID", pydicom.uid.ImplicitVRLittleEndian))
        dataset.file_meta.TransferSyntaxUID = syntax
        values, rescaled = _decode(path, dataset, syntax)
    if rescaled and len({(plane.slope, plane.intercept) for plane in planes}) > 1:
        problem = "is compressed and scales each frame differently, which cannot be decoded here"
        raise InputError(path, problem, "decompress it first, for example with `gdcmconv --raw`")
    values = values.reshape(file.frames, *planes[0].shape)
    result = []
    for plane in planes:
        pixels = values[plane.frame or 0]
        if rescaled or (plane.slope, plane.intercept) == (1.0, 0.0):
            result.append(pixels.astype(np.float32))
        else:
            result.append((pixels * np.float64(plane.slope) + plane.intercept).astype(np.float32))
    return result


@contextmanager
def _quiet_pydicom(path: Path) -> Iterator[None]:
    """Let pydicom read what is legible, warn about nothing (its warnings quote values), and fail in one line.

    pydicom's settings and Python's warning filters belong to the whole process, hence the lock.
    """
    log = logging.getLogger("pydicom")
    with _reading, warnings.catch_warnings(), pydicom.config.disable_value_validation():
        warnings.simplefilter("ignore")
        disabled, log.disabled = log.disabled, True
        try:
            yield
        except InputError:
            raise
        except MemoryError:
            raise InputError(path, "does not fit in memory", "use a machine with more") from None
        except OSError as error:
            reason = error.strerror or "it ends too early"
            raise InputError(path, f"cannot be read ({reason})", _COPY_AGAIN) from None
        except Exception as error:  # whatever a damaged file makes pydicom do; its text may quote tags
            problem = f"is damaged or not valid DICOM ({type(error).__name__} while reading it)"
            raise InputError(path, problem, "copy or export it again") from None
        finally:
            log.disabled = disabled


def _raw_bytes(dataset: pydicom.Dataset, tag: str) -> bytes:
    if tag not in dataset:
        return b""
    value = dataset.get_item(tag).value  # undecoded
    if not isinstance(value, bytes):
        value = str(value if value is not None else "").encode()
    return bytes(value).strip(b" \0")


def _groups(item: pydicom.Dataset) -> list[pydicom.Dataset]:
    """The datasets inside the functional groups of one frame."""
    return [group for element in item if element.VR == "SQ" for group in element.value]


def _slice(file: DicomFile, sources: Sequence[pydicom.Dataset], frame: int | None) -> Slice:
    where = file.path if frame is None else f"{file.path} frame {frame}"

    def numbers(tag: str, count: int) -> npt.NDArray[np.float64] | None:
        for source in sources:
            if tag in source and source[tag].value not in (None, ""):
                try:
                    values = np.atleast_1d(np.array(source[tag].value, dtype=np.float64))
                except ValueError:
                    raise InputError(where, f"its {tag} is not a number", "export the series again") from None
                if values.shape != (count,) or not np.isfinite(values).all():
                    raise InputError(where, f"its {tag} is not {count} finite numbers", "export the series again")
                return values
        return None

    def required(tag: str, count: int) -> npt.NDArray[np.float64]:
        values = numbers(tag, count)
        if values is None:
            problem = f"has no {tag}, so its place is unknown"
            raise InputError(where, problem, "name a series of CT, MR or PET slices with geometry")
        return values

    spacing, orientation = required("PixelSpacing", 2), required("ImageOrientationPatient", 6)
    if (spacing <= 0).any():
        raise InputError(where, f"its PixelSpacing is {spacing.tolist()}", "export the series again")
    axes = orientation.reshape(2, 3)
    if np.abs(axes @ axes.T - np.eye(2)).max() > 1e-3:
        raise InputError(where, "its ImageOrientationPatient is not two orthogonal unit vectors", "export it again")
    thickness, slope, intercept = (numbers(tag, 1) for tag in ("SliceThickness", "RescaleSlope", "RescaleIntercept"))
    if slope is not None and slope[0] == 0:
        raise InputError(where, "its RescaleSlope is 0", "export the series again")
    return Slice(
        path=file.path,
        frame=frame,
        shape=(int(file.dataset.Rows), int(file.dataset.Columns)),
        spacing_mm=(float(spacing[0]), float(spacing[1])),
        orientation=axes,
        position_mm=required("ImagePositionPatient", 3),
        thickness_mm=None if thickness is None else float(thickness[0]),
        slope=1.0 if slope is None else float(slope[0]),
        intercept=0.0 if intercept is None else float(intercept[0]),
    )


def _decode(path: Path, dataset: pydicom.Dataset, syntax: UID) -> tuple[npt.NDArray[Any], bool]:
    """Pixel values, and whether they are rescaled already."""
    name = next((tag for tag in ("PixelData", "FloatPixelData", "DoubleFloatPixelData") if tag in dataset), None)
    if name is None:
        raise InputError(path, "is truncated: it holds no pixels", _COPY_AGAIN)
    if not syntax.is_compressed or syntax == pydicom.uid.DeflatedExplicitVRLittleEndian:
        bits = {"FloatPixelData": 32, "DoubleFloatPixelData": 64}.get(name) or int(dataset.BitsAllocated)
        needed = int(dataset.Rows) * int(dataset.Columns) * int(dataset.get("NumberOfFrames") or 1) * bits // 8
        length = len(dataset[name].value)
        if length < needed:
            raise InputError(path, f"is truncated: {length} of {needed} bytes of pixels", _COPY_AGAIN)
        return dataset.pixel_array, False
    if syntax == RLELossless:
        return dataset.pixel_array, False
    return _decode_with_gdcm(path, syntax), True


def _decode_with_gdcm(path: Path, syntax: UID) -> npt.NDArray[Any]:
    """JPEG, JPEG-LS and JPEG 2000, which SimpleITK decodes and rescales."""
    import SimpleITK as sitk  # noqa: N813  (heavy, and needed for compressed files only)

    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    reader.SetImageIO("GDCMImageIO")
    try:
        image = reader.Execute()
    except RuntimeError:
        problem = f"is compressed as {syntax.name}, which cannot be decoded here (or it is damaged)"
        raise InputError(path, problem, "decompress it first, for example with `gdcmconv --raw`") from None
    return sitk.GetArrayFromImage(image)
