"""The CMEDL bundle: every architecture with every translator by configuration, and one short training."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from bundle_copies import BUNDLES, Copy, copy_of
from monai.bundle import ConfigParser

from medkd.deploy.inference_config import inference_config
from medkd.deploy.trust import list_code
from medkd.errors import InputError
from medkd.methods.cmedl import CMEDL

pytestmark = pytest.mark.filterwarnings("ignore")

NAME = "cmedl_ct_tumor_segmentation"
CONFIGS = BUNDLES / NAME / "configs"
QUICK: dict[str, Any] = {
    "batch_size": 2,
    "widths": [2, 4, 4, 4, 4],
    "i2i_width": 2,
    "i2i_blocks": 1,
    "vgg_layers": ["conv1_1"],
    "spacing_mm": [2.0, 2.0, -1],
    "patch_size": [32, 32],
    "epoch_length": 2,
    "val_interval": 1,
    "train#trainer#max_epochs": 1,
}


@pytest.fixture(scope="module")
def cohort(tmp_path_factory) -> Path:
    """Three tiny patients in CT, two in MR; none in both."""
    root = tmp_path_factory.mktemp("two_modalities")
    sections = {"training": ["CT", "CT", "MR_T1", "MR_T1"], "validation": ["CT"], "test": ["CT"]}
    datalist: dict[str, Any] = {"name": "tiny", "modality": "CT, MR", "labels": {"0": "background", "1": "tumor"}}
    for section, domains in sections.items():
        datalist[section] = []
        for number, domain in enumerate(domains):
            patient = f"{section}_{number}"
            drawn = np.random.default_rng(sum(patient.encode()))
            label = (((np.indices((40, 36, 3)) - np.array([20, 18, 1]).reshape(3, 1, 1, 1)) ** 2).sum(0) < 60) * 1
            image = label * (120 if domain == "CT" else 500) + drawn.normal(0, 30, label.shape)
            affine = np.diag([2.0, 2.0, 4.0, 1.0])
            for kind, array in (("image", image.astype(np.int16)), ("label", label.astype(np.uint8))):
                nib.save(nib.Nifti1Image(array, affine), root / f"{patient}_{kind}.nii.gz")
            datalist[section].append(
                {
                    "image": f"{patient}_image.nii.gz",
                    "label": f"{patient}_label.nii.gz",
                    "patient": patient,
                    "domain": domain,
                }
            )
    (root / "datalist.json").write_text(json.dumps(datalist))
    return root


def configured(cohort: Path, *overlays: str, **further: Any) -> ConfigParser:
    parser = ConfigParser()
    parser.read_config([str(CONFIGS / f"{name}.json") for name in ("train", *overlays)])
    for key, value in {**QUICK, "bundle_root": str(BUNDLES / NAME), "dataset_dir": str(cohort), **further}.items():
        parser[key] = value
    return parser


@pytest.mark.parametrize(
    ("network", "translator"), itertools.product(("BilinearUNet", "DenseFCN", "MRRN"), ("CycleGAN", "UNIT"))
)
def test_every_architecture_goes_with_every_translator(cohort, network, translator):
    small = {"DenseFCN": {"growth": 2, "first_width": 4}, "MRRN": {"stream_width": 2, "widths": [2, 4, 4, 4]}}
    overlays = [*({"DenseFCN": ["dense_fcn"], "MRRN": ["mrrn"]}.get(network, [])), *(["unit"] * (translator == "UNIT"))]
    further = {f"{role}#{k}": v for role in ("network_def", "teacher_def") for k, v in small.get(network, {}).items()}
    parser = configured(cohort, *overlays, **further)
    method = parser.get_parsed_content("train#method")
    assert isinstance(method, CMEDL)
    assert type(method.student).__name__ == type(method.teacher).__name__ == network
    assert type(method.i2i).__name__ == translator
    assert method.student_layers == method.student.hint_layers
    assert len(method.student_layers) == 2
    assert parser.get_parsed_content("network_def") is method.deployed


def test_the_shipped_networks_are_the_papers():
    parser = ConfigParser()
    parser.read_config(str(CONFIGS / "train.json"))
    parser["labels"] = {"0": "background", "1": "tumor"}
    with torch.device("meta"):
        sizes = {
            name: sum(p.numel() for p in parser.get_parsed_content(name).parameters())
            for name in ("network_def", "teacher_def")
        }
    assert sizes == {"network_def": 13_394_242, "teacher_def": 13_394_242}


@pytest.mark.parametrize(("overlay", "student", "teacher"), [(None, "CT", "MR_T1"), ("weak_teacher", "MR_T1", "CT")])
def test_the_overlay_decides_who_teaches(cohort, overlay, student, teacher):
    parser = configured(cohort, *([overlay] if overlay else []))
    for name, domain in (("dataset", student), ("teacher_dataset", teacher)):
        assert {item["domain"] for item in parser.get_parsed_content(f"train#{name}#data")} == {domain}
    own, other = (parser.get_parsed_content(name)[-1] for name in ("preprocessing", "teacher_preprocessing"))
    kinds = {"CT": "ScaleIntensityRanged", "MR_T1": "ScaleIntensityRangePercentilesd"}
    assert (type(own).__name__, type(other).__name__) == (kinds[student], kinds[teacher])


def test_a_modality_without_labels_is_named(cohort, tmp_path):
    datalist = json.loads((cohort / "datalist.json").read_text())
    mr = [entry for entry in datalist["training"] if entry["domain"] == "MR_T1"]
    datalist["training"] = [entry for entry in datalist["training"] if entry["domain"] == "CT"]
    datalist["unlabeled"] = [{**entry, "label": None} for entry in mr]
    (tmp_path / "datalist.json").write_text(json.dumps(datalist))
    parser = configured(cohort, datalist=str(tmp_path / "datalist.json"))
    with pytest.raises(RuntimeError) as caught:
        parser.get_parsed_content("train#teacher_dataset#data")
    assert isinstance(caught.value.__cause__, InputError)
    assert "no training case of 'MR_T1' has a label" in str(caught.value.__cause__)


def test_a_patient_in_both_modalities_is_refused(cohort, tmp_path):
    datalist = json.loads((cohort / "datalist.json").read_text())
    datalist["training"][-1]["patient"] = datalist["training"][0]["patient"]
    (tmp_path / "datalist.json").write_text(json.dumps(datalist))
    with pytest.raises(RuntimeError) as caught:
        configured(cohort, datalist=str(tmp_path / "datalist.json")).get_parsed_content("cases")
    assert isinstance(caught.value.__cause__, InputError)


def test_inference_is_derived_from_training():
    train = json.loads((CONFIGS / "train.json").read_text())
    shipped = json.loads((CONFIGS / "inference.json").read_text())
    assert inference_config({**train, "labels": shipped["labels"]}) == shipped


def test_the_bundle_needs_no_trust():
    assert [code for code in list_code(BUNDLES / NAME) if code.problem] == []


@dataclass(frozen=True)
class QuickCopy(Copy):
    """A copy of the bundle that trains in seconds."""

    def overrides(self, *names: str) -> dict[str, Any]:
        """Short for training; the same window and network for inference."""
        common = {"bundle_root": str(self.root), "dataset_dir": str(self.cohort)}
        if names[0] == "inference":
            return {**{key: QUICK[key] for key in ("widths", "spacing_mm", "patch_size")}, **common}
        return {**QUICK, **common}


def test_it_trains_and_the_student_segments_alone(cohort, tmp_path):
    copy = QuickCopy(NAME, copy_of(NAME, tmp_path, cohort).root, cohort)
    copy.run("train")
    weights = torch.load(copy.root / "models" / "model.pt", weights_only=True)
    assert not [name for name in weights if name.startswith(("teacher", "i2i"))]
    copy.run("inference", output_dir=str(tmp_path / "out"), datalist=[str(cohort / "test_0_image.nii.gz")])
    made = nib.load(tmp_path / "out" / "test_0_image_seg.nii.gz")
    assert made.shape == (40, 36, 3)
    assert np.allclose(made.affine, np.diag([2.0, 2.0, 4.0, 1.0]))
