"""RandConv: train on source images seen through random convolutions, so that texture and contrast cannot be relied on.

Paper: Xu, Liu, Yang, Raffel, Niethammer 2021, "Robust and Generalizable Visual Representation Learning via Random
Convolutions", ICLR 2021, arXiv:2007.13003. Code read: wildphoton/RandConv (nothing copied).
Roles: student. Streams: source {image (B, C, *S), label (B, 1, *S)}. Domain generalization: it never sees the target.

Differs: the consistency term is the Jensen-Shannon divergence of the three predictions, as in the release.
Differs: the three versions go through the network as one batch, so that BatchNorm sees them together.
Differs: every voxel is a sample; Dice besides cross-entropy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional

from medkd.engine.context import StepContext
from medkd.engine.method import Batch, Method
from medkd.losses.precision import at_least_float32
from medkd.losses.segmentation import dice_ce_loss


def jensen_shannon(logits: Sequence[torch.Tensor]) -> torch.Tensor:
    """Mean KL divergence of each prediction from their mean: sum over classes, mean over all else.

    Args:
        logits: several (B, K, *S), all with gradient; computed in float32, in float64 if given so.

    Returns:
        Scalar in [0, log n] for n predictions, nats.

    Source: Xu et al. 2021, arXiv:2007.13003, the release.
    """
    log_p = torch.log_softmax(at_least_float32(torch.stack(list(logits))), dim=2)
    log_mean = torch.logsumexp(log_p, dim=0, keepdim=True) - math.log(len(log_p))
    return (log_p.exp() * (log_p - log_mean)).sum(dim=2).mean()


class RandomConvolution(Method):
    """L = L_seg(first version) + consistency_weight · JSD of the predictions on three random versions of each image.

    A version is alpha · convolved + (1 - alpha) · image, alpha uniform in [0, 1], kernel size drawn from
    ``kernel_sizes``, weights from N(0, 1 / (C k^d)); or, with ``identity_prob``, the image itself. One draw serves the
    whole batch.

    Args:
        student: (B, C, *S) → logits (B, K, *S).
        consistency_weight: weight of the consistency term; 0 makes one version only, a third of the cost.
        kernel_sizes: odd sizes, px.
        identity_prob: probability of leaving a batch as it is; the paper has 0.5 without the consistency term.
        segmentation_loss: (logits, label) → scalar.

    Raises:
        ValueError: If a kernel size is not odd.
    """

    paper: ClassVar[str] = "Xu et al. 2021, ICLR, arXiv:2007.13003"
    roles: ClassVar[tuple[str, ...]] = ("student",)
    streams: ClassVar[tuple[str, ...]] = ("source",)
    batch_coupled: ClassVar[bool] = True  # the default Dice runs over the batch

    def __init__(
        self,
        student: nn.Module,
        *,
        consistency_weight: float = 10.0,
        kernel_sizes: Sequence[int] = (1, 3, 5, 7),
        identity_prob: float = 0.0,
        segmentation_loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = dice_ce_loss,
    ) -> None:
        super().__init__()
        if not kernel_sizes or any(size % 2 == 0 for size in kernel_sizes):
            raise ValueError(f"kernel_sizes must be odd, got {list(kernel_sizes)}")
        self.student = student
        self.consistency_weight = consistency_weight
        self.kernel_sizes = tuple(kernel_sizes)
        self.identity_prob = identity_prob
        self.segmentation_loss = segmentation_loss

    def randomized(self, image: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """One random version of (B, C, *S) images."""
        uniform = torch.rand(2, generator=generator, device=image.device).tolist()
        place = torch.randint(len(self.kernel_sizes), (), generator=generator, device=image.device).item()
        size, channels, dims = self.kernel_sizes[int(place)], image.shape[1], image.ndim - 2
        weight = torch.randn(channels, channels, *[size] * dims, generator=generator, device=image.device)
        weight = weight / math.sqrt(channels * size**dims)
        if uniform[0] < self.identity_prob:
            return image
        convolve = functional.conv3d if dims == 3 else functional.conv2d
        with torch.autocast(image.device.type, enabled=False):
            convolved = convolve(image.float(), weight, padding=size // 2)
        return torch.lerp(image.float(), convolved, uniform[1])

    def losses(self, batch: Batch, ctx: StepContext) -> dict[str, torch.Tensor]:
        """The supervised term on one version and the consistency of three."""
        source = batch["source"]
        versions = 3 if self.consistency_weight else 1
        images = [self.randomized(source["image"], ctx.generator) for _ in range(versions)]
        logits = self.student(torch.cat(images)).chunk(versions)
        terms = {"segmentation_loss": self.segmentation_loss(logits[0], source["label"])}
        if self.consistency_weight:
            terms["consistency_loss"] = self.consistency_weight * jensen_shannon(logits)
        return terms
