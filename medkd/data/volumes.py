"""Volumes in, segmentations out: the one door, where integrity and geometry are checked.

Everything medkd learns from or predicts on comes through :func:`read_volume` and :func:`read_label`, or through
:class:`VolumeReader`, which is the same door inside MONAI's ``LoadImaged``. What comes out has finite values, a known
place in the patient, and every checksum compared. What cannot be trusted is refused in one line.
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from isal import igzip
from monai.data.image_reader import ImageReader
from nibabel.nifti1 import Nifti1Image

from medkd.data.atomic import atomic_write
from medkd.data.dicom import read_dicom
from medkd.data.geometry import Affine, check_affine, grid_difference, is_rotation, orientation_of, spacing_of
from medkd.data.nifti import is_nifti_name, read_nifti, read_nifti_header
from medkd.errors import InputError

AnyPath = str | os.PathLike[Any]

FRAME_MARK = "#frame="
_EXACT_FLOAT = 1 << 53  # float64 holds every integer up to here
_QFORM_DRIFT_MM = 0.01  # further apart than this, two readers would disagree


@dataclass(frozen=True, eq=False)
class Volume:
    """A checked 3-D image or label map.

    Attributes:
        array: (X, Y, Z) as stored on disk, scaling applied; float32 for images, an integer type for labels.
        affine: (4, 4) float64, voxel index to RAS mm.
        path: the file or folder it was read from.
        frame: which frame of a 4-D file, counted from 0; ``None`` for a 3-D one.
    """

    array: npt.NDArray[Any]
    affine: Affine
    path: Path
    frame: int | None = None

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Voxel size along X, Y, Z."""
        return spacing_of(self.affine)

    @property
    def orientation(self) -> str:
        """Which way X, Y, Z point, for example ``"LPS"``."""
        return orientation_of(self.affine)

    @property
    def where(self) -> str:
        """How messages name it."""
        return str(self.path) if self.frame is None else f"{self.path} frame {self.frame}"


def read_volume(path: str | Path, *, frame: int | None = None, series: str | None = None) -> Volume:
    """Read an image from a NIfTI file (or ``.hdr``/``.img`` pair), a DICOM folder, or a multi-frame DICOM file.

    Args:
        path: the file or folder; ``cine.nii.gz#frame=3`` is frame 3 of that file.
        frame: which frame of a 4-D NIfTI file, counted from 0.
        series: SeriesInstanceUID, where a DICOM folder holds several.

    Returns:
        float32 voxels with their affine.

    Raises:
        InputError: missing, unreadable, truncated or damaged; not a 3-D scalar image; NaN or infinite voxels; every
            voxel the same; an affine that is NaN, singular, sheared or contradicts itself; a DICOM series with gaps,
            duplicates, mixed geometry, several patients or gantry tilt.
    """
    path, frame = _choose_frame(path, frame)
    if path.is_dir() or not is_nifti_name(path):
        if frame is not None:
            raise InputError(path, f"is not a 4-D NIfTI file, so it has no frame {frame}", "leave the frame out")
        return _check_image(Volume(*read_dicom(path, series=series), path=path), may_be_constant=False)
    if series is not None:
        raise InputError(path, "is a NIfTI file, which has no series", "leave the series out")
    return _read_nifti_image(path, frame, may_be_constant=False)


def read_frames(path: str | Path, frames: Sequence[int]) -> list[Volume]:
    """Read several frames of a 4-D NIfTI file, decompressing it once.

    Raises:
        InputError: as :func:`read_volume`.
    """
    path = Path(path)
    for frame in frames:
        _check_frame(path, frame)
    first = min(frames)
    voxels = read_nifti(path, (first, max(frames) - first + 1))
    volumes = [Volume(voxels.array[..., frame - first], voxels.header.affine, path, frame) for frame in frames]
    extremes = [voxels.extremes[frame - first] for frame in frames]
    return [_check_values(volume, *pair, may_be_constant=False) for volume, pair in zip(volumes, extremes, strict=True)]


