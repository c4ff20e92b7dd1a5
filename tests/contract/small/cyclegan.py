"""CycleGAN small enough for the contract tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def arguments(method_class: type, *, norm: bool, seed: int) -> dict[str, Any]:
    return {
        "generators": nn.ModuleDict(
            {"to_target": generator(4, norm=norm, seed=seed), "to_source": generator(5, norm=norm, seed=seed + 1)}
        ),
        "critics": nn.ModuleDict({"source": critic(4, seed=seed + 2), "target": critic(5, seed=seed + 3)}),
    }


def quiet(method_class: type) -> dict[str, Any]:
    return {"pool_size": 0, "collapse_steps": 0}


def generator(width: int, *, norm: bool = False, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    layers: list[nn.Module] = [nn.Conv2d(1, width, 3, padding=1)]
    if norm:
        layers.append(nn.BatchNorm2d(width))
    return nn.Sequential(*layers, nn.ReLU(), nn.Conv2d(width, 1, 3, padding=1), nn.Tanh())


def critic(width: int, *, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, width, 4, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(width, 1, 3, padding=1))
