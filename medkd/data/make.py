"""A datalist from any folder: patterns find images and labels, a regular expression finds the patient."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
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
    patient: str,
    images: str | None = None,
    labels: str | None = None,
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
        images: pattern of the image files below ``root`` (``*``, ``?``, ``[…]`` and ``**/``); with a slash at the end,
            of folders that each hold one DICOM series. Not needed for an nnU-Net raw dataset folder, whose
            dataset.json, channel suffixes and splits_final.json are understood.
        labels: pattern of the label files.
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
    who = _Finder(root, "--patient", patient)
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
        }
    )
    return split_datalist(datalist, validation=validation, test=test, seed=seed) if validation or test else datalist


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