def read_label(path: str | Path, *, labels: Collection[int] | None = None, frame: int | None = None) -> Volume:
    """Read a label map. All background is fine; integer values stored as floats are too.

    Args:
        path: a NIfTI file.
        labels: the values that may occur; ``None`` for any integer from 0.
        frame: which frame if the file is 4-D; a 3-D label map of that frame is read as it is.

    Returns:
        voxels in the stored integer type, or int64 where they were stored as floats or scaled.

    Raises:
        InputError: as :func:`read_volume`; a value that is negative, not an integer, or not in ``labels``.
    """
    path, frame = _choose_frame(path, frame)
    if path.is_dir() or (path.exists() and not is_nifti_name(path)):
        raise InputError(path, "is not a NIfTI file", "store label maps as .nii or .nii.gz")
    if frame is not None:
        _check_frame(path, frame)
        if read_nifti_header(path).frames == 1:
            frame = None
    voxels = read_nifti(path, None if frame is None else (frame, 1), exact=True, may_be_empty=True)
    volume = Volume(voxels.array[..., 0], voxels.header.affine, path, frame)
    low, high = voxels.extremes[0]
    if not (math.isfinite(low) and math.isfinite(high)):
        raise _not_finite(volume)
    if max(-low, high) > _EXACT_FLOAT:
        raise InputError(volume.where, f"has the label {high if high > -low else low:g}", "use small integers")
    array = volume.array
    if array.dtype.kind == "f":
        whole = array.astype(np.int64)
        _refuse_voxels(volume, array != whole, "label values must be integers", "correct the label map")
        array = whole
    volume = Volume(array, volume.affine, path, frame)
    if low < 0:
        _refuse_voxels(volume, array < 0, "label values must not be negative", "correct the label map")
    if labels is not None:
        _check_label_values(volume, int(high), labels)
    return volume


def check_pair(image: Volume, label: Volume) -> None:
    """Refuse an image and a label map that do not lie on the same voxels.

    Raises:
        InputError: naming both files and both numbers, where shape, voxel size, orientation, direction (beyond 1e-4)
            or origin (beyond 1e-3 of a voxel) differ.
    """
    difference = grid_difference(label.array.shape, label.affine, image.array.shape, image.affine)
    if difference is not None:
        remedy = "resample the label map onto the image, or pair the right files"
        raise InputError(label.where, f"does not lie on {image.where}: {difference}", remedy)


def split_frame(name: AnyPath) -> tuple[Path, int | None]:
    """File and frame of ``cine.nii.gz#frame=3``, the way in which one path names one frame."""
    text = os.fspath(name)
    file, mark, frame = text.rpartition(FRAME_MARK)
    return (Path(file), int(frame)) if mark and frame.isdecimal() else (Path(text), None)


class VolumeReader(ImageReader):
    """Brings the checks of :func:`read_volume` into MONAI: ``LoadImaged(keys, reader=VolumeReader)``.

    On good NIfTI files it gives the same values and affines as MONAI's ``NibabelReader`` (with the default
    ``dtype=float32``). ``path#frame=3`` reads one frame of a 4-D file. A list of paths becomes channels.

    ``LoadImage`` tries MONAI's own readers when ``read`` fails, which would load in silence what was refused.
    So ``read`` only notes the path and ``get_data`` opens the file.

    Args:
        may_be_constant: accept an image in which every voxel is the same integer. On by default because the reader
            cannot know an empty label map from an image; ``medkd data check`` and ``train`` can, and do.
        series: SeriesInstanceUID, where DICOM folders hold several.
    """

    def __init__(self, may_be_constant: bool = True, series: str | None = None) -> None:
        super().__init__()
        self.may_be_constant = may_be_constant
        self.series = series

    def verify_suffix(self, filename: Sequence[AnyPath] | AnyPath) -> bool:
        """Whether all names are NIfTI files or DICOM folders."""
        paths = [split_frame(name)[0] for name in _as_list(filename)]
        return all(is_nifti_name(path) or path.is_dir() for path in paths)

    def read(self, data: Sequence[AnyPath] | AnyPath, **kwargs: Any) -> list[str]:
        """Note which files are to be read; ``get_data`` opens them."""
        return [str(name) for name in _as_list(data)]

    def get_data(self, img: Sequence[str]) -> tuple[npt.NDArray[np.float32], dict[str, Any]]:
        """Read the files.

        Returns:
            (X, Y, Z) float32, or (C, X, Y, Z) for several paths, and the metadata MONAI needs.

        Raises:
            InputError: as :func:`read_volume`, and where several files do not lie on the same voxels.
        """
        volumes = [self._read(*split_frame(name)) for name in img]
        for volume in volumes[1:]:
            check_pair(volumes[0], volume)
        meta = {
            "affine": volumes[0].affine.copy(),
            "original_affine": volumes[0].affine.copy(),
            "spatial_shape": np.asarray(volumes[0].array.shape),
            "space": "RAS",
            "original_channel_dim": float("nan") if len(volumes) == 1 else 0,
        }
        arrays = [_last_axis_fastest(volume.array) for volume in volumes]
        return arrays[0] if len(arrays) == 1 else np.stack(arrays), meta

    def _read(self, path: Path, frame: int | None) -> Volume:
        if path.is_dir() or not is_nifti_name(path):
            volume = Volume(*read_dicom(path, series=self.series), path=path)
            return _check_image(volume, may_be_constant=self.may_be_constant)
        return _read_nifti_image(path, frame, may_be_constant=self.may_be_constant)


