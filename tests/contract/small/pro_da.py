"""ProDA; quiet: without the terms on target images, since prototypes run over images."""

from __future__ import annotations

from typing import Any

from engine import toy


def arguments(method_class: type, *, norm: bool, seed: int) -> dict[str, Any]:
    return {"student": toy.network(4, norm=norm, seed=seed)}


def quiet(method_class: type) -> dict[str, Any]:
    weights = ("cross_weight", "reverse_weight", "consistency_weight", "regularizer_weight")
    return {"segmentation_loss": toy.per_sample_loss, **dict.fromkeys(weights, 0.0)}
