"""DACS: paste half of the classes of a source image into a target image, labels and pseudo-labels alike.

Paper: Tranheden, Olsson, Pinto, Svensson 2021, "DACS: Domain Adaptation via Cross-domain Mixed Sampling", WACV 2021,
arXiv:2007.08702. Code read: vikolss/DACS (MIT; nothing copied).
Roles: student. The teacher is its EMA and receives no gradient. Streams: source {image (B, C, *S) in [-1, 1], label
(B, 1, *S)}, target {image}.

Differs: the confidence weight is the share of confident elements of each target image, not of the whole batch; the
release is written for a batch of two.
Differs: color jitter is brightness and contrast, as suits one channel.
Differs: buffers of the teacher are copied from the student at each update.
Differs: Dice besides cross-entropy on the source.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import nn

from medkd.engine.context import StepContext
from medkd.engine.method import Batch, Method
from medkd.losses.entropy import confident_share
from medkd.losses.mixing import class_mix_mask, paste
from medkd.losses.pseudo_labels import masked_cross_entropy
from medkd.losses.segmentation import dice_ce_loss
from medkd.nets.ema import ema_copy, update_ema
from medkd.nets.strong_intensity import strong_intensity
from medkd.schedules import ema_decay


class DACS(Method):
    """L = L_seg(source) + consistency_weight · weighted CE(augmented mix, mixed label).

    The weight is 1 on source elements and, on target elements, the share of the target image that the teacher is sure
    of.

    Args:
        student: (B, C, *S) → logits (B, K, *S).
        consistency_weight: weight of the mixed term.
        confidence: probability from which on the teacher counts as sure.
        decay: EMA decay of the teacher, warm-started.
        strength: of the augmentation of mixed images; 0 for none.
        deploy_teacher: ship the EMA teacher instead of the student.
        segmentation_loss: (logits, label) → scalar.
    """

    paper: ClassVar[str] = "Tranheden et al. 2021, WACV, arXiv:2007.08702"
    roles: ClassVar[tuple[str, ...]] = ("student",)
    streams: ClassVar[tuple[str, ...]] = ("source", "target")
    batch_coupled: ClassVar[bool] = True  # the default Dice runs over the batch

    def __init__(
        self,
        student: nn.Module,
        *,
        consistency_weight: float = 1.0,
        confidence: float = 0.968,
        decay: float = 0.99,
        strength: float = 0.25,
        deploy_teacher: bool = False,
        segmentation_loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = dice_ce_loss,
    ) -> None:
        super().__init__()
        self.student = student
        self.teacher = ema_copy(student)
        self.consistency_weight = consistency_weight
        self.confidence = confidence
        self.decay = decay
        self.strength = strength
        self.deploy_teacher = deploy_teacher
        self.segmentation_loss = segmentation_loss

    @property
    def deployed(self) -> nn.Module:
        """The student, or its average when ``deploy_teacher``."""
        return self.teacher if self.deploy_teacher else self.student

    def losses(self, batch: Batch, ctx: StepContext) -> dict[str, torch.Tensor]:
        """The supervised term and the term on mixed images."""
        image, label = batch["source"]["image"], batch["source"]["label"]
        target = batch["target"]["image"]
        target = target[torch.arange(len(image), device=target.device) % len(target)]
        with torch.no_grad():
            probabilities = torch.softmax(self.teacher(target).float(), dim=1)
        trust = confident_share(probabilities, self.confidence)
        mask = class_mix_mask(label, ctx.generator)
        mixed = strong_intensity(paste(mask, image, target), ctx.generator, strength=self.strength)
        mixed_label = paste(mask, label.long(), probabilities.argmax(dim=1, keepdim=True))
        weight = torch.where(mask, 1.0, trust.reshape(-1, *[1] * (image.ndim - 1)))
        mixed_loss = masked_cross_entropy(self.student(mixed), mixed_label, weight=weight)
        return {
            "segmentation_loss": self.segmentation_loss(self.student(image), label),
            "mixed_loss": self.consistency_weight * mixed_loss,
            "confident_share": trust.mean(),
        }

    def step(self, batch: Batch, ctx: StepContext) -> dict[str, torch.Tensor]:
        """Update the student, then move the teacher after it."""
        output = super().step(batch, ctx)
        if ctx.window_ends:
            update_ema(self.teacher, self.student, ema_decay(ctx.updates, self.decay))
        return output
