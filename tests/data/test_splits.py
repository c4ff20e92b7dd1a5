"""Splits: no patient on two sides, every stratum in every part, the same seed the same split."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from medkd.data.datalists import Case, Datalist
from medkd.data.splits import split_datalist, stratified_order
from medkd.errors import ConfigError, InputError

LABELS = {"0": "background", "1": "lesion"}


def cohort(patients: int, *, scans: int = 1, unlabeled: int = 0, domains: str = "A", **extra: Any) -> Datalist:
    """Patients p0, p1, … with ``scans`` labelled scans each, of whom the first ``unlabeled`` have a further image."""
    training = [
        Case(
            image=f"p{p}_{s}.nii.gz",
            label=f"p{p}_{s}_seg.nii.gz",
            patient=f"p{p}",
            domain=domains[p % len(domains)],
            **extra,
        )
        for p in range(patients)
        for s in range(scans)
    ]
    more = [Case(image=f"p{p}_cine.nii.gz", patient=f"p{p}", domain="A", frame=0) for p in range(unlabeled)]
    return Datalist(labels=LABELS, training=training, unlabeled=more, dataset_dir=Path("/nowhere"))


def random_manifest(source: random.Random) -> Datalist:
    patients = source.randint(6, 14)
    sections: dict[str, list[Case]] = {"training": [], "unlabeled": [], "validation": [], "test": []}
    for p in range(patients):
        side = source.choice(["training"] * 8 + ["validation", "test"]) if p > 5 else "training"
        for s in range(source.choice([1, 1, 2, 7])):
            place = "unlabeled" if side == "training" and s > 0 and source.random() < 0.4 else side
            entry: dict[str, Any] = {"image": f"{p}/{s}.nii.gz", "patient": f"p{p}", "domain": source.choice("ABC")}
            sections[place].append(Case(**entry, label=f"{p}/{s}_seg.nii.gz"))
    for p in range(source.randint(0, 6)):
        sections["unlabeled"].append(Case(image=f"extra{p}.nii.gz", patient=f"x{p}"))
    for cases in sections.values():
        source.shuffle(cases)
    return Datalist(labels=LABELS, dataset_dir=Path("/nowhere"), **sections)


def leaks(datalist: Datalist) -> int:
    """How many (fold, patient) pairs both train and are scored, counted from the items a run would get."""
    count = 0
    for fold in datalist.folds or [None]:
        patients = {
            name: {item["patient"] for item in datalist.section(name, fold=fold)}
            for name in ("training", "unlabeled", "validation", "test")
        }
        trains = patients["training"] | patients["unlabeled"]
        count += len(trains & (patients["validation"] | patients["test"]))
        count += len(patients["validation"] & patients["test"])
    return count


def test_a_thousand_random_manifests_have_no_leak() -> None:
    source = random.Random(7)
    for number in range(1000):
        datalist = random_manifest(source)
        request: dict[str, Any] = {"labeled": source.randint(2, 3)} if source.random() < 0.7 else {}
        if number % 3 == 0:
            request |= {"folds": source.randint(2, 4)}
        else:
            request |= {"validation": 0.2, "test": source.choice([0.0, 0.2])}
        split = split_datalist(datalist, seed=number, **request)
        assert leaks(split) == 0, (number, request)
        for fold in split.folds:
            assert split.section("training", fold=fold), (number, request)
            assert split.section("validation", fold=fold), (number, request)
        if "labeled" in request:
            assert len({case.patient for case in split.training}) == request["labeled"]


def test_every_labelled_patient_is_validated_on_in_exactly_one_fold() -> None:
    split = split_datalist(cohort(20, scans=2), folds=5, labeled=10, seed=3)
    seen = Counter(item["patient"] for fold in range(5) for item in split.section("validation", fold=fold))
    assert seen == {f"p{p}": 2 for p in range(20)}
    for fold in range(5):
        assert len({item["patient"] for item in split.section("training", fold=fold)}) == 8
        assert len({item["patient"] for item in split.section("unlabeled", fold=fold)}) == 8
        assert all("label" in item for item in split.section("validation", fold=fold))
        assert all("label" not in item for item in split.section("unlabeled", fold=fold))


def test_every_fold_has_every_domain() -> None:
    split = split_datalist(cohort(30, domains="AAB"), folds=5, seed=0)
    for fold in range(5):
        domains = Counter(item["domain"] for item in split.section("validation", fold=fold))
        assert domains == {"A": 4, "B": 2}


def test_a_domain_rarer_than_the_folds_does_not_stop_the_split() -> None:
    split = split_datalist(cohort(12, domains="AAAAAAAAAABC"), folds=4)
    assert {len(split.section("validation", fold=fold)) for fold in range(4)} == {3}


def test_any_field_can_stratify() -> None:
    datalist = cohort(10)
    cases = [case.model_copy(update={"group": "DCM" if n < 5 else "NOR"}) for n, case in enumerate(datalist.training)]
    grouped = Datalist.model_validate(datalist.model_copy(update={"training": cases}).model_dump())
    split = split_datalist(grouped, labeled=4, stratify_by="group")
    assert Counter(case.model_extra["group"] for case in split.training if case.model_extra) == {"DCM": 2, "NOR": 2}
    with pytest.raises(InputError, match='no case has "sex"'):
        split_datalist(grouped, labeled=4, stratify_by="sex")


def test_the_same_seed_gives_the_same_split_whatever_the_order_of_cases() -> None:
    datalist = cohort(15, scans=2, domains="AB")
    turned = datalist.model_copy(update={"training": datalist.training[::-1]})

    def sides(source: Datalist, seed: int) -> set[tuple[str, int | None, bool]]:
        split = split_datalist(source, folds=3, labeled=6, seed=seed)
        entries = ((section, case) for section, _, case in split.entries())
        return {(case.patient, case.fold, section == "training") for section, case in entries}

    assert sides(datalist, 1) == sides(turned, 1)
    assert sides(datalist, 1) != sides(datalist, 2)


def test_fewer_labelled_patients_are_among_more() -> None:
    datalist = cohort(30, domains="AB")
    few, more = ({c.patient for c in split_datalist(datalist, labeled=n, seed=4).training} for n in (5, 12))
    assert few < more


def test_labelled_patients_can_be_named() -> None:
    split = split_datalist(cohort(6), labeled=["p4", "p1"])
    assert split.patients["training"] == {"p1", "p4"}
    assert split.patients["unlabeled"] == {"p0", "p2", "p3", "p5"}
    with pytest.raises(InputError, match="has no labelled patient p9"):
        split_datalist(cohort(6), labeled=["p1", "p9"])
    with pytest.raises(ConfigError, match="0 is too few"):
        split_datalist(cohort(6), labeled=[])


def test_patients_without_labels_keep_their_images_and_lose_the_label() -> None:
    split = split_datalist(cohort(6, scans=2, unlabeled=6), labeled=2)
    assert len(split.training) == 4
    assert len(split.unlabeled) == 14
    assert all(case.label is None for case in split.unlabeled)


def test_unlabeled_images_of_held_out_patients_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        split = split_datalist(cohort(10, unlabeled=10), test=0.2, validation=0.1)
    assert (len(split.training), len(split.validation), len(split.test), len(split.unlabeled)) == (7, 1, 2, 7)
    assert "left out" in caplog.text


def test_a_validation_section_joins_the_folds_and_test_stays() -> None:
    split = split_datalist(cohort(12), test=0.25, validation=0.25, seed=1)
    again = split_datalist(split, folds=3)
    assert again.test == split.test
    assert not again.validation
    assert {case.patient for case in again.training} == split.patients["training"] | split.patients["validation"]


def test_the_input_is_not_changed() -> None:
    datalist = cohort(8)
    before = datalist.sha256
    split_datalist(datalist, folds=2, labeled=3)
    assert datalist.sha256 == before


def test_every_beginning_of_the_order_is_balanced() -> None:
    strata = {f"p{n}": "AAB"[n % 3] for n in range(90)}
    order = stratified_order(strata, 5)
    assert sorted(order) == sorted(strata)
    for length in range(3, 91):
        assert abs(sum(strata[p] == "B" for p in order[:length]) - length / 3) <= 1


@pytest.mark.parametrize(
    ("request_", "error", "message"),
    [
        ({}, ConfigError, "nothing to do"),
        ({"folds": 1}, ConfigError, "1 is too few"),
        ({"folds": 0}, ConfigError, "0 is too few"),
        ({"labeled": 0}, ConfigError, "0 is too few"),
        ({"labeled": -2}, ConfigError, "-2 is too few"),
        ({"folds": 2, "labeled": 1}, ConfigError, "without labels to train on"),
        ({"folds": 2, "validation": 0.2}, ConfigError, "not used beside folds"),
        ({"validation": 1.0}, ConfigError, "not a fraction"),
        ({"test": -0.1}, ConfigError, "not a fraction"),
        ({"test": float("nan")}, ConfigError, "not a fraction"),
        ({"folds": 6}, InputError, "has 5 labelled patients, too few for 6 folds"),
        ({"labeled": 6}, InputError, "has 5 labelled patients in training, not 6"),
        ({"validation": 0.5, "test": 0.6}, InputError, "leaves none"),
    ],
)
def test_impossible_splits_are_refused(request_: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        split_datalist(cohort(5), **request_)


def test_a_case_without_patient_is_refused_by_name() -> None:
    datalist = Datalist(labels=LABELS, unlabeled=[Case(image="who.nii.gz")], dataset_dir=Path("/nowhere"))
    with pytest.raises(InputError, match=r"unlabeled\[0\]: who.nii.gz has no patient"):
        split_datalist(datalist, labeled=1)
