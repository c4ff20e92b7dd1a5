from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from medkd.data import demo
from medkd.data.datalists import read_datalist
from medkd.data.demo import LABELS, demo_mri, patient_numbers, virtual_patient
from medkd.errors import InputError

DIFFICULTY = {"warp_mm": 4.0, "contrast": 0.15, "bias": 0.5, "noise": 0.03}


def patient(seed=0, number=1000, **changes):
    return virtual_patient(seed, number, **{**DIFFICULTY, **changes})


@pytest.fixture(scope="module")
def cohort(tmp_path_factory) -> Path:
    return demo_mri(tmp_path_factory.mktemp("demo"), labeled=2, unlabeled=3, validation=1, test=2, seed=5)


def test_patient_depends_on_seed_and_number_only():
    first = patient(3, 1001)
    patient(3, 4000)
    again = patient(3, 1001)
    assert np.array_equal(first.image, again.image)
    assert np.array_equal(first.label, again.label)


def test_other_seeds_and_numbers_are_other_patients():
    labels = [patient(*who).label for who in ((0, 1000), (0, 1001), (1, 1000))]
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert (labels[i] != labels[j]).mean() > 0.05


def test_files_do_not_depend_on_workers_or_cohort_size(cohort, tmp_path):
    other = demo_mri(tmp_path, labeled=1, unlabeled=0, validation=0, test=1, seed=5, workers=1)
    names = [path.relative_to(tmp_path) for path in sorted(tmp_path.glob("*/*.nii.gz"))]
    assert len(names) == 4
    for name in names:
        assert (cohort.parent / name).read_bytes() == (tmp_path / name).read_bytes()
    assert other.name == "datalist.json"


@pytest.mark.parametrize("warp_mm", [4.0, 12.0])
def test_deformation_never_folds(warp_mm):
    smallest = [patient(number=number, warp_mm=warp_mm).smallest_jacobian for number in range(1000, 1003)]
    assert all(0.15 <= jacobian < 1 for jacobian in smallest)


def test_label_moves_with_the_image():
    """Without bias, noise and contrast change, intensity alone tells the tissues apart wherever they moved to."""
    for number in (1000, 1001):
        case = patient(number=number, contrast=0.0, bias=0.0, noise=0.0)
        medians = [np.median(case.image[case.label == value]) for value in (0, 3, 1, 2)]
        assert medians == sorted(set(medians))
        by_intensity = np.digitize(case.image, [(a + b) / 2 for a, b in pairwise(medians[1:])])
        inside = case.label != 0
        assert (np.array([3, 1, 2])[by_intensity] == case.label)[inside].mean() > 0.85
    other_anatomy = patient(number=1002).label[inside]
    assert (np.array([3, 1, 2])[by_intensity][inside] == other_anatomy).mean() < 0.7


def test_appearance_leaves_anatomy_alone():
    plain, changed = patient(bias=0.0, noise=0.0, contrast=0.0), patient(bias=0.9, noise=0.1, contrast=0.25)
    assert np.array_equal(plain.label, changed.label)
    assert not np.array_equal(plain.image, changed.image)


def test_every_tissue_is_present_and_brains_stay_in_view():
    for number in range(1000, 1004):
        label = patient(number=number).label
        volumes_ml = np.bincount(label.ravel(), minlength=len(LABELS)) * 16 / 1000
        assert (volumes_ml[1:] > [300, 200, 15]).all()
        assert not label[[0, -1]].any()
        assert not label[:, [0, -1]].any()


def test_volumes_carry_millimeters_of_mni_space(cohort):
    for path in sorted(cohort.parent.glob("*/patient_*.nii.gz")):
        volume = nib.load(path)
        assert volume.shape == demo.GRID_SHAPE
        assert volume.header.get_zooms() == pytest.approx(demo.SPACING_MM)
        assert volume.header.get_xyzt_units()[0] == "mm"
        assert nib.aff2axcodes(volume.affine) == ("R", "A", "S")
        for affine, code in (volume.get_sform(coded=True), volume.get_qform(coded=True)):
            assert code == 4
            assert np.allclose(affine, volume.affine, atol=1e-4)


class Motionless:
    """A source of random numbers that are all at their mean."""

    def normal(self, mean, spread, size):
        return np.full(size, mean)

    def standard_normal(self, size, dtype):
        return np.zeros(size, dtype)


def test_without_deformation_a_voxel_shows_the_template_at_its_mni_position():
    axes_mm = demo._sample_positions()
    moved, jacobian = demo._deformation(axes_mm, 4.0, Motionless())
    assert jacobian == pytest.approx(1, abs=1e-3)
    centers = np.stack([demo._average_subslices(component) for component in moved], axis=-1)
    voxels = np.stack(np.meshgrid(*(np.arange(size) for size in demo.GRID_SHAPE), indexing="ij"), axis=-1)
    assert np.allclose(centers, nib.affines.apply_affine(patient().affine, voxels), atol=1e-3)


def test_datalist_is_readable_and_splits_share_no_patient(cohort):
    datalist = read_datalist(cohort)
    sections = ("training", "unlabeled", "validation", "test")
    patients = [{item["patient"] for item in datalist.section(name)} for name in sections]
    assert [len(group) for group in patients] == [2, 3, 1, 2]
    assert len(set().union(*patients)) == 8
    assert datalist.label_names == LABELS
    assert all(Path(item["label"]).is_file() for item in datalist.section("test"))


def test_unlabeled_patients_have_no_label_file(cohort):
    assert all("label" not in entry for entry in json.loads(cohort.read_text())["unlabeled"])
    assert len(list((cohort.parent / "labels").iterdir())) == 5


def test_readme_says_what_is_real_and_whose_template_it_is(cohort):
    text = (cohort.parent / "README.md").read_text()
    for needed in ("Real:", "Simulated:", "MNI152", "Fonov", "unknown", "Copyright (C)", "seed 5"):
        assert needed in text


def test_sections_never_share_numbers():
    numbers = [set(patient_numbers(section, 999)) for section in ("training", "unlabeled", "validation", "test")]
    assert len(set().union(*numbers)) == 4 * 999


@pytest.mark.parametrize(
    "wrong",
    [{"labeled": 0}, {"test": -1}, {"unlabeled": 1000}, {"seed": -1}, {"contrast": 0.5}, {"noise": float("nan")}],
)
def test_amounts_out_of_range_are_refused_before_anything_is_written(tmp_path, wrong):
    with pytest.raises(InputError, match=next(iter(wrong)) if "labeled" not in wrong else "training"):
        demo_mri(tmp_path / "out", **wrong)
    assert not (tmp_path / "out").exists()


def test_missing_template_is_named(monkeypatch):
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="mni_icbm152_t1"):
        demo._read_template("t1")
