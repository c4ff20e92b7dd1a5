"""MinEnt and AdvEnt: be sure about target images, by minimizing entropy or by hiding it from a critic.

Paper: Vu, Jain, Bucher, Cord, Pérez 2019, "ADVENT: Adversarial Entropy Minimization for Domain Adaptation in Semantic
Segmentation", CVPR 2019, arXiv:1811.12833. Code read: valeoai/ADVENT (Apache-2.0; nothing copied).
Roles: student; AdvEnt also critics. Streams: source {image (B, C, *S), label (B, 1, *S)}, target {image}.

Differs: one level, the output; the paper adds an auxiliary one with weight 0.0002.
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
from medkd.losses.entropy import normalized_entropy, weighted_self_information
from medkd.losses.segmentation import dice_ce_loss
from medkd.nets.critic_watch import CriticWatch


class MinEnt(Method):
    """L = L_seg(source) + entropy_weight · mean entropy of target predictions over log K.

    Entropy is lowest where everything is one class: small structures can vanish into the background. Watch the Dice of
    each class.

    Args:
        student: (B, C, *S) → logits (B, K, *S).
        entropy_weight: weight of the entropy term.
        segmentation_loss: (logits, label) → scalar.
    """

    paper: ClassVar[str] = "Vu et al. 2019, CVPR, arXiv:1811.12833"
    roles: ClassVar[tuple[str, ...]] = ("student",)
    streams: ClassVar[tuple[str, ...]] = ("source", "target")
    batch_coupled: ClassVar[bool] = True  # the default Dice runs over the batch

    def __init__(
        self,
        student: nn.Module,
        *,
        entropy_weight: float = 0.001,
        segmentation_loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = dice_ce_loss,
    ) -> None:
        super().__init__()
        self.student = student
        self.entropy_weight = entropy_weight
        self.segmentation_loss = segmentation_loss

    def losses(self, batch: Batch, ctx: StepContext) -> dict[str, torch.Tensor]:
        """The supervised term on the source and the entropy on the target."""
        source = batch["source"]
        segmentation = self.segmentation_loss(self.student(source["image"]), source["label"])
        entropy = normalized_entropy(self.student(batch["target"]["image"]))
        return {
            "segmentation_loss": segmentation,
            "entropy_loss": self.entropy_weight * entropy,
            "target_entropy": entropy,
        }


class AdvEnt(Method):
    """As AdaptSegNet, but the critic sees self-information -p log2 p / log2 K instead of probabilities.

    Student: L_seg + adversarial_weight · BCE(D(I_t), source). Critic: half of BCE(D(I_s), source) + BCE(D(I_t),
    target). Both gradients are taken at the same networks, then both are updated.

    Args:
        student: (B, C, *S) → logits (B, K, *S).
        critics: the critic, (B, K, *S) → logits, such as ``medkd.nets.critics.OutputCritic``.
        adversarial_weight: weight of the adversarial term.
        collapse_steps: warn when the critic was right at least 95 % of the time for so many steps; 0 never warns.
        segmentation_loss: (logits, label) → scalar.
    """

    paper: ClassVar[str] = "Vu et al. 2019, CVPR, arXiv:1811.12833"
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
            ["the critic of entropy maps"], steps=collapse_steps, remedy="raise adversarial_weight, or slow the critic"
        )

    def step(self, batch: Batch, ctx: StepContext) -> dict[str, torch.Tensor]:
        """Three backward passes, then one update of the student and of the critic."""
        source = batch["source"]
        source_logits, target_logits = self.student(source["image"]), self.student(batch["target"]["image"])
        source_map, target_map = weighted_self_information(source_logits), weighted_self_information(target_logits)
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
            "target_entropy": target_map.detach().sum(dim=1).mean(),
        }
