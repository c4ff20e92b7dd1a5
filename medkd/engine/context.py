"""All of the engine that a method's step may touch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch


@dataclass
class StepContext:
    """What one training step knows about the run, and its one way to change parameters.

    Attributes:
        device: where the batch and the networks are.
        epoch: current epoch, from 1.
        iteration: current iteration, from 1; with accumulation, iterations are micro-batches.
        progress: share of the run done before this iteration, in [0, 1).
        generator: this step's own random source on ``device``; a function of (seed, iteration, rank) alone, so that a
            resumed run draws the same numbers.
        updates: optimizer updates done before this iteration.
        window_ends: whether :meth:`update` steps the optimizers in this iteration (always, unless gradients
            accumulate over several).
    """

    device: torch.device
    epoch: int
    iteration: int
    progress: float
    generator: torch.Generator
    updates: int = 0
    window_ends: bool = True
    apply_update: Callable[[Mapping[str, torch.Tensor]], None] = field(repr=False, default=lambda losses: None)

    def update(self, losses: Mapping[str, torch.Tensor] | str, loss: torch.Tensor | None = None) -> None:
        """Backpropagate each role's loss into that role's parameters only, then step.

        All backward passes come before any optimizer step. When gradients accumulate, the step waits for the last
        iteration of the window. Mixed precision, clipping and averaging over processes happen here.

        Args:
            losses: scalar loss of each role; or one role's name, with ``loss`` as the second argument.
            loss: the scalar loss, when ``losses`` is a name.

        Raises:
            TrainingError: If a loss is not finite.
            ValueError: If a role is unknown or a loss is not a scalar.
        """
        if isinstance(losses, str):
            if loss is None:
                raise ValueError(f"update({losses!r}) needs its loss")
            losses = {losses: loss}
        self.apply_update(losses)

    def noise_like(self, tensor: torch.Tensor, *, std: float, limit: float) -> torch.Tensor:
        """Gaussian noise from the step's generator, clamped to [-limit, limit].

        Args:
            tensor: gives shape, type and device.
            std: standard deviation before clamping, in the tensor's intensity unit.
            limit: clamp bound, same unit.
        """
        noise = torch.randn(tensor.shape, generator=self.generator, device=tensor.device, dtype=torch.float32)
        return (noise * std).clamp_(-limit, limit).to(tensor.dtype)
