"""`data prepare`: each known layout, built here as its provider lays it out, becomes a split datalist."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from medkd.data.cards import Card, list_cards, load_card
from medkd.data.datalists import Datalist, read_datalist, write_datalist
from medkd.data.prepare import prepare_dataset
from medkd.errors import ConfigError, InputError

GROUPS = ("DCM", "HCM", "MINF", "NOR", "RV")


def volume(path: Path, shape: tuple[int, ...] = (3, 4, 2)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(np.zeros(shape, np.uint8), np.eye(4)), path)


def acdc_patient(folder: Path, number: int, *, labels: bool = True, frames: int = 8) -> None:
    name = f"patient{number:03}"
    end_systole = 3 + number % 3
    for frame in (1, end_systole):
        volume(folder / name / f"{name}_frame{frame:02}.nii.gz")
        if labels:
            volume(folder / name / f"{name}_frame{frame:02}_gt.nii.gz")
    volume(folder / name / f"{name}_4d.nii.gz", (3, 4, 2, frames))
    (folder / name / "Info.cfg").write_text(
        f"ED: 1\nES: {end_systole}\nGroup: {GROUPS[number % 5]}\nHeight: 180.0\nNbFrame: {frames}\nWeight: 70.0\n"
    )


@pytest.fixture(scope="module")
def acdc(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole of ACDC in small: 100 training and 10 of the 50 testing patients."""
    root = tmp_path_factory.mktemp("acdc")
    for number in range(1, 101):
        acdc_patient(root / "database" / "training", number)
    for number in range(101, 111):
        acdc_patient(root / "database" / "testing", number)
    return root


def msd(root: Path, card: Card, *, labelled: int = 20, unlabelled: int = 4, **description: Any) -> Path:
    stem = card.patient_key.split("_(")[0] if card.patient_key else ""
    names = [f"{stem}_{number:03}.nii.gz" for number in range(1, labelled + unlabelled + 1)]
    for number, name in enumerate(names):
        volume(root / ("imagesTr" if number < labelled else "imagesTs") / name)
        volume(root / ("imagesTr" if number < labelled else "imagesTs") / f"._{name}")  # macOS leaves these in the tar
        if number < labelled:
            volume(root / "labelsTr" / name)
    content = {
        "name": card.name,
        "modality": {"0": "MRI"},
        "labels": {str(value): name for value, name in card.labels.items()},
        "numTraining": labelled,
        "numTest": unlabelled,
        "training": [{"image": f"./imagesTr/{n}", "label": f"./labelsTr/{n}"} for n in names[:labelled]],
        "test": [f"./imagesTs/{n}" for n in names[labelled:]],
    } | description
    (root / "dataset.json").write_text(json.dumps(content))
    return root


def sarcoma(root: Path, patients: int = 10) -> Path:
    for number in range(1, patients + 1):
        for modality, shape in (("CT", (4, 4, 3)), ("MR_T1", (3, 3, 2))):
            for kind in ("image", "mask"):
                volume(root / f"STS_{number:03}" / f"{modality}_{kind}.nii.gz", shape)
    return root


def sizes(datalist: Datalist) -> dict[str, int]:
    return {section: len(patients) for section, patients in datalist.patients.items() if patients}


def test_a_layout_is_called_tested_only_if_tests_build_it() -> None:
    tested = {card.name for card in list_cards() if card.layout_tested}
    segmented = {"acdc", "msd_hippocampus", "msd_spleen", "msd_lung", "msd_heart", "ibsi_sts", "mm_whs", "chaos"}
    assert tested == {*segmented, "idrid"}


def test_acdc_is_tested_on_its_testing_folder(acdc: Path, tmp_path: Path) -> None:
    datalist = prepare_dataset(load_card("acdc"), acdc)
    assert sizes(datalist) == {"training": 90, "validation": 10, "test": 10}
    assert {case.patient for case in datalist.test} == {f"patient{n}" for n in range(101, 111)}
    assert len(datalist.training) == 180
    first = next(case for case in datalist.training if case.model_extra and case.model_extra["phase"] == "ES")
    assert first.label == first.image.replace(".nii.gz", "_gt.nii.gz")
    assert Counter(case.model_extra["group"] for case in datalist.validation if case.model_extra) == {
        group: 4 for group in GROUPS
    }
    assert datalist.label_names[1] == "right ventricle"
    write_datalist(datalist, acdc / "list.json")
    assert read_datalist(acdc / "list.json").sha256 == datalist.sha256


def test_acdc_labels_a_few_patients_of_every_group(acdc: Path) -> None:
    datalist = prepare_dataset(load_card("acdc"), acdc, labeled=5, seed=3)
    assert sizes(datalist) == {"training": 5, "unlabeled": 85, "validation": 10, "test": 10}
    assert {case.model_extra["group"] for case in datalist.training if case.model_extra} == set(GROUPS)
    assert all(case.label is None for case in datalist.unlabeled)


