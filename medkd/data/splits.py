"""Patient-level, stratified splits: folds, held-out patients, and which patients keep their labels."""

from __future__ import annotations

import logging
import random
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence

import numpy as np
from sklearn.model_selection import StratifiedGroupKFold

from medkd.data.datalist_rules import SECTIONS, TRAIN_SIDE
from medkd.data.datalists import Case, Datalist
from medkd.errors import ConfigError, InputError

logger = logging.getLogger(__name__)


def split_datalist(
    datalist: Datalist,
    *,
    folds: int | None = None,
    labeled: int | float | Collection[str] | None = None,
    validation: float = 0.0,
    test: float = 0.0,
    seed: int = 0,
    stratify_by: str | None = None,
) -> Datalist:
    """Split by patient, so that no patient is ever on two sides.

    The steps, in this order; ``test`` cases that are already there stay as they are:

    1. ``test`` and ``validation``: that fraction of the patients in ``training`` moves to the section of that name.
       Unlabeled images of those patients are left out, since training on them would leak.
    2. ``folds``: every ``training`` case gets a fold by scikit-learn's ``StratifiedGroupKFold``. A ``validation``
       section is joined to ``training`` first, since each fold makes its own.
    3. ``labeled``: that many patients keep their labels in ``training``; the other patients' cases move to
       ``unlabeled`` and lose theirs. With folds they keep it for validation in their own fold only, so that every fold
       is still validated on all of its patients. The choice is nested: with one seed, the patients of a smaller number
       are among those of a larger one.

    Args:
        datalist: what to split; it is not changed.
        folds: number of folds, at least 2; replaces folds that are already there.
        labeled: number of labelled patients, over all folds; as a float below 1 their share of those in training (at
            least one); or who they are.
        validation: fraction of the patients, in [0, 1).
        test: fraction of the patients, in [0, 1).
        seed: the same seed gives the same split, whatever the order of the cases.
        stratify_by: the field (``"domain"`` or any further one, such as ACDC's ``"group"``) whose values every part
            should have in like shares; by default ``domain`` where there is one.

    Raises:
        ConfigError: nothing to do, or numbers that make no sense.
        InputError: a case without a patient, an unknown field, too few patients.
    """
    _refuse_bad_request(folds, labeled, validation, test)
    _refuse_missing_patients(datalist)
    field = _stratification_field(datalist, stratify_by)
    sections: dict[str, list[Case]] = {name: list(datalist.cases(name)) for name in SECTIONS}
    if validation or test:
        _hold_out(datalist.where, sections, validation, test, field, seed)
    if folds:
        _assign_folds(datalist.where, sections, folds, field, seed)
    if labeled is not None:
        _keep_labels(datalist.where, sections, labeled, field, seed)
    return datalist.model_copy(update={**sections, "path": None})


def keep_one_domain(datalist: Datalist, domain: str, *, seed: int = 0) -> Datalist:
    """Make paired data unpaired: every patient keeps the images of one domain.

    The patients to train on are divided evenly between their domains, those with labels and those without by
    themselves. Validation and test keep the cases of ``domain``.

    Args:
        datalist: with patients that have images of several domains; it is not changed.
        domain: what to validate and test on.
        seed: of the division.

    Raises:
        ConfigError: no image is of that domain, or no patient has two domains.
    """
    if domain not in datalist.domains:
        remedy = f"choose from {', '.join(datalist.domains) or 'datasets of several modalities'}"
        raise ConfigError("--unpaired", f"there is no image of {domain}", remedy)
    domains: dict[str, set[str]] = defaultdict(set)
    for _, _, case in datalist.entries():
        domains[case.patient].add(case.domain or "")
    if all(len(own) == 1 for own in domains.values()):
        raise ConfigError("--unpaired", "every patient has images of one modality already", "leave it out")
    kept: dict[str, str] = {}
    given: Counter[str] = Counter()
    for section in TRAIN_SIDE:
        here: Counter[str] = Counter()
        fresh = {case.patient: "" for case in datalist.cases(section) if case.patient not in kept}
        for patient in stratified_order(fresh, f"{seed}:unpaired:{section}"):
            chosen = min(sorted(domains[patient]), key=lambda name: (here[name], given[name]))
            kept[patient] = chosen
            here[chosen] += 1
            given[chosen] += 1
    sections: dict[str, list[Case]] = {
        name: [
            case
            for case in datalist.cases(name)
            if case.domain == (kept[case.patient] if name in TRAIN_SIDE else domain)
        ]
        for name in SECTIONS
    }
    return datalist.model_copy(update={**sections, "path": None})


