"""What a datalist must not hold: a patient on both sides of a split, one image twice, paths out of its folder."""

from __future__ import annotations

import os
from collections import defaultdict
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from medkd.errors import InputError

if TYPE_CHECKING:
    from medkd.data.datalists import Case, Datalist

Section = Literal["training", "unlabeled", "validation", "test"]
SECTIONS: tuple[Section, ...] = ("training", "unlabeled", "validation", "test")
TRAIN_SIDE: tuple[Section, ...] = ("training", "unlabeled")


def refuse_unusable(datalist: Datalist) -> None:
    """Refuse what would leak, repeat or mislabel data, without looking into any file.

    Raises:
        InputError: naming the datalist and the entry.
    """
    _refuse_unknown_sections(datalist)
    if not any(datalist.cases(section) for section in SECTIONS):
        raise InputError(datalist.where, "has no case", f"list at least one image under {', '.join(SECTIONS)}")
    _refuse_bad_labels(datalist)
    for section, index, case in datalist.entries():
        _refuse_bad_entry(datalist, section, index, case)
        _refuse_bad_class(datalist, section, index, case)
    _refuse_repeated_images(datalist)
    _refuse_leaks(datalist)


def refuse_pairs(datalist: Datalist) -> None:
    """Refuse a patient who is in two domains, whichever the sections.

    Raises:
        InputError: naming the datalist, the patient and both domains; or a case without a domain.
    """
    domain_of: dict[str, str] = {}
    for section, index, case in datalist.entries():
        if case.domain is None:
            where = f"{datalist.where}: {section}[{index}]"
            raise InputError(where, "has no domain", 'give every case a "domain", such as "CT" or "MR"')
        first = domain_of.setdefault(case.patient, case.domain)
        if first != case.domain:
            raise InputError(
                datalist.where,
                f"patient {case.patient} is in domain {first} and in domain {case.domain}",
                "keep each patient in one of them",
            )


def _refuse_unknown_sections(datalist: Datalist) -> None:
    for key, value in (datalist.model_extra or {}).items():
        if isinstance(value, list) and any(isinstance(entry, dict) and "image" in entry for entry in value):
            near = get_close_matches(key, SECTIONS, n=1, cutoff=0.4)
            remedy = f'did you mean "{near[0]}"?' if near else f"the sections are {', '.join(SECTIONS)}"
            raise InputError(datalist.where, f'has an unknown section "{key}"', remedy)


def _refuse_bad_labels(datalist: Datalist) -> None:
    labels = datalist.labels
    for key, name in labels.items():
        if not (key.isascii() and key.isdecimal() and str(int(key)) == key):
            raise InputError(
                f"{datalist.where}: labels", f'"{key}" is not a label', 'write {"0": "background", "1": …}'
            )
        if not name.strip():
            raise InputError(f"{datalist.where}: labels", f'label "{key}" has no name', "name it")
    names = list(labels.values())
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"{datalist.where}: labels", f'two labels are named "{name}"', "give each its own name")
    if "0" not in labels and any(case.label is not None for _, _, case in datalist.entries()):
        raise InputError(f"{datalist.where}: labels", 'has no "0"', 'name every label: {"0": "background", "1": …}')


def _refuse_bad_entry(datalist: Datalist, section: Section, index: int, case: Case) -> None:
    where = f"{datalist.where}: {section}[{index}]"
    if section == "training" and case.label is None:
        raise InputError(where, f"{case.image} has no label", 'give one, or move the image to "unlabeled"')
    for key, path in (("image", case.image), ("label", case.label)):
        if isinstance(path, str) and not datalist.resolve(path).is_relative_to(datalist.dataset_dir):
            problem = f"{key} {path} lies outside {datalist.dataset_dir}"
            raise InputError(where, problem, "use paths inside that folder, or set dataset_dir to one that holds them")
    if isinstance(case.label, str) and datalist.resolve(case.image) == datalist.resolve(case.label):
        raise InputError(where, f"{case.image} is its own label", "give the file of the label map")


