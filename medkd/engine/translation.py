"""What the image-to-image methods share, and what a method that trains one inside itself may call."""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import torch
from torch import nn

from medkd.engine.context import StepContext
from medkd.engine.method import Batch, Method
from medkd.errors import ConfigError
from medkd.nets.critic_watch import CriticWatch
from medkd.nets.ema import ema_copy, update_ema
from medkd.schedules import ema_decay


class Translations(NamedTuple):
    """What the generators made of one batch.

    Attributes:
        terms: what the generators are to minimize, weighted; names end in ``_loss``.
        to_target: (B, C, *S) the source images as target images, with gradient.
        to_source: (B', C, *S) the target images as source images, with gradient.
    """

    terms: dict[str, torch.Tensor]
    to_target: torch.Tensor
    to_source: torch.Tensor


class TranslationMethod(Method):
    """Two generators and two critics between two domains that were never paired; the averaged generator ships.

    A subclass says what the generators (:meth:`generator_terms`) and the critics (:meth:`critic_terms`) minimize.

    Args:
        generators: ``to_target`` and ``to_source``, each (B, C, *S) → (B, C, *S) in [-1, 1].
        critics: ``source`` and ``target``, each judges images of that domain: (B, C, *S) → logits, or a list of them.
        decay: EMA decay of the generators that ship.
        direction: which of them is deployed, ``"to_target"`` or ``"to_source"``.
        collapse_steps: warn when a critic was right at least 95 % of the time for so many steps; 0 never warns.

    Attributes:
        ema: the averaged generators, with the keys of ``generators``.

    Raises:
        ConfigError: If a network is missing or the direction is unknown; at a step, if channels differ.
    """

    task: ClassVar[str] = "translation"
    roles: ClassVar[tuple[str, ...]] = ("generators", "critics")
    streams: ClassVar[tuple[str, ...]] = ("source", "target")
    accumulates: ClassVar[bool] = False

    def __init__(
        self,
        generators: nn.ModuleDict,
        critics: nn.ModuleDict,
        *,
        decay: float = 0.999,
        direction: str = "to_target",
        collapse_steps: int = 500,
    ) -> None:
        super().__init__()
        if set(generators) != {"to_target", "to_source"}:
            raise ConfigError("generators", f"has {sorted(generators)}", "give 'to_target' and 'to_source'")
        if set(critics) != {"source", "target"}:
            raise ConfigError("critics", f"has {sorted(critics)}", "give 'source' and 'target'")
        if direction not in generators:
            raise ConfigError("direction", f"{direction!r} is unknown", "use 'to_target' or 'to_source'")
        self.generators = generators
        self.critics = critics
        self.ema = ema_copy(generators)
        self.watch = CriticWatch(
            ("the critic of the source images", "the critic of the target images"), steps=collapse_steps
        )
        self.decay = decay
        self.direction = direction

    @property
    def deployed(self) -> nn.Module:
        """The averaged generator of ``direction``."""
        return self.ema.get_submodule(self.direction)

    def translate(self, image: torch.Tensor, *, to: str) -> torch.Tensor:
        """Translate with the generators as they are trained, not averaged; differentiable.

        Args:
            image: (B, C, *S), of the other domain (of the same one for an identity term).
            to: ``"target"`` or ``"source"``.

        Returns:
            (B, C, *S) in [-1, 1].
        """
        translated: torch.Tensor = self.generators[f"to_{to}"](image)
        return translated

    def generator_terms(self, source: torch.Tensor, target: torch.Tensor, ctx: StepContext) -> Translations:
        """Translate a batch both ways, and say what the generators are to minimize.

        Args:
            source: (B, C, *S) in [-1, 1].
            target: (B', C, *S) in [-1, 1].
            ctx: the step's context.
        """
        raise NotImplementedError(f"{type(self).__name__} does not override generator_terms()")

    def critic_terms(
        self, source: torch.Tensor, target: torch.Tensor, translations: Translations, ctx: StepContext
    ) -> dict[str, torch.Tensor]:
        """What the critics are to minimize (no gradient to the generators), and how often they are right.

        Args:
            source: as given to :meth:`generator_terms`.
            target: likewise.
            translations: what it returned.
            ctx: the step's context.
        """
        raise NotImplementedError(f"{type(self).__name__} does not override critic_terms()")

    def after_update(self, ctx: StepContext) -> None:
        """Move the averaged generators after the trained ones."""
        if ctx.window_ends:
            update_ema(self.ema, self.generators, ema_decay(ctx.updates, self.decay))

    def step(self, batch: Batch, ctx: StepContext) -> dict[str, torch.Tensor]:
        """Update generators and critics, then the averages; ``loss`` is the generators'."""
        source, target = batch["source"]["image"], batch["target"]["image"]
        require_same_channels(source, target)
        translations = self.generator_terms(source, target, ctx)
        critic_terms = self.critic_terms(source, target, translations, ctx)
        loss = sum_of_losses(translations.terms)
        ctx.update({"generators": loss, "critics": sum_of_losses(critic_terms)})
        self.after_update(ctx)
        terms = translations.terms | critic_terms
        return {"loss": loss.detach(), **{name: term.detach() for name, term in terms.items()}}


def sum_of_losses(terms: dict[str, torch.Tensor]) -> torch.Tensor:
    """The sum of the terms whose names end in ``_loss``."""
    return torch.stack([term for name, term in terms.items() if name.endswith("_loss")]).sum()


def require_same_channels(source: torch.Tensor, target: torch.Tensor) -> None:
    """Refuse streams that no pair of generators can map onto each other and onto themselves.

    Raises:
        ConfigError: naming both numbers of channels.
    """
    if source.shape[1] != target.shape[1]:
        raise ConfigError(
            "streams",
            f"source images have {source.shape[1]} channel(s), target images {target.shape[1]}",
            "give both streams images of the same channels",
        )