def write_segmentation(
    path: str | Path, array: npt.NDArray[Any], affine: npt.ArrayLike | None = None, like: Volume | None = None
) -> None:
    """Write a label map that every reader places where the image lies, whole or not at all.

    Stored as uint8, uint16 or int32, whichever is wide enough; sform code 1 (scanner), in mm, and the same qform where
    one can hold the affine: not shear, nor those small tilts of a flipped grid that its float32 quaternion would lose.

    Args:
        path: ``.nii`` or ``.nii.gz``; its folder must exist.
        array: (X, Y, Z) integers or booleans, from 0.
        affine: (4, 4), voxel to RAS mm; that of ``like`` if left out.
        like: the image it belongs to; its shape (and, if both are given, affine) must agree.

    Raises:
        InputError: another ending; a shape, affine or value that cannot be stored.
    """
    array = np.asarray(array)
    _write(Path(path), _narrow(Path(path), array), affine, like)


def write_image(
    path: str | Path, array: npt.NDArray[Any], affine: npt.ArrayLike | None = None, like: Volume | None = None
) -> None:
    """Write intensities as float32, otherwise as :func:`write_segmentation` does.

    Args:
        path: ``.nii`` or ``.nii.gz``; its folder must exist.
        array: (X, Y, Z) finite numbers.
        affine: (4, 4), voxel to RAS mm; that of ``like`` if left out.
        like: the image it was made from; its shape (and, if both are given, affine) must agree.

    Raises:
        InputError: another ending; a shape, affine or value that cannot be stored.
    """
    array = np.asarray(array, dtype=np.float32)
    if not np.isfinite(array).all():
        raise InputError(path, "has values that are not finite", "write finite intensities")
    _write(Path(path), array, affine, like)


def _write(path: Path, array: npt.NDArray[Any], affine: npt.ArrayLike | None, like: Volume | None) -> None:
    if affine is None and like is None:
        raise InputError(path, "cannot be placed in space", "give the affine or the image it belongs to")
    matrix = np.array(like.affine if affine is None and like is not None else affine, dtype=np.float64)
    check_affine(matrix, path)
    if array.ndim != 3:
        raise InputError(path, f"an array of shape {array.shape} is not a volume", "give (X, Y, Z)")
    if like is not None:
        difference = grid_difference(array.shape, matrix, like.array.shape, like.affine)
        if difference is not None:
            raise InputError(path, f"does not lie on {like.where}: {difference}", "resample it onto the image first")
    if not path.name.lower().endswith((".nii", ".nii.gz")):
        raise InputError(path, "is not a NIfTI name", "end it in .nii or .nii.gz")
    image = Nifti1Image(array, matrix)
    image.header.set_xyzt_units("mm")
    image.set_sform(matrix, code=1)
    image.set_qform(matrix, code=1)
    if not is_rotation(matrix) or _drift_mm(image.get_qform(), matrix, array.shape) > _QFORM_DRIFT_MM:
        image.set_qform(matrix, code=0)  # readers then take the sform
    content = image.to_bytes()
    with atomic_write(path, "wb") as file:
        file.write(igzip.compress(content, 3, mtime=0) if path.name.lower().endswith(".gz") else content)


def _drift_mm(affine: Affine, reference: Affine, shape: tuple[int, ...]) -> float:
    """How far apart two affines put the worst corner of a grid."""
    corners = np.array(list(product(*((0, size) for size in shape), (1,)))).T
    return float(np.linalg.norm((affine - reference) @ corners, axis=0).max())


