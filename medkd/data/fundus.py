"""Photographs of the back of the eye: find the round field of view, and bring all to one diameter."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform

from medkd.errors import ConfigError, InputError

_DARKEST = 10.0  # of 255: what is darker is never fundus
_RELATIVE = 0.12  # of the brightest hundredth
_FILLED = 0.97  # share of the image from which on there is no dark surround
_LEAST = 0.05  # share of the image below which a bright spot is no fundus


@dataclass(frozen=True)
class FundusCircle:
    """The field of view in pixels of its image; a camera often cuts its top and bottom off."""

    x: float
    y: float
    diameter_px: float


def find_fundus(pixels: npt.NDArray[Any]) -> FundusCircle:
    """The smallest circle around the largest bright region.

    Bright is what exceeds 12 % of the brightest hundredth, so that dark photographs need no other threshold. In an
    image without dark surround the field of view is taken to be as wide as the image's longer side.

    Args:
        pixels: (H, W) or (H, W, C), 0 to 255.

    Raises:
        InputError: If nothing but a small spot is bright.
    """
    values = np.asarray(pixels, dtype=np.float32)
    values = values.max(axis=2) if values.ndim == 3 else values
    height, width = values.shape
    bright = cv2.medianBlur(values, 5)  # removes specks without widening the circle
    mask = (bright > max(_DARKEST, _RELATIVE * float(np.percentile(bright, 99)))).astype(np.uint8)
    count, parts, statistics, _ = cv2.connectedComponentsWithStats(mask)
    largest = 1 + int(statistics[1:, cv2.CC_STAT_AREA].argmax()) if count > 1 else 0
    share = statistics[largest, cv2.CC_STAT_AREA] / (height * width) if largest else 0.0
    if share < _LEAST:
        raise InputError("fundus image", "has no round bright field of view", "leave this image out")
    if share > _FILLED:
        return FundusCircle((width - 1) / 2, (height - 1) / 2, float(max(height, width)))
    outlines, _ = cv2.findContours((parts == largest).astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    (x, y), radius = cv2.minEnclosingCircle(np.concatenate(outlines))
    return FundusCircle(float(x), float(y), 2 * float(radius))


def crop_fundus(pixels: npt.NDArray[Any], diameter_px: int, circle: FundusCircle | None = None) -> npt.NDArray[Any]:
    """Cut the circle out, scaled to a diameter; what lies outside of it, writing for example, becomes 0.

    Args:
        pixels: (H, W, C), 0 to 255, uint8 or floating point.
        diameter_px: side of the square that comes out.
        circle: where; found by :func:`find_fundus` if None.

    Returns:
        (diameter_px, diameter_px, C) of the type given; averaged over areas where it shrinks.
    """
    circle = circle or find_fundus(pixels)
    side = max(1, round(circle.diameter_px))
    left, top = round(circle.x - (side - 1) / 2), round(circle.y - (side - 1) / 2)
    height, width = pixels.shape[:2]
    square = np.zeros((side, side, pixels.shape[2]), dtype=pixels.dtype)
    rows, columns = slice(max(top, 0), min(top + side, height)), slice(max(left, 0), min(left + side, width))
    square[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left] = pixels[rows, columns]
    method = cv2.INTER_AREA if side > diameter_px else cv2.INTER_LINEAR
    scaled = cv2.resize(square, (diameter_px, diameter_px), interpolation=method).reshape(diameter_px, diameter_px, -1)
    offset = np.arange(diameter_px) - (diameter_px - 1) / 2
    outside = np.hypot(offset[:, None], offset[None, :]) > diameter_px / 2
    scaled[outside] = 0
    return scaled


class CropFundusd(MapTransform):
    """Bring fundus photographs to one diameter: find the circle, center it, scale it, blacken the rest.

    Takes (C, H, W), 0 to 255, as arrays or tensors (uint8 or floating point); gives (C, D, D) of the same type,
    MetaTensors as plain tensors since their affine no longer holds.

    Args:
        keys: the photographs.
        diameter_px: D, the diameter of the field of view and the side of the image that comes out.
        allow_missing_keys: pass over keys that an item lacks.

    Raises:
        ConfigError: If the diameter is below 1.
    """

    def __init__(self, keys: KeysCollection, diameter_px: int, allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)
        if diameter_px < 1:
            raise ConfigError("diameter_px", f"{diameter_px} is below 1", "give the diameter in pixels")
        self.diameter_px = diameter_px

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """A copy of the item with its photographs cropped.

        Raises:
            InputError: naming the image, if it shows no field of view.
            ValueError: If an image is not (C, H, W).
        """
        item = dict(data)
        for key in self.key_iterator(item):
            image = item[key]
            if image.ndim != 3:
                raise ValueError(f"CropFundusd: {key!r} has the shape {tuple(image.shape)}, not (C, H, W)")
            plain = image.as_subclass(torch.Tensor).numpy() if isinstance(image, torch.Tensor) else image
            rows = np.ascontiguousarray(np.moveaxis(plain, 0, -1))
            try:
                cropped = np.ascontiguousarray(np.moveaxis(crop_fundus(rows, self.diameter_px), -1, 0))
            except InputError as error:
                name = getattr(image, "meta", {}).get("filename_or_obj") or item.get("case") or str(key)
                raise InputError(name, error.problem, error.remedy) from None
            item[key] = torch.from_numpy(cropped) if isinstance(image, torch.Tensor) else cropped
        return item
