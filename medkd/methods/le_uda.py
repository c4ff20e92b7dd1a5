"""LE-UDA: MT-UDA, and critics that make the student's decoder features look like those of both teachers.

Paper: Zhao et al. 2022, "LE-UDA: Label-efficient Unsupervised Domain Adaptation for Medical Image
Segmentation", IEEE TMI, arXiv:2212.02078. No code was released; the losses are from a summary of the paper, the parts
shared with MT-UDA from MT-UDA's released code (MIT).
Roles: student, intra_critics, inter_critics. Frozen: generator (target → source). Both teachers are EMAs of the
student.
Streams: labeled (image, label, cycled), source and target (image, translated, cycled); see ``Renderings``.
The student works in source style: what ships translates a target image to it first.

Differs: adversarial weights, the critics' networks and their least squares are not published in what we could read.
Ours: least squares with the teacher's features as real, weights 1e-3 and 2e-4 for the last and an earlier layer, ramped
like the consistency weights; the critics learn from the first step on.
Differs: which images feed which critic is not known either; ours sees those of the matching consistency term, each
once.
Differs: the features are tapped as they are; that the two teachers may have one decay is explained in ``MTUDA``'s card,
and the same decays are the default, so that only the critics separate the two methods.
Differs: each network runs once per step on its images joined, so BatchNorm sees their joint statistics.
Differs: the teachers normalize by the statistics of their own batch (train mode, dropout included); their running
statistics are those of the student, copied at each update, and nothing uses them.
Differs: ramps follow the share of the run done: a fifth of the run without consistency and adversarial terms, then a
jump to 0.041 of their final weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import torch
from torch import nn

from medkd.engine.context import StepContext
from medkd.engine.method import Batch, Method
from medkd.errors import ConfigError
from medkd.losses.adversarial import critic_accuracy, least_squares
from medkd.losses.domain_consistency import (
    Renderings,
    StudentLogits,
    inter_domain_consistency,
    intra_domain_consistency,
)
from medkd.losses.segmentation import dice_ce_loss
from medkd.nets.critic_watch import CriticWatch
from medkd.nets.ema import ema_copy, update_ema
from medkd.nets.taps import Taps
from medkd.nets.translate_then_segment import TranslateThenSegment
from medkd.schedules import ema_decay, sigmoid_ramp_up

Features = dict[str, torch.Tensor]


class LEUDA(Method):
    """L = L_seg + w(t) · Σ over intra, inter (weight · L_con + Σ over layers adversarial_weight · L_adv).

    Args:
        student: (B, C, *S) in source style → logits (B, K, *S).
        generator: trained, target style → source style, (B, C, *S) in [-1, 1]; ships with the student.
        intra_critics: one critic per layer: features (B, F, *S') → logits; tells the student's features from those of
            the teacher in source style.
        inter_critics: likewise for the teacher in target style.
        layers: module names of the student's decoder whose outputs the critics see, last layer first.
        adversarial_weights: weight of fooling the critics, by layer, at the end of the ramp.
        intra_weight: weight of the agreement with the teacher in source style, at the end of the ramp.
        inter_weight: weight of the agreement with the teacher in target style, likewise.
        start_frac: share of the run before which the student has neither consistency nor adversarial terms.
        ramp_up_frac: share of the run, from its beginning, over which the weights ramp up.
        intra_decay: EMA decay of the teacher in source style.
        inter_decay: EMA decay of the teacher in target style.
        copy_updates: both teachers are copies of the student for so many updates; then the average begins.
        noise_std: standard deviation of the teachers' input noise, in units of the image in [-1, 1].
        noise_limit: the noise is clamped to ± this.
        collapse_steps: warn when a pair of critics was right at least 95 % of the time for so many steps in a row
            while the student tried to fool it; 0 never warns.
        segmentation_loss: (logits, label) → scalar; applied to labeled images and to their cycles, and summed.

    Raises:
        ConfigError: If layers, critics and weights differ in number; at a step, if labels or renderings are missing or
            channel counts differ.
    """

    paper: ClassVar[str] = "Zhao et al. 2022, IEEE TMI, arXiv:2212.02078"
    roles: ClassVar[tuple[str, ...]] = ("student", "intra_critics", "inter_critics")
    frozen: ClassVar[tuple[str, ...]] = ("generator",)
    streams: ClassVar[tuple[str, ...]] = ("labeled", "source", "target")
    batch_coupled: ClassVar[bool] = True  # the default Dice runs over the batch

    def __init__(
        self,
        student: nn.Module,
        generator: nn.Module,
        intra_critics: nn.ModuleList,
        inter_critics: nn.ModuleList,
        *,
        layers: Sequence[str],
        adversarial_weights: Sequence[float] = (1e-3, 2e-4),
        intra_weight: float = 1.0,
        inter_weight: float = 0.1,
        start_frac: float = 0.2,
        ramp_up_frac: float = 1.0,
        intra_decay: float = 0.99,
        inter_decay: float = 0.99,
        copy_updates: int = 30,
        noise_std: float = 0.1,
        noise_limit: float = 0.2,
        collapse_steps: int = 500,
        segmentation_loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = dice_ce_loss,
    ) -> None:
        super().__init__()
        counts = {len(layers), len(intra_critics), len(inter_critics), len(adversarial_weights)}
        if len(counts) > 1:
            raise ConfigError(
                "layers",
                f"{len(layers)} layers, {len(intra_critics)} intra_critics, {len(inter_critics)} inter_critics and "
                f"{len(adversarial_weights)} adversarial_weights",
                "give one of each per layer",
            )
        self.student = student
        self.generator = generator
        self.intra_critics = intra_critics
        self.inter_critics = inter_critics
        self.intra_teacher = ema_copy(student)
        self.inter_teacher = ema_copy(student)
        self.watch = CriticWatch(
            ("the critic of the intra-domain features", "the critic of the inter-domain features"),
            steps=collapse_steps,
            remedy="consider larger adversarial_weights, or a lower learning rate for the critics",
        )
        self._shipped = (TranslateThenSegment(generator, student),)  # in a tuple: its networks are registered above
        self.layers = tuple(layers)
        self.adversarial_weights = tuple(adversarial_weights)
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
        """The generator and the student behind it: takes a target image, needs no teacher and no critic."""
        return self._shipped[0]

    def step(self, batch: Batch, ctx: StepContext) -> dict[str, torch.Tensor]:
        """Update the student and both pairs of critics, then move the teachers; ``loss`` is the student's."""
        views = Renderings.of(batch)
        with Taps(self.student, self.layers) as tapped:
            logits = StudentLogits.of(self.student(torch.cat(views.of_student)), views)
        labeled = 2 * len(views.label)  # the critics see the features of unlabeled images only
        source_style = {name: tapped[name][labeled:] for name in self.layers}
        own = len(views.source), len(views.source_cycled), len(views.target_as_source)
        both = {name: _without_second(part, own) for name, part in source_style.items()}

        ramp = (ctx.progress >= self.start_frac) * sigmoid_ramp_up(ctx.progress, self.ramp_up_frac)
        intra_logits, intra_features = self._ask(self.intra_teacher, views.of_intra_teacher, ctx)
        inter_logits, inter_features = self._ask(self.inter_teacher, views.of_inter_teacher, ctx)
        terms = {
            "segmentation_loss": self.segmentation_loss(logits.labeled, views.label)
            + self.segmentation_loss(logits.labeled_cycled, views.label),
            "intra_consistency_loss": ramp * self.intra_weight * intra_domain_consistency(logits, intra_logits, views),
            "inter_consistency_loss": ramp * self.inter_weight * inter_domain_consistency(logits, inter_logits, views),
            "intra_adversarial_loss": ramp * self._fooling(self.intra_critics, both),
            "inter_adversarial_loss": ramp * self._fooling(self.inter_critics, source_style),
        }
        loss = torch.stack(list(terms.values())).sum()
        intra_loss, intra_accuracy = self._judging(self.intra_critics, intra_features, both)
        inter_loss, inter_accuracy = self._judging(self.inter_critics, inter_features, source_style)
        if ramp:
            self.watch.observe([intra_accuracy, inter_accuracy])
        ctx.update({"student": loss, "intra_critics": intra_loss, "inter_critics": inter_loss})
        if ctx.window_ends:
            averaged = max(0, ctx.updates - self.copy_updates)
            update_ema(self.intra_teacher, self.student, ema_decay(averaged, self.intra_decay))
            update_ema(self.inter_teacher, self.student, ema_decay(averaged, self.inter_decay))
        terms |= {
            "intra_critic_loss": intra_loss, "intra_critic_accuracy": intra_accuracy,
            "inter_critic_loss": inter_loss, "inter_critic_accuracy": inter_accuracy,
        }  # fmt: skip
        return {"loss": loss.detach(), **{name: term.detach() for name, term in terms.items()}}

    @torch.no_grad()
    def _ask(
        self, teacher: nn.Module, images: tuple[torch.Tensor, ...], ctx: StepContext
    ) -> tuple[torch.Tensor, Features]:
        joined = torch.cat(images)
        with Taps(teacher, self.layers) as tapped:
            logits = teacher(joined + ctx.noise_like(joined, std=self.noise_std, limit=self.noise_limit))
        return logits, {name: tapped[name] for name in self.layers}

    def _fooling(self, critics: nn.ModuleList, features: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """How far the student's features are from passing for the teacher's, weighted by layer."""
        parts = zip(self.adversarial_weights, critics, self.layers, strict=True)
        return torch.stack([w * least_squares(critic(features[name]), real=True) for w, critic, name in parts]).sum()

    def _judging(
        self, critics: nn.ModuleList, teacher: Mapping[str, torch.Tensor], student: Mapping[str, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The critics' loss on detached features and their share of right answers, means over layers."""
        losses, accuracies = [], []
        for critic, name in zip(critics, self.layers, strict=True):
            real, fake = critic(teacher[name]), critic(student[name].detach())
            losses.append(0.5 * (least_squares(real, real=True) + least_squares(fake, real=False)))
            accuracies.append(critic_accuracy(real, fake).detach())
        return torch.stack(losses).mean(), torch.stack(accuracies).mean()


def _without_second(joined: torch.Tensor, sizes: tuple[int, int, int]) -> torch.Tensor:
    """Of source, source cycled and target as source, joined: the first and the last."""
    first, _, last = joined.split(list(sizes))
    return torch.cat([first, last])
