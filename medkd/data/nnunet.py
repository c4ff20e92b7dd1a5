"""nnU-Net's raw dataset folders: imagesTr, labelsTr, imagesTs, dataset.json and, if there, splits_final.json."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

from medkd.data.datalists import Case
from medkd.errors import ConfigError, InputError

_CHANNEL = re.compile(r"(?P<case>.+)_(?P<channel>\d{4})")


def is_nnunet_folder(root: Path) -> bool:
    """Whether the folder is laid out as nnU-Net's raw data."""
    return (root / "dataset.json").is_file() and (root / "imagesTr").is_dir()


def nnunet_cases(root: Path, channel: int | None = None) -> dict[str, list[Case]]:
    """The cases of imagesTr as ``training`` and of imagesTs as ``test``; folds as in splits_final.json.

    Args:
        root: a folder as :func:`is_nnunet_folder` accepts.
        channel: which channel to take where there are several.

    Raises:
        ConfigError: several channels and none chosen, or one that is not there.
        InputError: a file that does not fit the layout, named.
    """
    description = read_json(root / "dataset.json")
    if not isinstance(description, dict):
        raise InputError(root / "dataset.json", "is not a JSON object", "correct or replace it")
    ending = description.get("file_ending", ".nii.gz")
    if not isinstance(ending, str) or not ending.startswith("."):
        raise InputError(root / "dataset.json", f'"file_ending" is {ending!r}', 'write it as in ".nii.gz"')
    count = max(len(description.get("channel_names") or description.get("modality") or {}), 1)
    found = {
        "training": _cases(root, "imagesTr", "labelsTr", ending, count, channel),
        "test": _cases(root, "imagesTs", "labelsTs", ending, count, channel),
    }
    if not found["training"]:
        raise InputError(root / "imagesTr", f"holds no *{ending} file", "check dataset.json's file_ending")
    splits = root / "splits_final.json"
    if splits.is_file():
        fold_of = _read_folds(splits, set(found["training"]))
        for name, case in found["training"].items():
            found["training"][name] = case.model_copy(update={"fold": fold_of.get(name)})
    return {section: list(cases.values()) for section, cases in found.items()}


def nnunet_label_names(root: Path) -> dict[int, str]:
    """Label names of dataset.json, in version 2's form (name to integer) or Decathlon's (integer to name).

    Raises:
        InputError: regions or an ignore label, which have no meaning as plain classes.
    """
    path = root / "dataset.json"
    description = read_json(path)
    labels = description.get("labels") if isinstance(description, dict) else None
    if not isinstance(labels, dict) or not labels:
        raise InputError(path, 'has no "labels"', "add them, or give label names")
    names: dict[int, str] = {}
    for key, value in labels.items():
        if isinstance(value, str) and key.isdecimal():
            number, name = int(key), value
        elif isinstance(value, int) and not isinstance(value, bool):
            number, name = value, key
        else:
            raise InputError(path, f'label "{key}" is {value!r}, a region', "give label names for the plain labels")
        if name == "ignore":
            raise InputError(path, "has an ignore label, which is not a class", "remove those voxels' cases first")
        if number in names or number < 0:
            raise InputError(path, f'label "{name}" has the number {number}, which is taken or negative', "correct it")
        names[number] = name
    return names


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        InputError: unreadable or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(path, f"cannot be read as JSON ({type(error).__name__})", "correct or replace it") from None


def _cases(
    root: Path, images: str, labels: str, ending: str, channel_count: int, channel: int | None
) -> dict[str, Case]:
    channels: dict[str, dict[int | None, str]] = defaultdict(dict)
    name: str
    number: int | None
    folder = root / images
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.name.startswith(".") or not path.name.endswith(ending):
            continue
        stem = path.name.removesuffix(ending)
        match = _CHANNEL.fullmatch(stem)
        if match and int(match["channel"]) < channel_count:
            name, number = match["case"], int(match["channel"])
        else:  # case_0023 without a channel suffix, as in the Decathlon's own folders
            name, number = stem, None
        channels[name][number] = f"{images}/{path.name}"
    cases = {}
    for name, files in channels.items():
        label = f"{labels}/{name}{ending}"
        cases[name] = Case(
            image=_choose_channel(folder / name, files, channel),
            label=label if (root / label).is_file() else None,
        )
    return cases


def _choose_channel(where: Path, files: dict[int | None, str], channel: int | None) -> str:
    if channel is not None:
        if channel not in files and set(files) != {None}:
            raise InputError(where, f"has no channel {channel}", f"choose one of {sorted(map(str, files))}")
        return files.get(channel) or files[None]
    if len(files) > 1:
        raise ConfigError("--channel", f"{where} has {len(files)} channels", "choose one, for example --channel 0")
    return next(iter(files.values()))


def _read_folds(path: Path, known: set[str]) -> dict[str, int]:
    splits = read_json(path)
    fold_of: dict[str, int] = {}
    try:
        for fold, split in enumerate(splits):
            for name in split["val"]:
                if name not in known:
                    raise InputError(path, f'fold {fold} names "{name}", which imagesTr lacks', "correct the file")
                if fold_of.setdefault(name, fold) != fold:
                    raise InputError(path, f'"{name}" is validated on in two folds', "move the file away")
    except (TypeError, KeyError):
        raise InputError(path, "is not a list of {train, val}", "correct the file or move it away") from None
    return fold_of
