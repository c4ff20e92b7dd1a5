"""ACT-Net: a small student from a large frozen teacher and an EMA co-teacher of its own size, on few labels.

Paper: Zhao, Zhu, Zeng, Veeravalli, Guan 2022, "ACT-Net: Asymmetric Co-Teacher Network for Semi-supervised
Memory-efficient Medical Image Segmentation", ICIP 2022, arXiv:2207.01900. No code was released.
Roles: student. Frozen: teacher. The co-teacher is the EMA of the student. Streams: labeled, unlabeled.

Differs: consistency_weight, ramps, EMA decay, noise and the teacher's training are not published in what we could read;
ours are those of mean teacher for segmentation.
Differs: kd_weight is not published either; ours was chosen on virtual patients, see docs/methods/act_net.md.
Differs: the KD term is multiplied by T² (``t_squared``); without it T = 20 makes the term's gradient vanish.
Differs: the KD term sums over classes and averages over pixels and over labeled and unlabeled images.
Differs: the networks are MONAI's: DynUNet in the cardiac bundle, UNet in the brain bundle, with instance normalization.
Differs: the co-teacher's buffers are copied from the student at each update.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import nn

from medkd.engine.context import StepContext
from medkd.engine.method import Batch, Method
from medkd.losses.consistency import probability_mse
from medkd.losses.distillation import softened_mse
from medkd.losses.segmentation import dice_ce_loss
from medkd.nets.ema import ema_copy, update_ema
from medkd.schedules import ema_decay, sigmoid_ramp_up


class ACTNet(Method):
    """L = L_seg + kd_weight · L_kd(student, teacher) + consistency_weight(progress) · L_co(student, co-teacher).

    Args:
        student: (B, C, *S) → logits (B, K, *S).
        teacher: same shapes, already trained.
        temperature: T of the softened probabilities.
        t_squared: multiply the KD term by T².
        kd_weight: weight of the KD term.
        consistency_weight: weight of the co-teacher term at the end of its ramp.
        ramp_up_frac: share of the run over which that weight ramps up.
        start_frac: share of the run before which the co-teacher term is left out.
        decay: EMA decay of the co-teacher.
        noise_std: standard deviation of the input noise, drawn separately for student and co-teacher, in units of
            the normalized image.
        noise_limit: the noise is clamped to ± this.
        deploy_co_teacher: ship the co-teacher instead of the student; both are of the same size.
        segmentation_loss: (logits, label) → scalar.
    """

    paper: ClassVar[str] = "Zhao et al. 2022, ICIP, arXiv:2207.01900"
    roles: ClassVar[tuple[str, ...]] = ("student",)
    frozen: ClassVar[tuple[str, ...]] = ("teacher",)
    streams: ClassVar[tuple[str, ...]] = ("labeled", "unlabeled")
    batch_coupled: ClassVar[bool] = True  # the default Dice runs over the batch

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        *,
        temperature: float = 20.0,
        t_squared: bool = True,
        kd_weight: float = 0.1,
        consistency_weight: float = 0.1,
        ramp_up_frac: float = 1.0,
        start_frac: float = 1 / 30,
        decay: float = 0.99,
        noise_std: float = 0.1,
        noise_limit: float = 0.2,
        deploy_co_teacher: bool = False,
        segmentation_loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = dice_ce_loss,
    ) -> None:
        super().__init__()
        self.student = student
        self.teacher = teacher
        self.co_teacher = ema_copy(student)
        self.temperature = temperature
        self.t_squared = t_squared
        self.kd_weight = kd_weight
        self.consistency_weight = consistency_weight
        self.ramp_up_frac = ramp_up_frac
        self.start_frac = start_frac
        self.decay = decay
        self.noise_std = noise_std
        self.noise_limit = noise_limit
        self.deploy_co_teacher = deploy_co_teacher
        self.segmentation_loss = segmentation_loss

    @property
    def deployed(self) -> nn.Module:
        """The student, or its average when ``deploy_co_teacher``."""
        return self.co_teacher if self.deploy_co_teacher else self.student

    def losses(self, batch: Batch, ctx: StepContext) -> dict[str, torch.Tensor]:
        """The three terms, and the size of the KD gradient at the student's logits."""
        label = batch["labeled"]["label"]
        labeled = len(label)
        image = torch.cat([batch["labeled"]["image"], batch["unlabeled"]["image"]])
        logits = self.student(image + ctx.noise_like(image, std=self.noise_std, limit=self.noise_limit))
        with torch.no_grad():
            teacher_logits = self.teacher(image)
            unlabeled = image[labeled:]
            noise = ctx.noise_like(unlabeled, std=self.noise_std, limit=self.noise_limit)
            co_teacher_logits = self.co_teacher(unlabeled + noise)

        kd_loss = self.kd_weight * softened_mse(logits, teacher_logits, self.temperature, t_squared=self.t_squared)
        active = ctx.progress >= self.start_frac
        weight = active * self.consistency_weight * sigmoid_ramp_up(ctx.progress, self.ramp_up_frac)
        (kd_gradient,) = torch.autograd.grad(kd_loss, logits, retain_graph=True)
        return {
            "segmentation_loss": self.segmentation_loss(logits[:labeled], label),
            "kd_loss": kd_loss,
            "consistency_loss": weight * probability_mse(logits[labeled:], co_teacher_logits),
            "kd_gradient_norm": kd_gradient.float().norm(),
        }

    def step(self, batch: Batch, ctx: StepContext) -> dict[str, torch.Tensor]:
        """Update the student, then move the co-teacher after it."""
        output = super().step(batch, ctx)
        if ctx.window_ends:
            update_ema(self.co_teacher, self.student, ema_decay(ctx.updates, self.decay))
        return output
