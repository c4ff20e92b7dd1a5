"""UNIT small enough for the contract tests: autoencoders, and critics at two scales."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional


class Autoencoder(nn.Module):
    def __init__(self, width: int, *, norm: bool = False, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        layers: list[nn.Module] = [nn.Conv2d(1, width, 3, padding=1)]
        if norm:
            layers.append(nn.BatchNorm2d(width))
        self.encoder = nn.Sequential(*layers, nn.ReLU(), nn.Conv2d(width, 3, 4, 2, 1))
        self.decoder = nn.Sequential(
            nn.ConvTranspose2d(3, width, 4, 2, 1), nn.ReLU(), nn.Conv2d(width, 1, 1), nn.Tanh()
        )

    def encode(self, image: torch.Tensor) -> torch.Tensor:
        return self.encoder(image)

    def decode(self, code: torch.Tensor) -> torch.Tensor:
        return self.decoder(code)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.decode(self.encode(image))


class TwoScales(nn.Module):
    def __init__(self, *, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.scales = nn.ModuleList(nn.Conv2d(1, 1, 3, padding=1) for _ in range(2))

    def forward(self, image: torch.Tensor) -> list[torch.Tensor]:
        return [self.scales[0](image), self.scales[1](functional.avg_pool2d(image, 2))]


def arguments(method_class: type, *, norm: bool, seed: int) -> dict[str, Any]:
    return {
        "generators": nn.ModuleDict(
            {"to_target": Autoencoder(4, norm=norm, seed=seed), "to_source": Autoencoder(5, norm=norm, seed=seed + 1)}
        ),
        "critics": nn.ModuleDict({"source": TwoScales(seed=seed + 2), "target": TwoScales(seed=seed + 3)}),
    }


def quiet(method_class: type) -> dict[str, Any]:
    return {"noise_std": 0.0, "collapse_steps": 0}
