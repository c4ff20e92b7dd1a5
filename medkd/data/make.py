"""A datalist from any folder: patterns find images and labels, a regular expression finds the patient."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import nibabel as nib

from medkd.data.datalists import Case, Datalist
from medkd.data.nnunet import is_nnunet_folder, nnunet_cases, nnunet_label_names
from medkd.data.splits import split_datalist
from medkd.data.volumes import read_label
from medkd.errors import ConfigError, InputError

logger = logging.getLogger(__name__)

_NIFTI = (".nii", ".nii.gz", ".hdr", ".img")


def make_datalist(
    root: str | Path,
    *,
    patient: str | None = None,
    images: str | None = None,
    labels: str | None = None,
    class_: str | None = None,
    classes: Sequence[str] | None = None,
    domain: str | None = None,
    frames: Literal["all"] | int | None = "all",
    label_names: Mapping[int, str] | None = None,
    channel: int | None = None,
    validation: float = 0.0,
    test: float = 0.0,
    seed: int = 0,
    name: str | None = None,
    modality: str = "",
) -> Datalist:
    """List the images of a folder, with their labels where they have one.

    A label belongs to the image for which the wildcards of the two patterns stand for the same text: with
    ``images="*/CT_image.nii.gz"`` and ``labels="*/CT_mask.nii.gz"`` the folder name. Images without a label become
    ``unlabeled``. No image is copied or changed.

    Args:
        root: the folder; the datalist's paths start from it.
        patient: regular expression searched in each image's path below ``root``, with one group: the patient.
            Images with a class may do without: then each counts as its own patient, and the datalist says that none are
            known.
        images: pattern of the image files below ``root`` (``*``, ``?``, ``[…]`` and ``**/``); with a slash at the end,
            of folders that each hold one DICOM series. Not needed for an nnU-Net raw dataset folder, whose
            dataset.json, channel suffixes and splits_final.json are understood.
        labels: pattern of the label files.
        class_: for photographs and tiles that are of one class as a whole: like ``patient``, for the class. Images in
            whose path it finds nothing become ``unlabeled``.
        classes: the classes in the order of their labels; of two, the second is the positive one. By default those
            found, sorted.
        domain: like ``patient``, for the domain.
        frames: what becomes of unlabeled 4-D files: ``"all"`` frames become a case each; a number takes that many,
            evenly spaced; ``None`` refuses them. The case names its ``frame``; the file stays as it is.
        label_names: integer label to name; by default read from dataset.json, or the values found in the labels.
        channel: which channel of a multi-channel nnU-Net dataset.
        validation: fraction of the labelled patients for ``validation``.
        test: fraction of the labelled patients for ``test``.
        seed: of that choice.
        name: the dataset's name; the folder's by default.
        modality: for example ``"MR"``.

    Raises:
        ConfigError: an unusable pattern or expression.
        InputError: naming the first file that does not fit.
    """
    root = Path(os.path.abspath(root))
    if not root.is_dir():
        raise InputError(root, "is not a folder", "give the folder that holds the images")
    if frames is not None and frames != "all" and frames < 1:
        raise ConfigError("--frames", f"{frames} is not a number of frames", "use all, or 1 or more")
    _refuse_mixed_labels(patient, images, labels, class_, classes)
    if images is None:
        if not is_nnunet_folder(root):
            raise ConfigError(
                "--images", "is missing and the folder is not an nnU-Net dataset", "give a pattern of files"
            )
        if labels is not None:
            raise ConfigError("--labels", "is given without --images", "give both, or none for an nnU-Net dataset")
        found = nnunet_cases(root, channel)
        if label_names is None:
            label_names = nnunet_label_names(root)
    else:
        found = {"training": _pair(root, images, labels)}
    if class_ is not None:
        found["training"], names = _with_classes(root, found["training"], class_, classes)
        label_names = label_names or names
    who = _Finder(root, "--patient", patient) if patient is not None else _without_suffix
    where = _Finder(root, "--domain", domain) if domain is not None else None
    sections: dict[str, list[Case]] = {"training": [], "unlabeled": [], "validation": [], "test": []}
    for section, entries in found.items():
        for case in entries:
            named = case.model_copy(
                update={"patient": who(case.image), "domain": where(case.image) if where else case.domain}
            )
            target = "unlabeled" if section == "training" and named.label is None else section
            sections[target] += _split_frames(root, named, frames)
    if label_names is None:
        label_names = _found_labels(root, [case for cases in sections.values() for case in cases])
    _refuse_fold_leaks(root, sections["training"])
    datalist = Datalist.model_validate(
        {
            "name": root.name if name is None else name,
            "modality": modality,
            "labels": {str(value): text for value, text in sorted(label_names.items())},
            "dataset_dir": root,
            **sections,
            **({} if patient is not None else {"patients_known": False}),
        }
    )
    if not (validation or test):
        return datalist
    stratify_by = "label" if class_ is not None else None
    return split_datalist(datalist, validation=validation, test=test, seed=seed, stratify_by=stratify_by)


def _refuse_mixed_labels(
    patient: str | None, images: str | None, labels: str | None, class_: str | None, classes: Sequence[str] | None
) -> None:
    if class_ is None:
        if patient is None:
            raise ConfigError("--patient", "is missing", "say where in a path the patient is, as in 'case_(\\d+)'")
        if classes is not None:
            raise ConfigError("--classes", "is given without --class", "say where in a path the class is")
    elif labels is not None:
        raise ConfigError("--class", "is given beside --labels", "an image has a class or a label map")
    elif images is None:
        raise ConfigError("--images", "is missing", "give a pattern of files, as in '*/*.png'")


def _with_classes(
    root: Path, cases: list[Case], expression: str, classes: Sequence[str] | None
) -> tuple[list[Case], dict[int, str]]:
    """The cases with their class as label, and the classes' names."""
    finder = _Finder(root, "--class", expression)
    found = {case.image: match[1] for case in cases if (match := finder.pattern.search(case.image)) and match[1]}
    names = list(classes) if classes is not None else sorted(set(found.values()))
    if len(set(names)) < 2:
        problem = f"{expression!r} finds {', '.join(names) or 'nothing'} in {len(cases)} paths"
        raise ConfigError("--class", problem, "two classes or more are needed: correct the expression")
    if unknown := sorted(set(found.values()) - set(names)):
        image = next(image for image, name in found.items() if name == unknown[0])
        raise InputError(root / image, f"is of class {unknown[0]}, which --classes lacks", "name it there")
    if without := len(cases) - len(found):
        logger.info("%d images have no class in their path and are unlabeled", without)
    index = {name: position for position, name in enumerate(names)}
    labeled = [
        case.model_copy(update={"label": index[found[case.image]]}) if case.image in found else case for case in cases
    ]
    return labeled, dict(enumerate(names))


