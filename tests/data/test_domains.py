"""Which domain is labeled and which is adapted to."""

from __future__ import annotations

import pytest

from medkd.data.datalists import Datalist
from medkd.data.domains import source_domain, target_domain
from medkd.errors import InputError


def datalist(training: list[str | None], unlabeled: list[str | None]) -> Datalist:
    def case(section: str, index: int, domain: str | None) -> dict[str, str | None]:
        name = f"{section}{index}"
        label = f"{name}_seg.nii.gz" if section == "training" else None
        return {"image": f"{name}.nii.gz", "label": label, "patient": name, "domain": domain}

    return Datalist.model_validate(
        {
            "labels": {"0": "background", "1": "heart"},
            "training": [case("training", k, domain) for k, domain in enumerate(training)],
            "unlabeled": [case("unlabeled", k, domain) for k, domain in enumerate(unlabeled)],
        }
    )


def test_the_labeled_domain_is_the_source_and_the_other_one_the_target():
    cases = datalist(["MR", "MR"], ["MR", "CT", "CT"])
    assert source_domain(cases) == "MR"
    assert target_domain(cases, "MR") == "CT"


@pytest.mark.parametrize(("training", "words"), [([None], 'name no "domain"'), (["CT", "MR"], "are of CT and MR")])
def test_a_source_that_is_not_one_domain_is_refused(training, words):
    with pytest.raises(InputError, match=words):
        source_domain(datalist(training, ["CT"]))


@pytest.mark.parametrize(
    ("unlabeled", "words"), [(["MR", None], "no domain but 'MR'"), (["CT", "PET"], "are of CT and PET")]
)
def test_a_target_that_is_not_one_domain_is_refused(unlabeled, words):
    with pytest.raises(InputError, match=words):
        target_domain(datalist(["MR"], unlabeled), "MR")
