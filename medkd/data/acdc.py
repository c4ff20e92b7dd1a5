"""ACDC's native folders: one per patient, with Info.cfg, the labelled frames and the whole cine."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from medkd.data.datalists import Case
from medkd.data.make import image_shape
from medkd.errors import InputError

CineFrames = Literal["all"] | int | None
_PATIENT = re.compile(r"patient\d{3}")
_UNPACK = "unpack the dataset's archive again"


def find_acdc(root: Path) -> dict[str, list[Path]]:
    """The patients' folders of ``training`` and ``testing``, wherever below root the archive left them.

    Raises:
        InputError: there are none.
    """
    for base in (root, root / "database", root / "ACDC", root / "ACDC" / "database"):
        folders = {part: _patient_folders(base / part) for part in ("training", "testing")}
        if not any(folders.values()):
            folders = {"training": _patient_folders(base), "testing": []}
        if any(folders.values()):
            return folders
    raise InputError(root, "holds no folder like training/patient001", "give the folder the archive was unpacked in")


def acdc_cases(root: Path, folder: Path) -> list[Case]:
    """The end-diastolic and the end-systolic frame of a patient.

    Args:
        root: what paths are relative to.
        folder: the patient's.

    Returns:
        Cases with ``group`` (pathology, if Info.cfg gives it) and ``phase`` (``ED`` or ``ES``). ``label`` is ``None``
        where the label's file is not there.

    Raises:
        InputError: Info.cfg or an image is missing or broken.
    """
    info = _read_info(folder / "Info.cfg")
    cases = []
    for phase in ("ED", "ES"):
        stem = f"{folder.name}_frame{_frame_number(folder, info, phase):02}"
        image = _existing(folder, stem)
        if image is None:
            raise InputError(folder / f"{stem}.nii.gz", "does not exist, but Info.cfg names it", _UNPACK)
        label = _existing(folder, f"{stem}_gt")
        cases.append(
            Case.model_validate(
                {
                    "image": image.relative_to(root).as_posix(),
                    "label": None if label is None else label.relative_to(root).as_posix(),
                    "patient": folder.name,
                    "phase": phase,
                    **_group(info),
                }
            )
        )
    return cases


def acdc_cine(root: Path, folder: Path, frames: CineFrames) -> list[Case]:
    """Frames of a patient's cine other than the labelled two, as cases that stay in the 4-D file.

    Args:
        root: what paths are relative to.
        folder: the patient's.
        frames: ``"all"``, how many (evenly spaced), or ``None`` for none.

    Raises:
        InputError: the cine is missing, broken or shorter than Info.cfg says.
    """
    if frames is None:
        return []
    cine = _existing(folder, f"{folder.name}_4d")
    if cine is None:
        raise InputError(folder / f"{folder.name}_4d.nii.gz", "does not exist", _UNPACK)
    info = _read_info(folder / "Info.cfg")
    labeled = {_frame_number(folder, info, phase) - 1 for phase in ("ED", "ES")}
    shape = image_shape(cine)
    if len(shape) != 4 or shape[3] <= max(labeled):
        raise InputError(cine, f"has the shape {shape}, without the frames that Info.cfg names", _UNPACK)
    others = [frame for frame in range(shape[3]) if frame not in labeled]
    wanted = len(others) if frames == "all" else min(frames, len(others))
    image = cine.relative_to(root).as_posix()
    shared = {"image": image, "patient": folder.name, "phase": "cine", **_group(info)}
    chosen = (others[index * len(others) // wanted] for index in range(wanted))
    return [Case.model_validate({**shared, "frame": frame}) for frame in chosen]


def _group(info: dict[str, str]) -> dict[str, str]:
    return {"group": info["Group"]} if info.get("Group") else {}


def _patient_folders(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return [entry for entry in sorted(folder.iterdir()) if entry.is_dir() and _PATIENT.fullmatch(entry.name)]


def _existing(folder: Path, stem: str) -> Path | None:
    return next((path for path in (folder / f"{stem}.nii.gz", folder / f"{stem}.nii") if path.is_file()), None)


def _read_info(path: Path) -> dict[str, str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        raise InputError(path, "is missing or unreadable", _UNPACK) from None
    pairs = (line.partition(":") for line in lines if ":" in line)
    return {key.strip(): value.strip() for key, _, value in pairs}


def _frame_number(folder: Path, info: dict[str, str], phase: str) -> int:
    number = info.get(phase, "")
    if not (number.isascii() and number.isdecimal() and int(number) > 0):
        raise InputError(folder / "Info.cfg", f"says {phase}: {number or '(nothing)'}, not a frame's number", _UNPACK)
    return int(number)
