"""CBST: train on one's own target predictions, the most confident share of every class, in rounds with a growing share.

Paper: Zou, Yu, Kumar, Wang 2018, "Unsupervised Domain Adaptation for Semantic Segmentation via Class-Balanced
Self-Training", ECCV 2018, arXiv:1810.07911. Code read: yzou2/CBST (CC BY-NC-SA 4.0; nothing copied).
Roles: student. Streams: source {image (B, C, *S), label (B, 1, *S)}, target {image}.

Differs: a copy of the student, made when a round begins, labels every target batch of the round; the release writes the
same labels to disk once. So labels fit crops and augmentations.
Differs: a round's thresholds come from the last ``images`` target images, not from a pass over the whole target set;
with as many as the set has they are the same. The first round therefore waits for ``start_frac`` of the run.
Differs: rounds are equal shares of the run (6 rounds of 2 epochs in the release), the learning rate is the user's
schedule.
Differs: no spatial priors (CBST-SP), no mining of source images, no test-time flips.
Differs: Dice besides cross-entropy on the source.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Self

import torch
from torch import nn

from medkd.engine.context import StepContext
from medkd.engine.method import Batch, Method
from medkd.losses.pseudo_labels import IGNORE, class_balanced_pseudo_labels, class_thresholds, masked_cross_entropy
from medkd.losses.segmentation import dice_ce_loss
from medkd.nets.ema import ema_copy, update_ema
from medkd.nets.late_buffer import LateBuffer
from medkd.nets.recent_images import RecentImages


class CBST(Method):
    """L = L_seg(source) + pseudo_weight · CE(target, pseudo-labels), in rounds.

    The pseudo-label is argmax_c p_c / exp(-k_c) where that exceeds 1. exp(-k_c) is the confidence that the r most
    confident share of the elements predicted as c exceeds; r grows from ``portion`` by ``portion_step`` a round up to
    ``largest_portion``. Start from a student trained on the source.

    Args:
        student: (B, C, *S) → logits (B, K, *S).
        rounds: rounds of self-training.
        portion: share of each class that is kept in the first round.
        portion_step: growth of the share per round.
        largest_portion: where it stops growing.
        pseudo_weight: weight of the pseudo-label term; 0: no rounds.
        start_frac: share of the run before the first round, with the source term alone.
        images: target images that thresholds are computed on.
        segmentation_loss: (logits, label) → scalar.
    """

    paper: ClassVar[str] = "Zou et al. 2018, ECCV, arXiv:1810.07911"
    roles: ClassVar[tuple[str, ...]] = ("student",)
    streams: ClassVar[tuple[str, ...]] = ("source", "target")
    batch_coupled: ClassVar[bool] = True  # thresholds run over images, the default Dice over the batch

    round: torch.Tensor

    def __init__(
        self,
        student: nn.Module,
        *,
        rounds: int = 6,
        portion: float = 0.3,
        portion_step: float = 0.05,
        largest_portion: float = 0.5,
        pseudo_weight: float = 1.0,
        start_frac: float = 0.1,
        images: int = 64,
        segmentation_loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = dice_ce_loss,
    ) -> None:
        super().__init__()
        self.student = student
        self.labeler = ema_copy(student)
        self.recent = RecentImages(images)
        self.thresholds = LateBuffer()
        self.register_buffer("round", torch.tensor(-1))
        self.rounds = rounds
        self.portion = portion
        self.portion_step = portion_step
        self.largest_portion = largest_portion
        self.pseudo_weight = pseudo_weight
        self.start_frac = start_frac
        self.segmentation_loss = segmentation_loss

    def train(self, mode: bool = True) -> Self:
        """Set train mode, but for the network that labels."""
        super().train(mode)
        self.labeler.eval()
        return self

    def portion_of(self, round_index: int) -> float:
        """The share of each class that round ``round_index``, from 0, keeps."""
        return min(self.portion + round_index * self.portion_step, self.largest_portion)

    @torch.no_grad()
    def begin_round(self, round_index: int, batch_size: int, device: torch.device) -> None:
        """Let the student of this moment label the round, with thresholds from the recent target images."""
        update_ema(self.labeler, self.student, 0.0)
        parts = [torch.softmax(self.labeler(part).float(), dim=1) for part in self.recent.batches(batch_size, device)]
        best = torch.cat(parts).max(dim=1)
        self.thresholds.value = class_thresholds(
            best.values, best.indices, classes=parts[0].shape[1], portion=self.portion_of(round_index)
        )
        self.round.fill_(round_index)

    def losses(self, batch: Batch, ctx: StepContext) -> dict[str, torch.Tensor]:
        """The supervised term and, once rounds have begun, the pseudo-label term."""
        source, target = batch["source"], batch["target"]["image"]
        terms = {"segmentation_loss": self.segmentation_loss(self.student(source["image"]), source["label"])}
        if self.thresholds.is_set:
            with torch.no_grad():
                probabilities = torch.softmax(self.labeler(target).float(), dim=1)
            label = class_balanced_pseudo_labels(probabilities, self.thresholds.value.to(target.device))
            terms["pseudo_loss"] = self.pseudo_weight * masked_cross_entropy(self.student(target), label)
            terms["labeled_share"] = (label != IGNORE).float().mean()
        return terms

    def step(self, batch: Batch, ctx: StepContext) -> dict[str, torch.Tensor]:
        """Begin a round when it is time, update the student, remember the target images."""
        target = batch["target"]["image"]
        done = (ctx.progress - self.start_frac) / max(1 - self.start_frac, 1e-9)
        due = min(int(done * self.rounds + 1e-9), self.rounds - 1) if done >= 0 else -1
        if due > int(self.round) and len(self.recent):
            self.begin_round(due, len(target), ctx.device)
        output = super().step(batch, ctx)
        if self.pseudo_weight:
            self.recent.add(target)
        return output
