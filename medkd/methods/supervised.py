"""Supervised training on the labeled images alone: the arm every method is compared with.

Paper: none; the plain baseline.
Roles: student. Streams: labeled {image (B, C, *S), label (B, 1, *S)}.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import nn

from medkd.engine.context import StepContext
from medkd.engine.method import Batch, Method
from medkd.losses.segmentation import dice_ce_loss


class Supervised(Method):
    """Minimise a supervised loss on the labeled stream.

    Args:
        student: (B, C, *S) → logits (B, K, *S).
        segmentation_loss: (logits, label) → scalar.
    """

    paper: ClassVar[str] = "the supervised baseline"
    roles: ClassVar[tuple[str, ...]] = ("student",)
    streams: ClassVar[tuple[str, ...]] = ("labeled",)
    batch_coupled: ClassVar[bool] = True  # the default Dice runs over the batch

    def __init__(
        self,
        student: nn.Module,
        *,
        segmentation_loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = dice_ce_loss,
    ) -> None:
        super().__init__()
        self.student = student
        self.segmentation_loss = segmentation_loss

    def losses(self, batch: Batch, ctx: StepContext) -> dict[str, torch.Tensor]:
        """The supervised loss."""
        labeled = batch["labeled"]
        return {"segmentation_loss": self.segmentation_loss(self.student(labeled["image"]), labeled["label"])}
