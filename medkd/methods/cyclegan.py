"""CycleGAN: translate images between two domains that were never paired.

Paper: Zhu, Park, Isola, Efros 2017, "Unpaired Image-to-Image Translation using Cycle-Consistent Adversarial
Networks", arXiv:1703.10593. Defaults: least-squares critics, L1 cycle 10, identity half of it, 50 pooled images.
Roles: generators, critics. Streams: source, target. What ships is the averaged generator of one direction.
Batch: each stream's image is (B, C, *S) float32 in [-1, 1]; both streams have the same C.

Differs: the deployed generator is an exponential moving average (decay 0.999); the paper ships the raw one.
Differs: generators and critics step together. In the paper's order, generators first, the critics see translations made
before the generators' step too, so the parameters come out the same.
Differs: the identity term is on by default; the paper uses it for paintings to photographs only.
"""

from __future__ import annotations

from typing import ClassVar, cast

import torch
from torch import nn

from medkd.engine.context import StepContext
from medkd.engine.translation import TranslationMethod, Translations
from medkd.losses.adversarial import critic_accuracy, least_squares
from medkd.losses.translation import cycle_l1
from medkd.nets.image_pool import ImagePool


class CycleGAN(TranslationMethod):
    """Generators: L_adv + cycle_weight · L_cycle + identity_weight · L_identity, each summed over both directions.

    Args:
        generators: ``to_target`` and ``to_source``, each (B, C, *S) → (B, C, *S) in [-1, 1].
        critics: ``source`` and ``target``, each judges images of that domain: (B, C, *S) → logits, or a list of them.
        cycle_weight: weight of the L1 distance of an image from its translation there and back.
        identity_weight: weight of the L1 distance of an image from its translation into its own domain; 0 leaves the
            term out.
        pool_size: translations kept for each critic, 0 for none.
        decay: EMA decay of the generators that ship.
        direction: which of them is deployed, ``"to_target"`` or ``"to_source"``.
        collapse_steps: warn when a critic was right at least 95 % of the time for so many steps; 0 never warns.
    """

    paper: ClassVar[str] = "Zhu et al. 2017, arXiv:1703.10593"
    batch_coupled: ClassVar[bool] = True  # the pools hold images of earlier batches

    def __init__(
        self,
        generators: nn.ModuleDict,
        critics: nn.ModuleDict,
        *,
        cycle_weight: float = 10.0,
        identity_weight: float = 5.0,
        pool_size: int = 50,
        decay: float = 0.999,
        direction: str = "to_target",
        collapse_steps: int = 500,
    ) -> None:
        super().__init__(generators, critics, decay=decay, direction=direction, collapse_steps=collapse_steps)
        self.pools = nn.ModuleDict({"source": ImagePool(pool_size), "target": ImagePool(pool_size)})
        self.cycle_weight = cycle_weight
        self.identity_weight = identity_weight

    def generator_terms(self, source: torch.Tensor, target: torch.Tensor, ctx: StepContext) -> Translations:
        """Translate both ways, there and back, and into the own domain; see the base class."""
        to_target, to_source = self.translate(source, to="target"), self.translate(target, to="source")
        back_to_source = self.translate(to_target, to="source")
        back_to_target = self.translate(to_source, to="target")
        terms = {
            "adversarial_loss": least_squares(self.critics["target"](to_target), real=True)
            + least_squares(self.critics["source"](to_source), real=True),
            "cycle_loss": self.cycle_weight * (cycle_l1(back_to_source, source) + cycle_l1(back_to_target, target)),
        }
        if self.identity_weight:
            same_target, same_source = self.translate(target, to="target"), self.translate(source, to="source")
            terms["identity_loss"] = self.identity_weight * (
                cycle_l1(same_target, target) + cycle_l1(same_source, source)
            )
        return Translations(terms, to_target, to_source)

    def critic_terms(
        self, source: torch.Tensor, target: torch.Tensor, translations: Translations, ctx: StepContext
    ) -> dict[str, torch.Tensor]:
        """Each critic: half of the loss on real images, half of that on translations from its pool."""
        terms = {}
        for domain, real, made in (
            ("source", source, translations.to_source),
            ("target", target, translations.to_target),
        ):
            pool = cast(ImagePool, self.pools[domain])
            on_real, on_made = self.critics[domain](real), self.critics[domain](pool.exchange(made, ctx.generator))
            loss = least_squares(on_real, real=True) + least_squares(on_made, real=False)
            terms[f"{domain}_critic_loss"] = 0.5 * loss
            terms[f"{domain}_critic_accuracy"] = critic_accuracy(on_real, on_made)
        self.watch.observe([terms["source_critic_accuracy"], terms["target_critic_accuracy"]])
        return terms
