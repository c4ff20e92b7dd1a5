"""Small slides, a network that needs no MONAI, and units that misbehave; workers import this too."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import simplejpeg

from medkd.data.jpeg_tiff import JpegLevel, write_jpeg_tiff
from medkd.workflows import slide_units
from medkd.workflows.slide_batch import run_batch
from medkd.workflows.slide_list import list_slides, take_shard
from medkd.workflows.slide_units import Job, PredictUnit
from medkd.wsi import export
from medkd.wsi.prediction import TileTask
from medkd.wsi.slide_state import prepare_out, setup_hash

GLASS, TISSUE = 240, (200, 120, 180)


def write_slide(path: Path, *, seed: int = 0, side: int = 512, blank: bool = False, mpp: float | None = 0.5) -> Path:
    """A slide of two levels with one island of stained tissue, or with none."""
    rng = np.random.default_rng(seed)
    pixels = np.full((side, side, 3), GLASS, np.uint8)
    if not blank:
        y, x = np.mgrid[:side, :side]
        center = side * (0.5 + 0.1 * rng.uniform(-1, 1, 2))
        inside = np.hypot(x - center[0], y - center[1]) < side * (0.3 + 0.05 * rng.uniform())
        pixels[inside] = TISSUE
        pixels[inside] -= rng.integers(0, 60, (int(inside.sum()), 3), np.uint8)
    with path.open("wb") as file:
        write_jpeg_tiff(file, [_level(pixels, mpp), _level(pixels[::2, ::2], mpp and 2 * mpp)])
    return path


def _level(pixels: np.ndarray, mpp: float | None) -> JpegLevel:
    height, width = pixels.shape[:2]
    tiles = [
        simplejpeg.encode_jpeg(
            np.ascontiguousarray(pixels[y : y + 256, x : x + 256]), quality=90, colorspace="RGB", colorsubsampling="420"
        )
        for y in range(0, height, 256)
        for x in range(0, width, 256)
    ]
    return JpegLevel(width, height, tiles, (256, 256), None if mpp is None else (mpp, mpp))


@dataclass(frozen=True)
class SmallNetwork:
    """Gives a classifier of two classes with random weights."""

    seed: int = 0

    def __call__(self):
        import torch
        from torch import nn

        torch.manual_seed(self.seed)
        return nn.Sequential(
            nn.Conv2d(3, 4, 3, stride=4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
        ).eval()


def draw_quickly(prediction, slide, path, *, name):
    """In place of the picture, which takes longer than all else that is done with a small slide."""
    height, width = slide.dimensions[::-1]
    path.write_bytes(f"{name} {width} {height} {len(prediction.grid)}".encode())


def predict(unit, report):
    """Predict a slide, with a quick picture."""
    export.write_picture = draw_quickly
    return slide_units.predict_unit(unit, report)


def predict_unless_killer(unit, report):
    """Predict a slide; reading one called killer kills the worker."""
    if unit.job.slide.name == "killer":
        os.kill(os.getpid(), signal.SIGKILL)
    return predict(unit, report)


def predict_slowly(unit, report):
    """Predict a slide so slowly that it can be caught at it."""
    record = predict(unit, report)
    time.sleep(0.3)
    return record


def vanish(unit, report):
    """The slide called vanishing is there when the batch begins, and gone when its turn comes."""
    if unit.job.slide.name == "vanishing":
        unit.job.slide.path.unlink()
    return predict(unit, report)


def tile_slowly(unit, report):
    """Tile a slide so slowly that it can be caught at it."""
    record = slide_units.tile_unit(unit, report)
    time.sleep(0.3)
    return record


TASK = TileTask("classification", size=64, mpp=0.5, mean=(0.5,) * 3, std=(0.2,) * 3, classes=("normal", "tumor"))


def batch(
    paths, out, *, function=predict, seed=0, resume=False, overwrite=False, deidentify=False, workers=0, **options
):
    """What predict_slides does, with a network that needs no bundle."""
    listed = list_slides(paths, deidentify=deidentify)
    own = take_shard(listed, options.get("shard"))
    units = [
        PredictUnit(
            Job(slide, Path(out), setup_hash(f"model {seed}", {"mpp": slide.mpp}), resume, deidentify),
            SmallNetwork(seed),
            "small",
            TASK,
            batch_size=4,
            threads=1,
        )
        for slide in own
    ]
    names = [slide.name for slide in own]
    shared = options.get("shard") is not None
    prepare_out(Path(out), {"n": len(listed)}, names, resume=resume, overwrite=overwrite, shared=shared)
    return run_batch(function, units, Path(out), listed=listed, workers=workers, **options)


def tile_batch(paths, out, *, function=slide_units.tile_unit, resume=False, workers=0):
    """What tile_slides does, with a function of the test's."""
    listed = list_slides(paths)
    options = {"size": 64, "mpp": 0.5, "save_images": True, "threads": 1}
    units = [slide_units.TileUnit(Job(slide, Path(out), "setup", resume), options) for slide in listed]
    names = [slide.name for slide in listed]
    prepare_out(Path(out), {}, names, resume=resume, overwrite=False, shared=False)
    return run_batch(function, units, Path(out), listed=listed, workers=workers)
