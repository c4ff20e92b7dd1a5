"""CBST in two rounds; quiet: one that never begins, since thresholds run over images."""

from __future__ import annotations

from typing import Any

from engine import toy


def arguments(method_class: type, *, norm: bool, seed: int) -> dict[str, Any]:
    return {"student": toy.network(4, norm=norm, seed=seed), "rounds": 2}


def quiet(method_class: type) -> dict[str, Any]:
    return {"segmentation_loss": toy.per_sample_loss, "pseudo_weight": 0.0}
