"""Small bundles and volumes for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.bundle import ConfigParser

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
