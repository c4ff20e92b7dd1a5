"""SHOT: adapt a source-trained network to the target without any source image; its classifier stays as it is.

Paper: Liang, Hu, Feng 2020, "Do We Really Need to Access the Source Data? Source Hypothesis Transfer for Unsupervised
Domain Adaptation", ICML 2020, arXiv:2002.08546. Code read: tim-learn/SHOT (MIT; nothing copied).
Roles: student, without its frozen last layer. Streams: target {image (B, C, *S)}. Start from a student trained on the
source.

Differs: the paper classifies images; here every voxel is a sample, and centroids are computed on voxels sampled from
the last ``images`` target images.
Differs: between refreshes a copy of the student labels each batch, by the centroids of the refresh; the release keeps
one label per image. The first interval has no pseudo-labels, while images are gathered.
Differs: the last layer is the classifier, without the paper's bottleneck and weight normalization.
Differs: learning rates and decay are the user's (SGD 0.01, a tenth for the backbone, × (1 + 10 u)^-0.75 in the paper).
"""

from __future__ import annotations

from typing import ClassVar, Self

import torch
from torch import nn
from torch.nn import functional

from medkd.engine.context import StepContext
from medkd.engine.method import Batch, Method
from medkd.losses.entropy import diversity, mean_entropy
from medkd.losses.precision import at_least_float32
from medkd.losses.pseudo_labels import class_centroids, masked_cross_entropy, shot_pseudo_labels
from medkd.nets.classifier_input import classifier_name, logits_and_features
from medkd.nets.ema import ema_copy, update_ema
from medkd.nets.late_buffer import LateBuffer
from medkd.nets.recent_images import RecentImages


class SHOT(Method):
    """L = entropy_weight · (mean H(p) - diversity_weight · H(mean p)) + pseudo_weight · CE(pseudo-labels).

    Information maximization alone can turn small structures into background, or, since the diversity term wants every
    class to be equally frequent, background into structures. Watch the Dice of each class.

    Args:
        student: (B, C, *S) → logits (B, K, *S), trained on the source.
        classifier: name of its last layer, which is frozen; None: its last convolution.
        entropy_weight: weight of both entropy terms.
        diversity_weight: weight of the second among them.
        pseudo_weight: weight of the pseudo-label term; 0 refreshes nothing.
        refreshes: refreshes of the pseudo-labels over the run, at equal distances.
        images: target images that centroids are computed on.
        voxels_per_image: voxels sampled of each.
        minimum_count: sampled voxels that must be predicted as a class for it to be a pseudo-label.

    Raises:
        ConfigError: If the classifier is not found.
    """

    paper: ClassVar[str] = "Liang et al. 2020, ICML, arXiv:2002.08546"
    roles: ClassVar[tuple[str, ...]] = ("student",)
    streams: ClassVar[tuple[str, ...]] = ("target",)
    batch_coupled: ClassVar[bool] = True  # the mean prediction and the centroids run over images

    interval: torch.Tensor

    def __init__(
        self,
        student: nn.Module,
        *,
        classifier: str | None = None,
        entropy_weight: float = 1.0,
        diversity_weight: float = 1.0,
        pseudo_weight: float = 0.3,
        refreshes: int = 15,
        images: int = 64,
        voxels_per_image: int = 256,
        minimum_count: int = 0,
    ) -> None:
        super().__init__()
        self.student = student
        self.classifier = classifier_name(student, classifier)
        student.get_submodule(self.classifier).requires_grad_(False)
        self.labeler = ema_copy(student)
        self.recent = RecentImages(images)
        self.centroids = LateBuffer()  # (K, D + 1) of length 1; 0 for a class that takes no part
        self.register_buffer("interval", torch.tensor(0))
        self.entropy_weight = entropy_weight
        self.diversity_weight = diversity_weight
        self.pseudo_weight = pseudo_weight
        self.refreshes = refreshes
        self.voxels_per_image = voxels_per_image
        self.minimum_count = minimum_count

    def train(self, mode: bool = True) -> Self:
        """Set train mode, but for the network that labels."""
        super().train(mode)
        self.labeler.eval()
        return self

    @torch.no_grad()
    def refresh(self, batch_size: int, generator: torch.Generator, device: torch.device) -> None:
        """Let the student of this moment label from now on, by centroids of voxels sampled from the recent images."""
        update_ema(self.labeler, self.student, 0.0)
        rows, shares = [], []
        for part in self.recent.batches(batch_size, device):
            logits, features = logits_and_features(self.labeler, part, self.classifier)
            for one_logits, one_features in zip(logits.flatten(2), features.flatten(2), strict=True):
                order = torch.randperm(one_logits.shape[1], generator=generator, device=device)
                chosen = order[: self.voxels_per_image]
                rows.append(one_features[:, chosen].t())
                shares.append(torch.softmax(one_logits[:, chosen].t().float(), dim=1))
        features, probabilities = torch.cat(rows), torch.cat(shares)
        label = shot_pseudo_labels(features, probabilities, minimum_count=self.minimum_count, rounds=0)
        one_hot = functional.one_hot(label, probabilities.shape[1])
        self.centroids.value = functional.normalize(class_centroids(unit_rows(features), one_hot)[0])

    @torch.no_grad()
    def pseudo_label(self, image: torch.Tensor) -> torch.Tensor:
        """(B, C, *S) → (B, *S): the class whose centroid is nearest in cosine distance."""
        _, features = logits_and_features(self.labeler, image, self.classifier)
        rows = unit_rows(features.movedim(1, -1))
        centroids = self.centroids.value.to(rows)
        takes_part = centroids.any(dim=1)
        return (rows @ centroids.t()).masked_fill(~takes_part, -torch.inf).argmax(dim=-1)

    def losses(self, batch: Batch, ctx: StepContext) -> dict[str, torch.Tensor]:
        """The two entropy terms and, after the first refresh, the pseudo-label term."""
        image = batch["target"]["image"]
        logits = self.student(image)
        entropy, spread = mean_entropy(logits), diversity(logits)
        terms = {
            "entropy_loss": self.entropy_weight * entropy,
            "diversity_loss": -self.entropy_weight * self.diversity_weight * spread,
            "target_entropy": entropy,
        }
        if self.centroids.is_set:
            terms["pseudo_loss"] = self.pseudo_weight * masked_cross_entropy(logits, self.pseudo_label(image))
        return terms

    def step(self, batch: Batch, ctx: StepContext) -> dict[str, torch.Tensor]:
        """Refresh when it is time, update the student, remember the images."""
        image = batch["target"]["image"]
        if self.pseudo_weight:
            due = int(ctx.progress * self.refreshes + 1e-9)
            if due > int(self.interval) and len(self.recent):
                self.refresh(len(image), ctx.generator, ctx.device)
                self.interval.fill_(due)
        output = super().step(batch, ctx)
        if self.pseudo_weight:
            self.recent.add(image)
        return output


def unit_rows(features: torch.Tensor) -> torch.Tensor:
    """(…, D) features with a 1 appended, scaled to length 1: (…, D + 1)."""
    rows = at_least_float32(features)
    return functional.normalize(torch.cat([rows, torch.ones_like(rows[..., :1])], dim=-1), dim=-1)
