"""AdaptSegNet small enough for the contract tests: a critic of 8 x 8 maps."""

from __future__ import annotations

from typing import Any

import torch
from engine import toy

from medkd.nets.critics import OutputCritic


def arguments(method_class: type, *, norm: bool, seed: int) -> dict[str, Any]:
    torch.manual_seed(seed + 1)
    return {"student": toy.network(4, norm=norm, seed=seed), "critics": OutputCritic(toy.CLASSES, 4, layers=1)}


def quiet(method_class: type) -> dict[str, Any]:
    return {"segmentation_loss": toy.per_sample_loss, "collapse_steps": 0}
