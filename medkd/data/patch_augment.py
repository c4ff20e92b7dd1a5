"""Albumentations pipelines for patches: on images with their masks, alone or inside MONAI's dictionaries.

Albumentations draws from generators of its own, which neither ``set_determinism`` nor MONAI's ``set_random_state``
reach. The adapter draws one number per item from MONAI's generator and seeds the whole pipeline with it, so that a
patch depends on (seed, epoch, index) alone, whatever the number of workers.
"""

from __future__ import annotations

import os
import random
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform, Randomizable

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # it asks the network for a newer version when imported

import albumentations

from medkd.errors import ConfigError

_MAX_SEED = 2**32
SYMMETRIES = {
    "e": ((1, 0), (0, 1)),
    "r90": ((0, 1), (-1, 0)),
    "r180": ((-1, 0), (0, -1)),
    "r270": ((0, -1), (1, 0)),
    "v": ((1, 0), (0, -1)),
    "hvt": ((0, -1), (-1, 0)),
    "h": ((-1, 0), (0, 1)),
    "t": ((0, 1), (1, 0)),
}
"""Where each flip and turn moves (x, y) about the center, by albumentations' names; r90 turns counterclockwise."""
_KEEP_THE_SHAPE = ("e", "r180", "v", "h")
_FEW_CHANNELS = 4  # what OpenCV interleaves ten times faster than NumPy
_CV_MASKS = (np.uint8, np.int16)  # what OpenCV warps by nearest neighbor, smallest first


