"""HD95 and surface Dice, four classes, 256 × 256 × 100: medkd against MONAI and DeepMind's surface-distance.

    python benchmarks/speed/surface_metrics.py [--rounds 7]

Prints one JSON line: CPU seconds (medians of interleaved rounds, one thread), ratios, and the largest differences
between the results. The peers get their masks and one-hot tensors ready-made; medkd starts from the two label maps and
computes ASSD as well. The label maps are four rough ellipsoids; the prediction's borders wander by about one voxel.
MONAI and scipy share medkd's definition and must agree to 1e-4; surface-distance places surface elements at voxel
corners and weighs them by area, so its numbers differ by definition and are shown, not judged.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before numpy and torch start their thread pools

import argparse
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from importlib import metadata
from typing import Any

import numpy as np
from scipy import ndimage

from medkd.metrics import surface_scores

SHAPE_ZYX = (100, 256, 256)
SPACING_MM = (2.5, 1.0, 1.0)
CLASSES = (1, 2, 3, 4)
TOLERANCE_MM = 1.0
AGREEMENT_MM = 1e-4
GOALS = {"monai": 5.0, "surface-distance": 2.5}
ELLIPSOIDS = (  # center z, y, x and radius z, y, x as shares of the half size
    (0.0, -0.3, -0.3, 0.7, 0.45, 0.4),
    (0.1, 0.4, 0.35, 0.5, 0.3, 0.35),
    (-0.3, 0.3, -0.5, 0.3, 0.2, 0.2),
    (0.2, -0.4, 0.5, 0.4, 0.25, 0.25),
)

Scores = dict[int, tuple[float, float]]


def label_maps() -> tuple[np.ndarray, np.ndarray]:
    """(Z, Y, X) uint8 prediction and reference."""
    axes = [np.linspace(-1.0, 1.0, n) for n in SHAPE_ZYX]
    z, y, x = np.meshgrid(*axes, indexing="ij", sparse=True)
    shared, own = rough_field(seed=1, amplitude=0.06), rough_field(seed=2, amplitude=0.012)
    maps = []
    for border in (shared + own, shared):
        labels = np.zeros(SHAPE_ZYX, np.uint8)
        for label, (cz, cy, cx, rz, ry, rx) in zip(CLASSES, ELLIPSOIDS, strict=True):
            radius = np.sqrt(((z - cz) / rz) ** 2 + ((y - cy) / ry) ** 2 + ((x - cx) / rx) ** 2)
            labels[radius + border < 1.0] = label
        maps.append(labels)
    return maps[0], maps[1]


def rough_field(seed: int, amplitude: float) -> np.ndarray:
    """Smooth noise with a standard deviation of ``amplitude``."""
    coarse = np.random.default_rng(seed).standard_normal([n // 8 for n in SHAPE_ZYX])
    field = ndimage.zoom(coarse, [n / m for n, m in zip(SHAPE_ZYX, coarse.shape, strict=True)], order=1)
    field = ndimage.gaussian_filter(field, 3.0)
    return amplitude * field / field.std()


def medkd_scores(pred: np.ndarray, reference: np.ndarray) -> Scores:
    scores = surface_scores(pred, reference, spacing_mm=SPACING_MM, classes=CLASSES, tolerance_mm=TOLERANCE_MM)
    return {label: (score.hd95, score.surface_dice) for label, score in scores.items()}


def scipy_scores(pred: np.ndarray, reference: np.ndarray) -> Scores:
    """The definition spelled out with scipy's erosion and exact distance transform."""
    cross = ndimage.generate_binary_structure(3, 1)
    scores = {}
    for label in CLASSES:
        box = ndimage.find_objects(((pred == label) | (reference == label)).astype(np.uint8))[0]
        surfaces = [
            mask & ~ndimage.binary_erosion(mask, cross) for mask in (pred[box] == label, reference[box] == label)
        ]
        directed = [ndimage.distance_transform_edt(~surfaces[1 - i], sampling=SPACING_MM)[surfaces[i]] for i in (0, 1)]
        within = np.concatenate(directed) <= TOLERANCE_MM + 1e-6
        scores[label] = (max(float(np.percentile(part, 95)) for part in directed), float(within.mean()))
    return scores


