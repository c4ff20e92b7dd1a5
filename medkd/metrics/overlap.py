"""Overlap of two label maps: voxel counts and Dice per class."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

LabelMap = npt.NDArray[np.integer[Any]]


@dataclass(frozen=True)
class Overlap:
    """Voxel counts of one class.

    Args:
        intersection: voxels of the class in both maps.
        pred: voxels of the class in the prediction.
        reference: voxels of the class in the reference.
    """

    intersection: int
    pred: int
    reference: int

    @property
    def dice(self) -> float:
        """2 |A ∩ B| / (|A| + |B|); NaN when the class is in neither map, 0 when it is in only one."""
        total = self.pred + self.reference
        return 2.0 * self.intersection / total if total else float("nan")


def dice(pred: npt.ArrayLike, reference: npt.ArrayLike, *, classes: Iterable[int]) -> dict[int, float]:
    """Dice coefficient of each class.

    Args:
        pred: (Z, Y, X) or (Y, X) integer label map.
        reference: integer label map of the same shape.
        classes: label values to score; list 0 to score the background too.

    Returns:
        Class to Dice in [0, 1]; 0 when only one map has the class, NaN when neither has.

    Raises:
        ValueError: for other shapes or dtypes, or without classes.

    Source: Dice 1945, Ecology 26(3).
    """
    return {label: counts.dice for label, counts in overlap(pred, reference, classes=classes).items()}


def overlap(pred: npt.ArrayLike, reference: npt.ArrayLike, *, classes: Iterable[int]) -> dict[int, Overlap]:
    """Voxel counts of each class in the prediction, the reference and both; arguments and errors as in `dice`."""
    pred_map, reference_map = checked_label_maps(pred, reference)
    counts = {}
    for label in checked_classes(classes):
        in_pred = pred_map == label
        in_reference = reference_map == label
        counts[label] = Overlap(
            intersection=int(np.count_nonzero(in_pred & in_reference)),
            pred=int(np.count_nonzero(in_pred)),
            reference=int(np.count_nonzero(in_reference)),
        )
    return counts


def checked_label_maps(pred: npt.ArrayLike, reference: npt.ArrayLike) -> tuple[LabelMap, LabelMap]:
    """Both arguments as integer arrays, narrowed to uint8 where they fit (boolean masks become 0 and 1).

    Raises:
        ValueError: unless both are 2-D or 3-D integer arrays of one shape with at least one voxel.
    """
    arrays = []
    for name, given in (("pred", pred), ("reference", reference)):
        array = np.asarray(given)
        if array.dtype == np.bool_:
            array = array.view(np.uint8)
        if not np.issubdtype(array.dtype, np.integer):
            raise ValueError(f"{name} must be an integer label map, not {array.dtype}; take the argmax or round first")
        if array.ndim not in (2, 3) or array.size == 0:
            raise ValueError(f"{name} must be (Z, Y, X) or (Y, X) with at least one voxel, not {array.shape}")
        if array.itemsize > 1 and array.min() >= 0 and array.max() <= 255:
            array = array.astype(np.uint8)  # every later comparison reads this much less memory
        arrays.append(array)
    if arrays[0].shape != arrays[1].shape:
        raise ValueError(f"pred {arrays[0].shape} and reference {arrays[1].shape} must have the same shape")
    return arrays[0], arrays[1]


def checked_classes(classes: Iterable[int]) -> list[int]:
    """The label values as distinct ints in the order given.

    Raises:
        ValueError: if there is none, or one is not an integer.
    """
    labels = list(classes)
    if not labels:
        raise ValueError("classes is empty; name at least one label value to score")
    for label in labels:
        if int(label) != label:
            raise ValueError(f"classes must be integers, not {label!r}")
    return list(dict.fromkeys(int(label) for label in labels))