def _without_suffix(path: str) -> str:
    return str(PurePosixPath(path).with_suffix(""))


class _Finder:
    """Finds the one group of a regular expression in a path."""

    def __init__(self, root: Path, option: str, expression: str) -> None:
        self.root = root
        self.option = option
        try:
            self.pattern = re.compile(expression)
        except re.error as error:
            raise ConfigError(option, f"{expression!r} is not a regular expression ({error})", "correct it") from None
        if self.pattern.groups != 1:
            problem = f"{expression!r} has {self.pattern.groups} groups"
            raise ConfigError(option, problem, r"put one pair of brackets around what to take, as in 'case_(\d+)'")

    def __call__(self, path: str) -> str:
        match = self.pattern.search(path)
        if match is None or not match[1]:
            raise InputError(
                path, f"{self.option} {self.pattern.pattern!r} finds nothing in it", "correct the expression"
            )
        return match[1]


def _pair(root: Path, images: str, labels: str | None) -> list[Case]:
    image_pattern = _compile_glob("--images", images)
    paths = list(_walk(root))
    label_of: dict[tuple[str, ...], str] = {}
    if labels is not None:
        label_pattern = _compile_glob("--labels", labels)
        if label_pattern.groups != image_pattern.groups:
            problem = f"{labels} has {label_pattern.groups} wildcards and --images {images} has {image_pattern.groups}"
            raise ConfigError(
                "--labels", problem, "a pair is known by what its wildcards stand for: use as many in both"
            )
        label_of = {match.groups(): path for path in paths if (match := label_pattern.fullmatch(path))}
        if not label_of:
            raise InputError(root, f"no file matches --labels {labels}", "correct the pattern")
    label_files = set(label_of.values())
    cases = [
        Case(image=path.rstrip("/"), label=label_of.pop(match.groups(), None))
        for path in paths
        if path not in label_files and (match := image_pattern.fullmatch(path))
    ]
    if not cases:
        raise InputError(root, f"no file matches --images {images}", "correct the pattern")
    if label_of:
        key, path = next(iter(label_of.items()))
        problem = f"is a label without an image (wildcards {', '.join(key)}; {len(label_of)} such in all)"
        raise InputError(root / path, problem, "correct the patterns")
    return cases


