"""From a public dataset as it is unpacked to a datalist with a patient-level split."""

from __future__ import annotations

import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Literal

from medkd.data.acdc import CineFrames, acdc_cases, acdc_cine, find_acdc
from medkd.data.cards import Card, PublishedSplit
from medkd.data.chaos import chaos_cases, find_chaos
from medkd.data.datalist_rules import refuse_missing_files
from medkd.data.datalists import Case, Datalist
from medkd.data.idrid import REFERABLE_LABELS, idrid_cases, referable
from medkd.data.make import image_shape
from medkd.data.mm_whs import SLICE_LABELS, mm_whs_slices, mm_whs_volumes
from medkd.data.nnunet import nnunet_label_names, read_json
from medkd.data.splits import keep_one_domain, split_datalist
from medkd.errors import ConfigError, InputError

logger = logging.getLogger(__name__)

SplitChoice = Literal["official", "published", "random"]
VALIDATION_FRACTION, TEST_FRACTION = 0.1, 0.2
"""Of the patients, where the dataset or the literature gives no split."""

_Cases = dict[str, list[Case]]
_WITH_DOMAINS = ("chaos", "ibsi_sts", "mm_whs")


def prepare_dataset(
    card: Card,
    root: str | Path,
    *,
    labeled: int | float | None = None,
    seed: int = 0,
    split: SplitChoice | None = None,
    cine_frames: CineFrames = None,
    modality: str | None = None,
    unpaired: str | None = None,
    referable_only: bool = False,
) -> Datalist:
    """Check a dataset's files against its card and list them, split by patient.

    Headers are read, voxels are not: `medkd data check` does that. (CHAOS and the slices of MM-WHS are read whole the
    first time, because their labels are converted.)

    Args:
        card: the dataset's card.
        root: the dataset's folder; the datalist's paths start from it.
        labeled: how many training patients keep their labels, or as a float below 1 which share of them; the others'
            images become ``unlabeled``. With the published split and the number it is known for, the published
            patients.
        seed: of every random choice.
        split: ``"official"`` tests on the patients the provider set apart (and validates on a tenth of the others),
            ``"published"`` takes the card's, ``"random"`` draws 70 % / 10 % / 20 % of the patients, stratified. By
            default official where there is one, otherwise random.
        cine_frames: ACDC only: frames between the labelled ones that become ``unlabeled``.
        modality: only these of several modalities, comma-separated; by default all, told apart by ``domain``.
        unpaired: the modality to test on where patients have several: then every patient keeps the images of one.
            See :func:`medkd.data.splits.keep_one_domain`.
        referable_only: IDRiD only: two classes, referable from grade 2 (moderate) on, in place of the five grades.

    Raises:
        ConfigError: the card has no layout, or a choice that this dataset does not offer.
        InputError: naming the first file that is missing or does not fit.
    """
    root = Path(os.path.abspath(root))
    if card.layout is None:
        raise ConfigError(f"dataset {card.name}", "has no layout that medkd prepares", "use `medkd data make`")
    if cine_frames is not None and card.layout != "acdc":
        raise ConfigError("--cine", f"{card.name} has no cine", "leave it out")
    if card.layout not in _WITH_DOMAINS:
        for option, value in (("--modality", modality), ("--unpaired", unpaired)):
            if value is not None:
                raise ConfigError(option, f"{card.name} has one modality", "leave it out")
    if referable_only and card.layout != "idrid":
        raise ConfigError("--referable", f"{card.name} has no grades of retinopathy", "leave it out")
    if not root.is_dir():
        raise InputError(root, "is not a folder", card.how_to_get)
    if card.layout == "idrid":
        return _prepare_idrid(card, root, labeled, seed, split, referable_only)
    if card.layout == "mm_whs" and (slices := mm_whs_slices(root)):
        return _prepare_slices(card, root, slices, labeled, split, modality, unpaired)
    names = card.labels
    if card.layout == "chaos":
        found, names = _find_chaos(card, root, modality)
    else:
        found = _find(card, root, cine_frames, modality)
    whole = _datalist(
        card, root, {**found, "training": [*found["training"], *found.get("test", [])], "test": []}, names
    )
    refuse_missing_files(whole)
    _refuse_other_shapes(whole)
    datalist = _split(card, found, whole, labeled, seed, split)
    return datalist if unpaired is None else keep_one_domain(datalist, unpaired, seed=seed)


