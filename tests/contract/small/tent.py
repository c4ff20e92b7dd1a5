"""TENT with BatchNorm, or without it with a normalization of each sample."""

from __future__ import annotations

from typing import Any

import torch
from engine import toy
from torch import nn


def arguments(method_class: type, *, norm: bool, seed: int) -> dict[str, Any]:
    if norm:
        return {"student": toy.network(4, norm=True, seed=seed)}
    torch.manual_seed(seed)
    norm_layer = nn.InstanceNorm2d(4, affine=True)
    student = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), norm_layer, nn.ReLU(), nn.Conv2d(4, toy.CLASSES, 1))
    return {"student": student, "any_norm": True}


def quiet(method_class: type) -> dict[str, Any]:
    return {}
