"""Datalists made from folders: pairing, patients, 4-D cine, nnU-Net's layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from medkd.data.datalists import Datalist, read_datalist, write_datalist
from medkd.data.make import make_datalist
from medkd.errors import ConfigError, InputError


def volume(path: Path, shape: tuple[int, ...] = (4, 5, 3), values: Any = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    array = np.zeros(shape, np.uint8) if values is None else np.resize(np.asarray(values, np.uint8), shape)
    nib.save(nib.Nifti1Image(array, np.eye(4)), path)


def images(datalist: Datalist, section: Any) -> list[tuple[str, str | None, str]]:
    return [(case.image, case.label, case.patient) for case in datalist.cases(section)]


def test_wildcards_pair_images_with_labels(tmp_path: Path) -> None:
    for patient in ("STS_001", "STS_002"):
        for modality in ("CT", "MR"):
            volume(tmp_path / patient / f"{modality}_image.nii.gz", values=range(60))
            if (patient, modality) != ("STS_002", "MR"):
                volume(tmp_path / patient / f"{modality}_mask.nii.gz", values=[0, 0, 3])
    datalist = make_datalist(
        tmp_path,
        images="*/*_image.nii.gz",
        labels="*/*_mask.nii.gz",
        patient=r"STS_(\d+)",
        domain="/(CT|MR)_",
        modality="CT, MR",
    )
    assert images(datalist, "training") == [
        ("STS_001/CT_image.nii.gz", "STS_001/CT_mask.nii.gz", "001"),
        ("STS_001/MR_image.nii.gz", "STS_001/MR_mask.nii.gz", "001"),
        ("STS_002/CT_image.nii.gz", "STS_002/CT_mask.nii.gz", "002"),
    ]
    assert images(datalist, "unlabeled") == [("STS_002/MR_image.nii.gz", None, "002")]
    assert [case.domain for case in datalist.training] == ["CT", "MR", "CT"]
    assert datalist.label_names == {0: "background", 3: "label 3"}
    write_datalist(datalist, tmp_path / "list.json")
    assert read_datalist(tmp_path / "list.json").sha256 == datalist.sha256


def test_label_files_that_match_the_image_pattern_are_not_images(tmp_path: Path) -> None:
    for name in ("p1", "p1_gt", "p2"):
        volume(tmp_path / "d" / "deep" / f"{name}.nii.gz")
    volume(tmp_path / "d" / "._p1.nii.gz")
    volume(tmp_path / ".cache" / "p9.nii.gz")
    datalist = make_datalist(
        tmp_path, images="**/*.nii.gz", labels="**/*_gt.nii.gz", patient=r"(p\d)", label_names={0: "background", 1: "x"}
    )
    assert images(datalist, "training") == [("d/deep/p1.nii.gz", "d/deep/p1_gt.nii.gz", "p1")]
    assert images(datalist, "unlabeled") == [("d/deep/p2.nii.gz", None, "p2")]


def test_without_labels_everything_is_unlabeled(tmp_path: Path) -> None:
    volume(tmp_path / "a1.nii")
    (tmp_path / "b2.png").write_bytes(b"")
    datalist = make_datalist(tmp_path, images="[a-b]?.*", patient=r"(.)\.")
    assert [case.patient for case in datalist.unlabeled] == ["1", "2"]
    assert datalist.labels == {}


def test_a_trailing_slash_finds_dicom_folders(tmp_path: Path) -> None:
    for name in ("p1", "p2"):
        (tmp_path / name / "T1").mkdir(parents=True)
        (tmp_path / name / "T1" / "0001.dcm").write_bytes(b"")
    datalist = make_datalist(tmp_path, images="*/T1/", patient="(p.)/")
    assert [case.image for case in datalist.unlabeled] == ["p1/T1", "p2/T1"]


@pytest.mark.parametrize(("frames", "expected"), [("all", list(range(6))), (3, [0, 2, 4]), (9, list(range(6)))])
def test_cine_is_split_into_frames_without_copying(tmp_path: Path, frames: Any, expected: list[int]) -> None:
    volume(tmp_path / "p1_4d.nii.gz", (4, 4, 2, 6))
    volume(tmp_path / "p2_4d.nii.gz", (4, 4, 2))
    before = sorted(path.name for path in tmp_path.iterdir())
    datalist = make_datalist(tmp_path, images="*_4d.nii.gz", patient="(p.)", frames=frames)
    cine = [case for case in datalist.unlabeled if case.patient == "p1"]
    assert [case.frame for case in cine] == expected
    assert {case.image for case in cine} == {"p1_4d.nii.gz"}
    assert [case.frame for case in datalist.unlabeled if case.patient == "p2"] == [None]
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_files_of_one_frame_keep_their_label(tmp_path: Path) -> None:
    volume(tmp_path / "p1.nii", (4, 4, 2, 1))
    volume(tmp_path / "p1_gt.nii", (4, 4, 2), values=[0, 1])
    datalist = make_datalist(tmp_path, images="p?.nii", labels="p?_gt.nii", patient="(p.)")
    assert datalist.training[0].frame == 0


def test_held_out_fractions_are_of_patients(tmp_path: Path) -> None:
    for p in range(10):
        for scan in "ab":
            volume(tmp_path / f"i/p{p}_{scan}.nii")
            volume(tmp_path / f"l/p{p}_{scan}.nii", values=[0, 1])
    datalist = make_datalist(tmp_path, images="i/*.nii", labels="l/*.nii", patient=r"(p\d)", validation=0.2, test=0.3)
    assert {section: len(who) for section, who in datalist.patients.items() if who} == {
        "training": 5,
        "validation": 2,
        "test": 3,
    }


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"images": "*.nii", "patient": "("}, ConfigError, "--patient: .* is not a regular expression"),
        ({"images": "*.nii", "patient": "p"}, ConfigError, "--patient: 'p' has 0 groups"),
        ({"images": "*.nii", "patient": "(p)(1)"}, ConfigError, "has 2 groups"),
        ({"images": "p*.nii", "patient": "(q)"}, InputError, "p1.nii: --patient '.q.' finds nothing"),
        ({"images": "p*.nii", "patient": "(q?)"}, InputError, "p1.nii: --patient .* finds nothing"),
        ({"images": "p*.nii", "patient": "(p)", "domain": "(q)"}, InputError, "--domain"),
        ({"images": "*.mha", "patient": "(p)"}, InputError, r"no file matches --images \*.mha"),
        ({"images": "*.nii", "labels": "x*.nii", "patient": "(p)"}, InputError, "no file matches --labels"),
        ({"images": "*.nii", "labels": "p?_*.nii", "patient": "(p)"}, ConfigError, "has 2 wildcards and .* has 1"),
        ({"images": "q?.nii", "labels": "p?_gt.nii", "patient": "(p)"}, InputError, "no file matches --images"),
        ({"images": "p1*.nii", "labels": "p?_gt.nii", "patient": "(p)"}, InputError, "p1_gt.nii: is a label without"),
        ({"images": "../*.nii", "patient": "(p)"}, ConfigError, "leaves the folder"),
        ({"images": "/*.nii", "patient": "(p)"}, ConfigError, "leaves the folder"),
        ({"images": "*.nii", "patient": "(p.)", "frames": 0}, ConfigError, "0 is not a number of frames"),
        ({"images": "c*.nii", "patient": "(c)", "frames": None}, InputError, "c4.nii: has 3 frames"),
        ({"images": "c?.nii", "labels": "c?_gt.nii", "patient": "(c)"}, InputError, "has 3 frames but one label"),
        ({"images": "bad/*.nii", "patient": "(b)"}, InputError, "broken.nii: cannot be read as NIfTI"),
        ({"images": "big/*.nii", "patient": "(b)"}, InputError, "has 5 dimensions"),
        ({"patient": "(p)"}, ConfigError, "--images: is missing"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(
    tmp_path: Path, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    volume(tmp_path / "p1.nii")
    volume(tmp_path / "p1_gt.nii")
    volume(tmp_path / "c4.nii", (4, 4, 2, 3))
    volume(tmp_path / "c4_gt.nii", (4, 4, 2))
    volume(tmp_path / "big" / "b.nii", (2, 2, 2, 2, 3))
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "broken.nii").write_bytes(b"not an image")
    with pytest.raises(error, match=message):
        make_datalist(tmp_path, **options)


def test_a_missing_root_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a folder"):
        make_datalist(tmp_path / "none", images="*", patient="(.)")


def nnunet(root: Path, *, channels: int = 1, cases: int = 4, splits: Any = None, **description: Any) -> Path:
    for case in range(cases):
        for channel in range(channels):
            volume(root / "imagesTr" / f"ds_{case:03}_{channel:04}.nii.gz")
        if case:
            volume(root / "labelsTr" / f"ds_{case:03}.nii.gz", values=[0, 1])
    volume(root / "imagesTs" / f"ds_{cases:03}_0000.nii.gz")
    content = {
        "channel_names": {str(channel): f"T{channel + 1}" for channel in range(channels)},
        "labels": {"background": 0, "edema": 1},
        "numTraining": cases,
        "file_ending": ".nii.gz",
    } | description
    (root / "dataset.json").write_text(json.dumps(content))
    if splits is not None:
        (root / "splits_final.json").write_text(json.dumps(splits))
    return root


FOLDS = [{"train": ["ds_002", "ds_003"], "val": ["ds_001"]}, {"train": ["ds_001"], "val": ["ds_002", "ds_003"]}]


def test_an_nnunet_folder_needs_no_patterns(tmp_path: Path) -> None:
    datalist = make_datalist(nnunet(tmp_path, splits=FOLDS), patient=r"ds_(\d+)")
    assert images(datalist, "training") == [
        (f"imagesTr/ds_{n:03}_0000.nii.gz", f"labelsTr/ds_{n:03}.nii.gz", f"{n:03}") for n in (1, 2, 3)
    ]
    assert [case.fold for case in datalist.training] == [0, 1, 1]
    assert [case.image for case in datalist.unlabeled] == ["imagesTr/ds_000_0000.nii.gz"]
    assert [case.image for case in datalist.test] == ["imagesTs/ds_004_0000.nii.gz"]
    assert datalist.label_names == {0: "background", 1: "edema"}


def test_decathlon_labels_and_names_without_channel_are_understood(tmp_path: Path) -> None:
    root = nnunet(
        tmp_path, cases=0, labels={"0": "background", "1": "spleen"}, channel_names=None, modality={"0": "CT"}
    )
    volume(root / "imagesTr" / "spleen_0023.nii.gz")
    volume(root / "labelsTr" / "spleen_0023.nii.gz", values=[0, 1])
    datalist = make_datalist(root, patient=r"_(\d{3,})")
    assert images(datalist, "training") == [("imagesTr/spleen_0023.nii.gz", "labelsTr/spleen_0023.nii.gz", "0023")]
    assert datalist.label_names[1] == "spleen"


def test_several_channels_need_a_choice(tmp_path: Path) -> None:
    root = nnunet(tmp_path, channels=2)
    with pytest.raises(ConfigError, match="2 channels"):
        make_datalist(root, patient=r"ds_(\d+)")
    (root / "imagesTs" / "ds_004_0000.nii.gz").rename(root / "imagesTs" / "ds_004_0001.nii.gz")
    assert all("_0001." in case.image for case in make_datalist(root, patient=r"ds_(\d+)", channel=1).training)
    with pytest.raises(InputError, match="has no channel 5"):
        make_datalist(root, patient=r"ds_(\d+)", channel=5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": {"background": 0, "whole": [1, 2]}}, "a region"),
        ({"labels": {"background": 0, "ignore": 2}}, "ignore label"),
        ({"labels": {"background": 0, "x": 0}}, "taken"),
        ({"labels": {}}, 'has no "labels"'),
        ({"file_ending": "nii"}, "file_ending"),
        ({"file_ending": ".mha"}, "holds no"),
        ({"splits": {"train": []}}, "is not a list of"),
        ({"splits": [{"train": [], "val": ["ds_009"]}]}, "which imagesTr lacks"),
        ({"splits": [{"val": ["ds_001"]}, {"val": ["ds_001"]}]}, "validated on in two folds"),
    ],
)
def test_broken_nnunet_folders_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_datalist(nnunet(tmp_path, **change), patient=r"ds_(\d+)")


def test_nnunet_folds_that_split_a_patient_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"splits_final.json: patient ds is in folds 0 and 1 \(leakage\)"):
        make_datalist(nnunet(tmp_path, splits=FOLDS), patient="(ds)")


def test_a_damaged_dataset_json_is_refused(tmp_path: Path) -> None:
    root = nnunet(tmp_path)
    for text in ("{", "[]"):
        (root / "dataset.json").write_text(text)
        with pytest.raises(InputError, match=r"dataset\.json"):
            make_datalist(root, patient=r"ds_(\d+)")


def test_the_real_sarcoma_folder_is_listed(real_data: Path) -> None:
    datalist = make_datalist(
        real_data / "ibsi_sts",
        images="*/*_image.nii.gz",
        labels="*/*_mask.nii.gz",
        patient=r"(STS_\d+)",
        domain="/(CT|MR_T1)_",
    )
    assert len(datalist.training) == 48
    assert len(datalist.patients["training"]) == 24
    assert sorted(datalist.label_names) == [0, 1]