def test_acdc_split_as_published_has_its_seven_labelled_patients(acdc: Path) -> None:
    card = load_card("acdc")
    datalist = prepare_dataset(card, acdc, split="published", labeled=7, cine_frames=2)
    assert card.published_split is not None
    assert datalist.patients["training"] == set(card.published_split.labeled)
    assert datalist.patients["validation"] == set(card.published_split.validation)
    assert datalist.patients["test"] == set(card.published_split.test)
    assert datalist.patients["unlabeled"] == set(card.published_split.training)
    assert sizes(prepare_dataset(card, acdc, split="published", labeled=14)) == {
        "training": 14,
        "unlabeled": 56,
        "validation": 10,
        "test": 20,
    }


def test_acdc_without_a_testing_folder_is_split_by_group(tmp_path: Path) -> None:
    for number in range(1, 21):
        acdc_patient(tmp_path, number)
    datalist = prepare_dataset(load_card("acdc"), tmp_path, cine_frames="all")
    assert sizes(datalist) == {"training": 14, "unlabeled": 14, "validation": 2, "test": 4}
    assert datalist.training[0].image.startswith("patient0")
    cine = [case for case in datalist.unlabeled if case.patient == datalist.training[0].patient]
    end_systole = 3 + int(cine[0].patient[-3:]) % 3
    assert [case.frame for case in cine] == [k for k in range(8) if k not in (0, end_systole - 1)]
    assert len([c for c in prepare_dataset(load_card("acdc"), tmp_path, cine_frames=3).unlabeled]) == 14 * 3
    assert not prepare_dataset(load_card("acdc"), tmp_path).unlabeled


def test_acdc_prepared_twice_is_the_same_and_other_seeds_differ(acdc: Path) -> None:
    hashes = [prepare_dataset(load_card("acdc"), acdc, labeled=7, seed=seed).sha256 for seed in (1, 1, 2)]
    assert hashes[0] == hashes[1] != hashes[2]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: (p / "Info.cfg").unlink(), "Info.cfg: is missing"),
        (lambda p: (p / "Info.cfg").write_text("ED: 1\n"), r"says ES: \(nothing\)"),
        (lambda p: (p / "Info.cfg").write_text("ED: 0\nES: 4\n"), "says ED: 0"),
        (lambda p: (p / "Info.cfg").write_bytes(b"\xff\xfe\x00"), "Info.cfg: is missing or unreadable"),
        (lambda p: (p / "patient001_frame01.nii.gz").unlink(), "patient001_frame01.nii.gz: does not exist"),
        (lambda p: (p / "patient001_frame01_gt.nii.gz").unlink(), "has no label"),
        (lambda p: volume(p / "patient001_frame01_gt.nii.gz", (3, 4, 1)), r"_gt.nii.gz: has the shape \(3, 4, 1\)"),
        (lambda p: (p / "patient001_frame01.nii.gz").write_bytes(b"<html>"), "frame01.nii.gz: cannot be read"),
        (lambda p: (p / "patient001_4d.nii.gz").unlink(), "patient001_4d.nii.gz: does not exist"),
        (lambda p: volume(p / "patient001_4d.nii.gz", (3, 4, 2, 2)), "without the frames that Info.cfg names"),
        (lambda p: volume(p / "patient001_4d.nii.gz", (3, 4, 2)), "without the frames that Info.cfg names"),
    ],
)  # fmt: skip
def test_a_damaged_acdc_folder_is_refused_by_name(tmp_path: Path, damage: Any, message: str) -> None:
    for number in range(1, 6):
        acdc_patient(tmp_path / "training", number)
    damage(tmp_path / "training" / "patient001")
    with pytest.raises(InputError, match=message):
        prepare_dataset(load_card("acdc"), tmp_path, cine_frames="all")


def test_testing_frames_without_labels_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for number in range(1, 11):
        acdc_patient(tmp_path / "training", number)
    acdc_patient(tmp_path / "testing", 101, labels=False)
    datalist = prepare_dataset(load_card("acdc"), tmp_path)
    assert sizes(datalist) == {"training": 7, "validation": 1, "test": 2}
    assert "2 testing frames have no label" in caplog.text
    assert "found 10 training patients, the card says 100" in caplog.text


@pytest.mark.parametrize("name", ["msd_hippocampus", "msd_spleen", "msd_lung", "msd_heart"])
def test_decathlon_tasks_are_split_by_patient(tmp_path: Path, name: str) -> None:
    card = load_card(name)
    unpacked = tmp_path / str(card.files[0].unpacks_to)
    unpacked.mkdir()
    datalist = prepare_dataset(card, msd(unpacked, card).parent, labeled=3)
    assert sizes(datalist) == {"training": 3, "unlabeled": 15, "validation": 2, "test": 4}
    assert datalist.training[0].image.startswith(f"{card.files[0].unpacks_to}/imagesTr/")
    assert sum("imagesTs" in case.image for case in datalist.unlabeled) == 4
    assert all(case.patient.isdigit() for case in datalist.test)
    assert sizes(prepare_dataset(card, unpacked, labeled=3)) == sizes(datalist)


