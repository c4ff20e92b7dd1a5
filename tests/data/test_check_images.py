"""Photographs and tiles before a training: copies on two sides of a split, classes of one image, mixed sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from medkd.data.check import check_datalist, require_trainable
from medkd.data.check_images import look_at
from medkd.data.datalists import Datalist
from medkd.errors import InputError


def photograph(seed: int, size: tuple[int, int] = (96, 64)) -> Image.Image:
    """A smooth picture with large structures, as photographs have them."""
    source = np.random.default_rng(seed)
    small = Image.fromarray(source.integers(256, size=(8, 12, 3), dtype=np.uint8))
    return small.resize(size, Image.Resampling.BICUBIC)


def listed(folder: Path, **sections: list[dict[str, Any]]) -> Datalist:
    return Datalist(labels={"0": "normal", "1": "tumor"}, dataset_dir=folder, **sections)


@pytest.fixture
def cohort(tmp_path: Path) -> dict[str, list[dict[str, Any]]]:
    sections: dict[str, list[dict[str, Any]]] = {"training": [], "validation": [], "test": []}
    for section, entries in sections.items():
        for number in range(4):
            name = f"{section}{number}.png"
            photograph(sum(name.encode())).save(tmp_path / name)
            entries.append({"image": name, "label": number % 2, "patient": name})
    return sections


def errors(datalist: Datalist) -> list[tuple[str, str]]:
    return [(finding.case, finding.problem) for finding in check_datalist(datalist) if finding.severity == "error"]


def test_sound_photographs_have_no_finding(tmp_path, cohort) -> None:
    assert check_datalist(listed(tmp_path, **cohort)) == []


@pytest.mark.parametrize("quality", [90, 50])
def test_recompressed_and_rescaled_copy_on_the_other_side_is_refused_with_both_files(tmp_path, cohort, quality) -> None:
    original = Image.open(tmp_path / "training2.png")
    original.resize((144, 96)).save(tmp_path / "copy.jpg", quality=quality)
    cohort["test"].append({"image": "copy.jpg", "label": 0, "patient": "someone"})
    datalist = listed(tmp_path, **cohort)
    ((case, problem),) = errors(datalist)
    assert case == "copy"
    assert "training2.png of training" in problem
    assert "of 64 bits" in problem
    with pytest.raises(InputError, match=r"copy\.jpg.*training2\.png"):
        require_trainable(datalist)


def test_near_copies_on_one_side_are_nobodys_business(tmp_path, cohort) -> None:
    Image.open(tmp_path / "training2.png").save(tmp_path / "copy.jpg", quality=80)
    cohort["training"].append({"image": "copy.jpg", "label": 0, "patient": "training2.png"})
    assert errors(listed(tmp_path, **cohort)) == []


def test_near_copies_in_two_folds_are_refused(tmp_path, cohort) -> None:
    Image.open(tmp_path / "training2.png").save(tmp_path / "copy.jpg", quality=80)
    training = [entry | {"fold": number % 2} for number, entry in enumerate(cohort["training"])]
    training.append({"image": "copy.jpg", "label": 0, "patient": "someone", "fold": 1})
    assert [case for case, _ in errors(listed(tmp_path, training=training))] == ["copy"]


def test_exact_copy_of_another_class_is_an_error_even_of_one_patient(tmp_path, cohort) -> None:
    Image.open(tmp_path / "training0.png").save(tmp_path / "copy.bmp")
    cohort["training"].append({"image": "copy.bmp", "label": 1, "patient": "training0.png"})
    ((case, problem),) = errors(listed(tmp_path, **cohort))
    assert case == "copy.bmp"
    assert "class 1 instead of 0" in problem


def test_exact_copy_across_the_split_is_told_once(tmp_path, cohort) -> None:
    Image.open(tmp_path / "training0.png").save(tmp_path / "copy.bmp")
    cohort["test"].append({"image": "copy.bmp", "label": 0, "patient": "someone"})
    ((_case, problem),) = errors(listed(tmp_path, **cohort))
    assert "same pixels" in problem
    assert "training0.png" in problem


def test_blank_tiles_are_no_copies_of_each_other(tmp_path, cohort) -> None:
    for section in ("training", "test"):
        Image.new("RGB", (96, 64), (240, 238, 241)).save(tmp_path / f"blank_{section}.png")
        cohort[section].append({"image": f"blank_{section}.png", "label": 0, "patient": f"blank {section}"})
    assert check_datalist(listed(tmp_path, **cohort)) == []


@pytest.mark.parametrize(("kept", "words"), [(0, "no training image"), (1, "only one training image")])
def test_class_with_no_or_one_training_image_is_refused(tmp_path, cohort, kept, words) -> None:
    tumor = [entry for entry in cohort["training"] if entry["label"] == 1]
    cohort["training"] = [entry for entry in cohort["training"] if entry["label"] == 0] + tumor[:kept]
    with pytest.raises(InputError, match=f"{words} is of class 1 .tumor."):
        require_trainable(listed(tmp_path, **cohort))


def test_split_with_one_class_is_a_warning(tmp_path, cohort) -> None:
    cohort["test"] = [entry for entry in cohort["test"] if entry["label"] == 1]
    (finding,) = check_datalist(listed(tmp_path, **cohort))
    assert finding.severity == "warning"
    assert "all 2 images of test" in finding.problem


def test_damaged_and_deep_images_are_errors_and_mixed_ones_warnings(tmp_path, cohort) -> None:
    content = (tmp_path / "training0.png").read_bytes()
    (tmp_path / "training0.png").write_bytes(content[: len(content) // 2])
    Image.fromarray(np.arange(6144, dtype=np.uint16).reshape(64, 96)).save(tmp_path / "training1.png")
    photograph(5, (50, 40)).convert("L").save(tmp_path / "training2.png")
    photograph(6).convert("RGBA").save(tmp_path / "training3.png")
    findings = check_datalist(listed(tmp_path, **cohort))
    found = {finding.case: finding.problem for finding in findings if finding.severity == "error" and finding.case}
    assert found.keys() == {"training0", "training1"}
    assert "8 bits per channel" in found["training1"]
    mixed = [finding.problem for finding in findings if finding.severity == "warning"]
    assert any("sizes" in problem and "50 x 40" in problem for problem in mixed)
    assert any("modes" in problem and "1 RGBA" in problem and "1 L" in problem for problem in mixed)


def test_different_fundus_photographs_are_not_called_copies(real_data) -> None:
    files = sorted((real_data / "idrid_grading" / "test").glob("*.jpg"))[:60]
    if not files:
        pytest.skip("IDRiD not present")
    looks = [look_at(path, np.asarray(Image.open(path))) for path in files]
    close = [
        (a, b)
        for i, a in enumerate(looks)
        for b in looks[:i]
        if np.bitwise_count(a.difference_hash ^ b.difference_hash) <= 4
    ]
    assert len(close) > 50  # the hash alone would refuse these data
    assert all(np.sqrt(np.mean((a.thumbnail - b.thumbnail).astype(float) ** 2)) > 4 for a, b in close)
