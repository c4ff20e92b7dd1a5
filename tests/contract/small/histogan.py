"""HistoGAN small enough for the contract tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

CLASSES, LATENT = 3, 4


class Generator(nn.Module):
    def __init__(self, *, norm: bool) -> None:
        super().__init__()
        self.expand = nn.Linear(LATENT + CLASSES, 4 * 4 * 4)
        self.norm = nn.BatchNorm2d(4) if norm else nn.Identity()
        self.out = nn.ConvTranspose2d(4, 3, kernel_size=4, stride=2, padding=1)

    def forward(self, code: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.out(torch.relu(self.norm(self.expand(code).view(-1, 4, 4, 4)))))


class Critic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 6, 4, stride=2, padding=1), nn.LeakyReLU(0.2), nn.Flatten())
        self.is_real, self.which_class = nn.Linear(96, 1), nn.Linear(96, CLASSES)

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = self.features(image)
        return self.is_real(features).squeeze(1), self.which_class(features)


def arguments(method_class: type, *, norm: bool, seed: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    return {"generator": Generator(norm=norm), "critic": Critic(), "classes": CLASSES, "latent": LATENT}


def quiet(method_class: type) -> dict[str, Any]:
    return {"latent_std": 0.0, "watch_steps": 0}


def items(stream: str, *, labeled: bool, seed: int) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        {"image": torch.randn(3, 8, 8, generator=generator).tanh(), "label": n % CLASSES, "case": f"{stream}-{n}"}
        for n in range(6)
    ]


def example(method_class: type) -> tuple[torch.Tensor, tuple[int, ...]]:
    return torch.randn(2, LATENT + CLASSES), (2, 3, 8, 8)