def _refuse_bad_class(datalist: Datalist, section: Section, index: int, case: Case) -> None:
    """Labels are all label maps, or all classes that the datalist names."""
    if case.label is None:
        return
    where = f"{datalist.where}: {section}[{index}]"
    if isinstance(case.label, str) and datalist.classifies:
        problem = f"{case.image} has a label map, other cases the class of the whole image"
        raise InputError(where, problem, "give every case an integer label, or every case a label map")
    if isinstance(case.label, int) and str(case.label) not in datalist.labels:
        problem = f'label {case.label} of {case.image} is not in "labels"'
        raise InputError(where, problem, 'name every class: {"0": "normal", "1": …}')


def refuse_missing_files(datalist: Datalist) -> None:
    """Refuse a datalist that names files which are not there (labels of ``unlabeled`` are never opened).

    Raises:
        InputError: naming the first one and how many there are.
    """
    missing = [
        (section, index, path)
        for section, index, case in datalist.entries()
        for path in (case.image, case.label if section != "unlabeled" else None)
        if isinstance(path, str) and not datalist.resolve(path).exists()
    ]
    if missing:
        section, index, path = missing[0]
        others = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        problem = f"{path} does not exist in {datalist.dataset_dir}{others}"
        raise InputError(f"{datalist.where}: {section}[{index}]", problem, "correct the path or set dataset_dir")


def _refuse_repeated_images(datalist: Datalist) -> None:
    seen: dict[Any, dict[int | None, str]] = defaultdict(dict)
    for section, index, case in datalist.entries():
        frames = seen[_file_identity(datalist.resolve(case.image))]
        clash = case.frame if case.frame in frames else None
        if case.frame in frames or None in frames or (case.frame is None and frames):
            first = frames[clash] if clash in frames else next(iter(frames.values()))
            place = f"{section}[{index}]"
            raise InputError(f"{datalist.where}: {place}", f"{case.image} is already {first}", "list every image once")
        frames[case.frame] = f"{section}[{index}]"


def _file_identity(path: Path) -> Any:
    """The same for one file under two names (./a, links); the path where nothing is there yet."""
    try:
        status = path.stat()
    except OSError:
        return str(path)
    return (status.st_dev, status.st_ino) if status.st_ino else os.path.realpath(path)


def _refuse_leaks(datalist: Datalist) -> None:
    if datalist.validation or datalist.test or datalist.folds:
        for section, index, case in datalist.entries():
            if not case.patient:
                where = f"{datalist.where}: {section}[{index}]"
                raise InputError(where, f"{case.image} has no patient, but the data are split", 'give its "patient"')
    sides: tuple[tuple[Section, ...], ...] = (TRAIN_SIDE, ("validation",), ("test",))
    first_seen: dict[str, tuple[int, str]] = {}
    for side, sections in enumerate(sides):
        for section in sections:
            for index, case in enumerate(datalist.cases(section)):
                place = f"{section}[{index}]"
                known_side, known_place = first_seen.setdefault(case.patient, (side, place))
                if known_side != side:
                    problem = f"patient {case.patient} is also in {known_place} (leakage)"
                    raise InputError(
                        f"{datalist.where}: {place}", problem, "keep each patient on one side of the split"
                    )
    _refuse_patient_in_two_folds(datalist)


def _refuse_patient_in_two_folds(datalist: Datalist) -> None:
    if not datalist.folds:
        return
    fold_of: dict[str, int | None] = {}
    for section in TRAIN_SIDE:
        for index, case in enumerate(datalist.cases(section)):
            if section == "unlabeled" and case.fold is None:
                continue  # left out with its patient, whichever fold that is in
            if fold_of.setdefault(case.patient, case.fold) != case.fold:
                problem = f"patient {case.patient} is in folds {fold_of[case.patient]} and {case.fold} (leakage)"
                raise InputError(f"{datalist.where}: {section}[{index}]", problem, "give a patient's cases one fold")
