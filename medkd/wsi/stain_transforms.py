"""Stains inside MONAI's dictionaries: normalization and jitter of channel-first images."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform, Randomizable

from medkd.wsi.stain import StainJitter

Pixels = npt.NDArray[np.uint8]


class StainNormalized(MapTransform):
    """Apply a fitted stain normalizer to images (3, H, W), uint8 RGB.

    Args:
        keys: the images.
        normalizer: a fitted ``Macenko``, ``Vahadane`` or ``Reinhard``.
        allow_missing_keys: skip a key that an item does not have.
    """

    def __init__(
        self, keys: KeysCollection, normalizer: Callable[[Pixels], Pixels], allow_missing_keys: bool = False
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.normalizer = normalizer

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """A copy of the item with its images normalized."""
        item = dict(data)
        for key in self.key_iterator(item):
            item[key] = _on_rows(item[key], self.normalizer)
        return item


class StainJitterd(MapTransform, Randomizable):
    """Vary the stains of images (3, H, W), uint8 RGB; all images of an item get the same change.

    Args:
        keys: the images.
        sigma: largest relative change of a stain.
        bias: largest shift, in units of optical density.
        prob: share of the items that are changed.
        allow_missing_keys: skip a key that an item does not have.
    """

    def __init__(
        self,
        keys: KeysCollection,
        sigma: float = 0.1,
        bias: float = 0.02,
        prob: float = 0.5,
        allow_missing_keys: bool = False,
    ) -> None:
        MapTransform.__init__(self, keys, allow_missing_keys)
        self.jitter = StainJitter(sigma, bias)
        self.prob = prob

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """A copy of the item with the stains of its images varied."""
        item = dict(data)
        applies, seed = self.R.random_sample() < self.prob, int(self.R.randint(2**32, dtype=np.uint32))
        for key in self.key_iterator(item) if applies else ():
            item[key] = _on_rows(item[key], lambda pixels: self.jitter(pixels, np.random.default_rng(seed)))
        return item


def _on_rows(image: Any, change: Callable[[Pixels], Pixels]) -> Any:
    """Apply a function of (H, W, 3) pixels to a channel-first tensor or array."""
    rows = np.moveaxis(image.as_subclass(torch.Tensor).numpy() if torch.is_tensor(image) else np.asarray(image), 0, -1)
    changed = np.ascontiguousarray(np.moveaxis(change(rows), -1, 0))
    return torch.from_numpy(changed) if torch.is_tensor(image) else changed
