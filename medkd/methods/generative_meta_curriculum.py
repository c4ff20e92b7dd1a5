"""Generative meta curriculum learning: a teacher makes training images so that the student gets better by them.

Paper: Li, Lovell 2022, "End to End Generative Meta Curriculum Learning For Medical Data Augmentation", ICIP 2023,
arXiv:2212.10086.
Roles: student, teacher. Streams: labeled {image (B, C, H, W), label (B,) or (B, 1)}, B at least 2.

Differs: nearly everything here is our reconstruction. Only the abstract was available to us. It says: no GAN but one
further model; one stage, end to end; a teacher learns "in a meta-learning style" to generate a curriculum that the
student is fed as augmentation. Networks, losses, weights, schedules and the update below are ours, after Generative
Teaching Networks (Such et al., arXiv:1912.07768) and Meta Pseudo Labels (Pham et al., arXiv:2003.10580).
Differs: one virtual step of plain gradient descent stands for what the student learns, whatever its own optimizer is.
Differs: the teacher is judged on a random part of the labeled batch, drawn anew each step and left out of the virtual
step. The student itself then learns from the whole batch, so no label is set aside. No other data is looked at.
Differs: with several processes or accumulation, each takes its own virtual step on its own part of the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from medkd.engine.context import StepContext
from medkd.engine.method import Batch, Method
from medkd.losses.classification import cross_entropy_loss
from medkd.schedules import sigmoid_ramp_up

Weights = dict[str, torch.Tensor]


class GenerativeMetaCurriculum(Method):
    """Student: CE on real and made images. Teacher: CE on other real images of a student that learned from its images.

    With T the teacher's image of (x, y, z), a the inner rate and (x_m, y_m) the part of the batch held out:

    - virtual step: θ' = θ - a ∇_θ [CE(f_θ(x), y) + μ CE(f_θ(T), y)] on the rest of the batch;
    - teacher: w CE(f_θ'(x_m), y_m) + ρ mean abs(T - x) - γ CE(f_θ(T), y);
    - student: CE(f_θ(x), y) + μ CE(f_θ(T), y) on the whole batch.

    The curriculum: μ ramps up; ε, the bound of the changes, and γ, the reward of what the student gets wrong, rise
    linearly, so images become harder.

    Args:
        student: (B, C, H, W) → logits (B, K).
        teacher: a network with ``noise(image, generator, std)`` and ``forward(image, label, noise, eps)``, as
            :mod:`medkd.nets.curriculum_teacher` has them.
        from_noise: the teacher makes images from noise: their classes are drawn balanced, and ρ plays no part.
        inner_lr: a.
        meta_weight: w; 0 leaves the virtual step out, and with it the feedback.
        meta_share: share of the batch that is held out of the virtual step.
        generated_weight: μ at the end of its ramp.
        ramp_up_frac: share of the run over which μ ramps up (sigmoid).
        eps: bound of the changes at the start and at the end, as shares of the range of the pixels.
        distance_weight: ρ.
        adversarial_weight: γ at the end; it starts at 0.
        harder_frac: share of the run over which ε and γ rise; 0 has them at their end from the start.
        first_order: no derivative through the virtual step. A sample is drawn around T and taken for training, and
            the teacher makes it more likely by the reward L_m(θ) - L_m(θ'), old minus new: positive where the step
            helped (REINFORCE, as the feedback of Meta Pseudo Labels). Cheaper, unbiased in its own sense, and noisy.
        sample_std: standard deviation of those samples around T, in units of the normalized image.
        noise_std: standard deviation of z.

    Raises:
        ValueError: If a share, rate or weight is out of range.
    """

    paper: ClassVar[str] = "Li and Lovell 2022, ICIP 2023, arXiv:2212.10086 (reconstruction from the abstract)"
    task: ClassVar[str] = "classification"
    roles: ClassVar[tuple[str, ...]] = ("student", "teacher")
    streams: ClassVar[tuple[str, ...]] = ("labeled",)
    batch_coupled: ClassVar[bool] = True  # the virtual step runs over the batch

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        *,
        from_noise: bool = False,
        inner_lr: float = 0.1,
        meta_weight: float = 1.0,
        meta_share: float = 0.5,
        generated_weight: float = 1.0,
        ramp_up_frac: float = 0.3,
        eps: Sequence[float] = (0.05, 0.3),
        distance_weight: float = 0.1,
        adversarial_weight: float = 0.1,
        harder_frac: float = 0.8,
        first_order: bool = False,
        sample_std: float = 0.1,
        noise_std: float = 1.0,
    ) -> None:
        super().__init__()
        weights = (inner_lr, meta_weight, generated_weight, distance_weight, adversarial_weight, harder_frac)
        if min(weights) < 0 or not 0 < meta_share < 1 or sample_std <= 0:
            raise ValueError("rates and weights must be 0 or more, meta_share between 0 and 1, sample_std above 0")
        self.student = student
        self.teacher = teacher
        self.from_noise = from_noise
        self.inner_lr = inner_lr
        self.meta_weight = meta_weight
        self.meta_share = meta_share
        self.generated_weight = generated_weight
        self.ramp_up_frac = ramp_up_frac
        self.eps = tuple(eps)
        self.distance_weight = distance_weight
        self.adversarial_weight = adversarial_weight
        self.harder_frac = harder_frac
        self.first_order = first_order
        self.sample_std = sample_std
        self.noise_std = noise_std

    def curriculum(self, progress: float) -> dict[str, float]:
        """μ, γ and ε after a share ``progress`` of the run."""
        risen = min(progress / self.harder_frac, 1.0) if self.harder_frac else 1.0
        return {
            "mu": self.generated_weight * sigmoid_ramp_up(progress, self.ramp_up_frac),
            "gamma": self.adversarial_weight * risen,
            "eps": self.eps[0] + (self.eps[1] - self.eps[0]) * risen,
        }

    def step(self, batch: Batch, ctx: StepContext) -> dict[str, torch.Tensor]:
        """Update student and teacher; ``loss`` is the student's."""
        image = batch["labeled"]["image"]
        label = batch["labeled"]["label"].reshape(-1).long()
        now = self.curriculum(ctx.progress)
        wanted = self._wanted(label, ctx.generator)
        noise = self.teacher.noise(image, ctx.generator, self.noise_std)  # type: ignore[operator]
        made = self.teacher(image, wanted, noise, now["eps"])
        shown = self._sampled(made, ctx.generator) if self.first_order else made
        logits = self.student(torch.cat([image, shown.to(image.dtype)]))
        real_term = cross_entropy_loss(logits[: len(label)], label)
        made_term = cross_entropy_loss(logits[len(label) :], wanted)
        student_loss = real_term + now["mu"] * made_term

        distance = (made - image).abs().mean()
        teacher_loss = -now["gamma"] * made_term
        if not self.from_noise:
            teacher_loss = teacher_loss + self.distance_weight * distance
        logged = {"classification_loss": real_term, "generated_loss": now["mu"] * made_term, "distance": distance}
        if self.meta_weight:
            feedback, meta = self.feedback(image, label, made, shown, wanted, now["mu"], ctx.generator)
            teacher_loss = teacher_loss + self.meta_weight * feedback
            logged |= meta
        ctx.update({"student": student_loss, "teacher": teacher_loss})
        logged |= {"teacher_loss": teacher_loss, **{k: torch.tensor(v) for k, v in now.items()}}
        return {"loss": student_loss.detach(), **{name: term.detach() for name, term in logged.items()}}

    def feedback(
        self,
        image: torch.Tensor,
        label: torch.Tensor,
        made: torch.Tensor,
        shown: torch.Tensor,
        wanted: torch.Tensor,
        mu: float,
        generator: torch.Generator | None = None,
    ) -> tuple[torch.Tensor, Weights]:
        """What the teacher minimizes so that its images teach, in float32 and without a trace in the student.

        Args:
            image: (B, C, H, W) real images.
            label: (B,) their classes.
            made: (B, C, H, W) the teacher's images, with their graph.
            shown: the same, or the samples around them that the student is shown (``first_order``).
            wanted: (B,) classes of the made images.
            mu: weight of the made images in the virtual step.
            generator: draws the part that is held out.

        Returns:
            The loss, whose gradient reaches the teacher; and ``meta_loss``, L_m(θ'), with ``reward``, L_m(θ) - L_m(θ'),
            where it was computed.
        """
        meta, inner = self._parts(len(label), image.device, generator)
        weights = {name: value.detach().requires_grad_() for name, value in self.student.named_parameters()}
        trained = {name: weights[name] for name, value in self.student.named_parameters() if value.requires_grad}
        with torch.autocast(image.device.type, enabled=False):  # second derivatives in 16 bits are mostly rounding
            image = image if image.dtype == torch.float64 else image.float()
            shown = shown.to(image.dtype)
            material = shown.detach() if self.first_order else shown
            logits = self._student(weights, torch.cat([image[inner], material[inner]]))
            loss = cross_entropy(logits[: len(inner)], label[inner])
            loss = loss + mu * cross_entropy(logits[len(inner) :], wanted[inner])
            slopes = torch.autograd.grad(loss, list(trained.values()), create_graph=not self.first_order)
            stepped = {n: w - self.inner_lr * s for (n, w), s in zip(trained.items(), slopes, strict=True)}
            if not self.first_order:
                after = cross_entropy(self._student({**weights, **stepped}, image[meta]), label[meta])
                return after, {"meta_loss": after}
            with torch.no_grad():
                before = cross_entropy(self._student(weights, image[meta]), label[meta])
                after = cross_entropy(self._student({**weights, **stepped}, image[meta]), label[meta])
            reward = before - after
            surprise = (shown.detach() - made.to(image.dtype))[inner].square().sum() / (2 * self.sample_std**2)
            return reward * surprise, {"meta_loss": after, "reward": reward}

    def _student(self, weights: Weights, image: torch.Tensor) -> torch.Tensor:
        """The student with other weights; BatchNorm takes the batch's statistics and moves copies of its own."""
        buffers = {name: value.clone() for name, value in self.student.named_buffers()}
        logits: torch.Tensor = torch.func.functional_call(self.student, {**weights, **buffers}, (image,))
        return logits

    def _parts(
        self, count: int, device: torch.device, generator: torch.Generator | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Indices of the held-out part, and of the rest."""
        if count < 2:
            raise ValueError("the labeled batch has one image; a part must be held out, so use 2 or more")
        order = torch.randperm(count, generator=generator, device=device)
        held = min(max(round(self.meta_share * count), 1), count - 1)
        return order[:held], order[held:]

    def _wanted(self, label: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Classes of the images to make: those of the real ones, or all equally often in random order."""
        if not self.from_noise:
            return label
        classes = int(self.teacher.classes)  # type: ignore[arg-type]
        first = torch.randint(classes, (1,), generator=generator, device=label.device)
        order = torch.randperm(len(label), generator=generator, device=label.device)
        return (order + first) % classes

    def _sampled(self, made: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        noise = torch.randn(made.shape, generator=generator, device=made.device, dtype=torch.float32)
        return made + (self.sample_std * noise).to(made.dtype)
