from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from medkd.data import check
from medkd.data.check import check_datalist, require_trainable
from medkd.data.datalists import Case, Datalist
from medkd.errors import InputError

SHAPE = (6, 5, 4)
AFFINE = np.diag([-1.0, -1.0, 2.0, 1.0])


def write(path: Path, array: np.ndarray, affine: np.ndarray = AFFINE) -> str:
    nib.save(nib.Nifti1Image(array, affine), path)
    return path.name


def scan(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 100, SHAPE).astype(np.int16)


def mask(*labels: int) -> np.ndarray:
    array = np.zeros(SHAPE, np.uint8)
    array.flat[: len(labels)] = labels
    return array


def cohort(folder: Path, change: Callable[[dict[str, Any]], None] | None = None) -> Datalist:
    """Six sound cases; ``change`` may alter the entries before they are checked."""
    entries: dict[str, Any] = {"training": [], "unlabeled": [], "validation": [], "test": []}
    sections = ["training", "training", "training", "unlabeled", "validation", "test"]
    for index, section in enumerate(sections):
        entry = {"image": write(folder / f"c{index}.nii.gz", scan(index)), "patient": f"p{index}"}
        if section != "unlabeled":
            entry["label"] = write(folder / f"c{index}_seg.nii.gz", mask(1, 2, 1))
        entries[section].append(entry)
    if change is not None:
        change(entries)
    return Datalist(labels={"0": "background", "1": "a", "2": "b"}, dataset_dir=folder, **entries)


def test_sound_cohort_has_no_finding(tmp_path: Path) -> None:
    datalist = cohort(tmp_path)
    assert check_datalist(datalist) == []
    require_trainable(datalist)


def nan(folder: Path) -> None:
    array = scan(3).astype(np.float32)
    array[1, 2, 3] = np.nan
    write(folder / "c3.nii.gz", array)


def truncated(folder: Path) -> None:
    path = folder / "c4.nii.gz"
    path.write_bytes(path.read_bytes()[:-9])


