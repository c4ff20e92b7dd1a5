"""MinEnt and AdvEnt small enough for the contract tests."""

from __future__ import annotations

from typing import Any

from contract.small import adapt_seg_net
from engine import toy


def arguments(method_class: type, *, norm: bool, seed: int) -> dict[str, Any]:
    networks = adapt_seg_net.arguments(method_class, norm=norm, seed=seed)
    return {role: networks[role] for role in method_class.roles}


def quiet(method_class: type) -> dict[str, Any]:
    watched = {"collapse_steps": 0} if "critics" in method_class.roles else {}
    return {"segmentation_loss": toy.per_sample_loss, **watched}
