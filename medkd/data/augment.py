"""Augmentation at the speed of plain tensors."""

from __future__ import annotations

from typing import Any

from monai.data import get_track_meta, set_track_meta
from monai.transforms import Compose


class PlainCompose(Compose):
    """A ``Compose`` whose transforms work on plain tensors, without tracking affines and applied operations.

    Training needs no geometry once volumes are on one grid, and tracking it triples the time of an augmentation. Do
    not put transforms inside that read the affine (``Spacingd``, ``Orientationd``, ``Invertd``): they come before.

    Args:
        transforms: as for MONAI's ``Compose``.
    """

    def __call__(self, input_: Any, *args: Any, **kwargs: Any) -> Any:
        """Apply the transforms in turn."""
        before = get_track_meta()
        set_track_meta(False)
        try:
            return super().__call__(input_, *args, **kwargs)
        finally:
            set_track_meta(before)