def _find(card: Card, root: Path, cine_frames: CineFrames, modality: str | None) -> _Cases:
    finders: dict[str | None, Callable[[], _Cases]] = {
        "acdc": lambda: _find_acdc(card, root, cine_frames),
        "msd": lambda: _find_msd(card, root),
        "ibsi_sts": lambda: _find_ibsi_sts(card, root, modality),
        "mm_whs": lambda: _find_mm_whs(card, root, modality),
    }
    return finders[card.layout]()


def _split(
    card: Card, found: _Cases, whole: Datalist, labeled: int | float | None, seed: int, split: SplitChoice | None
) -> Datalist:
    field = "group" if any("group" in (case.model_extra or {}) for case in whole.training) else None
    chosen = split or ("official" if found.get("test") else "random")
    if chosen == "published":
        return _split_as_published(card, whole, labeled, seed, field)
    if chosen == "random":
        return split_datalist(
            whole, labeled=labeled, validation=VALIDATION_FRACTION, test=TEST_FRACTION, seed=seed, stratify_by=field
        )
    if not found.get("test"):
        raise ConfigError(
            "--split", f"{whole.dataset_dir} has no patients set apart for testing", "use random, or published if any"
        )
    official = whole.model_copy(update={"training": found["training"], "test": found["test"]})
    return split_datalist(official, labeled=labeled, validation=VALIDATION_FRACTION, seed=seed, stratify_by=field)


def _datalist(card: Card, root: Path, sections: _Cases, labels: dict[int, str]) -> Datalist:
    return Datalist.model_validate(
        {
            "name": card.name,
            "modality": card.modality,
            "labels": {str(value): name for value, name in sorted(labels.items())},
            "licence": card.licence,
            "reference": card.citation,
            "dataset_dir": root,
            **sections,
        }
    )


def _find_acdc(card: Card, root: Path, cine_frames: CineFrames) -> _Cases:
    folders = find_acdc(root)
    found = {part: [case for folder in folders[part] for case in acdc_cases(root, folder)] for part in folders}
    for case in found["training"]:
        if case.label is None:
            raise InputError(root / case.image, "has no label (_gt) beside it", "unpack the dataset's archive again")
    testing = [case for case in found["testing"] if case.label is not None]
    if len(testing) < len(found["testing"]):
        logger.warning("%d testing frames have no label and are left out", len(found["testing"]) - len(testing))
    _compare_counts(card, {f"{part} patients": len(folders[part]) for part in folders if folders[part]})
    cine = [case for folder in folders["training"] for case in acdc_cine(root, folder, cine_frames)]
    return {"training": found["training"], "test": testing, "unlabeled": cine}


def _find_msd(card: Card, root: Path) -> _Cases:
    bases = [root, *(root / file.unpacks_to for file in card.files if file.unpacks_to)]
    base = next((base for base in bases if (base / "dataset.json").is_file()), None)
    if base is not None:
        pairs, unlabeled = _listed_in_dataset_json(card, base)
    elif (root / "images").is_dir() and (root / "labels").is_dir():
        base = root
        images = sorted(path.name for path in (root / "images").glob("*.nii*") if not path.name.startswith("."))
        pairs, unlabeled = [(f"images/{name}", f"labels/{name}") for name in images], []
    else:
        raise InputError(root, "holds neither dataset.json nor images/ and labels/", card.how_to_get)
    if not pairs:
        raise InputError(base, "lists no labelled image", card.how_to_get)
    _compare_counts(
        card, {"labelled images": len(pairs), **({"unlabelled images": len(unlabeled)} if unlabeled else {})}
    )
    prefix = base.relative_to(root)

    def case(image: str, label: str | None = None) -> Case:
        return Case(
            image=(prefix / image).as_posix(),
            label=None if label is None else (prefix / label).as_posix(),
            patient=_patient(card, root, image),
        )

    return {"training": [case(*pair) for pair in pairs], "unlabeled": [case(image) for image in unlabeled]}