def _narrow(path: Path, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    if array.dtype.kind not in "biu":
        raise InputError(path, f"a segmentation of type {array.dtype} is not integer", "round it to labels first")
    low, high = (int(array.min()), int(array.max())) if array.size else (0, 0)
    if low < 0 or high > np.iinfo(np.int32).max:
        raise InputError(path, f"label {low if low < 0 else high} cannot be stored", "use labels from 0 to 2147483647")
    for kind in (np.uint8, np.uint16, np.int32):
        if high <= np.iinfo(kind).max:
            return array.astype(kind)
    raise AssertionError  # int32 was wide enough


def _last_axis_fastest(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The array in C order, which MONAI makes of every image; block by block is 2.5 times faster than at once."""
    result = np.empty(array.shape, array.dtype)
    for y in range(0, array.shape[1], 64):
        for z in range(0, array.shape[2], 16):
            result[:, y : y + 64, z : z + 16] = array[:, y : y + 64, z : z + 16]
    return result


def _as_list(names: Sequence[AnyPath] | AnyPath) -> list[AnyPath]:
    return [names] if isinstance(names, str | os.PathLike) else list(names)


def _choose_frame(name: AnyPath, frame: int | None) -> tuple[Path, int | None]:
    path, marked = split_frame(name)
    return path, marked if frame is None else frame


def _check_frame(path: Path, frame: int) -> None:
    if isinstance(frame, bool) or not isinstance(frame, int) or frame < 0:
        raise InputError(path, f"has no frame {frame}", "count frames from 0")


def _read_nifti_image(path: Path, frame: int | None, *, may_be_constant: bool) -> Volume:
    if frame is not None:
        _check_frame(path, frame)
    voxels = read_nifti(path, None if frame is None else (frame, 1), may_be_empty=may_be_constant)
    volume = Volume(voxels.array[..., 0], voxels.header.affine, path, frame if voxels.header.frames > 1 else None)
    return _check_values(volume, *voxels.extremes[0], may_be_constant=may_be_constant)


def _check_image(volume: Volume, *, may_be_constant: bool) -> Volume:
    low, high = float(volume.array.min()), float(volume.array.max())
    return _check_values(volume, low, high, may_be_constant=may_be_constant)


def _check_values(volume: Volume, low: float, high: float, *, may_be_constant: bool) -> Volume:
    """Refuse voxels that would turn a whole normalized image into NaN."""
    if not (math.isfinite(low) and math.isfinite(high)):
        raise _not_finite(volume)
    if low == high and not (may_be_constant and float(low).is_integer()):
        raise InputError(volume.where, f"is constant: every voxel is {low:g}", "check how it was made; leave it out")
    return volume


def _not_finite(volume: Volume) -> InputError:
    parts = []
    for name, bad in (("NaN", np.isnan(volume.array)), ("infinite", np.isinf(volume.array))):
        if count := int(bad.sum()):
            parts.append(f"{count} {name} voxel{'s' if count > 1 else ''}, first at {_first_index(bad)}")
    remedy = "correct the values (also beyond 3.4e38 counts as infinite), or leave the file out"
    return InputError(volume.where, "has " + " and ".join(parts or ["values out of range"]), remedy)


def _first_index(bad: npt.NDArray[np.bool_]) -> tuple[int, ...]:
    return tuple(int(index) for index in np.unravel_index(int(bad.argmax()), bad.shape))


def _refuse_voxels(volume: Volume, bad: npt.NDArray[np.bool_], rule: str, remedy: str) -> None:
    count = int(bad.sum())
    if count:
        index = _first_index(bad)
        value = volume.array[index].item()
        problem = f"has {count} voxel{'s' if count > 1 else ''} such as {value:g} at {index}: {rule}"
        raise InputError(volume.where, problem, remedy)


def _check_label_values(volume: Volume, high: int, labels: Collection[int]) -> None:
    allowed = sorted({int(label) for label in labels})
    if high <= 1 << 16:
        table = np.zeros(high + 1, dtype=bool)
        table[[label for label in allowed if 0 <= label <= high]] = True
        bad = ~table[volume.array]
    else:
        bad = ~np.isin(volume.array, allowed)
    if bad.any():
        shown = ", ".join(map(str, allowed[:20])) + (", …" if len(allowed) > 20 else "")
        _refuse_voxels(volume, bad, f"the labels are {shown}", "correct the label map, or the labels of the datalist")
