"""Short names for cases that differ from each other, fit for file names."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

_IMAGE_SUFFIXES = (".nii.gz", ".nii", ".hdr", ".img", ".mha", ".nrrd", ".dcm", ".png", ".jpg", ".jpeg", ".tif", ".tiff")


def unique_case_names(files: Sequence[tuple[Path, int | None]]) -> list[str]:
    """File names without suffix, with as many parent folders in front as it takes to tell them apart.

    Args:
        files: (path relative to the dataset's folder, frame) of every case, all different.

    Returns:
        One name per file, all different even where case does not count.
    """
    depths = [0] * len(files)
    names = [_name_at_depth(path, frame, 0) for path, frame in files]
    while clashing := _clashing(names):
        grew = False
        for position in clashing:
            path, frame = files[position]
            if depths[position] < len(path.parts) - 1:
                grew = True
                depths[position] += 1
                names[position] = _name_at_depth(path, frame, depths[position])
        if not grew:  # a.nii beside a.nii.gz, a_b/c beside a/b_c: only a mark of the whole path tells them apart
            for position in clashing:
                names[position] += "_" + hashlib.sha256(str(files[position][0]).encode()).hexdigest()[:8]
            return names
    return names


def _clashing(names: Sequence[str]) -> list[int]:
    """Positions of names that are not unique; outputs named after cases must differ on any file system."""
    groups: dict[str, list[int]] = defaultdict(list)
    for position, name in enumerate(names):
        groups[name.casefold()].append(position)
    return [position for group in groups.values() if len(group) > 1 for position in group]


def _name_at_depth(path: Path, frame: int | None, depth: int) -> str:
    suffix = next((suffix for suffix in _IMAGE_SUFFIXES if path.name.lower().endswith(suffix)), "")
    name = path.name[: -len(suffix)] if suffix and path.name.lower() != suffix else path.name
    parents = path.parts[:-1]
    name = "_".join([*parents[max(len(parents) - depth, 0) :], name])
    return name if frame is None else f"{name}_frame{frame}"
