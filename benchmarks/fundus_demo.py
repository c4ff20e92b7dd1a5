"""Simulated photographs of retinas with and without lesions, from the one that scikit-image ships (CC0)."""

from __future__ import annotations

import math

import cv2
import numpy as np
import skimage.data

from medkd.data.fundus import crop_fundus

TRAIN, TEST = 400, 200
_SIDE = 192  # of the drawing; lesions are blurred by the reduction like real ones


def simulated_photographs(side: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Images (N, side, side, 3) uint8 and labels (N,) to train on, then the same to test on; half have lesions.

    Every eye is the photograph turned, mirrored and colored anew, with a smooth change of brightness. Eyes with lesions
    have 3 to 8 dark red and 2 to 6 yellow spots; all have a few gray specks, so that spots alone say nothing.
    """
    random = np.random.default_rng(seed)
    healthy = crop_fundus(skimage.data.retina(), _SIDE).astype(np.float32) / 255
    labels = np.arange(TRAIN + TEST) % 2
    images = np.stack([_photograph(healthy, bool(label), side, random) for label in labels])
    return images[:TRAIN], labels[:TRAIN], images[TRAIN:], labels[TRAIN:]


def _photograph(healthy: np.ndarray, lesions: bool, side: int, random: np.random.Generator) -> np.ndarray:
    center = (_SIDE - 1) / 2
    turn = cv2.getRotationMatrix2D((center, center), random.uniform(-180, 180), random.uniform(0.97, 1.1))
    eye = cv2.warpAffine(healthy[:, ::-1] if random.random() < 0.5 else healthy, turn, (_SIDE, _SIDE))
    spots = [((0.35, 0.35, 0.35), 0.6, random.integers(2, 6))]
    if lesions:
        spots += [((0.35, 0.03, 0.02), 1.0, random.integers(3, 9)), ((0.95, 0.85, 0.35), 1.0, random.integers(2, 7))]
    for color, strength, count in spots:
        for _ in range(count):
            _spot(eye, color, strength * random.uniform(0.5, 0.9), random)
    rows, columns = np.mgrid[:_SIDE, :_SIDE] / _SIDE - 0.5
    angle = random.uniform(0, 2 * math.pi)
    eye *= (1 + random.uniform(0, 0.6) * (rows * math.sin(angle) + columns * math.cos(angle)))[..., None]
    eye = np.clip(eye * random.uniform(0.7, 1.3) * random.uniform(0.85, 1.15, 3), 0, 1) ** random.uniform(0.8, 1.25)
    eye += random.normal(0, 0.02, eye.shape)
    eye[np.hypot(rows, columns) > 0.5] = 0
    small = cv2.resize(np.clip(eye, 0, 1), (side, side), interpolation=cv2.INTER_AREA)
    return np.round(255 * small).astype(np.uint8)


def _spot(eye: np.ndarray, color: tuple[float, float, float], strength: float, random: np.random.Generator) -> None:
    """Draw a soft ellipse in place."""
    distance, angle = 0.42 * _SIDE * math.sqrt(random.random()), random.uniform(0, 2 * math.pi)
    x, y = (_SIDE / 2 + distance * part for part in (math.cos(angle), math.sin(angle)))
    long, wide = random.uniform(2.0, 5.0), random.uniform(1.5, 3.0)
    rows, columns = np.mgrid[:_SIDE, :_SIDE].astype(np.float32)
    along = (columns - x) * math.cos(angle) + (rows - y) * math.sin(angle)
    across = (rows - y) * math.cos(angle) - (columns - x) * math.sin(angle)
    weight = strength * np.exp(-((along / long) ** 2 + (across / wide) ** 2))[..., None]
    eye[:] = eye * (1 - weight) + weight * np.array(color, dtype=np.float32)
