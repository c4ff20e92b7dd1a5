"""IDRiD as its provider lays it out, and folders of photographs with their class in the path."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medkd.data.cards import load_card
from medkd.data.datalists import Datalist, read_datalist, write_datalist
from medkd.data.make import make_datalist
from medkd.data.prepare import prepare_dataset
from medkd.data.splits import split_datalist
from medkd.errors import ConfigError, InputError

LAYOUTS = {
    "plain": ("train", "test", "{}. IDRiD_Disease_Grading_{}_Labels.csv"),
    "provider": (
        "1. Original Images/a. Training Set", "1. Original Images/b. Testing Set",
        "2. Groundtruths/{}. IDRiD_Disease Grading_{} Labels.csv",
    ),
}  # fmt: skip


def photograph(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(256, size=(4, 4, 3), dtype=np.uint8)).save(path)


def idrid(root: Path, layout: str = "plain") -> Path:
    train, test, table = LAYOUTS[layout]
    for folder, letter, word, count in ((train, "a", "Training", 50), (test, "b", "Testing", 10)):
        lines = ["Image name,Retinopathy grade,Risk of macular edema ,,"]
        for number in range(1, count + 1):
            photograph(root / folder / f"IDRiD_{number:03}.jpg", number + 1000 * (letter == "b"))
            lines.append(f"IDRiD_{number:03},{number % 5},0,,")
        path = root / table.format(letter, word)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join([*lines, ",,,,"]))
    return root


@pytest.mark.parametrize("layout", LAYOUTS)
def test_official_split_is_kept_and_each_image_stands_for_a_patient(tmp_path, layout) -> None:
    datalist = prepare_dataset(load_card("idrid"), idrid(tmp_path, layout))
    assert [len(datalist.cases(part)) for part in ("training", "validation", "test")] == [45, 5, 10]
    assert {case.label for case in datalist.validation} == {0, 1, 2, 3, 4}
    assert len({case.patient for _, _, case in datalist.entries()}) == 60
    assert datalist.model_extra is not None
    assert datalist.model_extra["patients_known"] is False
    write_datalist(datalist, tmp_path / "list.json")
    assert (read_datalist(tmp_path / "list.json").model_extra or {})["patients_known"] is False


def test_share_of_labels_leaves_the_rest_unlabeled_and_is_nested(tmp_path) -> None:
    root, card = idrid(tmp_path), load_card("idrid")
    few, more = (prepare_dataset(card, root, labeled=share, referable_only=True) for share in (0.2, 0.4))
    assert [len(few.training), len(few.unlabeled)] == [9, 36]
    assert all(case.label is None for case in few.unlabeled)
    assert {case.image for case in few.training} < {case.image for case in more.training}
    assert len(prepare_dataset(card, root, labeled=12).training) == 12
    with pytest.raises(ConfigError, match="share"):
        prepare_dataset(card, root, labeled=1.5)


def test_referable_means_grade_two_and_above(tmp_path) -> None:
    datalist = prepare_dataset(load_card("idrid"), idrid(tmp_path), referable_only=True)
    assert datalist.label_names == {0: "not referable", 1: "referable"}
    for _, _, case in datalist.entries():
        assert case.label == int((case.model_extra or {})["grade"] >= 2)
    with pytest.raises(ConfigError, match="--referable"):
        prepare_dataset(load_card("acdc"), tmp_path, referable_only=True)


def copy(root: Path, source: str, target: str) -> None:
    (root / target).write_bytes((root / source).read_bytes())


def test_photographs_that_are_there_twice_are_left_out_and_named(tmp_path, caplog) -> None:
    root = idrid(tmp_path)
    copy(root, "test/IDRiD_004.jpg", "train/IDRiD_001.jpg")  # leaks
    copy(root, "train/IDRiD_002.jpg", "train/IDRiD_003.jpg")  # grades 2 and 3
    copy(root, "train/IDRiD_006.jpg", "train/IDRiD_011.jpg")  # both grade 1
    with caplog.at_level(logging.WARNING):
        datalist = prepare_dataset(load_card("idrid"), root)
    images = {case.image for part in ("training", "validation") for case in datalist.cases(part)}
    gone = {f"train/IDRiD_{number:03}.jpg" for number in range(1, 51)} - images
    assert gone == {f"train/IDRiD_{number:03}.jpg" for number in (1, 2, 3, 11)}
    assert len(datalist.test) == 10
    for words in ("test/IDRiD_004.jpg of the test set", "grades [2, 3]", "only the first is kept"):
        assert words in caplog.text


@pytest.mark.parametrize("fault", ["image", "table", "grade", "folder"])
def test_incomplete_idrid_is_refused_by_name(tmp_path, fault) -> None:
    root = idrid(tmp_path)
    table = root / "b. IDRiD_Disease_Grading_Testing_Labels.csv"
    if fault == "image":
        (root / "train" / "IDRiD_007.jpg").unlink()
    elif fault == "table":
        table.unlink()
    elif fault == "grade":
        table.write_text(table.read_text().replace("IDRiD_002,2", "IDRiD_002,7"))
    else:
        (root / "test").rename(root / "elsewhere")
    words = {"image": "IDRiD_007", "table": "holds no table", "grade": "grade 7 is unknown", "folder": "test"}[fault]
    with pytest.raises(InputError, match=words):
        prepare_dataset(load_card("idrid"), root)


def test_real_idrid_has_the_copies_its_card_names(real_data, caplog) -> None:
    if not (real_data / "idrid_grading").is_dir():
        pytest.skip("IDRiD not present")
    datalist = prepare_dataset(load_card("idrid"), real_data / "idrid_grading", labeled=0.1, referable_only=True)
    assert len(datalist.test) == 103
    assert sum(len(datalist.cases(part)) for part in ("training", "unlabeled", "validation")) == 405
    assert "train/IDRiD_118.jpg: the same file as test/IDRiD_064.jpg" in caplog.text


def photographs(root: Path) -> Path:
    for patient in range(6):
        for kind in ("tumor", "normal"):
            photograph(root / kind / f"p{patient}_{kind}.png", patient + 100 * (kind == "tumor"))
    photograph(root / "unknown" / "p9_x.png", 999)
    return root


def classes_of(datalist: Datalist) -> dict[str, int | str | None]:
    return {case.image: case.label for case in datalist.training}


def test_class_is_found_in_the_path_and_images_without_one_are_unlabeled(tmp_path) -> None:
    made = make_datalist(photographs(tmp_path), images="*/*.png", class_=r"^(tumor|normal)/", patient=r"(p\d)_")
    assert made.label_names == {0: "normal", 1: "tumor"}
    assert made.classifies
    assert classes_of(made)["tumor/p3_tumor.png"] == 1
    assert classes_of(made)["normal/p3_normal.png"] == 0
    assert [case.image for case in made.unlabeled] == ["unknown/p9_x.png"]
    assert "patients_known" not in (made.model_extra or {})
    split = make_datalist(
        tmp_path,
        images="*/*.png",
        class_=r"^(tumor|normal)/",
        patient=r"(p\d)_",
        test=0.34,
        classes=["tumor", "normal"],
    )
    assert split.label_names == {0: "tumor", 1: "normal"}
    assert len(split.test) == 4
    assert not {case.patient for case in split.test} & {case.patient for case in split.training}


def test_without_patient_each_image_is_one_and_the_datalist_says_so(tmp_path) -> None:
    made = make_datalist(photographs(tmp_path), images="*/*.png", class_=r"^(tumor|normal)/", test=0.5)
    assert (made.model_extra or {})["patients_known"] is False
    assert len(made.patients["test"]) == 6
    assert {case.label for case in made.test} == {0, 1}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"class_": "^(tumor)/"}, "two classes or more"),
        ({"class_": "^nothing(x)/"}, "finds nothing in 13 paths"),
        ({"class_": "^(tumor|normal)/", "classes": ["tumor", "benign"]}, "is of class normal"),
        ({"class_": "^(tumor|normal)/", "labels": "*/*.gif"}, "beside --labels"),
        ({"class_": "tumor"}, "0 groups"),
        ({}, "--patient"),
        ({"patient": r"(p\d)", "classes": ["a", "b"]}, "without --class"),
    ],
)
def test_unusable_classes_are_refused(tmp_path, options, words) -> None:
    with pytest.raises((ConfigError, InputError), match=words):
        make_datalist(photographs(tmp_path), images="*/*.png", **options)


def test_split_by_share_needs_a_share(tmp_path) -> None:
    made = make_datalist(photographs(tmp_path), images="*/*.png", class_=r"^(tumor|normal)/", patient=r"(p\d)_")
    assert len(split_datalist(made, labeled=0.5).patients["training"]) == 3
    with pytest.raises(ConfigError, match="share"):
        split_datalist(made, labeled=0.0)