FAULTS: dict[str, tuple[Callable[[Path], object], str, str, str]] = {
    # what is done to the files: severity, case, words
    "NaN": (nan, "error", "c3", "1 NaN voxel"),
    "truncated": (truncated, "error", "c4", "truncated"),
    "gone": (lambda folder: (folder / "c1.nii.gz").unlink(), "error", "c1", "does not exist"),
    "label gone": (lambda folder: (folder / "c1_seg.nii.gz").unlink(), "error", "c1", "does not exist"),
    "constant": (lambda folder: write(folder / "c0.nii.gz", mask()), "error", "c0", "constant"),
    "label value": (lambda folder: write(folder / "c5_seg.nii.gz", mask(1, 2, 3)), "error", "c5", "such as 3"),
    "label grid": (
        lambda folder: write(folder / "c5_seg.nii.gz", mask(1, 2), np.diag([-1, -1, 3.0, 1])), "error", "c5",
        "voxel size (1, 1, 3) against (1, 1, 2) mm",
    ),
    "copy under another patient": (
        lambda folder: write(folder / "c5.nii.gz", scan(0).astype(np.float32)), "error", "c5", "of patient p5 instead"
    ),
    "empty mask": (lambda folder: write(folder / "c5_seg.nii.gz", mask()), "warning", "c5", "empty"),
    "voxel size": (
        lambda folder: write(folder / "c3.nii.gz", scan(3), np.diag([-1, -1, 9.0, 1])), "warning", "c3",
        "1 x 1 x 9 mm is far from the usual 1 x 1 x 2 mm",
    ),
    "orientation": (
        lambda folder: write(folder / "c3.nii.gz", scan(3), np.diag([1, -1, 2.0, 1])), "warning", "c3",
        "RPS is not the usual LPS",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_the_one_finding(name: str, tmp_path: Path) -> None:
    spoil, severity, case, words = FAULTS[name]
    datalist = cohort(tmp_path)
    spoil(tmp_path)
    findings = check_datalist(datalist, workers=2)
    assert [(finding.severity, finding.case) for finding in findings] == [(severity, case)], findings
    assert words in findings[0].problem
    assert case in findings[0].file
    assert findings[0].remedy
    if severity == "error":
        with pytest.raises(InputError) as caught:
            require_trainable(datalist)
        assert words in str(caught.value)
    else:
        require_trainable(datalist)


def test_axes_in_another_order_are_no_other_voxel_size(tmp_path: Path) -> None:
    datalist = cohort(tmp_path)
    sagittal = np.array([[0, 0, -1.0, 0], [-1, 0, 0, 0], [0, 2, 0, 0], [0, 0, 0, 1]])
    write(tmp_path / "c3.nii.gz", scan(3), sagittal)
    assert [finding.problem for finding in check_datalist(datalist)] == ["its orientation PSL is not the usual LPS"]


def test_mixed_orientations_are_one_finding_and_domains_are_kept_apart(tmp_path: Path) -> None:
    def domains(entries: dict[str, Any]) -> None:
        for section in entries.values():
            for entry in section:
                entry["domain"] = "CT" if entry["patient"] in {"p0", "p1", "p2"} else "MR"

    (tmp_path / "a").mkdir()
    mixed, apart = cohort(tmp_path / "a"), None
    for index in range(3):
        for suffix in ("", "_seg"):
            array = np.asarray(nib.load(tmp_path / "a" / f"c{index}{suffix}.nii.gz").dataobj)
            write(tmp_path / "a" / f"c{index}{suffix}.nii.gz", array, np.diag([1, 1, 2.0, 1]))
    assert [finding.problem for finding in check_datalist(mixed)] == ["orientations are mixed: 3 RAS, 3 LPS"]
    entries = {section: [case.model_dump() for case in getattr(mixed, section)] for section in check._SIDE_OF}
    domains(entries)
    apart = Datalist(labels=mixed.labels, dataset_dir=mixed.dataset_dir, **entries)
    assert check_datalist(apart) == []


def test_a_label_no_training_case_shows_is_pointed_out(tmp_path: Path) -> None:
    datalist = cohort(tmp_path)
    for index in range(3):
        write(tmp_path / f"c{index}_seg.nii.gz", mask(1, 1))
    findings = check_datalist(datalist)
    assert [finding.problem for finding in findings] == ["no training case shows label 2 (b)"]


def test_the_same_scan_twice_under_one_patient_is_a_warning(tmp_path: Path) -> None:
    def change(entries: dict[str, Any]) -> None:
        entries["unlabeled"].append({"image": write(tmp_path / "again.nii", scan(3)), "patient": "p3"})

    findings = check_datalist(cohort(tmp_path, change))
    assert [(finding.severity, finding.case) for finding in findings] == [("warning", "again")]


def test_a_patient_on_both_sides_is_found_however_the_datalist_was_made(tmp_path: Path) -> None:
    datalist = cohort(tmp_path)
    test = [Case(image="c5.nii.gz", label="c5_seg.nii.gz", patient="p3")]
    leaking = Datalist.model_construct(**{**dict(datalist), "test": test})
    findings = check_datalist(leaking)
    assert [finding.severity for finding in findings] == ["error"]
    assert "patient p3 is in test and in unlabeled (leakage)" in findings[0].problem


def test_frames_of_a_cine_are_read_in_one_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cine = np.stack([scan(10 + frame) for frame in range(3)], axis=-1)

    def change(entries: dict[str, Any]) -> None:
        name = write(tmp_path / "cine.nii.gz", cine)
        entries["unlabeled"] += [{"image": name, "patient": "p9", "frame": frame} for frame in (0, 2)]

    opened: list[str] = []
    read_nifti = check.read_frames.__globals__["read_nifti"]

    def counting(path: Path, *args, **kwargs):
        opened.append(path.name)
        return read_nifti(path, *args, **kwargs)

    monkeypatch.setitem(check.read_frames.__globals__, "read_nifti", counting)
    datalist = cohort(tmp_path, change)
    assert check_datalist(datalist) == []
    assert sorted(opened) == sorted(set(opened))
    cine[..., 2] = 7
    write(tmp_path / "cine.nii.gz", cine)
    assert "constant" in check_datalist(datalist)[0].problem


def test_first_error_says_how_many_more_there_are(tmp_path: Path) -> None:
    datalist = cohort(tmp_path)
    nan(tmp_path)
    truncated(tmp_path)
    with pytest.raises(InputError, match=r"c3\.nii\.gz: has 1 NaN voxel.*\(1 more: run `medkd data check`\)"):
        require_trainable(datalist)


def test_findings_do_not_depend_on_the_number_of_workers(tmp_path: Path) -> None:
    datalist = cohort(tmp_path)
    nan(tmp_path)
    truncated(tmp_path)
    write(tmp_path / "c5_seg.nii.gz", mask())
    assert check_datalist(datalist, workers=1) == check_datalist(datalist, workers=4)
