"""Label maps as DICOM-SEG objects that refer to the series they were made from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pydicom

from medkd.data.atomic import atomic_write
from medkd.data.dicom_slices import is_dicom
from medkd.deploy.allowlist import words
from medkd.errors import ConfigError, InputError

# What highdicom would copy from the images; the rest of the object is written anew.
_IDENTIFYING = words(
    "PatientName PatientID PatientBirthDate PatientSex PatientAge PatientSize PatientWeight OtherPatientIDs"
    " IssuerOfPatientID TypeOfPatientID AccessionNumber StudyID StudyDate StudyTime StudyDescription"
    " ReferringPhysicianName InstitutionName InstitutionalDepartmentName PatientComments EthnicGroup Occupation"
    " AdditionalPatientHistory PatientIdentityRemoved DeidentificationMethod ClinicalTrialSubjectID"
    " ClinicalTrialProtocolID ClinicalTrialSponsorName ClinicalTrialSiteID ClinicalTrialSiteName"
    " ConsultingPhysicianName PhysiciansOfRecord NameOfPhysiciansReadingStudy RequestingService"
    " PatientSpeciesDescription ResponsiblePerson ResponsibleOrganization"
)


def require_highdicom() -> None:
    """Refuse early where the extra is missing.

    Raises:
        ConfigError: naming the command that adds it.
    """
    try:
        import highdicom  # noqa: F401
    except ImportError:
        raise ConfigError(
            "--format dicom-seg", "needs the highdicom package", "run `pip install 'medkd[dicom-seg]'`"
        ) from None


def write_dicom_seg(
    path: str | Path,
    array: npt.NDArray[np.integer[Any]],
    folder: str | Path,
    *,
    labels: Mapping[int, str],
    model: str,
    version: str,
    series: str | None = None,
) -> None:
    """Write a segmentation object for a DICOM series; the patient's data are left empty in it.

    The series is referred to by its UIDs, which viewers need; nothing else of its headers is kept.

    Args:
        path: the ``.dcm`` file to write.
        array: (X, Y, Z) labels as ``read_volume(folder)`` orders voxels.
        folder: of the series.
        labels: label value → name; every value but 0 becomes a segment.
        model: name of the model.
        version: of the model.
        series: SeriesInstanceUID, where the folder holds several.

    Raises:
        ConfigError: highdicom is not installed.
        InputError: the series is not single-frame, or does not have the array's shape.
    """
    require_highdicom()
    import highdicom as hd
    from pydicom.sr.codedict import codes

    images = _series_images(Path(folder), series)
    shape = (images[0].Columns, images[0].Rows, len(images))
    if tuple(array.shape) != shape:
        raise InputError(folder, f"has {shape} voxels, the segmentation {array.shape}", "predict on the whole series")
    algorithm = hd.AlgorithmIdentificationSequence(
        name=model, version=version, family=codes.cid7162.ArtificialIntelligence
    )
    numbers = [label for label in sorted(labels) if label != 0]
    segments = [
        hd.seg.SegmentDescription(
            segment_number=position,
            segment_label=labels[label][:64],
            segmented_property_category=codes.SCT.Tissue,
            segmented_property_type=codes.SCT.Tissue,
            algorithm_type=hd.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
            algorithm_identification=algorithm,
        )
        for position, label in enumerate(numbers, start=1)
    ]
    planes = np.zeros((len(images), images[0].Rows, images[0].Columns), dtype=np.uint8)
    for position, label in enumerate(numbers, start=1):
        planes[array.transpose(2, 1, 0) == label] = position
    segmentation = hd.seg.Segmentation(
        source_images=images,
        pixel_array=planes,
        segmentation_type=hd.seg.SegmentationTypeValues.BINARY,
        segment_descriptions=segments,
        series_instance_uid=hd.UID(),
        series_number=900,
        sop_instance_uid=hd.UID(),
        instance_number=1,
        manufacturer="medkd",
        manufacturer_model_name=model,
        software_versions=version,
        device_serial_number="0",
        omit_empty_frames=False,
    )
    with atomic_write(path, "wb") as file:
        segmentation.save_as(file)


def _series_images(folder: Path, series: str | None) -> list[pydicom.Dataset]:
    """The series' headers without pixels and patient, ordered along the normal of the slices."""
    if not folder.is_dir():
        raise InputError(folder, "is not the folder of a DICOM series", "use --format nifti")
    images: list[pydicom.Dataset] = []
    for file in sorted(path for path in folder.rglob("*") if path.is_file() and is_dicom(path)):
        image: pydicom.Dataset = pydicom.dcmread(file, stop_before_pixels=True)
        if "ImagePositionPatient" in image and series in (None, image.SeriesInstanceUID):
            images.append(image)
    if not images or "SharedFunctionalGroupsSequence" in images[0]:
        raise InputError(folder, "is not a series of single slices", "use --format nifti")
    for image in images:
        for keyword in _IDENTIFYING:
            if keyword in image:
                delattr(image, keyword)
        image.PatientName, image.PatientID, image.PatientBirthDate, image.PatientSex = "", "", None, None
        image.StudyID = image.AccessionNumber = None
        image.StudyDate = image.StudyTime = None
        image.ReferringPhysicianName = None
    direction = np.asarray(images[0].ImageOrientationPatient, dtype=np.float64)
    normal = np.cross(direction[:3], direction[3:])
    images.sort(key=lambda image: float(normal @ np.asarray(image.ImagePositionPatient, dtype=np.float64)))
    return images
