"""IDRiD's disease grading: two tables of grades beside two folders of fundus photographs, some of them there twice."""

from __future__ import annotations

import csv
import hashlib
import logging
import re
from collections import defaultdict
from pathlib import Path

from medkd.data.cards import Card
from medkd.data.datalists import Case
from medkd.errors import InputError

logger = logging.getLogger(__name__)

REFERABLE_GRADE = 2
REFERABLE_LABELS = {0: "not referable", 1: "referable"}
_TABLES = {
    "training": "a. idrid disease grading training labels.csv",
    "test": "b. idrid disease grading testing labels.csv",
}


def idrid_cases(root: Path, card: Card) -> dict[str, list[Case]]:
    """The photographs of the official training and test sets with their grade.

    A photograph that is a file of the test set too is left out of the training set. Of one that is in the training set
    twice, one copy is kept if the grades agree, none if they do not: nobody knows which is right.

    Args:
        root: a folder with the two tables somewhere in it, and the photographs in ``train`` and ``test`` or in the
            provider's ``a. Training Set`` and ``b. Testing Set``.
        card: the dataset's card.

    Returns:
        ``training`` and ``test``; paths relative to ``root``, ``grade`` as a further field, the image as the patient.

    Raises:
        InputError: naming the table or photograph that is missing or damaged.
    """
    found = {section: _graded(root, card, section) for section in _TABLES}
    for section, cases in found.items():
        if card.counts.get(f"{section} images", len(cases)) != len(cases):
            logger.warning(
                "%s: found %d %s images, the card says %d", card.name, len(cases), section,
                card.counts[f"{section} images"],
            )  # fmt: skip
    return {**found, "training": _without_copies(root, found["training"], found["test"])}


def referable(case: Case) -> Case:
    """The case with two classes instead of five grades: referable from grade 2, moderate, on."""
    assert isinstance(case.label, int)
    return case.model_copy(update={"label": int(case.label >= REFERABLE_GRADE)})


def _graded(root: Path, card: Card, section: str) -> list[Case]:
    tables = [
        path for path in sorted(root.rglob("*.csv")) if re.sub(r"[ _]+", " ", path.name).lower() == _TABLES[section]
    ]
    if not tables:
        raise InputError(root, f"holds no table {_TABLES[section]!r}", card.how_to_get)
    grades: dict[str, int] = {}
    try:
        with tables[0].open(newline="", encoding="utf-8-sig") as file:
            for row in list(csv.reader(file))[1:]:
                if row and row[0].strip():
                    name, grade = row[0].strip(), int(row[1])
                    if name in grades or grade not in card.labels:
                        raise ValueError(f"{name} is listed twice, or its grade {grade} is unknown")
                    grades[name] = grade
    except (OSError, ValueError, IndexError, csv.Error) as error:
        raise InputError(tables[0], f"cannot be read ({error})", "take the original file") from None
    if not grades:
        raise InputError(tables[0], "lists no image", "take the original file")
    folder = _folder(root, section, next(iter(grades)), card)
    cases = []
    for name, grade in grades.items():
        path = folder / f"{name}.jpg"
        if not path.is_file():
            raise InputError(path, "does not exist, but has a grade", card.how_to_get)
        image = path.relative_to(root).as_posix()
        entry = {"image": image, "label": grade, "patient": image.removesuffix(".jpg"), "grade": grade}
        cases.append(Case.model_validate(entry))
    return cases


def _folder(root: Path, section: str, first: str, card: Card) -> Path:
    """Where the photographs of a section lie: other parts of IDRiD have folders of the same name, not these files."""
    names = {"training": ("train", "a. Training Set"), "test": ("test", "b. Testing Set")}[section]
    for path in sorted(root.rglob(f"{first}.jpg")):
        if path.parent.name in names:
            return path.parent
    raise InputError(root, f"holds no {first}.jpg in a folder {' or '.join(names)}", card.how_to_get)


def _without_copies(root: Path, training: list[Case], test: list[Case]) -> list[Case]:
    tested = {_sha256(root / case.image): case.image for case in test}
    copies: dict[str, list[Case]] = defaultdict(list)
    for case in training:
        copies[_sha256(root / case.image)].append(case)
    left_out: set[str] = set()
    for digest, cases in copies.items():
        images = " and ".join(case.image for case in cases)
        if digest in tested:
            left_out |= {case.image for case in cases}
            logger.warning("%s: the same file as %s of the test set; left out of training", images, tested[digest])
        elif len(cases) > 1 and len({case.label for case in cases}) > 1:
            left_out |= {case.image for case in cases}
            logger.warning("%s: one photograph with the grades %s; left out", images, [case.label for case in cases])
        elif len(cases) > 1:
            left_out |= {case.image for case in cases[1:]}
            logger.warning("%s: one photograph; only the first is kept", images)
    return [case for case in training if case.image not in left_out]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
