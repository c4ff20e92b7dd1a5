"""Distances between the surfaces of two label maps: HD95, ASSD and surface Dice.

The surface of a mask is the mask minus its erosion by the 6-neighbourhood (4-neighbourhood in 2-D); the outside of
the array counts as background, so a structure cut by the image border has surface there. Distances run between
voxel centers, in the unit of the spacing.

| prediction | reference | HD95, ASSD | surface Dice |
|---|---|---|---|
| empty | non-empty | inf | 0 |
| non-empty | empty | inf | 0 |
| empty | empty | NaN | NaN |
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage
from scipy.spatial import cKDTree

from medkd.metrics.overlap import LabelMap, checked_classes, checked_label_maps

Mask = npt.NDArray[np.bool_]
Distances = npt.NDArray[np.float64]

HAUSDORFF_PERCENTILE = 95.0

# A tree query costs about 0.5 to 4 µs a point and a distance transform 0.1 to 0.25 µs a voxel (scipy 1.17, one core),
# so the transform pays only where a fifth of the box or more is to be queried: speckle and noise.
_QUERIES_PER_VOXEL_FOR_TRANSFORM = 0.2


@dataclass(frozen=True)
class SurfaceScores:
    """What one pass over the surfaces of one class gives.

    Args:
        hd95: 95 % Hausdorff distance, in the unit of the spacing.
        assd: average symmetric surface distance, in the unit of the spacing.
        surface_dice: share of both surfaces within the tolerance of the other, in [0, 1].
    """

    hd95: float
    assd: float
    surface_dice: float


def hd95_mm(
    pred: npt.ArrayLike, reference: npt.ArrayLike, *, spacing_mm: Sequence[float], classes: Iterable[int]
) -> dict[int, float]:
    """95 % Hausdorff distance of each class.

    The larger of the two directed 95th percentiles of the distances between surface voxels. The percentile
    interpolates linearly between order statistics (numpy's ``"linear"``, Hyndman and Fan's type 7), as MONAI's does.
    Other tools pool both directions or weight by surface area and give other numbers.

    Args:
        pred: (Z, Y, X) or (Y, X) integer label map.
        reference: integer label map of the same shape.
        spacing_mm: voxel size along each array axis, in mm (ones give pixels).
        classes: label values to score.

    Returns:
        Class to distance in mm; inf when only one map has the class, NaN when neither has.

    Raises:
        ValueError: for other shapes, dtypes or spacings, or without classes.

    Source: Huttenlocher et al. 1993, the directed distances of section 2 with a percentile for the maximum.
    """
    scores = surface_scores(pred, reference, spacing_mm=spacing_mm, classes=classes)
    return {label: score.hd95 for label, score in scores.items()}


def assd_mm(
    pred: npt.ArrayLike, reference: npt.ArrayLike, *, spacing_mm: Sequence[float], classes: Iterable[int]
) -> dict[int, float]:
    """Average symmetric surface distance of each class: the mean over the surface voxels of both maps, pooled.

    Arguments, empty cases and errors as in `hd95_mm`.

    Source: Heimann et al. 2009, 10.1109/TMI.2009.2013851, section II-C.
    """
    scores = surface_scores(pred, reference, spacing_mm=spacing_mm, classes=classes)
    return {label: score.assd for label, score in scores.items()}


def surface_dice(
    pred: npt.ArrayLike,
    reference: npt.ArrayLike,
    *,
    spacing_mm: Sequence[float],
    classes: Iterable[int],
    tolerance_mm: float,
) -> dict[int, float]:
    """Normalized surface Dice of each class: the share of the surface voxels of both maps within the tolerance.

    Surface voxels count equally, as in MONAI's `compute_surface_dice(use_subvoxels=False)`. Distance and tolerance are
    compared in single precision, so that three voxels of 0.1 mm lie within 0.3 mm.

    Args:
        pred: (Z, Y, X) or (Y, X) integer label map.
        reference: integer label map of the same shape.
        spacing_mm: voxel size along each array axis, in mm.
        classes: label values to score.
        tolerance_mm: accepted distance in mm, at least 0.

    Returns:
        Class to share in [0, 1]; 0 when only one map has the class, NaN when neither has.

    Raises:
        ValueError: for other shapes, dtypes, spacings or tolerances, or without classes.

    Source: Nikolov et al. 2018, arXiv:1809.04430, with voxel counts in place of surface areas.
    """
    scores = surface_scores(pred, reference, spacing_mm=spacing_mm, classes=classes, tolerance_mm=tolerance_mm)
    return {label: score.surface_dice for label, score in scores.items()}


def surface_scores(
    pred: npt.ArrayLike,
    reference: npt.ArrayLike,
    *,
    spacing_mm: Sequence[float],
    classes: Iterable[int],
    tolerance_mm: float = 1.0,
) -> dict[int, SurfaceScores]:
    """HD95, ASSD and surface Dice of each class from one pass over its surfaces; arguments as in `surface_dice`."""
    pred_map, reference_map = checked_label_maps(pred, reference)
    spacing = checked_spacing(spacing_mm, pred_map.ndim)
    if not (np.isfinite(tolerance_mm) and tolerance_mm >= 0):
        raise ValueError(f"tolerance_mm must be finite and at least 0, not {tolerance_mm}")
    if pred_map.flags.f_contiguous and reference_map.flags.f_contiguous:  # as nibabel loads; distances do not mind
        pred_map, reference_map, spacing = pred_map.T, reference_map.T, spacing[::-1]
    pred_map, reference_map = np.ascontiguousarray(pred_map), np.ascontiguousarray(reference_map)
    return {
        label: _scores_of_class(pred_map, reference_map, label, spacing, tolerance_mm)
        for label in checked_classes(classes)
    }


def surface_mask(mask: Mask) -> Mask:
    """The surface voxels of a boolean mask, same shape: those with a face neighbor outside of the mask."""
    padded = np.pad(mask, 1)
    eroded = mask.copy()
    for axis, length in enumerate(mask.shape):
        for start in (0, 2):
            window = [slice(1, -1)] * mask.ndim
            window[axis] = slice(start, start + length)
            eroded &= padded[tuple(window)]
    return mask & ~eroded


def checked_spacing(spacing_mm: Sequence[float], dimensions: int) -> Distances:
    """The spacing as float64, one positive finite number per axis.

    Raises:
        ValueError: for another length, or for a number that is not positive and finite.
    """
    spacing = np.asarray(spacing_mm, dtype=np.float64)
    if spacing.shape != (dimensions,):
        raise ValueError(f"spacing_mm {spacing_mm} must have one number per axis of a {dimensions}-D label map")
    if not np.all(np.isfinite(spacing) & (spacing > 0)):
        raise ValueError(f"spacing_mm {spacing_mm} must be positive and finite")
    return spacing


def _scores_of_class(
    pred: LabelMap, reference: LabelMap, label: int, spacing: Distances, tolerance_mm: float
) -> SurfaceScores:
    in_pred, in_reference = pred == label, reference == label
    box = _bounding_box(in_pred | in_reference)
    if box is None:
        return SurfaceScores(hd95=float("nan"), assd=float("nan"), surface_dice=float("nan"))
    pred_surface, reference_surface = surface_mask(in_pred[box]), surface_mask(in_reference[box])
    if not (pred_surface.any() and reference_surface.any()):
        return SurfaceScores(hd95=float("inf"), assd=float("inf"), surface_dice=0.0)
    directed = (
        _distances(pred_surface, reference_surface, spacing),
        _distances(reference_surface, pred_surface, spacing),
    )
    pooled = np.concatenate(directed)
    return SurfaceScores(
        hd95=max(float(np.percentile(distances, HAUSDORFF_PERCENTILE)) for distances in directed),
        assd=float(pooled.mean()),
        surface_dice=float(np.mean(pooled.astype(np.float32) <= np.float32(tolerance_mm))),
    )


def _bounding_box(mask: Mask) -> tuple[slice, ...] | None:
    """The smallest box around the true voxels; None when there is none."""
    box = []
    # Collapsing one leading axis at a time leaves ever smaller projections to look at.
    flat: Any = mask
    for _ in range(mask.ndim - 1):
        box.append(_true_range(flat.reshape(len(flat), -1).any(axis=1)))
        flat = flat.any(axis=0)
    box.append(_true_range(flat))
    return None if None in box else tuple(side for side in box if side is not None)


def _true_range(line: Mask) -> slice | None:
    positions = np.flatnonzero(line)
    return slice(int(positions[0]), int(positions[-1]) + 1) if positions.size else None


def _distances(start: Mask, target: Mask, spacing: Distances) -> Distances:
    """(N,) distance from each true voxel of ``start`` to the nearest true voxel of ``target``, in no order."""
    distances = np.zeros(np.count_nonzero(start))
    apart = np.argwhere(start & ~target)  # shared voxels are at distance 0 and need no search
    if len(apart) == 0:
        return distances
    if len(apart) < _QUERIES_PER_VOXEL_FOR_TRANSFORM * start.size:
        tree = cKDTree(np.argwhere(target) * spacing, balanced_tree=False, compact_nodes=False)
        distances[: len(apart)] = tree.query(apart * spacing)[0]
    else:
        nearest = ndimage.distance_transform_edt(
            ~target, sampling=spacing, return_distances=False, return_indices=True
        )[(slice(None), *apart.T)]
        distances[: len(apart)] = np.linalg.norm((apart - nearest.T) * spacing, axis=1)
    return distances
