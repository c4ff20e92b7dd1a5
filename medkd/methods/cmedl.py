"""CMEDL: a network of one modality taught by another network that sees the same patient as a pseudo-image of a second.

Paper: Jiang, Rimner, Deasy, Veeraraghavan 2022, "Unpaired Cross-Modality Educed Distillation (CMEDL) for Medical Image
Segmentation", IEEE TMI, arXiv:2107.07985. No code was released; read were the abstracts of three versions and the same
authors' code of related papers. docs/methods/cmedl.md says where each part comes from.
Roles: student, teacher, generators, critics; the last two are those of the translation method ``i2i``, which trains
along. Frozen: feature_network. Streams: student, teacher, images and labels of unpaired patients of two modalities.
Batch: each stream's image is (B, C, *S) float32 in [-1, 1], its label (B, 1, *S); both streams have the same C.

Which modality is on which stream makes the teacher informative (the student sees CT, the teacher MR), weak (student
MR, teacher CT) or equal (two contrasts or two sets of scans of one modality): the method does not know modalities.

Differs: hint_reaches: the hint updates the student only. The paper's routing is not confirmed; the switch is there.
Differs: the weights (5 for segmentation through the generator, 1 for hint and contextual loss) are second-hand, and a
related release of the authors weighs a feature term by 5.
Differs: all networks step together, with what they computed before the step; the related release updates generators and
critics first. The teacher's features and the pseudo-images are then one update older.
Differs: segmentation_loss is 0.5 (cross-entropy + Dice); the paper's form is not confirmed.
Differs: one forward pass of the teacher over the pseudo-images serves its own loss, the generator's and the hint.
Differs: the contextual loss is summed over the layers that ``feature_network`` returns; which those are is its matter.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import nn

from medkd.engine.context import StepContext
from medkd.engine.method import Batch, Method
from medkd.engine.translation import TranslationMethod, Translations, sum_of_losses
from medkd.errors import ConfigError, TrainingError
from medkd.losses.contextual import contextual_loss
from medkd.losses.hints import feature_hint
from medkd.losses.segmentation import dice_ce_loss
from medkd.nets.taps import Taps

Terms = dict[str, torch.Tensor]
Features = list[torch.Tensor]


class CMEDL(Method):
    """Concurrent training of a translation method, a teacher on the teacher's modality, and the student that ships.

    - generators: those of ``i2i`` + contextual_weight · L_cx + generator_segmentation_weight · L_seg(teacher(G(x)), y)
    - critics: those of ``i2i``
    - teacher: segmentation_weight · (L_seg on its own modality + L_seg on pseudo-images with the student's labels)
    - student: segmentation_weight · L_seg + hint_weight · L_hint(student at x, teacher at G(x))

    Args:
        student: (B, C, *S) → logits (B, K, *S) of images of the student's modality; ships alone.
        teacher: same shapes, of images of the teacher's modality; at the hinted layers its features have the student's
            shape.
        i2i: translates; its source is the student's modality, its target the teacher's.
        feature_network: (B, C, *S) → a feature map (B, D, *R) or a list of them, for the contextual loss; never
            changes.
        student_layers: names of the student's hinted layers; by default its ``hint_layers``, the last two.
        teacher_layers: the teacher's, in the same order; by default its ``hint_layers``.
        segmentation_weight: weight of the student's and of the teacher's segmentation losses.
        generator_segmentation_weight: weight of the teacher's segmentation loss on pseudo-images in the generators'
            objective; 0 leaves the term out.
        contextual_weight: weight of the contextual loss; 0 leaves the term out.
        hint_weight: weight of the hint; 0 leaves the term out.
        hint_reaches: the roles that the hint updates: ``("student",)``, or with ``"teacher"`` or ``"generators"``.
        bandwidth: of the contextual loss.
        segmentation_loss: (logits, label) → scalar.

    Raises:
        ConfigError: If ``i2i`` does not translate, a network does not say which layers to hint at, or a role is
            unknown; at a step, if labels are missing, channels differ or hinted features have different shapes.
        TrainingError: At a step, if features of the contextual loss are not finite.
    """

    paper: ClassVar[str] = "Jiang et al. 2022, IEEE TMI, arXiv:2107.07985"
    roles: ClassVar[tuple[str, ...]] = ("student", "teacher", "generators", "critics")
    frozen: ClassVar[tuple[str, ...]] = ("feature_network",)
    streams: ClassVar[tuple[str, ...]] = ("student", "teacher")
    batch_coupled: ClassVar[bool] = True  # the default Dice runs over the batch, image pools over several
    accumulates: ClassVar[bool] = False

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        i2i: TranslationMethod,
        feature_network: nn.Module,
        *,
        student_layers: Sequence[str] | None = None,
        teacher_layers: Sequence[str] | None = None,
        segmentation_weight: float = 1.0,
        generator_segmentation_weight: float = 5.0,
        contextual_weight: float = 1.0,
        hint_weight: float = 1.0,
        hint_reaches: Sequence[str] = ("student",),
        bandwidth: float = 0.5,
        segmentation_loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = dice_ce_loss,
    ) -> None:
        super().__init__()
        if not isinstance(i2i, TranslationMethod):
            raise ConfigError("i2i", f"{type(i2i).__name__} does not translate", "give a CycleGAN or UNIT of medkd")
        self.student = student
        self.teacher = teacher
        self.i2i = i2i
        self.feature_network = feature_network.requires_grad_(False)
        self.student_layers = _hint_layers("student", student, student_layers)
        self.teacher_layers = _hint_layers("teacher", teacher, teacher_layers)
        if len(self.student_layers) != len(self.teacher_layers):
            counts = f"{len(self.student_layers)} of the student, {len(self.teacher_layers)} of the teacher"
            raise ConfigError("hinted layers", counts, "name as many of both, in the same order")
        self.hint_reaches = _reached(hint_reaches)
        self.segmentation_weight = segmentation_weight
        self.generator_segmentation_weight = generator_segmentation_weight
        self.contextual_weight = contextual_weight
        self.hint_weight = hint_weight
        self.bandwidth = bandwidth
        self.segmentation_loss = segmentation_loss

    @property
    def generators(self) -> nn.ModuleDict:
        """Those of the translation method, which owns their place in checkpoints."""
        return self.i2i.generators

    @property
    def critics(self) -> nn.ModuleDict:
        """Those of the translation method."""
        return self.i2i.critics

    def step(self, batch: Batch, ctx: StepContext) -> Terms:
        """Update all four roles at once, then what the translation method averages; ``loss`` is the student's."""
        _require_usable(batch)
        translations = self.i2i.generator_terms(batch["student"]["image"], batch["teacher"]["image"], ctx)
        terms = self.role_terms(batch, translations, ctx)
        ctx.update({role: sum_of_losses(terms[role]) for role in self.roles})
        self.i2i.after_update(ctx)
        logged = {name: term.detach() for role in self.roles for name, term in terms[role].items()}
        return {"loss": sum_of_losses(terms["student"]).detach(), **logged}

    def role_terms(self, batch: Batch, translations: Translations, ctx: StepContext) -> dict[str, Terms]:
        """What each role is to minimize; names that end in ``_loss`` are weighted.

        Args:
            batch: the step's batch.
            translations: of its images, by ``i2i``.
            ctx: the step's context.
        """
        own, other = batch["student"], batch["teacher"]
        pseudo = translations.to_target
        logits, student_features = _with_features(self.student, own["image"], self.student_layers)
        pseudo_logits, teacher_features = _with_features(self.teacher, pseudo, self.teacher_layers)
        on_real = self.segmentation_loss(self.teacher(other["image"]), other["label"])
        on_pseudo = self.segmentation_loss(pseudo_logits, own["label"])

        terms: dict[str, Terms] = {
            "student": {
                "student_segmentation_loss": self.segmentation_weight * self.segmentation_loss(logits, own["label"])
            },
            "teacher": {
                "teacher_segmentation_loss": self.segmentation_weight * on_real,
                "teacher_pseudo_segmentation_loss": self.segmentation_weight * on_pseudo,
            },
            "generators": dict(translations.terms),
            "critics": self.i2i.critic_terms(own["image"], other["image"], translations, ctx),
        }
        if self.generator_segmentation_weight:
            terms["generators"]["generator_segmentation_loss"] = self.generator_segmentation_weight * on_pseudo
        if self.contextual_weight:
            terms["generators"]["contextual_loss"] = self.contextual_weight * self._contextual(pseudo, batch, ctx)
        if self.hint_weight:
            hint = self.hint_weight * self._hint(student_features, self.hint_targets(pseudo, teacher_features))
            for role in self.hint_reaches:
                terms[role]["hint_loss"] = hint
        return terms

    def hint_targets(self, pseudo: torch.Tensor, teacher_features: Features) -> Features:
        """What the student's features are drawn to: the teacher's; a control experiment may put others here.

        Args:
            pseudo: (B, C, *S) the student's images as images of the teacher's modality.
            teacher_features: the teacher's for them, one tensor per hinted layer.
        """
        return teacher_features

    def _hint(self, student_features: Features, teacher_features: Features) -> torch.Tensor:
        for place, (own, other) in enumerate(zip(student_features, teacher_features, strict=True)):
            if own.shape != other.shape:
                raise ConfigError(
                    "hinted layers",
                    f"the student's {self.student_layers[place]!r} gives {tuple(own.shape)}, "
                    f"the teacher's {self.teacher_layers[place]!r} {tuple(other.shape)}",
                    "choose layers of equal shapes with student_layers and teacher_layers",
                )
        return feature_hint(student_features, teacher_features, stop_gradient=self.hint_reaches == ("student",))

    def _contextual(self, pseudo: torch.Tensor, batch: Batch, ctx: StepContext) -> torch.Tensor:
        """Of each pseudo-image and a real image of another patient; real ones are reused if they are fewer."""
        real = batch["teacher"]["image"]
        partners = torch.arange(len(pseudo), device=real.device) % len(real)
        made = _as_list(self.feature_network(pseudo))
        with torch.no_grad():
            wanted = _as_list(self.feature_network(real[partners]))
        try:
            losses = [contextual_loss(a, b, bandwidth=self.bandwidth) for a, b in zip(made, wanted, strict=True)]
        except FloatingPointError as error:
            raise TrainingError(
                f"iteration {ctx.iteration}",
                f"{error}, on {_cases(batch)}",
                "look at these images, lower the generators' learning rate or set contextual_weight=0",
            ) from error
        return torch.stack(losses).sum()


def _with_features(network: nn.Module, image: torch.Tensor, layers: tuple[str, ...]) -> tuple[torch.Tensor, Features]:
    """Logits, and the outputs of the named layers."""
    with Taps(network, layers) as features:
        logits = network(image)
    return logits, [features[name] for name in layers]


def _as_list(features: torch.Tensor | Sequence[torch.Tensor]) -> Features:
    return [features] if isinstance(features, torch.Tensor) else list(features)


def _hint_layers(role: str, network: nn.Module, given: Sequence[str] | None) -> tuple[str, ...]:
    layers = tuple(getattr(network, "hint_layers", ()) if given is None else given)
    if not layers:
        raise ConfigError(
            f"{role}_layers", f"{type(network).__name__} names no hint_layers", "name its last two layers"
        )
    modules = dict(network.named_modules())
    unknown = [name for name in layers if name not in modules]
    if unknown:
        near = difflib.get_close_matches(unknown[0], modules, n=3, cutoff=0)
        raise ConfigError(f"{role}_layers", f"{type(network).__name__} has no {unknown[0]!r}", f"did you mean {near}?")
    return layers


def _reached(roles: Sequence[str]) -> tuple[str, ...]:
    known = ("student", "teacher", "generators")
    if "student" not in roles or not set(roles) <= set(known):
        raise ConfigError("hint_reaches", f"{list(roles)} cannot be", f"name the student, and others of {list(known)}")
    return tuple(role for role in known if role in roles)


def _require_usable(batch: Batch) -> None:
    for name in ("student", "teacher"):
        if "label" not in batch[name]:
            raise ConfigError(
                f"stream {name!r}", "its cases have no labels", "list labeled cases of this modality under training"
            )
    own, other = (batch[name]["image"].shape[1] for name in ("student", "teacher"))
    if own != other:
        raise ConfigError(
            "streams",
            f"the student's images have {own} channel(s), the teacher's {other}",
            "give both modalities the same channels",
        )


def _cases(batch: Batch) -> str:
    """Names of the batch's cases, for a message."""
    named = {name: items.get("case") for name, items in batch.items()}
    return (
        "; ".join(f"{name}: {', '.join(map(str, cases))}" for name, cases in named.items() if cases) or "unnamed images"
    )