def _listed_in_dataset_json(card: Card, base: Path) -> tuple[list[tuple[str, str]], list[str]]:
    path = base / "dataset.json"
    numbers = sorted(nnunet_label_names(base))
    if numbers != sorted(card.labels):
        raise InputError(
            path, f"has the labels {numbers}, the card {sorted(card.labels)}", "check which dataset this is"
        )
    description = read_json(path)
    try:
        pairs = [(str(entry["image"]), str(entry["label"])) for entry in description.get("training", [])]
        unlabeled = [str(entry["image"] if isinstance(entry, dict) else entry) for entry in description.get("test", [])]
    except (TypeError, KeyError):
        raise InputError(path, 'its "training" or "test" is not a list of images', "take the original file") from None
    return pairs, unlabeled


def _find_ibsi_sts(card: Card, root: Path, modality: str | None) -> _Cases:
    cases = []
    for path in sorted(root.glob("*/*_image.nii.gz")):
        domain = path.name.removesuffix("_image.nii.gz")
        image = path.relative_to(root).as_posix()
        label = image.replace("_image.nii.gz", "_mask.nii.gz")
        cases.append(Case(image=image, label=label, patient=_patient(card, root, image), domain=domain))
    if not cases:
        raise InputError(root, "holds no file like STS_001/CT_image.nii.gz", card.how_to_get)
    _compare_counts(card, {"patients": len({case.patient for case in cases})})
    return _only(modality, {"training": cases})


def _find_mm_whs(card: Card, root: Path, modality: str | None) -> _Cases:
    found = mm_whs_volumes(root)
    if not found:
        problem = "holds neither a file like ct_train_1001_image.nii.gz nor a folder like ct_train_tfs"
        raise InputError(root, problem, card.how_to_get)
    counts = Counter(case.domain for case in found["training"])
    _compare_counts(card, {f"{domain} volumes with labels": counts[domain] for domain in ("CT", "MR")})
    return _only(modality, found)


def _prepare_slices(
    card: Card,
    root: Path,
    found: _Cases,
    labeled: int | float | None,
    split: SplitChoice | None,
    modality: str | None,
    unpaired: str | None,
) -> Datalist:
    """The slices of MM-WHS that PnP-AdaNet released, in the parts they were released in."""
    for option, value in (("--labeled", labeled), ("--split", split), ("--unpaired", unpaired)):
        if value not in (None, "official"):
            problem = "these slices do not say which patient they are of, so only the release's own split is sound"
            raise ConfigError(option, problem, "leave it out, or prepare the challenge's volumes")
    return _datalist(card, root, _only(modality, found), SLICE_LABELS)


def _prepare_idrid(
    card: Card, root: Path, labeled: int | float | None, seed: int, split: SplitChoice | None, referable_only: bool
) -> Datalist:
    """IDRiD's photographs, stratified by class; no patients are published, so each image stands for one."""
    found = idrid_cases(root, card)
    labels = card.labels
    if referable_only:
        found = {section: [referable(case) for case in cases] for section, cases in found.items()}
        labels = REFERABLE_LABELS
    if split == "published":
        raise ConfigError("--split", f"no split of {card.name} is published on its card", "use official or random")
    if split == "random":
        found = {"training": [*found["training"], *found["test"]]}
    datalist = _datalist(card, root, found, labels).model_copy(update={"patients_known": False})
    test = TEST_FRACTION if split == "random" else 0.0
    return split_datalist(
        datalist, labeled=labeled, validation=VALIDATION_FRACTION, test=test, seed=seed, stratify_by="label"
    )


