"""A paper: its networks, its objective, its update rule."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import nn

from medkd.engine.context import StepContext

Batch = Mapping[str, Mapping[str, Any]]


class Method(nn.Module):
    """Base of every method: an ``nn.Module`` that holds all of the paper's networks as attributes.

    Override :meth:`losses` when one optimizer minimizes a sum of terms. Override :meth:`step` when the paper owns
    several updates or does something after the update (an EMA, say).

    Attributes:
        paper: citation with the arXiv number, shown by ``medkd methods``.
        task: what it trains, ``"segmentation"`` or ``"classification"`` or both.
        roles: attribute names of the trained networks, one optimizer each; the first is the main one.
        frozen: attribute names of networks that never change; they stay in eval mode whatever ``train()`` says.
        streams: names of the streams a batch must have.
        optional_streams: names of further streams it can use.
        batch_coupled: True when a loss or layer couples the samples of a batch, so that several processes or
            accumulation only approximate the joint batch.
        accumulates: False where micro-batches cannot stand for the large batch at all (several updates per step, image
            pools); the trainer then refuses to accumulate.
    """

    paper: ClassVar[str] = ""
    task: ClassVar[str] = "segmentation"
    roles: ClassVar[tuple[str, ...]] = ("student",)
    frozen: ClassVar[tuple[str, ...]] = ()
    streams: ClassVar[tuple[str, ...]] = ("labeled",)
    optional_streams: ClassVar[tuple[str, ...]] = ()
    batch_coupled: ClassVar[bool] = False
    accumulates: ClassVar[bool] = True

    @property
    def deployed(self) -> nn.Module:
        """The network that ships; the first role unless overridden."""
        return self.get_submodule(self.roles[0])

    def role_parameters(self, role: str) -> list[nn.Parameter]:
        """The trainable parameters of one role, in a fixed order."""
        return [parameter for parameter in self.get_submodule(role).parameters() if parameter.requires_grad]

    def losses(self, batch: Batch, ctx: StepContext) -> dict[str, torch.Tensor]:
        """The objective's terms for one batch.

        Args:
            batch: stream name → {"image": (B, C, *S), "label": (B, 1, *S), …}, on ``ctx.device``.
            ctx: the step's context.

        Returns:
            Scalars: names ending in ``_loss`` are already weighted and are summed; the others are only logged.
        """
        raise NotImplementedError(f"{type(self).__name__} overrides neither losses() nor step()")

    def step(self, batch: Batch, ctx: StepContext) -> dict[str, torch.Tensor]:
        """One training step; by default updates the first role with the sum of :meth:`losses`.

        Returns:
            What to log: ``loss`` and the terms, detached.
        """
        terms = self.losses(batch, ctx)
        loss = torch.stack([term for name, term in terms.items() if name.endswith("_loss")]).sum()
        ctx.update({self.roles[0]: loss})
        return {"loss": loss.detach(), **{name: term.detach() for name, term in terms.items()}}

    def train(self, mode: bool = True) -> Self:
        """Set train mode everywhere but in the frozen networks."""
        super().train(mode)
        for name in self.frozen:
            self.get_submodule(name).eval()
        return self
