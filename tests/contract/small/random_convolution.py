"""RandConv; quiet: no convolution, which is drawn for each batch."""

from __future__ import annotations

from typing import Any

from engine import toy


def arguments(method_class: type, *, norm: bool, seed: int) -> dict[str, Any]:
    return {"student": toy.network(4, norm=norm, seed=seed)}


def quiet(method_class: type) -> dict[str, Any]:
    return {"segmentation_loss": toy.per_sample_loss, "identity_prob": 1.0}
