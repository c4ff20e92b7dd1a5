"""CHAOS: DICOM series of the abdomen with labels as PNG slices, which become label maps in NIfTI.

The folders are ``CT/<n>/{DICOM_anon,Ground}``, ``MR/<n>/T2SPIR/{DICOM_anon,Ground}`` and
``MR/<n>/T1DUAL/{DICOM_anon/InPhase,DICOM_anon/OutPhase,Ground}``, where CT 1 and MR 1 are different people.

A PNG belongs to the DICOM file of the same name or, where names differ (``liver_GT_000.png`` and ``i0000,0000b.dcm``),
of the same rank when both are ordered by the numbers in their names. On the CT that the organizers publish with their
evaluation code, that order gives a liver of 141 ± 34 HU and the reverse 36 ± 248 HU. Where a slice lies comes from its
DICOM header, never from a name.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from medkd.data.datalists import Case
from medkd.data.dicom_slices import is_dicom, read_dicom_header, slices_of
from medkd.data.nifti import read_nifti_header
from medkd.data.volumes import Volume, read_volume, write_segmentation
from medkd.errors import InputError

logger = logging.getLogger(__name__)

ORGANS = {0: "background", 1: "liver", 2: "right kidney", 3: "left kidney", 4: "spleen"}
LIVER = {0: "background", 1: "liver"}
_SERIES = {  # where its DICOM files are, and how many folders above are Ground's and the patient's
    "CT": ("CT/*/DICOM_anon", 0, 0),
    "MR_T1DUAL_in": ("MR/*/T1DUAL/DICOM_anon/InPhase", 1, 2),
    "MR_T1DUAL_out": ("MR/*/T1DUAL/DICOM_anon/OutPhase", 1, 2),
    "MR_T2SPIR": ("MR/*/T2SPIR/DICOM_anon", 0, 1),
}
_GREY = {1: (55, 70), 2: (110, 135), 3: (175, 200), 4: (240, 255)}  # label to range in MR's PNGs, from the organizers
_ASK = "unpack CHAOS_Train_Sets.zip again"


@dataclass(frozen=True)
class Series:
    """One image series.

    Attributes:
        folder: with its DICOM files.
        ground: with its PNGs; ``None`` where the challenge keeps the labels.
        domain: ``CT``, ``MR_T1DUAL_in``, ``MR_T1DUAL_out`` or ``MR_T2SPIR``.
        patient: for example ``CT_1``.
    """

    folder: Path
    ground: Path | None
    domain: str
    patient: str


def find_chaos(root: Path) -> list[Series]:
    """All series, wherever below root the archives left them."""
    found = []
    for domain, (pattern, to_ground, to_patient) in _SERIES.items():
        for folder in sorted(root.rglob(pattern)):
            ground = folder.parents[to_ground] / "Ground"
            patient = f"{domain[:2]}_{folder.parents[to_patient].name}"
            found.append(Series(folder, ground if ground.is_dir() else None, domain, patient))
    return found


def chaos_cases(root: Path, series: list[Series]) -> tuple[dict[str, list[Case]], dict[int, str]]:
    """Cases of the given series; their label maps are written beside the PNGs, once, and then kept.

    CT has labels of the liver alone. So where CT is among the series, the other organs are left out of MR's label maps
    too: they are there in CT, and calling them background would teach that they are not.

    Args:
        root: what paths are relative to.
        series: some of :func:`find_chaos`.

    Returns:
        ``training`` and ``unlabeled`` cases, and the names of the labels.

    Raises:
        InputError: PNGs that do not match their series, or a folder that cannot be written.
    """
    liver_alone = any(one.domain == "CT" for one in series)
    found: dict[str, list[Case]] = {"training": [], "unlabeled": []}
    for one in series:
        label = None if one.ground is None else _label_map(one, liver_alone=liver_alone)
        case = Case(
            image=one.folder.relative_to(root).as_posix(),
            label=None if label is None else label.relative_to(root).as_posix(),
            patient=one.patient,
            domain=one.domain,
        )
        found["unlabeled" if label is None else "training"].append(case)
    return found, LIVER if liver_alone else ORGANS


def _label_map(series: Series, *, liver_alone: bool) -> Path:
    assert series.ground is not None
    name = f"{series.domain}_{'liver' if liver_alone else 'organs'}.nii.gz"
    path = series.ground.with_name(name)
    slices = sorted((file for file in series.folder.iterdir() if file.is_file() and is_dicom(file)), key=_by_numbers)
    if path.is_file() and read_nifti_header(path).shape[2] == len(slices):
        logger.info("%s is kept", path)
        return path
    image = read_volume(series.folder)
    labels = np.zeros(image.array.shape, np.uint8)
    for file, picture in _pairs(series, slices):
        labels[:, :, _position(file, image)] = _read_picture(picture, image.array.shape[:2], series.domain).T
    if liver_alone:
        labels[labels > 1] = 0
    try:
        write_segmentation(path, labels, like=image)
    except OSError as error:
        raise InputError(
            path, f"cannot be written ({error.strerror})", "copy the dataset where you may write"
        ) from None
    return path


def _pairs(series: Series, slices: list[Path]) -> list[tuple[Path, Path]]:
    assert series.ground is not None
    pictures = sorted(series.ground.glob("*.png"), key=_by_numbers)
    if len(pictures) != len(slices):
        raise InputError(series.ground, f"holds {len(pictures)} PNGs for {len(slices)} DICOM slices", _ASK)
    named = {picture.stem: picture for picture in pictures}
    if all(file.stem in named for file in slices):
        return [(file, named[file.stem]) for file in slices]
    return list(zip(slices, pictures, strict=True))


def _by_numbers(path: Path) -> tuple[list[int], str]:
    return [int(number) for number in re.findall(r"\d+", path.stem)], path.name


def _position(file: Path, image: Volume) -> int:
    """Index of a slice in the volume that holds it."""
    header = read_dicom_header(file)
    if header is None:
        raise InputError(file, "is not an image", _ASK)
    x, y, z = slices_of(header)[0].position_mm
    index = np.linalg.inv(image.affine) @ (-x, -y, z, 1)  # DICOM counts to the left and to the back
    nearest = round(float(index[2]))
    if abs(index[2] - nearest) > 0.1 or not 0 <= nearest < image.array.shape[2]:
        raise InputError(file, "does not lie on the grid of its series", _ASK)
    return nearest


def _read_picture(path: Path, shape: tuple[int, ...], domain: str) -> npt.NDArray[np.uint8]:
    """A PNG's labels, (rows, columns)."""
    try:
        with Image.open(path) as picture:
            grey = np.asarray(picture).astype(np.int64)
    except (OSError, ValueError, SyntaxError):
        raise InputError(path, "cannot be read as PNG", _ASK) from None
    if grey.shape != shape[::-1]:
        raise InputError(path, f"has the shape {grey.shape}, its DICOM slice {shape[::-1]}", _ASK)
    if domain == "CT":
        return (grey > 0).astype(np.uint8)
    labels = np.zeros(grey.shape, np.uint8)
    for label, (low, high) in _GREY.items():
        labels[(grey >= low) & (grey <= high)] = label
    unknown = grey[(labels == 0) & (grey != 0)]
    if unknown.size:
        raise InputError(path, f"has the grey value {unknown[0]}, which is no organ's", _ASK)
    return labels
