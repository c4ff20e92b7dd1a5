"""AdaptSegNet: a critic of segmentation maps cannot tell target predictions from source predictions.

Paper: Tsai, Hung, Schulter, Sohn, Yang, Chandraker 2018, "Learning to Adapt Structured Output Space for Semantic
Segmentation", CVPR 2018, arXiv:1802.10349. Code read: wasidennis/AdaptSegNet (no licence; nothing copied).
Roles: student, critics. Streams: source {image (B, C, *S), label (B, 1, *S)}, target {image}.

Differs: one level, the output; the author advises against the second level in current PyTorch (issue 65 of the
release).
Differs: source is class 0 and target class 1, as in the release; the paper has them the other way round, which changes
nothing.
Differs: Dice besides cross-entropy on the source.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import nn

from medkd.engine.context import StepContext
from medkd.engine.method import Batch, Method
from medkd.losses.adversarial import critic_accuracy, domain_bce
from medkd.losses.segmentation import dice_ce_loss
from medkd.nets.critic_watch import CriticWatch


class AdaptSegNet(Method):
    """L_seg + adversarial_weight · BCE(D(p_t), source) for the student; the critic D names the domain of p_s and p_t.

    The critic minimizes half of BCE(D(p_s), source) + BCE(D(p_t), target) on detached maps. Both gradients are taken at
    the same networks, then both are updated. The paper's optimizers: SGD 2.5e-4 with poly decay 0.9 for the student,
    Adam 1e-4 with betas (0.9, 0.99) for the critic.

    Args:
        student: (B, C, *S) → logits (B, K, *S).
        critics: the critic, (B, K, *S) probabilities → logits, such as ``medkd.nets.critics.OutputCritic``.
        adversarial_weight: 0.001 in the paper; the author's advice is to raise it until the best checkpoint comes too
            early.
        collapse_steps: warn when the critic was right at least 95 % of the time for so many steps; 0 never warns.
        segmentation_loss: (logits, label) → scalar.
    """

    paper: ClassVar[str] = "Tsai et al. 2018, CVPR, arXiv:1802.10349"
    roles: ClassVar[tuple[str, ...]] = ("student", "critics")
    streams: ClassVar[tuple[str, ...]] = ("source", "target")
    batch_coupled: ClassVar[bool] = True  # the default Dice runs over the batch

    def __init__(
        self,
        student: nn.Module,
        critics: nn.Module,
        *,
        adversarial_weight: float = 0.001,
        collapse_steps: int = 500,
        segmentation_loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = dice_ce_loss,
    ) -> None:
        super().__init__()
        self.student = student
        self.critics = critics
        self.adversarial_weight = adversarial_weight
        self.segmentation_loss = segmentation_loss
        self.watch = CriticWatch(
            ["the critic of segmentations"], steps=collapse_steps, remedy="raise adversarial_weight, or slow the critic"
        )

    def step(self, batch: Batch, ctx: StepContext) -> dict[str, torch.Tensor]:
        """Three backward passes, then one update of the student and of the critic."""
        source = batch["source"]
        source_logits = self.student(source["image"])
        source_map = torch.softmax(source_logits.float(), dim=1)
        target_map = torch.softmax(self.student(batch["target"]["image"]).float(), dim=1)
        segmentation = self.segmentation_loss(source_logits, source["label"])
        adversarial = self.adversarial_weight * domain_bce(self.critics(target_map), is_source=True)
        of_source, of_target = self.critics(source_map.detach()), self.critics(target_map.detach())
        critic = (domain_bce(of_source, is_source=True) + domain_bce(of_target, is_source=False)) / 2
        loss = segmentation + adversarial
        ctx.update({"student": loss, "critics": critic})
        accuracy = critic_accuracy(of_target, of_source, threshold=0.0)
        self.watch.observe([accuracy])
        return {
            "loss": loss.detach(),
            "segmentation_loss": segmentation.detach(),
            "adversarial_loss": adversarial.detach(),
            "critic_loss": critic.detach(),
            "critic_accuracy": accuracy,
        }
