"""Where voxels lie in the patient: which affines are usable, and when two grids are the same."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from nibabel.orientations import aff2axcodes

from medkd.errors import InputError

DIRECTION_TOLERANCE = 1e-4  # difference of unit vectors; float32 noise is below 1e-6
SPACING_TOLERANCE = 1e-3  # relative
ORIGIN_TOLERANCE = 1e-3  # in voxels
SHEAR_TOLERANCE = 1e-2  # cosine between two axes; distances along axes mean nothing beyond it
_SMALLEST_SPACING_MM = 1e-6

Affine = npt.NDArray[np.float64]


def spacing_of(affine: Affine) -> tuple[float, float, float]:
    """Voxel size in mm along X, Y, Z of a (4, 4) affine."""
    x, y, z = np.sqrt((affine[:3, :3] ** 2).sum(axis=0))
    return float(x), float(y), float(z)


def directions_of(affine: Affine) -> npt.NDArray[np.float64]:
    """Unit vectors of the voxel axes as the columns of a (3, 3) matrix."""
    return np.asarray(affine[:3, :3] / np.array(spacing_of(affine)))


def orientation_of(affine: Affine) -> str:
    """Which way X, Y, Z point, for example ``"LPS"`` or ``"RAS"``."""
    return "".join(str(code) for code in aff2axcodes(affine))


def is_rotation(affine: Affine) -> bool:
    """Whether the axes are at right angles, up to float noise, so that a quaternion can hold them."""
    directions = directions_of(affine)
    return bool(np.abs(directions.T @ directions - np.eye(3)).max() < DIRECTION_TOLERANCE)


def check_affine(affine: Affine, where: str | Path, name: str = "affine") -> None:
    """Refuse an affine that does not place voxels in space.

    Args:
        affine: (4, 4), voxel to mm.
        where: the file, for the message.
        name: how the message calls the matrix.

    Raises:
        InputError: for NaN or infinite entries, a zero or singular matrix, a last row other than 0 0 0 1, or shear.
    """
    remedy = "convert the original scan again, or write the right affine into the header"
    if affine.shape != (4, 4):
        raise InputError(where, f"its {name} has shape {affine.shape}, not (4, 4)", remedy)
    if not np.isfinite(affine).all():
        raise InputError(where, f"its {name} holds NaN or infinite numbers", remedy)
    if not np.array_equal(affine[3], (0.0, 0.0, 0.0, 1.0)):
        raise InputError(where, f"the last row of its {name} is {describe(affine[3])}, not (0, 0, 0, 1)", remedy)
    spacing = spacing_of(affine)
    if min(spacing) < _SMALLEST_SPACING_MM:
        raise InputError(where, f"its {name} has voxel size {describe(spacing)} mm", remedy)
    directions = directions_of(affine)
    if abs(np.linalg.det(directions)) < SHEAR_TOLERANCE:
        raise InputError(where, f"its {name} is singular: two axes point the same way", remedy)
    shear = np.abs(directions.T @ directions - np.eye(3)).max()
    if shear > SHEAR_TOLERANCE:
        angle = np.degrees(np.arcsin(min(shear, 1.0)))
        problem = f"its {name} is sheared: two axes are {angle:.2g} degrees off the right angle"
        raise InputError(where, problem, "resample it to a grid with right angles (gantry tilt is one cause)")


def same_spacing(first: Sequence[float], second: Sequence[float]) -> bool:
    """Whether voxel sizes agree to one part in a thousand."""
    return all(abs(a - b) <= SPACING_TOLERANCE * abs(b) for a, b in zip(first, second, strict=True))


def axes_difference(first: Affine, second: Affine, direction_tolerance: float = DIRECTION_TOLERANCE) -> str | None:
    """How voxel size or orientation of two affines differ, with both numbers; ``None`` when they agree."""
    ours, theirs = spacing_of(first), spacing_of(second)
    if not same_spacing(ours, theirs):
        return f"voxel size {describe(ours)} against {describe(theirs)} mm"
    gap = np.abs(directions_of(first) - directions_of(second))
    if gap.max() <= direction_tolerance:
        return None
    if orientation_of(first) != orientation_of(second):
        return f"orientation {orientation_of(first)} against {orientation_of(second)}"
    axis = int(gap.max(axis=0).argmax())
    unit = directions_of(first)[:, axis], directions_of(second)[:, axis]
    return f"direction of {'XYZ'[axis]} {describe(unit[0])} against {describe(unit[1])}"


def origin_difference(first: Affine, second: Affine) -> str | None:
    """How the centers of the first voxels differ, with both positions in mm; ``None`` when they agree."""
    tolerance_mm = ORIGIN_TOLERANCE * min(spacing_of(first))
    if np.abs(first[:3, 3] - second[:3, 3]).max() <= tolerance_mm:
        return None
    return f"origin {describe(first[:3, 3])} against {describe(second[:3, 3])} mm"


def grid_difference(
    first_shape: tuple[int, ...], first: Affine, second_shape: tuple[int, ...], second: Affine
) -> str | None:
    """How two voxel grids differ, with both numbers; ``None`` when they are the same within float noise."""
    if tuple(first_shape) != tuple(second_shape):
        return f"shape {_size(first_shape)} against {_size(second_shape)}"
    return axes_difference(first, second) or origin_difference(first, second)


def describe(values: npt.ArrayLike) -> str:
    """Numbers for a message."""
    return "(" + ", ".join(f"{value:.6g}" for value in np.asarray(values, dtype=float)) + ")"


def _size(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
