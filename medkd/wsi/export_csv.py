"""Tile probabilities as a table."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np

from medkd.data.atomic import atomic_write
from medkd.wsi.prediction import SlidePrediction


def write_csv(prediction: SlidePrediction, path: Path) -> None:
    """Write x, y, width, height in level-0 pixels of the slide file and prob_<class>; failed tiles have ``nan``."""
    grid = prediction.grid
    side = plain_number(grid.size_level0)
    with atomic_write(path) as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["x", "y", "width", "height", *(f"prob_{name}" for name in prediction.classes)])
        for (x, y), values in zip(grid.coords.tolist(), np.asarray(prediction.probabilities).tolist(), strict=True):
            table.writerow([x, y, side, side, *(f"{value:.6f}" for value in values)])


def plain_number(value: float) -> str:
    """With at most two decimals, and none where it is whole."""
    return f"{value:.2f}".rstrip("0").rstrip(".")
