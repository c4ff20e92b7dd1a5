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
TRANSLATOR = "cyclegan_mr_ct_translation"
CMEDL, LE_UDA = "cmedl_ct_tumor_segmentation", "le_uda_cardiac_segmentation"
ACROSS = [CMEDL, TRANSLATOR, LE_UDA]  # what trains on two domains
NAMES = sorted([*SEGMENTERS, CLASSIFIER, *ACROSS])
HISTOGAN, SSL_KD = "histogan_histopathology_classification", "ssl_kd_retinopathy_classification"
EVERY_NAME = sorted([*NAMES, HISTOGAN, SSL_KD])  # the stages of these two have test files of their own
SECTIONS = {"training": 2, "unlabeled": 2, "validation": 1, "test": 1}
DOMAINS = ("CT", "MR_T1")

# The students keep the size they ship with, unless SMALL says otherwise; the teachers shrink, and so do the patches.
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
    TRANSLATOR: {
        **{key: value for key, value in _QUICK.items() if key != "teacher_epochs"},
        "patch_size": [64, 64],  # UNIT's critics of three scales need as much
        "source_domain": "MR_T1",
    },
    CMEDL: {
        **{key: value for key, value in _QUICK.items() if key != "teacher_epochs"},
        "patch_size": [64, 64],
        "vgg_layers": ["conv1_1"],
    },
    LE_UDA: {
        **{key: value for key, value in _QUICK.items() if key != "teacher_epochs"},
        "translator_epochs": 1,
        "source_domain": "MR_T1",
        "target_domain": "CT",
    },
}
# Sizes that all configurations of a copy get, where the network that ships is too large to train in a second.
SMALL: dict[str, dict[str, Any]] = {
    TRANSLATOR: {"generator_width": 2, "generator_blocks": 1, "critic_width": 2},
    CMEDL: {"widths": [2, 4, 4, 4, 4], "i2i_width": 2, "i2i_blocks": 1},
    LE_UDA: {"widths": [2, 4, 4, 4, 4], "generator_width": 2, "generator_blocks": 1, "critic_width": 2},
}
METRIC = {name: "val_mean_dice" for name in NAMES} | {CLASSIFIER: "val_auc", TRANSLATOR: "negative_kid"}
WINDOW = {name: (2, 1, 48, 32) for name in NAMES} | {CLASSIFIER: (2, 3, 96, 96)}
# The overlay that trains something else, where a bundle has one for all to try.
OVERLAY = {name: "supervised" for name in NAMES} | {TRANSLATOR: "unit", LE_UDA: "mt_uda"}
# Where the parts of the network that ships lie in a checkpoint's method.
SHIPPED: dict[str, dict[str, str]] = {name: {"": "student."} for name in NAMES} | {
    TRANSLATOR: {"": "ema.to_target."},
    LE_UDA: {"generator.": "generator.", "segmenter.": "student."},
}
TUMOR = {"0": "background", "1": "tumor"}
HEART = {"0": "background", "1": "myocardium", "2": "left atrium", "3": "left ventricle", "4": "aorta"}


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
        """The first image of the section `test` that the bundle is for."""
        name = {CLASSIFIER: "test_0.png", TRANSLATOR: "test_1.nii.gz"}.get(self.name, "test_0.nii.gz")
        return self.cohort / "images" / name

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
        cohorts: a folder with `volumes`, `tiles`, `domains` and `hearts`.
    """
    root = Path(shutil.copytree(BUNDLES / name, folder / name, ignore=shutil.ignore_patterns("models")))
    metadata = root / "configs" / "metadata.json"
    content = json.loads(metadata.read_text())
    content.pop("weights_sha256", None)
    metadata.write_text(json.dumps(content))
    for file in ("train", "inference") if name in SMALL else ():
        config = root / "configs" / f"{file}.json"
        content = json.loads(config.read_text())
        content.update({key: value for key, value in SMALL[name].items() if key in content})
        config.write_text(json.dumps(content))
    special = {CLASSIFIER: "tiles", CMEDL: "domains", TRANSLATOR: "domains", LE_UDA: "hearts"}
    return Copy(name, root, cohorts / special.get(name, "volumes"))


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


def write_domains(root: Path, labels: dict[str, str] = TUMOR) -> Path:
    """Write patients of two domains, each in one of them, with a datalist; returns their folder."""
    datalist: dict[str, Any] = {"name": "tiny domains", "modality": "CT, MR", "labels": labels}
    classes = min(len(labels) - 1, 3)
    for section, count in SECTIONS.items():
        datalist[section] = []
        for number in range(2 * count):
            entry: dict[str, Any] = _write_patient(root, f"{section}_{number}", section != "unlabeled", classes=classes)
            datalist[section].append({**entry, "domain": DOMAINS[number % 2]})
    (root / "datalist.json").write_text(json.dumps(datalist))
    return root


def _write_patient(root: Path, patient: str, labeled: bool, *, classes: int = 3) -> dict[str, str]:
    random_numbers = np.random.default_rng(sum(patient.encode()))
    affine = np.array([[-2.0, 0, 0, 40], [0, 2.0, 0, -50], [0, 0, 6.0, 10], [0, 0, 0, 1]])
    center = np.array([20, 24, 2.0])[:, None, None, None] + random_numbers.uniform(-2, 2, (3, 1, 1, 1))
    scale = np.array([1, 1, 4.0])[:, None, None, None]
    radius = np.sqrt(((np.indices((40, 48, 4)) - center) ** 2 * scale).sum(0))
    label = (radius < 16).astype(np.uint8) + (radius < 11) + (radius < 6)
    label = np.minimum(label, classes)
    image = (label * 90 + random_numbers.normal(100, 15, label.shape)).astype(np.int16)
    entry = {"image": f"images/{patient}.nii.gz", "patient": patient}
    if labeled:
        entry["label"] = f"labels/{patient}.nii.gz"
    for key, array in (("image", image), ("label", label)):
        if key in entry:
            (root / entry[key]).parent.mkdir(exist_ok=True)
            nib.save(nib.Nifti1Image(array, affine), root / entry[key])
    return entry
