"""ProDA, stage 1: pseudo-labels that the distance to class prototypes corrects while training goes on.

Paper: Zhang, Zhang, Zhang, Chen, Wang, Wen 2021, "Prototypical Pseudo Label Denoising and Target Structure Learning for
Domain Adaptive Semantic Segmentation", CVPR 2021, arXiv:2101.10979. Code read: microsoft/ProDA (MIT; nothing copied).
Roles: student. The teacher is its EMA; the labeler, which gives the soft pseudo-labels, is the student as it was when
the method began. Streams: source {image (B, C, *S) in [-1, 1], label (B, 1, *S)}, target {image}.

Differs: stage 1 only; stages 2 and 3 distill into a self-supervised initialization, which small medical networks lack.
Differs: soft pseudo-labels are computed for each batch by the frozen labeler; the release writes the same to disk once.
Differs: first prototypes come from the last ``images`` target images, not from a pass over the target set; the method
therefore waits for ``start_frac`` of the run, with the source term alone.
Differs: weak and strong views differ in intensities alone (no geometry), so no label has to be moved.
Differs: a class that no prototype exists of yet gets no weight until the teacher predicts it.
Differs: the labeler and the teacher run in eval mode; the release freezes BatchNorm on request.
Differs: Dice besides cross-entropy on the source.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Self

import torch
from torch import nn
from torch.nn import functional

from medkd.engine.context import StepContext
from medkd.engine.method import Batch, Method
from medkd.losses.entropy import uniform_divergence
from medkd.losses.precision import at_least_float32, without_autocast
from medkd.losses.pseudo_labels import class_centroids, symmetric_cross_entropy
from medkd.losses.segmentation import dice_ce_loss
from medkd.nets.classifier_input import classifier_name, logits_and_features
from medkd.nets.ema import ema_copy, update_ema
from medkd.nets.late_buffer import LateBuffer
from medkd.nets.recent_images import RecentImages
from medkd.nets.strong_intensity import strong_intensity


def log_assignment(features: torch.Tensor, prototypes: torch.Tensor, tau: float = 1.0) -> torch.Tensor:
    """Logarithm of ``medkd.losses.pseudo_labels.prototype_weights``, where some classes may lack a prototype.

    Args:
        features: (B, D, *S).
        prototypes: (K, D); infinite rows are classes without one, which get (almost) nothing.
        tau: temperature, > 0.

    Returns:
        (B, K, *S); its exponentials sum to 1 over K.
    """
    rows = at_least_float32(features).movedim(1, -1)
    known = prototypes.to(rows)
    with without_autocast(rows):
        distances = torch.cdist(
            rows.flatten(0, -2), known.nan_to_num(posinf=0.0), compute_mode="donot_use_mm_for_euclid_dist"
        ).masked_fill(known[:, 0].isinf(), 1e4 * tau)
    return torch.log_softmax(-distances / tau, dim=1).unflatten(0, rows.shape[:-1]).movedim(-1, 1)


def _one_hot_prediction(logits: torch.Tensor) -> torch.Tensor:
    """(B, K, *S) logits → (B, K, *S), 1 for the predicted class."""
    return torch.zeros_like(logits, dtype=torch.float32).scatter_(1, logits.argmax(dim=1, keepdim=True), 1.0)


class ProDA(Method):
    """L = L_seg(source) + symmetric CE(target, argmax w · p0) + consistency of prototype assignments + KLD regularizer.

    w = softmax_c(-‖f′ - η_c‖ / tau) of the teacher's features f′ weighs the labeler's probabilities p0. Prototypes η
    follow the teacher's class means with momentum. Start from a student trained on the source.

    Args:
        student: (B, C, *S) → logits (B, K, *S).
        classifier: name of the student's last layer, whose input are the features; None: its last convolution.
        tau: temperature of prototype assignments.
        prototype_momentum: share of the batch's class means in the prototypes, per update.
        decay: EMA decay of the teacher.
        cross_weight: weight of the cross-entropy in the symmetric one.
        reverse_weight: weight of the reverse cross-entropy.
        consistency_weight: weight of the KL divergence between prototype assignments of the teacher's (weak) and the
            student's (strong) view, mean over elements and classes.
        regularizer_weight: weight of the KLD from uniform.
        strength: of the strong view; 0 for none.
        start_frac: share of the run before the method begins.
        images: target images that first prototypes are computed on.
        deploy_teacher: ship the EMA teacher instead of the student.
        segmentation_loss: (logits, label) → scalar.

    Raises:
        ConfigError: If the classifier is not found.
    """

    paper: ClassVar[str] = "Zhang et al. 2021, CVPR, arXiv:2101.10979"
    roles: ClassVar[tuple[str, ...]] = ("student",)
    streams: ClassVar[tuple[str, ...]] = ("source", "target")
    batch_coupled: ClassVar[bool] = True  # prototypes run over images, the default Dice over the batch

    def __init__(
        self,
        student: nn.Module,
        *,
        classifier: str | None = None,
        tau: float = 1.0,
        prototype_momentum: float = 1e-4,
        decay: float = 0.999,
        cross_weight: float = 0.1,
        reverse_weight: float = 1.0,
        consistency_weight: float = 10.0,
        regularizer_weight: float = 0.1,
        strength: float = 0.25,
        start_frac: float = 0.1,
        images: int = 64,
        deploy_teacher: bool = False,
        segmentation_loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = dice_ce_loss,
    ) -> None:
        super().__init__()
        self.student = student
        self.teacher = ema_copy(student)
        self.labeler = ema_copy(student)
        self.classifier = classifier_name(student, classifier)
        self.recent = RecentImages(images)
        self.prototypes = LateBuffer()  # (K, D); infinite for a class without one
        self.tau = tau
        self.prototype_momentum = prototype_momentum
        self.decay = decay
        self.cross_weight = cross_weight
        self.reverse_weight = reverse_weight
        self.consistency_weight = consistency_weight
        self.regularizer_weight = regularizer_weight
        self.adapts = any((cross_weight, reverse_weight, consistency_weight, regularizer_weight))
        self.strength = strength
        self.start_frac = start_frac
        self.deploy_teacher = deploy_teacher
        self.segmentation_loss = segmentation_loss

    @property
    def deployed(self) -> nn.Module:
        """The student, or its average when ``deploy_teacher``."""
        return self.teacher if self.deploy_teacher else self.student

    def train(self, mode: bool = True) -> Self:
        """Set train mode, but for the labeler and the teacher."""
        super().train(mode)
        self.labeler.eval()
        self.teacher.eval()
        return self

    @torch.no_grad()
    def begin(self, batch_size: int, device: torch.device) -> None:
        """Make labeler and teacher from the student of this moment, and prototypes from the recent target images."""
        update_ema(self.labeler, self.student, 0.0)
        update_ema(self.teacher, self.student, 0.0)
        sums, counts = [], []
        for part in self.recent.batches(batch_size, device):
            logits, features = logits_and_features(self.labeler, part, self.classifier)
            means, totals = class_centroids(features, _one_hot_prediction(logits))
            sums.append(means * totals[:, None])
            counts.append(totals)
        count = torch.stack(counts).sum(dim=0)[:, None]
        self.prototypes.value = torch.where(count > 0, torch.stack(sums).sum(dim=0) / count, torch.inf)

    @torch.no_grad()
    def move_prototypes(self, logits: torch.Tensor, features: torch.Tensor) -> None:
        """Move each class's prototype toward the mean feature of what the teacher predicts as that class."""
        means, totals = class_centroids(features, _one_hot_prediction(logits))
        old = self.prototypes.value.to(means)
        moved = torch.where(old.isinf(), means, torch.lerp(old, means, self.prototype_momentum))
        self.prototypes.value = torch.where(totals[:, None] > 0, moved, old)

    def losses(self, batch: Batch, ctx: StepContext) -> dict[str, torch.Tensor]:
        """The supervised term and, once the method has begun, the three terms on target images."""
        source, target = batch["source"], batch["target"]["image"]
        terms = {"segmentation_loss": self.segmentation_loss(self.student(source["image"]), source["label"])}
        if not self.prototypes.is_set:
            return terms
        with torch.no_grad():
            soft_label = torch.softmax(self.labeler(target).float(), dim=1)
            weak_logits, weak_features = logits_and_features(self.teacher, target, self.classifier)
            assignment = log_assignment(weak_features, self.prototypes.value, self.tau).exp()
            label = (assignment * soft_label).argmax(dim=1)
        strong = strong_intensity(target, ctx.generator, strength=self.strength)
        logits, features = logits_and_features(self.student, strong, self.classifier)
        symmetric = symmetric_cross_entropy(
            logits, label, cross_weight=self.cross_weight, reverse_weight=self.reverse_weight
        )
        student_assignment = log_assignment(features, self.prototypes.value, self.tau)
        consistency = functional.kl_div(student_assignment, assignment, reduction="none").mean()
        self.move_prototypes(weak_logits, weak_features)
        return {
            **terms,
            "pseudo_loss": symmetric,
            "consistency_loss": self.consistency_weight * consistency,
            "regularizer_loss": self.regularizer_weight * uniform_divergence(logits),
            "corrected_share": (label != soft_label.argmax(dim=1)).float().mean(),
        }

    def step(self, batch: Batch, ctx: StepContext) -> dict[str, torch.Tensor]:
        """Begin when it is time, update the student, move the teacher, remember the target images."""
        target = batch["target"]["image"]
        if not self.prototypes.is_set and ctx.progress >= self.start_frac and len(self.recent):
            self.begin(len(target), ctx.device)
        output = super().step(batch, ctx)
        if self.prototypes.is_set and ctx.window_ends:
            update_ema(self.teacher, self.student, self.decay)
        elif self.adapts and not self.prototypes.is_set:
            self.recent.add(target)
        return output