def _find_chaos(card: Card, root: Path, modality: str | None) -> tuple[_Cases, dict[int, str]]:
    series = find_chaos(root)
    if not series:
        raise InputError(root, "holds no folder like CT/1/DICOM_anon or MR/1/T2SPIR/DICOM_anon", card.how_to_get)
    if modality is not None:
        wanted = _wanted(modality, {one.domain for one in series})
        series = [one for one in series if one.domain in wanted]
    for kind in ("CT", "MR"):
        if patients := {one.patient for one in series if one.domain.startswith(kind)}:
            _compare_counts(card, {f"{kind} patients": len(patients)})
    return chaos_cases(root, series)


def _only(modality: str | None, found: _Cases) -> _Cases:
    """The cases of some modalities."""
    if modality is None:
        return found
    wanted = _wanted(modality, {case.domain or "" for cases in found.values() for case in cases})
    return {section: [case for case in cases if case.domain in wanted] for section, cases in found.items()}


def _wanted(modality: str, present: set[str]) -> set[str]:
    wanted = {name.strip() for name in modality.split(",")}
    if missing := sorted(wanted - present):
        raise ConfigError(
            "--modality", f"there is no image of {missing[0]}", f"choose from {', '.join(sorted(present))}"
        )
    return wanted


def _patient(card: Card, root: Path, path: str) -> str:
    match = re.search(card.patient_key or "", path)
    if match is None:
        raise InputError(
            root / path, f"is not named as the card says ({card.patient_key})", "check which dataset this is"
        )
    return match[1]


def _compare_counts(card: Card, found: dict[str, int]) -> None:
    """A part of a dataset is a fair thing to use, so that a difference is told but not refused."""
    for what, count in found.items():
        if what in card.counts and card.counts[what] != count:
            logger.warning("%s: found %d %s, the card says %d", card.name, count, what, card.counts[what])


def _refuse_other_shapes(datalist: Datalist) -> None:
    for _, _, case in datalist.entries():
        image = datalist.resolve(case.image)
        if image.is_dir():  # a DICOM series, read when its label map was made
            continue
        shape = image_shape(image)
        if len(shape) != (3 if case.frame is None else 4):
            raise InputError(image, f"has {len(shape)} dimensions {shape}", "take the original file")
        if isinstance(case.label, str) and image_shape(datalist.resolve(case.label)) != shape:
            problem = f"has the shape {image_shape(datalist.resolve(case.label))}, its image {shape}"
            raise InputError(datalist.resolve(case.label), problem, "take the original files")


def _split_as_published(
    card: Card, whole: Datalist, labeled: int | float | None, seed: int, field: str | None
) -> Datalist:
    published = card.published_split
    if published is None:
        raise ConfigError("--split", f"no split of {card.name} is published on its card", "use random or official")
    _refuse_absent_patients(whole, published)
    sides = {name: set(getattr(published, name)) for name in ("training", "validation", "test")}
    sections = {name: [case for case in whole.training if case.patient in side] for name, side in sides.items()}
    sections["unlabeled"] = [case for case in whole.unlabeled if case.patient in sides["training"]]
    kept = sum(len(cases) for name, cases in sections.items() if name != "unlabeled")
    if kept < len(whole.training):
        logger.info(
            "%d labelled images of patients outside the published split are left out", len(whole.training) - kept
        )
    datalist = whole.model_copy(update=sections)
    if labeled is None:
        return datalist
    named: int | float | Collection[str] = published.labeled if labeled == len(published.labeled) else labeled
    return split_datalist(datalist, labeled=named, seed=seed, stratify_by=field)


def _refuse_absent_patients(whole: Datalist, published: PublishedSplit) -> None:
    present = {case.patient for case in whole.training}
    absent = [who for who in (*published.training, *published.validation, *published.test) if who not in present]
    if absent:
        problem = f"lacks {len(absent)} patients of the published split, {absent[0]} first"
        raise InputError(whole.dataset_dir, problem, "complete the dataset, or use --split random")
