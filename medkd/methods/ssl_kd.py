"""Few labels, many images: self-supervised teacher, fine-tuned, then distilled on the images without labels.

Paper: Arrieta, Perdómo, González 2022, "Deep Semi-Supervised and Self-Supervised Learning for Diabetic Retinopathy
Detection", arXiv:2208.02408; its first stage is SimCLR: Chen, Kornblith, Norouzi, Hinton 2020, arXiv:2002.05709.
Roles: SimCLR trains ``encoder`` (with its projector); SSLKD trains ``student``, its ``teacher`` is frozen.
Streams: unlabeled; SimCLR wants {image, second_view}, two augmentations of the same images, SSLKD {image}.
Four stages, each a training of its own: SimCLR → Supervised (the encoder becomes the teacher) → SSLKD → Supervised.

What the authors' released code does and this does not; docs/methods/ssl_kd.md has the whole table:

Differs: the teacher is in eval mode while it labels. Released: train mode, so that its BatchNorm uses the statistics of
each batch and its running statistics drift.
Differs: networks start from random weights. Released: both start from ImageNet; ``nets.initial_weights`` can do so.
Differs: the projector is a head of its own behind the features, 128 wide. Released: the contrast is taken in the
1000 outputs of the ImageNet classifier, the argument for 128 has no effect.
Differs: negatives are those of the joint batch of all processes, as in SimCLR. Released: of one process.
Differs: two logits and softmax. Released: one logit and sigmoid, the same family of functions; argmax is its > 0.5.
Differs: teacher and student see the same image, scaled as the teacher was trained on. Released: fine-tuning is on
normalized images, labeling on unnormalized ones.
Differs: the pipeline augments; that of the bundle also rotates, as the paper is said to and the code does not.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional

from medkd.engine.context import StepContext
from medkd.engine.method import Batch, Method
from medkd.errors import ConfigError
from medkd.losses.contrastive import nt_xent
from medkd.losses.distillation import soft_target_kl
from medkd.losses.precision import at_least_float32
from medkd.nets.classifier_input import classifier_name, logits_and_features


class SimCLR(Method):
    """Learn features without labels: the two views of an image should be more alike than views of two images.

    What ships is the encoder as it will be fine-tuned: a whole classifier, whose last layer this stage leaves alone.

    Args:
        encoder: a classifier, (B, C, *S) → logits (B, K); its features are what its last linear layer sees.
        projector: (B, D) features → (B, P) projections.
        temperature: T > 0 of the NT-Xent loss; 0.07 as released.
        classifier: name of the encoder's last layer; by default the linear layer registered last.
    """

    paper: ClassVar[str] = "Chen et al. 2020, arXiv:2002.05709"
    task: ClassVar[str] = "classification"
    roles: ClassVar[tuple[str, ...]] = ("encoder",)
    streams: ClassVar[tuple[str, ...]] = ("unlabeled",)
    batch_coupled: ClassVar[bool] = True  # the other images of the batch are the negatives
    accumulates: ClassVar[bool] = False  # and those of other micro-batches would be missing

    def __init__(
        self, encoder: nn.Module, projector: nn.Module, *, temperature: float = 0.07, classifier: str | None = None
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.projector = projector
        self.temperature = temperature
        self.classifier = classifier_name(encoder, classifier or _last_linear(encoder))

    def role_parameters(self, role: str) -> list[nn.Parameter]:
        """The encoder's up to its features, then the projector's."""
        unused = {id(parameter) for parameter in self.encoder.get_submodule(self.classifier).parameters()}
        return [
            parameter
            for parameter in (*super().role_parameters(role), *self.projector.parameters())
            if parameter.requires_grad and id(parameter) not in unused
        ]

    def losses(self, batch: Batch, ctx: StepContext) -> dict[str, torch.Tensor]:
        """NT-Xent between the two views, which go through the encoder together."""
        images = batch["unlabeled"]
        if "second_view" not in images:
            raise ConfigError("SimCLR", "the stream 'unlabeled' has no 'second_view'", "augment each image twice")
        views = torch.cat([images["image"], images["second_view"]])
        _, features = logits_and_features(self.encoder, views, self.classifier)
        projections = at_least_float32(self.projector(features))
        first, second = (_of_all_processes(part) for part in projections.chunk(2))
        return {"contrastive_loss": nt_xent(first, second, self.temperature)}


class SSLKD(Method):
    """Distil a frozen teacher into a student on images without labels.

    Args:
        student: (B, C, *S) → logits (B, K).
        teacher: same shapes, already fine-tuned on the labeled images; always in eval mode.
        hard_labels: the student learns the teacher's most probable class, as released; else its probabilities.
        temperature: T > 0 that softens both sides' probabilities; without effect on hard labels.
    """

    paper: ClassVar[str] = "Arrieta et al. 2022, arXiv:2208.02408"
    task: ClassVar[str] = "classification"
    roles: ClassVar[tuple[str, ...]] = ("student",)
    frozen: ClassVar[tuple[str, ...]] = ("teacher",)
    streams: ClassVar[tuple[str, ...]] = ("unlabeled",)

    def __init__(
        self, student: nn.Module, teacher: nn.Module, *, hard_labels: bool = True, temperature: float = 1.0
    ) -> None:
        super().__init__()
        self.student = student
        self.teacher = teacher
        self.hard_labels = hard_labels
        self.temperature = temperature

    def losses(self, batch: Batch, ctx: StepContext) -> dict[str, torch.Tensor]:
        """The student's loss on the teacher's labels; also logs the share of the teacher's most frequent class."""
        image = batch["unlabeled"]["image"]
        with torch.no_grad():
            teacher_logits = self.teacher(image)
        logits = at_least_float32(self.student(image))
        label = teacher_logits.argmax(dim=1)
        if self.hard_labels:
            loss = functional.cross_entropy(logits, label)
        else:
            loss = soft_target_kl(logits, teacher_logits, self.temperature)
        largest = torch.bincount(label, minlength=logits.shape[1]).max() / len(label)
        return {"kd_loss": loss, "teacher_largest_class": largest}


def _last_linear(network: nn.Module) -> str:
    found = [name for name, module in network.named_modules() if isinstance(module, nn.Linear) and name]
    if not found:
        raise ConfigError("SimCLR", "the encoder has no linear layer", "name its last layer with classifier=")
    return found[-1]


def _of_all_processes(projections: torch.Tensor) -> torch.Tensor:
    """The joint batch's projections, (world · B, P); gradients reach this process's own.

    Every process computes the whole loss but differentiates its own part of it. The trainer averages gradients over
    processes, so that part counts as often as there are processes; its value stays what it is.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return projections
    world = dist.get_world_size()
    parts = [torch.empty_like(projections) for _ in range(world)]
    dist.all_gather(parts, projections.detach().contiguous())
    parts[dist.get_rank()] = projections + (world - 1) * (projections - projections.detach())
    return torch.cat(parts)
