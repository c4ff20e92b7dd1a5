"""The demo in two contrasts."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest

from medkd.data import demo_two_contrasts, read_datalist
from medkd.data.demo import virtual_patient
from medkd.errors import InputError

SETTINGS = {"warp_mm": 4.0, "contrast": 0.15, "bias": 0.0, "noise": 0.0}


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    folder = tmp_path_factory.mktemp("contrasts")
    return read_datalist(demo_two_contrasts(folder, labeled=2, source=1, target=2, validation=1, test=1), unpaired=True)


def test_no_patient_is_in_both_contrasts_and_target_labels_stay_hidden(cohort):
    assert cohort.domains == ["t1", "t2"]
    assert {s: len(cohort.section(s, domain="t2")) for s in ("training", "unlabeled", "validation", "test")} == {
        "training": 0,
        "unlabeled": 2,
        "validation": 0,
        "test": 1,
    }
    assert all("label" not in item for item in cohort.section("unlabeled"))
    assert all(case.label for case in cohort.cases("unlabeled"))


def test_second_contrast_turns_the_order_of_tissues_round(cohort):
    def means(item):
        image = np.asarray(nib.load(item["image"]).dataobj)
        label = np.asarray(nib.load(item["label"]).dataobj)
        return [image[label == tissue].mean() for tissue in (1, 2, 3)]

    gray, white, fluid = means(cohort.section("training", domain="t1")[0])
    assert white > gray > fluid
    gray, white, fluid = means(cohort.section("test", domain="t2")[0])
    assert fluid > gray > white


def test_contrast_leaves_anatomy_alone():
    first, second = (virtual_patient(0, 7, weighting=weighting, **SETTINGS) for weighting in ("t1", "t2"))
    assert np.array_equal(first.label, second.label)
    assert not np.array_equal(first.image, second.image)


def test_a_contrast_that_no_case_has_is_refused(cohort):
    with pytest.raises(InputError, match=r"has no domain 'ct': its domains are \['t1', 't2'\]"):
        cohort.section("training", domain="ct")


def test_too_many_patients_are_refused_before_anything_is_written(tmp_path):
    with pytest.raises(InputError, match="5000 patients"):
        demo_two_contrasts(tmp_path, target=5000)
    assert not list(tmp_path.iterdir())