@pytest.mark.parametrize(
    ("description", "message"),
    [
        ({"labels": {"0": "background", "1": "liver"}}, r"dataset.json: has the labels \[0, 1\], the card \[0, 1, 2\]"),
        ({"training": [{"image": "./imagesTr/hippocampus_001.nii.gz"}]}, "not a list of images"),
        ({"training": "x"}, "not a list of images"),
        ({"training": []}, "lists no labelled image"),
        ({"training": [{"image": "imagesTr/hippocampus_900.nii.gz", "label": "l"}]}, "does not exist"),
        ({"training": [{"image": "imagesTr/other_1.nii.gz", "label": "l"}]}, "is not named as the card says"),
        ({"test": ["../../hippocampus_1.nii.gz"]}, "lies outside"),
        ({"test": ["/etc/hippocampus_1"]}, "lies outside"),
    ],
)
def test_a_wrong_dataset_json_is_refused(tmp_path: Path, description: dict[str, Any], message: str) -> None:
    card = load_card("msd_hippocampus")
    with pytest.raises(InputError, match=message):
        prepare_dataset(card, msd(tmp_path, card, **description))


def test_four_dimensional_images_of_a_3d_task_are_refused(tmp_path: Path) -> None:
    card = load_card("msd_hippocampus")
    msd(tmp_path, card)
    volume(tmp_path / "imagesTr" / "hippocampus_001.nii.gz", (3, 4, 2, 4))
    with pytest.raises(InputError, match=r"hippocampus_001.nii.gz: has 4 dimensions"):
        prepare_dataset(card, tmp_path)


def test_sarcoma_patients_keep_both_modalities_on_one_side(tmp_path: Path) -> None:
    datalist = prepare_dataset(load_card("ibsi_sts"), sarcoma(tmp_path))
    assert sizes(datalist) == {"training": 7, "validation": 1, "test": 2}
    assert Counter(case.domain for case in datalist.test) == {"CT": 2, "MR_T1": 2}
    one = prepare_dataset(load_card("ibsi_sts"), tmp_path, modality="MR_T1", labeled=2)
    assert {case.domain for case in (*one.training, *one.unlabeled, *one.test)} == {"MR_T1"}
    assert sizes(one) == {"training": 2, "unlabeled": 5, "validation": 1, "test": 2}


def test_a_sarcoma_image_without_mask_is_refused(tmp_path: Path) -> None:
    (sarcoma(tmp_path) / "STS_004" / "CT_mask.nii.gz").unlink()
    with pytest.raises(InputError, match=r"STS_004/CT_mask.nii.gz does not exist"):
        prepare_dataset(load_card("ibsi_sts"), tmp_path)


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("kvasir_seg", {}, ConfigError, "has no layout that medkd prepares"),
        ("msd_heart", {"cine_frames": "all"}, ConfigError, "has no cine"),
        ("acdc", {"modality": "CT"}, ConfigError, "has one modality"),
        ("ibsi_sts", {"split": "official"}, ConfigError, "no patients set apart"),
        ("ibsi_sts", {"split": "published"}, ConfigError, "no split of ibsi_sts is published"),
        ("ibsi_sts", {"modality": "PET"}, ConfigError, "no image of PET; choose from CT, MR_T1"),
        ("ibsi_sts", {"labeled": 99}, InputError, "not 99"),
        ("acdc", {}, InputError, "holds no folder like training/patient001"),
        ("msd_heart", {}, InputError, "holds neither dataset.json"),
    ],
)
def test_what_a_dataset_does_not_offer_is_refused(
    tmp_path: Path, name: str, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    sarcoma(tmp_path, 5)
    with pytest.raises(error, match=message):
        prepare_dataset(load_card(name), tmp_path, **options)


def test_a_missing_root_says_how_to_get_the_data(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a folder; Follow"):
        prepare_dataset(load_card("acdc"), tmp_path / "none")


def test_a_part_of_acdc_has_not_the_published_split(tmp_path: Path) -> None:
    for number in range(1, 6):
        acdc_patient(tmp_path / "training", number)
    with pytest.raises(InputError, match="lacks 95 patients of the published split"):
        prepare_dataset(load_card("acdc"), tmp_path, split="published")


def test_the_real_hippocampus_folder_is_prepared(real_data: Path) -> None:
    datalist = prepare_dataset(load_card("msd_hippocampus"), real_data / "msd_hippocampus", labeled=10)
    assert sizes(datalist) == {"training": 10, "unlabeled": 130, "validation": 20, "test": 40}


def test_the_real_sarcoma_folder_is_prepared(real_data: Path) -> None:
    datalist = prepare_dataset(load_card("ibsi_sts"), real_data / "ibsi_sts", labeled=4)
    assert sizes(datalist) == {"training": 4, "unlabeled": 13, "validation": 2, "test": 5}