class FusedAffine(albumentations.Affine):
    """``albumentations.Affine`` after one of the eight flips and quarter turns, with a single warp for all of it.

    One interpolation instead of one per step is faster and blurs less. Takes the arguments of ``Affine`` (where the
    scale is to be one for both axes say ``keep_ratio``); images and masks only. The flip or turn is drawn uniformly;
    where height and width differ, of those four that keep the shape. For use in :class:`Albumented`, for example
    ``FusedAffine(rotate=(-180, 180), scale=(0.8, 1.25), border_mode=cv2.BORDER_REFLECT_101, p=1)``.
    """

    def get_params_dependent_on_data(self, params: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
        """What albumentations asks for before it warps: ``Affine``'s own, the matrix with the flip or turn before."""
        height, width = params["shape"][:2]
        symmetry = self.py_random.choice([name for name in SYMMETRIES if height == width or name in _KEEP_THE_SHAPE])
        chosen: dict[str, Any] = super().get_params_dependent_on_data(params, data)
        x, y = (width - 1) / 2, (height - 1) / 2
        (a, b), (c, d) = SYMMETRIES[symmetry]
        about_the_center = np.array([[a, b, x - a * x - b * y], [c, d, y - c * x - d * y], [0, 0, 1]])
        return chosen | {"symmetry": symmetry, "matrix": chosen["matrix"] @ about_the_center}

    def apply_to_bboxes(self, bboxes: Any, *args: Any, **params: Any) -> Any:
        """Boxes are not supported."""
        raise NotImplementedError("FusedAffine warps images and masks; use albumentations.D4 and Affine for boxes")

    def apply_to_keypoints(self, keypoints: Any, *args: Any, **params: Any) -> Any:
        """Points are not supported."""
        raise NotImplementedError("FusedAffine warps images and masks; use albumentations.D4 and Affine for points")


class Albumented(MapTransform, Randomizable):
    """Apply an albumentations pipeline to the images of a dictionary, and geometrically alike to their masks.

    Images and masks are channel first, (C, H, W), or masks (H, W), as arrays, tensors or MetaTensors; they come back
    channel first in their own type, MetaTensors as plain tensors since an affine no longer holds. Images keep their
    scale: 8-bit images are 0 to 255, floating-point images 0 to 1, as albumentations expects them. Masks are warped by
    nearest neighbor. All images and masks of an item share every random number.

    Args:
        transforms: albumentations transforms, or one ``Compose`` of them.
        keys: the images.
        mask_keys: the integer masks.
        allow_missing_keys: skip a key that an item does not have.

    Raises:
        ConfigError: transforms that are not albumentations' own, or a key that is both image and mask.
    """

    def __init__(
        self,
        transforms: Sequence[albumentations.BasicTransform | albumentations.BaseCompose] | albumentations.Compose,
        keys: KeysCollection = "image",
        mask_keys: KeysCollection = (),
        allow_missing_keys: bool = False,
    ) -> None:
        MapTransform.__init__(self, keys, allow_missing_keys)
        self.mask_keys: tuple[Hashable, ...] = _as_tuple(mask_keys)
        if both := set(self.keys) & set(self.mask_keys):
            raise ConfigError("Albumented", f"{sorted(map(str, both))} is image and mask", "name each key once")
        steps = (
            [transforms]
            if isinstance(transforms, albumentations.BasicTransform | albumentations.BaseCompose)
            else list(transforms)
        )
        for step in steps:
            if not isinstance(step, albumentations.BasicTransform | albumentations.BaseCompose):
                raise ConfigError(
                    "Albumented", f"{type(step).__name__} is not of albumentations", "give its transforms"
                )
        targets = {f"image_{position}": "image" for position in range(1, len(self.keys))}
        targets |= {f"mask_{position}": "mask" for position in range(len(self.mask_keys))}
        # Shapes are compared by albumentations only for its own names, so _require_one_size does it.
        self.pipeline = albumentations.Compose(steps, additional_targets=targets)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """A copy of the item with its images and masks augmented.

        Raises:
            KeyError: a key is missing.
            ValueError: shapes that differ, types that are not understood, or masks beyond 16 bits.
        """
        item = dict(data)
        images, masks = self._present(item, self.keys), self._present(item, self.mask_keys)
        if not images:
            return item
        given = {_image_name(position): _image_to_rows(key, item[key]) for position, key in enumerate(images)}
        given |= {f"mask_{position}": _mask_to_rows(key, item[key]) for position, key in enumerate(masks)}
        _require_one_size({key: item[key] for key in (*images, *masks)})
        seed = int(self.R.randint(_MAX_SEED, dtype=np.uint32))
        # One generator for all: with set_random_seed every transform would draw the same numbers as the others.
        self.pipeline.set_random_state(np.random.default_rng(seed), random.Random(seed))
        made = self.pipeline(**given)
        for position, key in enumerate(images):
            rows = made[_image_name(position)]
            item[key] = _like(item[key], _channels_first(rows))
        for position, key in enumerate(masks):
            rows = made[f"mask_{position}"]
            item[key] = _like(item[key], rows[None] if item[key].ndim == 3 else rows)
        return item

    def _present(self, item: Mapping[Hashable, Any], keys: Sequence[Hashable]) -> list[Hashable]:
        missing = [key for key in keys if key not in item]
        if missing and not self.allow_missing_keys:
            raise KeyError(f"Albumented: the item has no {missing[0]!r}; its keys are {sorted(map(str, item))}")
        return [key for key in keys if key in item]


def _as_tuple(keys: KeysCollection) -> tuple[Hashable, ...]:
    return (keys,) if isinstance(keys, str) or not isinstance(keys, Sequence) else tuple(keys)


def _image_name(position: int) -> str:
    return "image" if position == 0 else f"image_{position}"


def _array(key: Hashable, value: Any) -> npt.NDArray[Any]:
    if isinstance(value, torch.Tensor):
        return value.detach().as_subclass(torch.Tensor).cpu().numpy()
    if isinstance(value, np.ndarray):
        return value
    raise ValueError(f"Albumented: {key!r} is a {type(value).__name__}, not an array or tensor")


def _require_one_size(values: Mapping[Hashable, Any]) -> None:
    sizes = {key: tuple(getattr(value, "shape", ()))[-2:] for key, value in values.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"Albumented: images and masks differ in size: {sizes}")


def _image_to_rows(key: Hashable, value: Any) -> npt.NDArray[Any]:
    """(C, H, W) to (H, W, C), uint8 or float32."""
    array = _array(key, value)
    if array.ndim != 3:
        raise ValueError(f"Albumented: the image {key!r} has the shape {array.shape}, not (C, H, W)")
    if array.dtype != np.uint8 and not np.issubdtype(array.dtype, np.floating):
        raise ValueError(f"Albumented: the image {key!r} is {array.dtype}; use uint8, or floating point from 0 to 1")
    return _channels_last(array if array.dtype == np.uint8 else array.astype(np.float32))


def _channels_last(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """(C, H, W) to (H, W, C), always a copy: some transforms work in place."""
    if 1 < len(array) <= _FEW_CHANNELS and array.size:
        return cv2.merge(list(array))
    return np.array(np.moveaxis(array, 0, -1), order="C")


def _channels_first(rows: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """(H, W, C) or (H, W) to (C, H, W)."""
    if rows.ndim == 3 and 1 < rows.shape[2] <= _FEW_CHANNELS and rows.size:
        return np.stack(cv2.split(rows))
    return np.ascontiguousarray(np.moveaxis(rows.reshape(*rows.shape[:2], -1), -1, 0))


def _mask_to_rows(key: Hashable, value: Any) -> npt.NDArray[Any]:
    """(1, H, W) or (H, W) to (H, W), in the smallest type that OpenCV warps."""
    array = _array(key, value)
    if array.ndim == 3 and array.shape[0] == 1:
        array = array[0]
    if array.ndim != 2:
        raise ValueError(f"Albumented: the mask {key!r} has the shape {array.shape}, not (1, H, W) or (H, W)")
    if np.issubdtype(array.dtype, np.floating) and not np.array_equal(array, np.round(array)):
        raise ValueError(f"Albumented: the mask {key!r} holds values that are not integers")
    low, high = (array.min(), array.max()) if array.size else (0, 0)
    for dtype in _CV_MASKS:
        if np.iinfo(dtype).min <= low and high <= np.iinfo(dtype).max:
            return np.array(array, dtype=dtype, order="C")
    raise ValueError(f"Albumented: the mask {key!r} holds labels from {low} to {high}; use at most 16 bits")


def _like(original: Any, array: npt.NDArray[Any]) -> Any:
    """The array in the original's kind and type."""
    if isinstance(original, torch.Tensor):
        return torch.from_numpy(np.ascontiguousarray(array)).to(device=original.device, dtype=original.dtype)
    return array.astype(original.dtype, copy=False)
