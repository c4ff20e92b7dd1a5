"""What to predict on: files, folders of files, and folders of DICOM series, with a name for each output."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from medkd.data.case_names import unique_case_names
from medkd.data.dicom_slices import is_dicom
from medkd.data.nifti import is_nifti_name, read_nifti_header
from medkd.errors import InputError


@dataclass(frozen=True)
class Source:
    """One volume to predict on.

    Attributes:
        path: NIfTI file, multi-frame DICOM file or DICOM folder.
        frame: of a 4-D NIfTI file, counted from 0.
        name: of its outputs, unique among all sources.
    """

    path: Path
    frame: int | None
    name: str

    @property
    def is_dicom_folder(self) -> bool:
        """Whether it is a DICOM series in a folder."""
        return self.path.is_dir()


def find_sources(inputs: Sequence[str | Path], *, series: str | None = None, deidentify: bool = False) -> list[Source]:
    """Find the volumes behind the inputs of ``predict``; every frame of a 4-D file is one.

    Args:
        inputs: files and folders; folders are searched with their sub-folders.
        series: with a SeriesInstanceUID, a folder stands for that one series wherever its slices lie in it.
        deidentify: name outputs case-0001, case-0002, …

    Raises:
        InputError: an input that does not exist, or holds nothing to predict on.
    """
    found: list[tuple[Path, int | None]] = []
    for given in inputs:
        path = Path(os.path.abspath(given))
        if not path.exists():
            raise InputError(given, "does not exist", "check the path")
        volumes = list(_volumes(path, series))
        if not volumes:
            raise InputError(given, "holds no NIfTI file and no DICOM series", "name a file or another folder")
        found += [volume for volume in volumes if volume not in found]
    if deidentify:
        names = [f"case-{number:04d}" for number in range(1, len(found) + 1)]
    else:
        names = unique_case_names([(path.relative_to(path.anchor), frame) for path, frame in found])
    return [Source(path, frame, name) for (path, frame), name in zip(found, names, strict=True)]


def _volumes(path: Path, series: str | None) -> Iterator[tuple[Path, int | None]]:
    if path.is_file():
        yield from _frames(path)
        return
    if series is not None:
        yield path, None
        return
    for parent, folders, names in os.walk(path):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        files = [Path(parent, name) for name in sorted(names) if not name.startswith(".")]
        nifti = [file for file in files if is_nifti_name(file)]
        for file in nifti:
            if file.suffix.lower() != ".img" or file.with_suffix(".hdr") not in nifti:
                yield from _frames(file)
        if any(file not in nifti and is_dicom(file) for file in files):
            yield Path(parent), None


def _frames(file: Path) -> Iterator[tuple[Path, int | None]]:
    """The frames of a NIfTI file; a file that cannot be read is one case, which will fail by name."""
    count = 1
    if is_nifti_name(file):
        try:
            count = read_nifti_header(file).frames
        except (InputError, OSError):
            count = 1
    if count > 1:
        yield from ((file, frame) for frame in range(count))
    else:
        yield file, None
