"""MT-UDA small enough for the contract tests: every item comes in both styles."""

from __future__ import annotations

from typing import Any

import torch
from engine import toy
from torch import nn


def arguments(method_class: type, *, norm: bool, seed: int) -> dict[str, Any]:
    return {"student": toy.network(4, norm=norm, seed=seed), "generator": generator(seed=seed + 1)}


def quiet(method_class: type) -> dict[str, Any]:
    return {"segmentation_loss": toy.per_sample_loss, "noise_std": 0.0}


def items(stream: str, *, labeled: bool, seed: int) -> list[dict[str, Any]]:
    found = toy.items(8, labeled=stream == "labeled", seed=seed)
    for item in found:
        item["cycled"] = 0.9 * item["image"]
        if stream != "labeled":
            item["translated"] = -item["image"]
    return found


def generator(*, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 1, 1), nn.Tanh())
