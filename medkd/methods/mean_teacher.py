"""Mean teacher: agree with the running average of oneself on unlabeled images.

Paper: Tarvainen, Valpola 2017, "Mean teachers are better role models", arXiv:1703.01780.
Roles: student. The teacher is the EMA of the student and receives no gradient. Streams: labeled, unlabeled.

Differs: noise on the teacher's input only, clamp(0.1 N(0, 1), ±0.2), as the usual segmentation code has it.
Differs: ramps follow the share of the run done, not fixed iteration counts; at 30,000 iterations they are the same.
Differs: buffers are copied from the student at each update, so that the teacher can be evaluated and shipped.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import nn

from medkd.engine.context import StepContext
from medkd.engine.method import Batch, Method
from medkd.losses.consistency import probability_mse
from medkd.losses.segmentation import dice_ce_loss
from medkd.nets.ema import ema_copy, update_ema
from medkd.schedules import ema_decay, sigmoid_ramp_up


class MeanTeacher(Method):
    """Supervised loss plus consistency with an EMA teacher.

    Args:
        student: (B, C, *S) → logits (B, K, *S).
        consistency_weight: weight of the consistency term at the end of its ramp.
        ramp_up_frac: share of the run over which the weight ramps up.
        start_frac: share of the run before which the consistency term is left out.
        decay: EMA decay.
        noise_std: standard deviation of the teacher's input noise, in units of the normalized image.
        noise_limit: the noise is clamped to ± this.
        deploy_teacher: ship the EMA teacher instead of the student.
        segmentation_loss: (logits, label) → scalar.
    """

    paper: ClassVar[str] = "Tarvainen and Valpola 2017, arXiv:1703.01780"
    roles: ClassVar[tuple[str, ...]] = ("student",)
    streams: ClassVar[tuple[str, ...]] = ("labeled", "unlabeled")
    batch_coupled: ClassVar[bool] = True  # the default Dice runs over the batch

    def __init__(
        self,
        student: nn.Module,
        *,
        consistency_weight: float = 0.1,
        ramp_up_frac: float = 1.0,
        start_frac: float = 1 / 30,
        decay: float = 0.99,
        noise_std: float = 0.1,
        noise_limit: float = 0.2,
        deploy_teacher: bool = False,
        segmentation_loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = dice_ce_loss,
    ) -> None:
        super().__init__()
        self.student = student
        self.teacher = ema_copy(student)
        self.consistency_weight = consistency_weight
        self.ramp_up_frac = ramp_up_frac
        self.start_frac = start_frac
        self.decay = decay
        self.noise_std = noise_std
        self.noise_limit = noise_limit
        self.deploy_teacher = deploy_teacher
        self.segmentation_loss = segmentation_loss

    @property
    def deployed(self) -> nn.Module:
        """The student, or its average when ``deploy_teacher``."""
        return self.teacher if self.deploy_teacher else self.student

    def losses(self, batch: Batch, ctx: StepContext) -> dict[str, torch.Tensor]:
        """Supervised loss on labeled images, consistency on unlabeled ones."""
        label, unlabeled = batch["labeled"]["label"], batch["unlabeled"]["image"]
        logits = self.student(torch.cat([batch["labeled"]["image"], unlabeled]))
        with torch.no_grad():
            target = self.teacher(unlabeled + ctx.noise_like(unlabeled, std=self.noise_std, limit=self.noise_limit))
        active = ctx.progress >= self.start_frac
        weight = active * self.consistency_weight * sigmoid_ramp_up(ctx.progress, self.ramp_up_frac)
        return {
            "segmentation_loss": self.segmentation_loss(logits[: len(label)], label),
            "consistency_loss": weight * probability_mse(logits[len(label) :], target),
        }

    def step(self, batch: Batch, ctx: StepContext) -> dict[str, torch.Tensor]:
        """Update the student, then move the teacher after it."""
        output = super().step(batch, ctx)
        if ctx.window_ends:
            update_ema(self.teacher, self.student, ema_decay(ctx.updates, self.decay))
        return output
