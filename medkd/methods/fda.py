"""FDA: give source images the low-frequency spectrum of target images, then train on them with their labels.

Paper: Yang, Soatto 2020, "FDA: Fourier Domain Adaptation for Semantic Segmentation", CVPR 2020, arXiv:2004.05498.
Code read: YanchaoYang/FDA (no licence; nothing copied).
Roles: student. Streams: source {image (B, C, *S) in [-1, 1], label (B, 1, *S)}, target {image}.

Differs: the square of exchanged frequencies is symmetric, as in the release's NumPy function; its torch function (which
no longer runs) leaves out a row and a column.
Differs: one network and one beta; the paper's best number averages three networks (0.01, 0.05, 0.09) and then trains on
their pseudo-labels (FDA-MBT).
Differs: the release switches the entropy term on after 50,000 of 100,000 steps; here it is a share of the run,
``start_frac``.
Differs: Dice besides cross-entropy on the source.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import nn

from medkd.engine.context import StepContext
from medkd.engine.method import Batch, Method
from medkd.losses.entropy import charbonnier_entropy
from medkd.losses.mixing import low_frequency_swap
from medkd.losses.segmentation import dice_ce_loss


class FDA(Method):
    """L = L_seg(source in the style of the target) + entropy_weight · mean (h² + 1e-8)^eta on target images.

    Args:
        student: (B, C, *S) → logits (B, K, *S).
        beta: half-width of the exchanged square as a share of the shortest side; the paper has 0.01, 0.05 and 0.09.
        entropy_weight: weight of the entropy term.
        eta: exponent of the entropy term.
        start_frac: share of the run before which the entropy term is left out.
        lowest_intensity: of the images. Amplitudes are exchanged above it, so that the mean is a brightness.
        segmentation_loss: (logits, label) → scalar.
    """

    paper: ClassVar[str] = "Yang and Soatto 2020, CVPR, arXiv:2004.05498"
    roles: ClassVar[tuple[str, ...]] = ("student",)
    streams: ClassVar[tuple[str, ...]] = ("source", "target")
    batch_coupled: ClassVar[bool] = True  # the default Dice runs over the batch

    def __init__(
        self,
        student: nn.Module,
        *,
        beta: float = 0.01,
        entropy_weight: float = 0.005,
        eta: float = 2.0,
        start_frac: float = 0.5,
        lowest_intensity: float = -1.0,
        segmentation_loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = dice_ce_loss,
    ) -> None:
        super().__init__()
        self.student = student
        self.beta = beta
        self.entropy_weight = entropy_weight
        self.eta = eta
        self.start_frac = start_frac
        self.lowest_intensity = lowest_intensity
        self.segmentation_loss = segmentation_loss

    def in_target_style(self, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Source images (B, C, *S), each with the low-frequency amplitudes of a target image (B', C, *S)."""
        partner = target[torch.arange(len(source), device=target.device) % len(target)]
        low = self.lowest_intensity
        return low_frequency_swap(source - low, partner - low, self.beta) + low

    def losses(self, batch: Batch, ctx: StepContext) -> dict[str, torch.Tensor]:
        """The supervised term on stylized source images, and the entropy of target predictions."""
        source, target = batch["source"], batch["target"]["image"]
        logits = self.student(self.in_target_style(source["image"], target))
        entropy = charbonnier_entropy(self.student(target), self.eta)
        weight = self.entropy_weight if ctx.progress >= self.start_frac else 0.0
        return {
            "segmentation_loss": self.segmentation_loss(logits, source["label"]),
            "entropy_loss": weight * entropy,
        }
