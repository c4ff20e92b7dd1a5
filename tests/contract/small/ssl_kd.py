"""SimCLR and SSLKD small enough for the contract tests: classifiers of 8 x 8 photographs."""

from __future__ import annotations

from typing import Any

import torch
from engine import toy
from torch import nn

from medkd.methods.ssl_kd import SimCLR
from medkd.nets.projection import projection_head


def classifier(width: int = 4, *, norm: bool = False, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    middle: list[nn.Module] = [nn.BatchNorm2d(width)] if norm else []
    pooled = [nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()]
    return nn.Sequential(nn.Conv2d(3, width, 3, padding=1), *middle, *pooled, nn.Linear(4 * width, toy.CLASSES))


def arguments(method_class: type, *, norm: bool, seed: int) -> dict[str, Any]:
    if method_class is SimCLR:
        encoder = classifier(norm=norm, seed=seed)
        return {"encoder": encoder, "projector": projection_head(16, 6), "temperature": 0.5}
    return {"student": classifier(norm=norm, seed=seed), "teacher": classifier(6, norm=norm, seed=seed + 1)}


def quiet(method_class: type) -> dict[str, Any]:
    return {}


def items(stream: str, *, labeled: bool, seed: int) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for index in range(8):
        image = torch.randn(3, 8, 8, generator=generator)
        second = image + 0.1 * torch.randn(3, 8, 8, generator=generator)
        made.append({"image": image, "second_view": second, "case": f"{stream}-{index}"})
    return made


def example(method_class: type) -> tuple[torch.Tensor, tuple[int, ...]]:
    return torch.randn(2, 3, 8, 8), (2, toy.CLASSES)
