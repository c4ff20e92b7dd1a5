"""The arithmetic of losses: float32 at least, also where a network runs in half precision."""

from __future__ import annotations

import torch


def at_least_float32(values: torch.Tensor) -> torch.Tensor:
    """``values`` as they are in float64, else as float32: half precision loses too much of a sum of small terms."""
    return values if values.dtype == torch.float64 else values.float()


def without_autocast(values: torch.Tensor) -> torch.autocast:
    """Context in which matrix products on the device of ``values`` keep their operands' precision."""
    return torch.autocast(device_type=values.device.type, enabled=False)
