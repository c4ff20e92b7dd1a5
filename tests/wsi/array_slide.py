"""A slide held in memory, for tests of what is made from slides."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from PIL import Image

from medkd.wsi.slides import Region

GLASS = (243, 242, 240)


class ArraySlide:
    """What the functions of grid, tissue and overview use of a Slide, over an (H, W, 3) array."""

    def __init__(self, pixels, *, mpp=0.5, bounds=None, name="made", levels=(1.0,), invalid=None):
        self.pixels = np.ascontiguousarray(pixels, np.uint8)
        height, width = pixels.shape[:2]
        self.dimensions = (width, height)
        self.mpp = mpp
        self.bounds = bounds or (0, 0, width, height)
        self.name = name
        self.path = Path(f"{name}.tiff")
        self.background = GLASS
        self.level_downsamples = levels
        self.fingerprint = hashlib.sha256(self.pixels.tobytes()).hexdigest()
        self.bad_tiles = []
        self._invalid = invalid  # x, y, width, height of what cannot be decoded

    def read_region(self, x, y, size, *, mpp):
        pixels = self._mean(self.pixels, (x, y), size, mpp / self.mpp, self.background)
        if self._invalid is None:
            return Region(pixels, None)
        left, top, width, height = self._invalid
        bad = np.zeros(self.pixels.shape[:2], np.uint8)
        bad[top : top + height, left : left + width] = 255
        return Region(pixels, self._mean(bad, (x, y), size, mpp / self.mpp, 0) == 0)

    @staticmethod
    def _mean(pixels, corner, size, scale, beyond):
        """Mean over the area of every pixel of the result, the outside filled."""
        margin = int(2 * scale * max(size)) + 2 if max(corner) + scale * max(size) > min(pixels.shape[:2]) else 2
        bands = np.atleast_3d(pixels).transpose(2, 0, 1)
        padded = [
            np.pad(band, margin, constant_values=value)
            for band, value in zip(bands, np.broadcast_to(beyond, len(bands)), strict=True)
        ]
        x, y = corner[0] + margin, corner[1] + margin
        box = (x, y, x + size[0] * scale, y + size[1] * scale)
        means = [np.asarray(Image.fromarray(band).resize(size, Image.Resampling.BOX, box)) for band in padded]
        return np.stack(means, axis=-1).reshape(size[1], size[0], *pixels.shape[2:])

    def read(self, x, y, size, *, mpp):
        return self.read_region(x, y, size, mpp=mpp).pixels


def glass(height, width, *, seed=0, color=GLASS):
    noise = np.random.default_rng(seed).normal(0, 2, (height, width, 1))
    return np.clip(np.asarray(color) + noise, 0, 255).astype(np.uint8)


def stain(height, width, *, seed=0):
    """Pink ground with purple nuclei, each of some pixels."""
    rng = np.random.default_rng(seed)
    nuclei = np.kron(rng.random((height // 8 + 1, width // 8 + 1)) < 0.3, np.ones((8, 8), bool))[:height, :width]
    colors = np.where(nuclei[..., None], (110, 70, 150), (226, 160, 200))
    return np.clip(colors + rng.normal(0, 4, (height, width, 1)), 0, 255).astype(np.uint8)
