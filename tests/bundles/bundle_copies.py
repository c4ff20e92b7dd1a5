"""Copies of the shipped bundles that train in a second, and the tiny cohort they train on."""

from __future__ import annotations

import json
import random
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.bundle import run
from monai.utils import set_determinism
from PIL import Image

BUNDLES = Path(__file__).resolve().parents[2] / "bundles"
SEGMENTERS = ["act_net_brain_segmentation", "act_net_cardiac_segmentation"]
CLASSIFIER = "tissue_classification"
NAMES = [*SEGMENTERS, CLASSIFIER]
SECTIONS = {"training": 2, "unlabeled": 2, "validation": 1, "test": 1}

# The students keep the size they ship with; the teachers shrink, and so do the patches.
_QUICK = {
    "batch_size": 2,
    "epoch_length": 2,
    "teacher_epochs": 1,
    "val_interval": 1,
    "patch_size": [32, 32],
    "train#trainer#max_epochs": 1,
}
QUICK: dict[str, dict[str, Any]] = {
    "act_net_brain_segmentation": {**_QUICK, "teacher_def#channels": [2, 4, 4, 4, 4]},
    "act_net_cardiac_segmentation": {**_QUICK, "patch_size": [64, 64], "teacher_def#filters": [2, 4, 4, 4, 4, 4]},
    CLASSIFIER: {
        **{key: value for key, value in _QUICK.items() if key != "patch_size"},
        "teacher_def#block_inplanes": [4, 4, 4, 4],
    },
}
METRIC = {**dict.fromkeys(SEGMENTERS, "val_mean_dice"), CLASSIFIER: "val_auc"}
WINDOW = {**dict.fromkeys(SEGMENTERS, (2, 1, 48, 32)), CLASSIFIER: (2, 3, 96, 96)}


@dataclass(frozen=True)
class Copy:
    """A copy of a shipped bundle that a test may change."""

    name: str
    root: Path
    cohort: Path

    def configs(self, *names: str) -> Any:
        """Configuration files as MONAI's commands take them."""
        files = [str(self.root / "configs" / f"{name}.json") for name in names]
        return files if len(files) > 1 else files[0]

    def overrides(self, *names: str) -> dict[str, Any]:
        """Where the data is and, for training configurations, what makes training short."""
        if names[0] == "inference":
            return {"bundle_root": str(self.root), "dataset_dir": str(self.cohort / "images")}
        return {**QUICK[self.name], "bundle_root": str(self.root), "dataset_dir": str(self.cohort)}

    @property
    def test_image(self) -> Path:
        """The first image of the section `test`."""
        return self.cohort / "images" / ("test_0.png" if self.name == CLASSIFIER else "test_0.nii.gz")

    def run(self, *names: str, **further: Any) -> None:
        """Run configurations of this bundle in this process, as `python -m monai.bundle run` would."""
        path, generators = list(sys.path), (torch.get_rng_state(), np.random.get_state(), random.getstate())
        try:
            run(config_file=self.configs(*names), logging_file=False, **{**self.overrides(*names), **further})
        finally:
            sys.path[:] = path  # MONAI adds the bundle
            set_determinism(None)
            torch.set_rng_state(generators[0])
            np.random.set_state(generators[1])
            random.setstate(generators[2])


def copy_of(name: str, folder: Path, cohorts: Path) -> Copy:
    """Copy a shipped bundle, as a user with no right to write into the installation would, without its weights.

    Args:
        name: of the bundle.
        folder: where the copy goes.
        cohorts: a folder with `volumes` and `tiles`.
    """
    root = Path(shutil.copytree(BUNDLES / name, folder / name, ignore=shutil.ignore_patterns("models")))
    metadata = root / "configs" / "metadata.json"
    content = json.loads(metadata.read_text())
    content.pop("weights_sha256", None)
    metadata.write_text(json.dumps(content))
    return Copy(name, root, cohorts / ("tiles" if name == CLASSIFIER else "volumes"))


def write_tiles(root: Path) -> Path:
    """Write a few tiles of two classes with a datalist; returns their folder."""
    datalist: dict[str, Any] = {"name": "tiny tiles", "modality": "H&E", "labels": {"0": "normal", "1": "tumor"}}
    (root / "images").mkdir()
    for section, count in SECTIONS.items():
        datalist[section] = []
        for number in range(2 * count):
            name = f"{section}_{number}"
            source = np.random.default_rng(sum(name.encode()))
            pixels = source.normal((190, 140, 190) if number % 2 else (220, 170, 200), 20, (96, 96, 3))
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / "images" / f"{name}.png")
            entry: dict[str, Any] = {"image": f"images/{name}.png", "patient": name}
            datalist[section].append(entry if section == "unlabeled" else {**entry, "label": number % 2})
    (root / "datalist.json").write_text(json.dumps(datalist))
    return root


def write_cohort(root: Path) -> Path:
    """Write a few patients with a datalist; returns their folder."""
    datalist: dict[str, Any] = {
        "name": "tiny",
        "modality": "MR",
        "labels": {"0": "background", "1": "outer", "2": "middle", "3": "inner"},
    }
    for section, count in SECTIONS.items():
        datalist[section] = [_write_patient(root, f"{section}_{n}", section != "unlabeled") for n in range(count)]
    (root / "datalist.json").write_text(json.dumps(datalist))
    return root


def _write_patient(root: Path, patient: str, labeled: bool) -> dict[str, str]:
    random_numbers = np.random.default_rng(sum(patient.encode()))
    affine = np.array([[-2.0, 0, 0, 40], [0, 2.0, 0, -50], [0, 0, 6.0, 10], [0, 0, 0, 1]])
    center = np.array([20, 24, 2.0])[:, None, None, None] + random_numbers.uniform(-2, 2, (3, 1, 1, 1))
    scale = np.array([1, 1, 4.0])[:, None, None, None]
    radius = np.sqrt(((np.indices((40, 48, 4)) - center) ** 2 * scale).sum(0))
    label = (radius < 16).astype(np.uint8) + (radius < 11) + (radius < 6)
    image = (label * 90 + random_numbers.normal(100, 15, label.shape)).astype(np.int16)
    entry = {"image": f"images/{patient}.nii.gz", "patient": patient}
    if labeled:
        entry["label"] = f"labels/{patient}.nii.gz"
    for key, array in (("image", image), ("label", label)):
        if key in entry:
            (root / entry[key]).parent.mkdir(exist_ok=True)
            nib.save(nib.Nifti1Image(array, affine), root / entry[key])
    return entry
