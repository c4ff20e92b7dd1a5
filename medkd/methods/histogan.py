"""HistoGAN: images of a wanted class from noise, to add to a small labeled set.

Paper: Xue, Ye, Zhou, Long, Antani, Xue, Cornwell, Zaino, Cheng, Huang 2021, "Selective Synthetic Augmentation with
HistoGAN for Improved Histopathology Image Classification", Medical Image Analysis 67, arXiv:2111.06399.
Roles: generator, critic. Streams: labeled {image (B, 3, H, W) float32 in [-1, 1], label (B,)}.
What ships is the averaged generator; :mod:`medkd.methods.selective_augmentation` chooses among its images.

Differs: a reconstruction. The paper's text was not available to us: that the generator is conditional on the class and
that spectral normalization is cited is all we know of its networks; architecture, hinge loss, class head with weight 1
and the averaging of the generator (decay 0.999) are ours, out of the common parts of its time.
Differs: generator and critic step together, from one pass over the generated images; the usual order updates the critic
first and lets the generator see the updated one.
Differs: generated images have the classes of the batch's real ones, not classes drawn anew.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn

from medkd.engine.context import StepContext
from medkd.engine.method import Batch, Method
from medkd.losses.adversarial import critic_accuracy, hinge, hinge_to_fool
from medkd.losses.classification import cross_entropy_loss
from medkd.nets.conditional_gan import class_codes
from medkd.nets.critic_watch import CriticWatch
from medkd.nets.ema import ema_copy, update_ema
from medkd.schedules import ema_decay


class HistoGAN(Method):
    """Critic: hinge + class_weight · CE on real images. Generator: -critic + class_weight · CE on its own.

    Args:
        generator: (B, latent + K), noise and one-hot class → (B, 3, H, W) in [-1, 1].
        critic: (B, 3, H, W) → logits of being real (B,), logits of the class (B, K).
        classes: K.
        latent: length of the noise.
        class_weight: of the class terms.
        latent_std: standard deviation of the noise; 0 leaves only the class.
        decay: EMA decay of the generator that ships.
        watch_steps: warn when the critic was right at least 99 % of the time for so many steps; 0 never warns.

    Attributes:
        ema: the averaged generator.
    """

    paper: ClassVar[str] = "Xue et al. 2021, Medical Image Analysis 67, arXiv:2111.06399 (reconstruction)"
    task: ClassVar[str] = "synthesis"
    roles: ClassVar[tuple[str, ...]] = ("generator", "critic")
    streams: ClassVar[tuple[str, ...]] = ("labeled",)
    batch_coupled: ClassVar[bool] = True  # batch normalization and the critic's minibatch statistic

    def __init__(
        self,
        generator: nn.Module,
        critic: nn.Module,
        *,
        classes: int,
        latent: int = 128,
        class_weight: float = 1.0,
        latent_std: float = 1.0,
        decay: float = 0.999,
        watch_steps: int = 500,
    ) -> None:
        super().__init__()
        self.generator = generator
        self.critic = critic
        self.ema = ema_copy(generator)
        self.watch = CriticWatch(
            ("the critic",),
            steps=watch_steps,
            accuracy=0.99,
            remedy="look at the sample sheets, and consider more real images or a smaller critic",
        )
        self.classes = classes
        self.latent = latent
        self.class_weight = class_weight
        self.latent_std = latent_std
        self.decay = decay

    @property
    def deployed(self) -> nn.Module:
        """The averaged generator."""
        return self.ema

    def codes(self, label: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        """Random codes (B, latent + K) for images of the wanted classes (B,)."""
        return class_codes(label, self.latent, self.classes, generator, std=self.latent_std)

    def step(self, batch: Batch, ctx: StepContext) -> dict[str, torch.Tensor]:
        """Update generator and critic, then the average; ``loss`` is the generator's."""
        real, label = batch["labeled"]["image"], batch["labeled"]["label"].reshape(-1).long()
        made = self.generator(self.codes(label, ctx.generator))
        on_real, class_of_real = self.critic(real)
        on_made, class_of_made = self.critic(made)
        critic_terms = {
            "critic_loss": hinge(on_real, real=True) + hinge(on_made, real=False),
            "critic_class_loss": self.class_weight * cross_entropy_loss(class_of_real, label),
        }
        generator_terms = {
            "adversarial_loss": hinge_to_fool(on_made),
            "class_loss": self.class_weight * cross_entropy_loss(class_of_made, label),
        }
        loss = generator_terms["adversarial_loss"] + generator_terms["class_loss"]
        critic_loss = critic_terms["critic_loss"] + critic_terms["critic_class_loss"]
        accuracy = critic_accuracy(on_real, on_made, threshold=0.0)
        ctx.update({"generator": loss, "critic": critic_loss})
        self.watch.observe([accuracy])
        if ctx.window_ends:
            update_ema(self.ema, self.generator, ema_decay(ctx.updates, self.decay))
        logged = {**generator_terms, **critic_terms, "critic_accuracy": accuracy}
        return {"loss": loss.detach(), **{name: term.detach() for name, term in logged.items()}}
