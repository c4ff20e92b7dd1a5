"""The gate of an int8 export: how a network in 8-bit integers compares with the same network in float32."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from medkd.data.volumes import read_label, read_volume
from medkd.deploy.bundle import LoadedBundle
from medkd.deploy.calibration import TileSamples, VolumeSamples
from medkd.deploy.predict import predict_volume
from medkd.metrics.overlap import overlap
from medkd.metrics.roc import roc_auc
from medkd.wsi.fold import RawTileNetwork
from medkd.wsi.prediction import TileTask

LARGEST_DROP = 0.005  # of AUC or Dice
LEAST_AGREEMENT = 0.99  # share of tiles, or of foreground voxels, with the same class, where there are no labels
_BATCH = 16


@dataclass(frozen=True)
class Gate:
    """How an int8 network compares with the same network in float32, on data it was not calibrated on.

    Attributes:
        metric: ``AUC`` or ``Dice`` where there are labels, else None: then only agreement is known, not accuracy.
        float32: the metric in float32; None without labels.
        int8: the metric in int8; None without labels.
        agreement: share of tiles, pixels or voxels that both give the same class.
        probability_difference: mean over tiles or pixels and classes; None for volumes.
        compared: how many tiles or volumes.
    """

    metric: str | None
    float32: float | None
    int8: float | None
    agreement: float
    probability_difference: float | None
    compared: int

    @property
    def drop(self) -> float | None:
        """Of the metric, from float32 to int8; negative where int8 is better."""
        return None if self.float32 is None or self.int8 is None else self.float32 - self.int8

    @property
    def passed(self) -> bool:
        """Whether the int8 network may be used."""
        return self.agreement >= LEAST_AGREEMENT if self.drop is None else self.drop <= LARGEST_DROP


def compare_tiles(exact: RawTileNetwork, quantized: RawTileNetwork, task: TileTask, samples: TileSamples) -> Gate:
    """How two networks agree on tiles and, where these have labels, what AUC each has (mean over classes)."""
    first, second = (_probabilities(network, samples.comparison, task) for network in (exact, quantized))
    if task.activation == "softmax":
        agreement = float((first.argmax(1) == second.argmax(1)).mean())
    else:
        agreement = float(((first >= 0.5) == (second >= 0.5)).all(1).mean())
    difference = float(np.abs(first - second).mean())
    exact_auc: float | None = None
    int8_auc: float | None = None
    if samples.labels is not None and task.task == "classification":
        exact_auc, int8_auc = tile_auc(first, samples.labels), tile_auc(second, samples.labels)
    metric = None if exact_auc is None or int8_auc is None else "AUC"
    if not np.isfinite(second).all():
        agreement, int8_auc = 0.0, None if metric is None else 0.0
    return Gate(metric, exact_auc, int8_auc, agreement, difference, len(samples.comparison))


def tile_auc(probabilities: npt.NDArray[np.float32], labels: npt.NDArray[np.int64]) -> float | None:
    """AUC, one class against the others, mean over the classes; of two classes that of the second.

    Args:
        probabilities: (N, K).
        labels: (N,) class indices.

    Returns:
        None where no class has both tiles that are of it and tiles that are not.
    """
    classes = [1] if probabilities.shape[1] == 2 else range(probabilities.shape[1])
    found = np.nan_to_num(probabilities)
    aucs = [roc_auc(found[:, index], labels == index) for index in classes]
    known = [auc for auc in aucs if not math.isnan(auc)]
    return float(np.mean(known)) if known else None


def compare_volumes(exact: LoadedBundle, quantized: LoadedBundle, samples: VolumeSamples) -> Gate:
    """How two bundles agree on whole volumes and, where these have labels, the mean Dice of each."""
    agreements: list[float] = []
    dices: list[tuple[float, float]] = []
    classes = [label for label in exact.labels if label != 0] or [1]
    for item in samples.comparison:
        volume = read_volume(item["image"])
        first, second = predict_volume(exact, volume), predict_volume(quantized, volume)
        agreements.append(_agreement(first, second))
        if "label" in item:
            reference = read_label(item["label"]).array
            scores = [overlap(found, reference, classes=classes) for found in (first, second)]
            pairs = [(scores[0][label].dice, scores[1][label].dice) for label in classes]
            # An absent class that only one network finds: the other was right to leave it out.
            dices += [(_or_one(a), _or_one(b)) for a, b in pairs if not (math.isnan(a) and math.isnan(b))]
    means = tuple(float(value) for value in np.mean(dices, axis=0)) if dices else (None, None)
    return Gate(
        "Dice" if dices else None, means[0], means[1], float(np.mean(agreements)), None, len(samples.comparison)
    )


def _or_one(dice: float) -> float:
    return 1.0 if math.isnan(dice) else dice


def _agreement(first: npt.NDArray[Any], second: npt.NDArray[Any]) -> float:
    """Share of the voxels, of those that either calls foreground, with the same class."""
    either = (first != 0) | (second != 0)
    return float((first[either] == second[either]).mean()) if either.any() else 1.0


@torch.inference_mode()
def _probabilities(network: RawTileNetwork, tiles: npt.NDArray[np.uint8], task: TileTask) -> npt.NDArray[np.float32]:
    """(N, K), of a segmentation (N × pixels, K)."""
    found = []
    for batch in torch.from_numpy(tiles).split(_BATCH):
        logits = network(batch)
        values = logits.softmax(1) if task.activation == "softmax" else logits.sigmoid()
        found.append(values if values.ndim == 2 else values.permute(0, 2, 3, 1).flatten(0, 2))
    return torch.cat(found).numpy()
