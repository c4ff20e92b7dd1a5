"""Exponential moving average copies of a network."""

from __future__ import annotations

import copy

import torch
from torch import nn


def ema_copy(network: nn.Module) -> nn.Module:
    """A copy of ``network`` whose parameters never ask for a gradient."""
    return copy.deepcopy(network).requires_grad_(False)


@torch.no_grad()
def update_ema(average: nn.Module, network: nn.Module, decay: float) -> None:
    """Move ``average`` toward ``network``: average = decay × average + (1 - decay) × network.

    Only parameters are averaged. Buffers (BatchNorm statistics) are copied, so that the average is always usable
    in eval mode; the mean-teacher release leaves them alone.

    Args:
        average: the copy that moves.
        network: the trained network, of the same architecture.
        decay: in [0, 1]; 0 copies.
    """
    averages = [parameter.data for parameter in average.parameters()]
    torch._foreach_lerp_(averages, [parameter.detach() for parameter in network.parameters()], 1.0 - decay)
    for target, source in zip(average.buffers(), network.buffers(), strict=True):
        target.copy_(source)
