"""Notices a critic that no generator fools any more, and says so once."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import nn

logger = logging.getLogger(__name__)


class CriticWatch(nn.Module):
    """Count the steps in a row in which a critic was nearly always right; warn once for each critic.

    A critic that is always right has no doubt left to learn from, and the translations it judges no longer improve. The
    counts and what was warned about are buffers: a resumed run neither forgets nor repeats.

    Args:
        names: of the critics, as a sentence begins with them: ``"the critic of the target images"``.
        steps: how many steps in a row; 0 watches nothing.
        accuracy: from which share of right answers on a critic counts as always right, in (0.5, 1].
        remedy: what to do about it.
    """

    counts: torch.Tensor
    warned: torch.Tensor

    def __init__(
        self,
        names: Sequence[str],
        *,
        steps: int = 500,
        accuracy: float = 0.95,
        remedy: str = "look at the translations, and consider a lower learning rate for the critics, or more images",
    ) -> None:
        super().__init__()
        self.names = tuple(names)
        self.steps = steps
        self.accuracy = accuracy
        self.remedy = remedy
        self.register_buffer("counts", torch.zeros(len(self.names), dtype=torch.int64))
        self.register_buffer("warned", torch.zeros(len(self.names), dtype=torch.bool))

    @torch.no_grad()
    def observe(self, accuracies: Sequence[torch.Tensor]) -> None:
        """Take note of one step.

        Args:
            accuracies: of each critic in the order of ``names``: 0-dim, share of right answers in [0, 1].
        """
        if not self.steps:
            return
        is_right = torch.stack(list(accuracies)) >= self.accuracy
        self.counts = torch.where(is_right, self.counts + 1, 0)
        due = (self.counts >= self.steps) & ~self.warned
        if not due.any():
            return
        self.warned = self.warned | due
        for name, is_due in zip(self.names, due.tolist(), strict=True):
            if is_due:
                logger.warning(
                    "%s was right in at least %.0f %% of its answers for %d steps in a row: nothing fools it now; %s",
                    name,
                    100 * self.accuracy,
                    self.steps,
                    self.remedy,
                )
