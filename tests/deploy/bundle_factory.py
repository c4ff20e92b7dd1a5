"""Small bundles and volumes for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.bundle import ConfigParser
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from medkd.deploy.bundle import write_bundle
from medkd.deploy.metadata import segmentation_metadata

LABELS = {"0": "background", "1": "left", "2": "right"}

# The shape of train.json that inference.json is derived from.
TRAIN_CONFIG: dict[str, Any] = {
    "imports": ["$from medkd.data.volumes import VolumeReader"],
    "labels": LABELS,
    "spacing_mm": [1.5, 1.5, 2.0],
    "network_def": {
        "_target_": "monai.networks.nets.UNet",
        "spatial_dims": 3,
        "in_channels": 1,
        "out_channels": 3,
        "channels": [4, 8],
        "strides": [2],
        "norm": "INSTANCE",
    },
    "preprocessing": [
        {
            "_target_": "monai.transforms.LoadImaged",
            "keys": ["image", "label"],
            "reader": "$VolumeReader",
            "ensure_channel_first": True,
        },
        {"_target_": "monai.transforms.Orientationd", "keys": ["image", "label"], "axcodes": "RAS", "labels": None},
        {
            "_target_": "monai.transforms.Spacingd",
            "keys": ["image", "label"],
            "pixdim": "@spacing_mm",
            "mode": ["bilinear", "nearest"],
        },
        {"_target_": "monai.transforms.CropForegroundd", "keys": ["image", "label"], "source_key": "image"},
        {"_target_": "monai.transforms.NormalizeIntensityd", "keys": "image"},
        {"_target_": "monai.transforms.CastToTyped", "keys": "label", "dtype": "$torch.int64"},
        {"_target_": "monai.transforms.EnsureTyped", "keys": ["image", "label"]},
    ],
    "inferer": {
        "_target_": "monai.inferers.SlidingWindowInferer",
        "roi_size": [16, 16, 16],
        "sw_batch_size": 2,
        "overlap": 0.25,
    },
}


def make_bundle(out: Path, *, seed: int = 0, train_config: dict[str, Any] | None = None, **metadata: Any) -> Path:
    """A bundle with random weights."""
    config = train_config or TRAIN_CONFIG
    torch.manual_seed(seed)
    network = ConfigParser({"network_def": config["network_def"]}).get_parsed_content("network_def")
    described = segmentation_metadata(
        name="Test bundle",
        task="Two structures",
        description="A test.",
        labels=config["labels"],
        spatial_shape=[16] * config["network_def"]["spatial_dims"],
        **metadata,
    )
    return write_bundle(out, train_config=config, weights=network.state_dict(), metadata=described, readme="# Test\n")


def write_image(path: Path, *, seed: int = 0, shape: tuple[int, ...] = (24, 20, 18), affine: Any = None) -> Path:
    """A NIfTI image of smooth blobs, oblique and anisotropic unless ``affine`` is given."""
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, size) for size in shape], indexing="ij"))
    image = np.exp(-((grid - rng.uniform(-0.3, 0.3, (len(shape),) + (1,) * len(shape))) ** 2).sum(0) * 4)
    image = (image * 200 + rng.normal(0, 5, shape)).astype(np.float32)
    if affine is None:
        angle = 0.2
        rotation = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
        affine = np.eye(4)
        affine[:3, :3] = rotation @ np.diag([-1.2, 1.0, 2.5])
        affine[:3, 3] = [12.0, -30.0, 5.0]
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(image, affine), path)
    return path


def write_dicom_series(folder: Path, *, slices: int = 12, seed: int = 0, patient: str = "DOE^JANE") -> Path:
    """A plain axial CT series of one patient, its files in no particular order."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    study, series, frame = (generate_uid() for _ in range(3))
    for number in rng.permutation(slices):
        image = Dataset()
        image.file_meta = FileMetaDataset()
        image.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        image.SOPClassUID = image.file_meta.MediaStorageSOPClassUID = CTImageStorage
        image.SOPInstanceUID = image.file_meta.MediaStorageSOPInstanceUID = generate_uid()
        image.StudyInstanceUID, image.SeriesInstanceUID, image.FrameOfReferenceUID = study, series, frame
        image.PatientName, image.PatientID, image.PatientBirthDate, image.PatientSex = patient, "4711", "19700101", "F"
        image.StudyDate, image.StudyTime, image.StudyID, image.AccessionNumber = "20200102", "010203", "S1", "A1"
        image.InstitutionName, image.ReferringPhysicianName = "General Hospital", "WHO^DOCTOR"
        image.Modality, image.SeriesNumber, image.InstanceNumber = "CT", 1, int(number) + 1
        image.PositionReferenceIndicator = ""
        image.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
        image.ImagePositionPatient = [-10.0, -20.0, 30.0 + 2.5 * int(number)]
        image.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        image.PixelSpacing, image.SliceThickness = [1.5, 1.5], 2.5
        image.Rows, image.Columns, image.SamplesPerPixel = 20, 24, 1
        image.PhotometricInterpretation = "MONOCHROME2"
        image.BitsAllocated, image.BitsStored, image.HighBit, image.PixelRepresentation = 16, 16, 15, 1
        image.RescaleSlope, image.RescaleIntercept = 1, -1024
        pixels = rng.integers(900, 1200, (20, 24))
        pixels[5:15, 6:18] += 40 * int(number)
        image.PixelData = pixels.astype("<i2").tobytes()
        image.save_as(folder / f"IM{int(number):04d}.dcm", enforce_file_format=True)
    return folder