def _compile_glob(option: str, pattern: str) -> re.Pattern[str]:
    """A regular expression with one group for every wildcard of the pattern."""
    if pattern.startswith("/") or ".." in pattern.split("/"):
        raise ConfigError(option, f"{pattern} leaves the folder", "give a pattern that starts from ROOT")
    expression, position = "", 0
    pattern = pattern.removeprefix("./")
    for wildcard in re.finditer(r"\*\*/|\*+|\?|\[[^\]]+\]", pattern):
        expression += re.escape(pattern[position : wildcard.start()])
        position = wildcard.end()
        text = wildcard[0]
        if text == "**/":
            expression += "((?:[^/]+/)*)"
        elif text[0] == "[":
            expression += (
                f"([{'^' if text[1] in '!^' else ''}{re.escape(text[1:-1].lstrip('!^')).replace(chr(92) + '-', '-')}])"
            )
        else:
            expression += "([^/]*)" if text[0] == "*" else "([^/])"
    return re.compile(expression + re.escape(pattern[position:]))


def _walk(root: Path) -> Iterator[str]:
    """Paths below root in a fixed order, folders with a slash at the end, without hidden ones (macOS's ._files too)."""
    visited = set()
    for folder, folders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if real in visited:  # a link back up
            folders.clear()
            continue
        visited.add(real)
        prefix = Path(folder).relative_to(root).as_posix().removeprefix(".")
        prefix = f"{prefix}/" if prefix else ""
        yield from (f"{prefix}{name}/" for name in folders)
        yield from (f"{prefix}{name}" for name in sorted(files) if not name.startswith("."))


def _split_frames(root: Path, case: Case, frames: Literal["all"] | int | None) -> list[Case]:
    shape = image_shape(root / case.image)
    if len(shape) <= 3:
        return [case]
    if len(shape) > 4:
        raise InputError(root / case.image, f"has {len(shape)} dimensions {shape}", "give volumes of 2 to 4 dimensions")
    count = shape[3]
    if count == 1:
        return [case.model_copy(update={"frame": 0})]
    if case.label is not None:
        raise InputError(
            root / case.image, f"has {count} frames but one label", "give the labelled frame as its own file"
        )
    if frames is None:
        raise InputError(root / case.image, f"has {count} frames", "split it with --frames all")
    wanted = count if frames == "all" else min(frames, count)
    return [case.model_copy(update={"frame": index * count // wanted}) for index in range(wanted)]


def image_shape(path: Path) -> tuple[int, ...]:
    """The shape that a NIfTI header gives; ``()`` for what is not NIfTI.

    Raises:
        InputError: the header cannot be read.
    """
    if not path.name.lower().endswith(_NIFTI):
        return ()
    try:
        image: Any = nib.load(path)
        return tuple(int(size) for size in image.shape)
    except Exception as error:  # whatever a damaged header makes nibabel raise
        raise InputError(path, f"cannot be read as NIfTI ({type(error).__name__})", "remove or replace it") from None


def _found_labels(root: Path, cases: list[Case]) -> dict[int, str]:
    """Names for the values that occur; reads every label."""
    values: set[int] = set()
    for case in cases:
        if isinstance(case.label, str):
            values.update(int(value) for value in set(read_label(root / case.label).array.ravel().tolist()))
    if not values:
        return {}
    names = {value: f"label {value}" for value in sorted(values | {0})} | {0: "background"}
    logger.info("labels found: %s; give names for better tables", sorted(names))
    return names


def _refuse_fold_leaks(root: Path, training: list[Case]) -> None:
    fold_of: dict[str, int | None] = {}
    for case in training:
        if fold_of.setdefault(case.patient, case.fold) != case.fold:
            problem = f"patient {case.patient} is in folds {fold_of[case.patient]} and {case.fold} (leakage)"
            raise InputError(root / "splits_final.json", problem, "move it away and use `medkd data split --folds`")