def stratified_order(strata: Mapping[str, str], seed: int | str, blocks: Mapping[str, int] | None = None) -> list[str]:
    """Patients in a random order of which every beginning holds all strata in nearly their overall shares.

    Args:
        strata: patient to stratum.
        seed: decides among equals.
        blocks: patient to block (fold); patients are then taken from the blocks in turn.
    """
    source = random.Random(f"medkd:{seed}")
    waiting: dict[int, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    shuffled = sorted(strata)
    source.shuffle(shuffled)
    for patient in shuffled:
        waiting[blocks[patient] if blocks else 0][strata[patient]].append(patient)
    share = {stratum: count / len(strata) for stratum, count in Counter(strata.values()).items()}
    taken_from: Counter[int] = Counter()
    taken_of: Counter[str] = Counter()
    order: list[str] = []
    while len(order) < len(strata):
        block = min((block for block in sorted(waiting) if waiting[block]), key=lambda block: taken_from[block])
        here = waiting[block]
        # The stratum furthest behind its share; among equals the one the shuffle put first.
        stratum = max(here, key=lambda stratum: share[stratum] * (len(order) + 1) - taken_of[stratum])
        order.append(here[stratum].pop(0))
        if not here[stratum]:
            del here[stratum]
        taken_from[block] += 1
        taken_of[stratum] += 1
    return order


def _refuse_bad_request(
    folds: int | None, labeled: int | float | Collection[str] | None, validation: float, test: float
) -> None:
    if folds is None and labeled is None and not (validation or test):
        raise ConfigError("data split", "has nothing to do", "give a number of folds or of labelled patients")
    if folds is not None and folds < 2:
        raise ConfigError("--folds", f"{folds} is too few", "use 2 or more")
    if isinstance(labeled, float):
        if not 0 < labeled < 1:
            raise ConfigError("--labeled", f"{labeled} is not a share", "give more than 0 % and less than 100 %")
        count = 2  # how many that are shows when the others are held out
    else:
        count = labeled if isinstance(labeled, int) else len(set(labeled or ()))
    if labeled is not None and count < 1:
        raise ConfigError("--labeled", f"{count} is too few", "keep at least one labelled patient")
    if folds and count == 1:
        raise ConfigError("--labeled", "one labelled patient leaves a fold without labels to train on", "use 2 or more")
    for option, fraction in (("--validation", validation), ("--test", test)):
        if not 0 <= fraction < 1:
            raise ConfigError(option, f"{fraction} is not a fraction of the patients", "use a number from 0 to below 1")
    if validation and folds:
        raise ConfigError(
            "--validation", "is not used beside folds, which are validated on in turn", "give one of the two"
        )


def _refuse_missing_patients(datalist: Datalist) -> None:
    for section, index, case in datalist.entries():
        if not case.patient:
            where = f"{datalist.where}: {section}[{index}]"
            raise InputError(where, f"{case.image} has no patient to split by", 'give its "patient"')


def _stratification_field(datalist: Datalist, stratify_by: str | None) -> str | None:
    cases = [case for _, _, case in datalist.entries()]
    if stratify_by is None:
        return "domain" if any(case.domain is not None for case in cases) else None
    if not any(_value(case, stratify_by) for case in cases):
        raise InputError(datalist.where, f'no case has "{stratify_by}" to stratify by', "name a field the cases have")
    return stratify_by


def _value(case: Case, field: str | None) -> str:
    value = getattr(case, field, None) if field else None
    return "" if value is None else str(value)


def _patient_strata(cases: Iterable[Case], field: str | None) -> dict[str, str]:
    """Each patient's values of the field, joined where the patient has several."""
    values: dict[str, set[str]] = {}
    for case in cases:
        values.setdefault(case.patient, set()).add(_value(case, field))
    return {patient: "|".join(sorted(own)) for patient, own in values.items()}


def _hold_out(
    where: str, sections: dict[str, list[Case]], validation: float, test: float, field: str | None, seed: int
) -> None:
    order = stratified_order(_patient_strata(sections["training"], field), f"{seed}:hold out")
    counts = {
        name: max(1, round(fraction * len(order))) if fraction else 0
        for name, fraction in (("test", test), ("validation", validation))
    }
    if sum(counts.values()) >= len(order):
        asked = " and ".join(f"{count} for {name}" for name, count in counts.items() if count)
        raise InputError(
            where, f"has {len(order)} patients in training, of which {asked} leaves none", "hold out fewer"
        )
    start = 0
    for name, count in counts.items():
        held_out = set(order[start : start + count])
        start += count
        sections[name] += [case for case in sections["training"] if case.patient in held_out]
        sections["training"] = _without(sections["training"], held_out)
        dropped = len(sections["unlabeled"])
        sections["unlabeled"] = _without(sections["unlabeled"], held_out)
        if dropped := dropped - len(sections["unlabeled"]):
            logger.info("%d unlabeled images of patients held out for %s are left out", dropped, name)


def _without(cases: Sequence[Case], patients: Collection[str]) -> list[Case]:
    return [case for case in cases if case.patient not in patients]


def _assign_folds(where: str, sections: dict[str, list[Case]], folds: int, field: str | None, seed: int) -> None:
    if sections["validation"]:
        logger.info("%d validation cases join the folds", len(sections["validation"]))
    pool = [*sections["training"], *(case for case in sections["validation"] if case.label is not None)]
    sections["unlabeled"] = [
        case.model_copy(update={"fold": None})
        for case in (*sections["unlabeled"], *(case for case in sections["validation"] if case.label is None))
    ]
    sections["validation"] = []
    fold_of = _fold_of_patients(where, pool, folds, field, seed)
    sections["training"] = [case.model_copy(update={"fold": fold_of[case.patient]}) for case in pool]


def _fold_of_patients(where: str, cases: Sequence[Case], folds: int, field: str | None, seed: int) -> dict[str, int]:
    cases = sorted(cases, key=lambda case: (case.patient, case.image, case.frame or 0))
    patients = [case.patient for case in cases]
    if len(set(patients)) < folds:
        raise InputError(
            where, f"has {len(set(patients))} labelled patients, too few for {folds} folds", "use fewer folds"
        )
    strata = _join_rare([_value(case, field) for case in cases], patients, folds)
    splitter = StratifiedGroupKFold(n_splits=folds, shuffle=True, random_state=seed)
    fold_of: dict[str, int] = {}
    for fold, (_, held_out) in enumerate(splitter.split(np.zeros(len(cases)), strata, groups=patients)):
        fold_of |= {patients[index]: fold for index in held_out}
    return fold_of


def _join_rare(strata: Sequence[str], patients: Sequence[str], folds: int) -> list[str]:
    """Strata of fewer patients than folds cannot be in every fold: they are balanced together."""
    patients_in = Counter(stratum for stratum, _ in set(zip(strata, patients, strict=True)))
    rare = {stratum for stratum, count in patients_in.items() if count < folds}
    together = "(rare)"
    if sum(patients_in[stratum] for stratum in rare) < folds and rare != set(patients_in):
        together = max(sorted(patients_in), key=lambda stratum: patients_in[stratum])
    return [together if stratum in rare else stratum for stratum in strata]


def _keep_labels(
    where: str, sections: dict[str, list[Case]], labeled: int | float | Collection[str], field: str | None, seed: int
) -> None:
    training = sections["training"]
    strata = _patient_strata(training, field)
    if isinstance(labeled, float):
        labeled = max(1, round(labeled * len(strata)))
    if isinstance(labeled, int):
        if labeled > len(strata):
            raise InputError(where, f"has {len(strata)} labelled patients in training, not {labeled}", "ask for fewer")
        fold_of = {case.patient: case.fold or 0 for case in training}
        kept = set(stratified_order(strata, f"{seed}:labeled", fold_of)[:labeled])
    else:
        kept = set(labeled)
        if unknown := sorted(kept - set(strata)):
            raise InputError(where, f"has no labelled patient {unknown[0]} in training", "name patients it has")
    sections["training"] = [case for case in training if case.patient in kept]
    sections["unlabeled"] += [
        case if case.fold is not None else case.model_copy(update={"label": None})
        for case in training
        if case.patient not in kept
    ]
