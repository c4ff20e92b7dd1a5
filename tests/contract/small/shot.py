"""SHOT; quiet: without the mean prediction and the centroids, which run over images."""

from __future__ import annotations

from typing import Any

from engine import toy


def arguments(method_class: type, *, norm: bool, seed: int) -> dict[str, Any]:
    return {"student": toy.network(4, norm=norm, seed=seed), "voxels_per_image": 32}


def quiet(method_class: type) -> dict[str, Any]:
    return {"diversity_weight": 0.0, "pseudo_weight": 0.0}
