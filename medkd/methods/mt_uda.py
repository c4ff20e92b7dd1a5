"""MT-UDA: few source labels, no target labels, and two mean teachers, one in each image style.

Paper: Zhao, Xu, Li, Zeng, Guan 2021, "MT-UDA: Towards Unsupervised Cross-modality Medical Image Segmentation with
Limited Source Labels", MICCAI 2021, arXiv:2203.12454. Read: the released code (MIT), not the paper's text.
Roles: student. Frozen: generator (target → source). Both teachers are EMAs of the student and receive no gradient.
Streams: labeled (image, label, cycled), source and target (image, translated, cycled); see ``Renderings``. One item
carries all styles of its image, so that the pairs of the inter-domain term show the same anatomy.
The student works in source style: what ships translates a target image to it first.

Differs: the released teachers have one decay and are bit-identical but for BatchNorm's running statistics; that is
the default here too. ``inter_decay`` other than ``intra_decay`` gives two different teachers.
Differs: each network runs once per step on its images joined, so BatchNorm sees their joint statistics; the release
runs every stream of one image by itself, and draws new input noise for each use of an image.
Differs: the teachers normalize by the statistics of their own batch (train mode, as released, dropout included); their
running statistics are those of the student, copied at each update, and nothing uses them.
Differs: the release's extra affine of labeled images without their labels is left out; it is a defect.
Differs: ramps follow the share of the run done: a fifth of the run (30 of 150 epochs) without consistency, where both
weights are exactly 0, then a jump to 0.041 of their final value.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import nn

from medkd.engine.context import StepContext
from medkd.engine.method import Batch, Method
from medkd.losses.domain_consistency import (
    Renderings,
    StudentLogits,
    inter_domain_consistency,
    intra_domain_consistency,
)
from medkd.losses.segmentation import dice_ce_loss
from medkd.nets.ema import ema_copy, update_ema
from medkd.nets.translate_then_segment import TranslateThenSegment
from medkd.schedules import ema_decay, sigmoid_ramp_up


class MTUDA(Method):
    """L = L_seg + w(t) · (intra_weight · L_intra + inter_weight · L_inter).

    Args:
        student: (B, C, *S) in source style → logits (B, K, *S).
        generator: trained, target style → source style, (B, C, *S) in [-1, 1]; ships with the student.
        intra_weight: weight of the agreement with the teacher in source style, at the end of the ramp; 0 leaves that
            teacher out.
        inter_weight: weight of the agreement with the teacher in target style, likewise.
        start_frac: share of the run before which both terms are left out.
        ramp_up_frac: share of the run, from its beginning, over which the weights ramp up.
        intra_decay: EMA decay of the teacher in source style.
        inter_decay: EMA decay of the teacher in target style.
        copy_updates: both teachers are copies of the student for so many updates; then the average begins.
        noise_std: standard deviation of the teachers' input noise, in units of the image in [-1, 1].
        noise_limit: the noise is clamped to ± this.
        segmentation_loss: (logits, label) → scalar; applied to labeled images and to their cycles, and summed.

    Raises:
        ConfigError: At a step, if labels or renderings are missing or channel counts differ.
    """

    paper: ClassVar[str] = "Zhao et al. 2021, MICCAI, arXiv:2203.12454"
    roles: ClassVar[tuple[str, ...]] = ("student",)
    frozen: ClassVar[tuple[str, ...]] = ("generator",)
    streams: ClassVar[tuple[str, ...]] = ("labeled", "source", "target")
    batch_coupled: ClassVar[bool] = True  # the default Dice runs over the batch

    def __init__(
        self,
        student: nn.Module,
        generator: nn.Module,
        *,
        intra_weight: float = 1.0,
        inter_weight: float = 0.1,
        start_frac: float = 0.2,
        ramp_up_frac: float = 1.0,
        intra_decay: float = 0.99,
        inter_decay: float = 0.99,
        copy_updates: int = 30,
        noise_std: float = 0.1,
        noise_limit: float = 0.2,
        segmentation_loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = dice_ce_loss,
    ) -> None:
        super().__init__()
        self.student = student
        self.generator = generator
        self.intra_teacher = ema_copy(student)
        self.inter_teacher = ema_copy(student)
        self._shipped = (TranslateThenSegment(generator, student),)  # in a tuple: its networks are registered above
        self.intra_weight = intra_weight
        self.inter_weight = inter_weight
        self.start_frac = start_frac
        self.ramp_up_frac = ramp_up_frac
        self.intra_decay = intra_decay
        self.inter_decay = inter_decay
        self.copy_updates = copy_updates
        self.noise_std = noise_std
        self.noise_limit = noise_limit
        self.segmentation_loss = segmentation_loss

    @property
    def deployed(self) -> nn.Module:
        """The generator and the student behind it: takes a target image, needs no teacher."""
        return self._shipped[0]

    def losses(self, batch: Batch, ctx: StepContext) -> dict[str, torch.Tensor]:
        """Supervised loss on labeled images and their cycles; agreement with both teachers on the others."""
        views = Renderings.of(batch)
        logits = StudentLogits.of(self.student(torch.cat(views.of_student)), views)
        terms = {
            "segmentation_loss": self.segmentation_loss(logits.labeled, views.label)
            + self.segmentation_loss(logits.labeled_cycled, views.label)
        }
        ramp = (ctx.progress >= self.start_frac) * sigmoid_ramp_up(ctx.progress, self.ramp_up_frac)
        for name, weight, teacher, images, consistency in (
            ("intra", self.intra_weight, self.intra_teacher, views.of_intra_teacher, intra_domain_consistency),
            ("inter", self.inter_weight, self.inter_teacher, views.of_inter_teacher, inter_domain_consistency),
        ):
            term = logits.labeled.new_zeros((), dtype=torch.float32)
            if ramp * weight:
                term = ramp * weight * consistency(logits, self._ask(teacher, images, ctx), views)
            terms[f"{name}_consistency_loss"] = term
        return terms

    def step(self, batch: Batch, ctx: StepContext) -> dict[str, torch.Tensor]:
        """Update the student, then move both teachers after it."""
        output = super().step(batch, ctx)
        if ctx.window_ends:
            averaged = max(0, ctx.updates - self.copy_updates)
            update_ema(self.intra_teacher, self.student, ema_decay(averaged, self.intra_decay))
            update_ema(self.inter_teacher, self.student, ema_decay(averaged, self.inter_decay))
        return output

    @torch.no_grad()
    def _ask(self, teacher: nn.Module, images: tuple[torch.Tensor, ...], ctx: StepContext) -> torch.Tensor:
        joined = torch.cat(images)
        logits: torch.Tensor = teacher(joined + ctx.noise_like(joined, std=self.noise_std, limit=self.noise_limit))
        return logits
