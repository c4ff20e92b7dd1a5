"""Generative meta curriculum learning small enough for the contract tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from medkd.nets.curriculum_teacher import PerturbingTeacher

CLASSES = 3


def classifier(*, norm: bool, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    layers: list[nn.Module] = [nn.Conv2d(3, 4, 3, stride=2, padding=1)]
    if norm:
        layers.append(nn.BatchNorm2d(4))
    return nn.Sequential(*layers, nn.Tanh(), nn.Flatten(), nn.Linear(64, CLASSES))


def arguments(method_class: type, *, norm: bool, seed: int) -> dict[str, Any]:
    student = classifier(norm=norm, seed=seed)
    return {"student": student, "teacher": PerturbingTeacher(CLASSES, width=4)}


def quiet(method_class: type) -> dict[str, Any]:
    """Without the virtual step, which couples the images of a batch."""
    return {"inner_lr": 0.0, "noise_std": 0.0, "ramp_up_frac": 0.0, "harder_frac": 0.0}


def items(stream: str, *, labeled: bool, seed: int) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        {"image": torch.randn(3, 8, 8, generator=generator).tanh(), "label": n % CLASSES, "case": f"{stream}-{n}"}
        for n in range(6)
    ]


def example(method_class: type) -> tuple[torch.Tensor, tuple[int, ...]]:
    return torch.randn(2, 3, 8, 8), (2, CLASSES)
