"""Knowledge distillation from a frozen teacher's soft targets.

Paper: Hinton, Vinyals, Dean 2015, "Distilling the Knowledge in a Neural Network", arXiv:1503.02531.
Roles: student. Frozen: teacher. Streams: labeled; unlabeled if given, where only the teacher speaks.

Differs: the paper distills a classifier; here every voxel is a sample, as all segmentation work reads it.
Differs: supervised and soft terms are weighted 1 and ``kd_weight``; the paper gives only "a considerably lower weight"
for the hard targets.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import nn

from medkd.engine.context import StepContext
from medkd.engine.method import Batch, Method
from medkd.losses.distillation import soft_target_kl
from medkd.losses.segmentation import dice_ce_loss


class KD(Method):
    """Supervised loss plus distillation from a frozen teacher.

    Args:
        student: (B, C, *S) → logits (B, K, *S).
        teacher: same shapes, already trained.
        temperature: T > 0.
        kd_weight: weight of the distillation term.
        distillation_loss: (student logits, teacher logits, temperature) → scalar.
        segmentation_loss: (logits, label) → scalar.
    """

    paper: ClassVar[str] = "Hinton et al. 2015, arXiv:1503.02531"
    roles: ClassVar[tuple[str, ...]] = ("student",)
    frozen: ClassVar[tuple[str, ...]] = ("teacher",)
    streams: ClassVar[tuple[str, ...]] = ("labeled",)
    optional_streams: ClassVar[tuple[str, ...]] = ("unlabeled",)
    batch_coupled: ClassVar[bool] = True  # the default Dice runs over the batch

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        *,
        temperature: float = 4.0,
        kd_weight: float = 1.0,
        distillation_loss: Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor] = soft_target_kl,
        segmentation_loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = dice_ce_loss,
    ) -> None:
        super().__init__()
        self.student = student
        self.teacher = teacher
        self.temperature = temperature
        self.kd_weight = kd_weight
        self.distillation_loss = distillation_loss
        self.segmentation_loss = segmentation_loss

    def losses(self, batch: Batch, ctx: StepContext) -> dict[str, torch.Tensor]:
        """Supervised loss on labeled images, distillation on all."""
        label = batch["labeled"]["label"]
        image = torch.cat([batch[name]["image"] for name in ("labeled", "unlabeled") if name in batch])
        logits = self.student(image)
        with torch.no_grad():
            teacher_logits = self.teacher(image)
        distillation = self.distillation_loss(logits, teacher_logits, self.temperature)
        return {
            "segmentation_loss": self.segmentation_loss(logits[: len(label)], label),
            "kd_loss": self.kd_weight * distillation,
        }