def monai_call(pred: np.ndarray, reference: np.ndarray) -> Callable[[], Scores]:
    import torch
    from monai.metrics import compute_hausdorff_distance, compute_surface_dice
    from monai.networks.utils import one_hot

    torch.set_num_threads(1)
    hot = [one_hot(torch.from_numpy(labels.astype(np.int64))[None, None], 5).bool() for labels in (pred, reference)]

    def call() -> Scores:
        hd95 = compute_hausdorff_distance(*hot, percentile=95, spacing=SPACING_MM)[0]
        nsd = compute_surface_dice(*hot, [TOLERANCE_MM] * len(CLASSES), spacing=SPACING_MM)[0]
        return dict(zip(CLASSES, zip(hd95.tolist(), nsd.tolist(), strict=True), strict=True))

    return call


def surface_distance_call(pred: np.ndarray, reference: np.ndarray) -> Callable[[], Scores]:
    import surface_distance

    masks = {label: (reference == label, pred == label) for label in CLASSES}

    def call() -> Scores:
        scores = {}
        for label, pair in masks.items():
            distances = surface_distance.compute_surface_distances(*pair, SPACING_MM)
            hd95 = surface_distance.compute_robust_hausdorff(distances, 95)
            scores[label] = (
                float(hd95),
                float(surface_distance.compute_surface_dice_at_tolerance(distances, TOLERANCE_MM)),
            )
        return scores

    return call


def cpu_seconds(call: Callable[[], Scores]) -> tuple[float, Scores]:
    start = time.process_time()
    scores = call()
    return time.process_time() - start, scores


def largest_differences(scores: Scores, others: Scores) -> dict[str, float]:
    return {
        "hd95_mm": max(abs(scores[label][0] - others[label][0]) for label in CLASSES),
        "surface_dice": max(abs(scores[label][1] - others[label][1]) for label in CLASSES),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="HD95 + surface Dice: medkd against MONAI and surface-distance")
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    warnings.simplefilter("ignore")  # the peers' deprecation notes
    pred, reference = label_maps()
    calls: dict[str, Callable[[], Scores]] = {"medkd": lambda: medkd_scores(pred, reference)}
    peers: dict[str, dict[str, Any]] = {}
    for name, prepare in (("monai", monai_call), ("surface-distance", surface_distance_call)):
        try:
            calls[name] = prepare(pred, reference)
        except ImportError:
            peers[name] = {"installed": False}
    results = {name: call() for name, call in calls.items()}  # a first, uncounted round
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            elapsed, results[name] = cpu_seconds(call)
            seconds[name].append(elapsed)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    for name in list(medians)[1:]:  # medkd is the first
        peers[name] = {
            "installed": True,
            "version": metadata.version(name),
            "cpu_s": round(medians[name], 4),
            "ratio": round(medians[name] / medians["medkd"], 2),
            "goal": GOALS[name],
            "largest_difference": largest_differences(results["medkd"], results[name]),
        }
    against_scipy = largest_differences(results["medkd"], scipy_scores(pred, reference))
    judged = [against_scipy, *(peers[name]["largest_difference"] for name in ("monai",) if name in medians)]
    agree = all(max(differences.values()) <= AGREEMENT_MM for differences in judged)
    line = {
        "benchmark": "surface_metrics",
        "shape_zyx": SHAPE_ZYX,
        "spacing_mm": SPACING_MM,
        "classes": len(CLASSES),
        "rounds": rounds,
        "medkd_cpu_s": round(medians["medkd"], 4),
        "medkd": {label: {"hd95_mm": hd95, "surface_dice": nsd} for label, (hd95, nsd) in results["medkd"].items()},
        "peers": peers,
        "scipy_largest_difference": against_scipy,
        "agree": agree,
    }
    print(json.dumps(line))
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
