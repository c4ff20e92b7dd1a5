"""LE-UDA small enough for the contract tests: MT-UDA's networks and streams, and a critic for each of two layers."""

from __future__ import annotations

from typing import Any

import torch
from contract.small import mt_uda
from contract.small.mt_uda import items
from torch import nn

__all__ = ["arguments", "items", "quiet"]


def arguments(method_class: type, *, norm: bool, seed: int) -> dict[str, Any]:
    networks = mt_uda.arguments(method_class, norm=norm, seed=seed)
    last = str(len(networks["student"]) - 1)
    return {
        **networks,
        "intra_critics": nn.ModuleList([critic(3, seed=seed + 2), critic(4, seed=seed + 3)]),
        "inter_critics": nn.ModuleList([critic(3, seed=seed + 4), critic(4, seed=seed + 5)]),
        "layers": (last, "0"),
    }


def quiet(method_class: type) -> dict[str, Any]:
    return {**mt_uda.quiet(method_class), "collapse_steps": 0}


def critic(channels: int, *, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(channels, 4, 4, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(4, 1, 1))
