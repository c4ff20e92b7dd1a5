"""UNIT: translate between two domains through a latent space that both are taken to share.

Paper: Liu, Breuel, Kautz 2017, "Unsupervised Image-to-Image Translation Networks", arXiv:1703.00848; settings of the
authors' released code (multi-scale least-squares critics, weights 1, 10, 0.01, 10, 0.01).
Roles: generators, critics. Streams: source, target. What ships is the averaged generator of one direction.
Batch: each stream's image is (B, C, *S) float32 in [-1, 1]; both streams have the same C.
Generators: ``to_target`` holds the encoder of source images and the decoder of target images, ``to_source`` the
encoder of target images and the decoder of source images; so each of them alone translates, and the two domains'
autoencoders are made of both.

Differs: no weights are shared between the domains. The paper shares the layers next to the latent space; the authors'
released code, which we follow, shares none.
Differs: generators and critics step together, on the same latent noise; the release steps the critics first and draws
new noise for the generators.
Differs: the deployed generator is an exponential moving average (decay 0.999).
Differs: no VGG feature term (off by default in the release).
"""

from __future__ import annotations

from typing import ClassVar, cast

import torch
from torch import nn

from medkd.engine.context import StepContext
from medkd.engine.translation import TranslationMethod, Translations
from medkd.errors import ConfigError
from medkd.losses.adversarial import critic_accuracy, least_squares
from medkd.losses.translation import cycle_l1, latent_kl


class UNIT(TranslationMethod):
    """Generators: adversarial, reconstruction, latent KL, cycle reconstruction and cycle latent KL, both directions.

    In training the latent code is its mean plus N(0, 1); ``translate`` and what is deployed use the mean.

    Args:
        generators: ``to_target`` and ``to_source``; each has ``encode``: (B, C, *S) → mean of the latent code, and
            ``decode``: latent code → (B, C, *S) in [-1, 1].
        critics: ``source`` and ``target``, each judges images of that domain: (B, C, *S) → logits, or a list of them.
        adversarial_weight: weight of the adversarial term.
        reconstruction_weight: weight of the L1 distance of an image from its own domain's autoencoder's.
        kl_weight: weight of the latent codes' KL divergence from N(0, 1), of images.
        cycle_weight: weight of the L1 distance of an image from its translation there and back.
        cycle_kl_weight: weight of the KL divergence of the latent codes of translated images.
        noise_std: standard deviation of the latent noise in training; 1 is the paper's.
        decay: EMA decay of the generators that ship.
        direction: which of them is deployed, ``"to_target"`` or ``"to_source"``.
        collapse_steps: warn when a critic was right at least 95 % of the time for so many steps; 0 never warns.

    Raises:
        ConfigError: If a generator cannot encode and decode.
    """

    paper: ClassVar[str] = "Liu et al. 2017, arXiv:1703.00848"

    def __init__(
        self,
        generators: nn.ModuleDict,
        critics: nn.ModuleDict,
        *,
        adversarial_weight: float = 1.0,
        reconstruction_weight: float = 10.0,
        kl_weight: float = 0.01,
        cycle_weight: float = 10.0,
        cycle_kl_weight: float = 0.01,
        noise_std: float = 1.0,
        decay: float = 0.999,
        direction: str = "to_target",
        collapse_steps: int = 500,
    ) -> None:
        super().__init__(generators, critics, decay=decay, direction=direction, collapse_steps=collapse_steps)
        for name, generator in generators.items():
            if not (hasattr(generator, "encode") and hasattr(generator, "decode")):
                raise ConfigError(
                    f"generators[{name!r}]",
                    f"{type(generator).__name__} has no encode and decode",
                    "use medkd.nets.translators.VAETranslator",
                )
        self.adversarial_weight = adversarial_weight
        self.reconstruction_weight = reconstruction_weight
        self.kl_weight = kl_weight
        self.cycle_weight = cycle_weight
        self.cycle_kl_weight = cycle_kl_weight
        self.noise_std = noise_std

    def generator_terms(self, source: torch.Tensor, target: torch.Tensor, ctx: StepContext) -> Translations:
        """Encode, decode into both domains, and both again from the translations; see the base class."""
        source_mean, target_mean = self._encode("to_target", source), self._encode("to_source", target)
        source_code, target_code = self._noisy(source_mean, ctx), self._noisy(target_mean, ctx)
        same_source, same_target = self._decode("to_source", source_code), self._decode("to_target", target_code)
        to_source, to_target = self._decode("to_source", target_code), self._decode("to_target", source_code)

        source_again, target_again = self._encode("to_source", to_target), self._encode("to_target", to_source)
        back_to_source = self._decode("to_source", self._noisy(source_again, ctx))
        back_to_target = self._decode("to_target", self._noisy(target_again, ctx))
        terms = {
            "adversarial_loss": self.adversarial_weight
            * (
                least_squares(self.critics["target"](to_target), real=True)
                + least_squares(self.critics["source"](to_source), real=True)
            ),
            "reconstruction_loss": self.reconstruction_weight
            * (cycle_l1(same_source, source) + cycle_l1(same_target, target)),
            "kl_loss": self.kl_weight * (latent_kl(source_mean) + latent_kl(target_mean)),
            "cycle_loss": self.cycle_weight * (cycle_l1(back_to_source, source) + cycle_l1(back_to_target, target)),
            "cycle_kl_loss": self.cycle_kl_weight * (latent_kl(source_again) + latent_kl(target_again)),
        }
        return Translations(terms, to_target, to_source)

    def critic_terms(
        self, source: torch.Tensor, target: torch.Tensor, translations: Translations, ctx: StepContext
    ) -> dict[str, torch.Tensor]:
        """Each critic: the loss on real images plus that on the batch's translations, as the release weighs them."""
        terms = {}
        for domain, real, made in (
            ("source", source, translations.to_source),
            ("target", target, translations.to_target),
        ):
            on_real, on_made = self.critics[domain](real), self.critics[domain](made.detach())
            loss = least_squares(on_real, real=True) + least_squares(on_made, real=False)
            terms[f"{domain}_critic_loss"] = self.adversarial_weight * loss
            terms[f"{domain}_critic_accuracy"] = critic_accuracy(on_real, on_made)
        self.watch.observe([terms["source_critic_accuracy"], terms["target_critic_accuracy"]])
        return terms

    def _encode(self, name: str, image: torch.Tensor) -> torch.Tensor:
        return cast(torch.Tensor, self.generators.get_submodule(name).encode(image))  # type: ignore[operator]

    def _decode(self, name: str, code: torch.Tensor) -> torch.Tensor:
        return cast(torch.Tensor, self.generators.get_submodule(name).decode(code))  # type: ignore[operator]

    def _noisy(self, mean: torch.Tensor, ctx: StepContext) -> torch.Tensor:
        """The latent code of a training step."""
        return mean + ctx.noise_like(mean, std=self.noise_std, limit=float("inf"))
