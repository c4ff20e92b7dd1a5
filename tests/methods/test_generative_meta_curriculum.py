"""Generative meta curriculum: its meta-gradient, what leaves the teacher alone, its curriculum, and resuming."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from contract.small.generative_meta_curriculum import CLASSES, classifier
from engine import toy
from ignite.engine import Events
from torch import nn

from medkd.engine import StepContext
from medkd.methods.generative_meta_curriculum import GenerativeMetaCurriculum
from medkd.nets.curriculum_teacher import NoiseTeacher, PerturbingTeacher


class Shift(nn.Module):
    """A teacher of one tensor, added to every image."""

    classes = CLASSES

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(0.1 * torch.randn(3, 2, 2, dtype=torch.float64))

    def noise(self, image, generator, std):
        return torch.zeros(len(image))

    def forward(self, image, label, noise, eps):
        return image + self.shift


class FlatGenerator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.expand = nn.Linear(4 + CLASSES, 3 * 8 * 8)

    def forward(self, code):
        return torch.tanh(self.expand(code)).view(-1, 3, 8, 8)


def linear_setting(**arguments):
    """A linear student, a one-tensor teacher and a batch, in float64."""
    torch.manual_seed(0)
    student = nn.Sequential(nn.Flatten(), nn.Linear(12, CLASSES)).double()
    method = GenerativeMetaCurriculum(student, Shift(), inner_lr=0.7, **arguments)
    image, label = torch.randn(8, 3, 2, 2, dtype=torch.float64), torch.arange(8) % CLASSES
    return method, image, label


def feedback(method, image, label, *, offset=None, wanted=None, mu=0.8):
    made = method.teacher(image, label, None, 0.0)
    shown = made if offset is None else made.detach() + offset
    wanted = label if wanted is None else wanted
    return method.feedback(image, label, made, shown, wanted, mu, torch.Generator().manual_seed(5))


def context(progress: float = 0.5, updates=None) -> StepContext:
    chosen = StepContext(torch.device("cpu"), 1, 1, progress, torch.Generator().manual_seed(0))
    if updates is not None:
        chosen.apply_update = updates.update
    return chosen


def batch_of(images: int = 6):
    torch.manual_seed(1)
    return {"labeled": {"image": torch.randn(images, 3, 8, 8).tanh(), "label": torch.arange(images) % CLASSES}}


def test_the_meta_gradient_equals_finite_differences():
    method, image, label = linear_setting()
    loss, _ = feedback(method, image, label)
    (found,) = torch.autograd.grad(loss, [method.teacher.shift])
    step = 1e-5
    for place in [(0, 0, 0), (1, 0, 1), (2, 1, 1)]:
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                method.teacher.shift[place] += sign * step
            values.append(feedback(method, image, label)[0].item())
            with torch.no_grad():
                method.teacher.shift[place] -= sign * step
        assert found[place].item() == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-6)
    assert found.abs().max() > 1e-5


def test_the_meta_loss_is_that_of_a_student_stepped_by_hand():
    method, image, label = linear_setting()
    loss, _ = feedback(method, image, label)
    meta, inner = method._parts(8, image.device, torch.Generator().manual_seed(5))
    assert sorted([*meta.tolist(), *inner.tolist()]) == list(range(8))
    twin = copy.deepcopy(method.student)
    made = method.teacher(image, label, None, 0.0)
    ce = nn.functional.cross_entropy
    (ce(twin(image[inner]), label[inner]) + 0.8 * ce(twin(made[inner]), label[inner])).backward()
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter -= 0.7 * parameter.grad
    torch.testing.assert_close(loss, ce(twin(image[meta]), label[meta]))


@pytest.mark.parametrize(("shift", "sign"), [(0, 1), (1, -1)])
def test_the_reward_is_old_minus_new(shift, sign):
    """Positive where the made images help; descending then moves the teacher toward the sample, and away where not."""
    method, _, _ = linear_setting(first_order=True)
    label = torch.arange(30) % CLASSES
    image = torch.eye(12, dtype=torch.float64)[label].view(30, 3, 2, 2)
    offset = 0.1 * torch.randn_like(image)
    loss, logged = feedback(method, image, label, offset=offset, wanted=(label + shift) % CLASSES, mu=4.0)
    assert sign * logged["reward"] > 0
    (slope,) = torch.autograd.grad(loss, [method.teacher.shift])
    _, inner = method._parts(30, image.device, torch.Generator().manual_seed(5))
    torch.testing.assert_close(slope, -logged["reward"] * offset[inner].sum(0) / method.sample_std**2)


def test_the_first_order_feedback_points_where_the_meta_gradient_points():
    """On average over samples; opposite samples in pairs take the constant part of the reward away."""
    method, image, label = linear_setting(meta_share=0.5)
    loss, _ = feedback(method, image, label)
    (exact,) = torch.autograd.grad(loss, [method.teacher.shift])
    method.first_order, method.sample_std = True, 0.05
    total = torch.zeros_like(exact)
    generator = torch.Generator().manual_seed(0)
    for _ in range(150):
        offset = 0.05 * torch.randn(image.shape, generator=generator, dtype=torch.float64)
        for sign in (1, -1):
            loss, _ = feedback(method, image, label, offset=sign * offset)
            total += torch.autograd.grad(loss, [method.teacher.shift])[0]
    assert torch.cosine_similarity(total.flatten(), exact.flatten(), dim=0) > 0.6


@pytest.mark.parametrize("first_order", [False, True])
def test_nothing_moves_the_teacher_without_inner_rate_and_other_terms(first_order):
    chosen = {"inner_lr": 0.0, "distance_weight": 0.0, "adversarial_weight": 0.0, "first_order": first_order}
    method = toy.method(GenerativeMetaCurriculum, norm=True, **chosen)
    losses: dict[str, torch.Tensor] = {}
    method.step(batch_of(), context(updates=losses))
    gradients = torch.autograd.grad(losses["teacher"], method.role_parameters("teacher"))
    assert max(gradient.abs().max() for gradient in gradients) == 0


def test_with_an_inner_rate_every_teacher_parameter_gets_a_gradient():
    chosen = {"distance_weight": 0.0, "adversarial_weight": 0.0}
    method = toy.method(GenerativeMetaCurriculum, norm=True, **chosen)
    losses: dict[str, torch.Tensor] = {}
    method.step(batch_of(), context(updates=losses))
    gradients = torch.autograd.grad(losses["teacher"], method.role_parameters("teacher"))
    assert all(gradient.abs().max() > 0 for gradient in gradients)


def test_the_virtual_step_leaves_no_trace_in_the_student():
    method = toy.method(GenerativeMetaCurriculum, norm=True)
    before = copy.deepcopy(method.student)
    batch = batch_of()["labeled"]
    made = method.teacher(batch["image"], batch["label"], torch.zeros(6, 1, 8, 8), 0.2)
    method.feedback(batch["image"], batch["label"], made, made, batch["label"], 1.0)
    assert toy.same_state(before, method.student)
    assert all(parameter.grad is None for parameter in method.student.parameters())


def test_the_curriculum_rises_to_its_end_and_stays():
    method = toy.method(GenerativeMetaCurriculum, eps=(0.05, 0.3), harder_frac=0.5, adversarial_weight=0.2)
    start, middle, end = (method.curriculum(progress) for progress in (0.0, 0.25, 0.9))
    assert start["eps"] == 0.05
    assert start["gamma"] == 0
    assert start["mu"] == pytest.approx(0.00674, abs=1e-5)
    assert middle["eps"] == pytest.approx(0.175)
    assert middle["gamma"] == pytest.approx(0.1)
    assert end == {"mu": 1.0, "gamma": 0.2, "eps": pytest.approx(0.3)}
    flat = toy.method(GenerativeMetaCurriculum, harder_frac=0.0, ramp_up_frac=0.0, adversarial_weight=0.2)
    assert flat.curriculum(0.0) == flat.curriculum(0.9)


def test_changes_stay_within_their_bound_and_the_range_of_pixels():
    torch.manual_seed(0)
    mean, std = (0.6, 0.45, 0.7), (0.2, 0.2, 0.15)
    teacher = PerturbingTeacher(CLASSES, width=4, mean=mean, std=std)
    pixels = torch.rand(4, 3, 9, 12)
    image = (pixels - teacher.mean) / teacher.std
    noise = teacher.noise(image, torch.Generator().manual_seed(0))
    made = teacher(image, torch.arange(4) % CLASSES, noise, 0.1) * teacher.std + teacher.mean
    assert (made - pixels).abs().max() <= 0.1 + 1e-6
    assert made.min() >= -1e-6
    assert made.max() <= 1 + 1e-6
    assert (made - pixels).abs().mean() > 0.02  # an untrained teacher already augments
    torch.testing.assert_close(teacher(image, torch.arange(4) % CLASSES, noise, 0.0), image, atol=1e-5, rtol=0)


class Recorder(nn.Module):
    """A student that remembers the batches it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.seen = classifier(norm=False, seed=0), []

    def forward(self, image):
        self.seen.append(image.detach())
        return self.inner(image)


def test_labels_of_changed_images_are_those_of_the_real_ones():
    student = Recorder()
    method = GenerativeMetaCurriculum(student, PerturbingTeacher(CLASSES, width=4), ramp_up_frac=0, meta_weight=0)
    batch = batch_of()
    logged = method.step(batch, context())
    assert len(student.seen) == 1  # without feedback there is no virtual step
    logits = student.inner(student.seen[0][6:])
    expected = nn.functional.cross_entropy(logits, batch["labeled"]["label"])
    torch.testing.assert_close(logged["generated_loss"], expected.detach())


def test_a_teacher_from_noise_makes_all_classes_equally_often():
    teacher = NoiseTeacher(FlatGenerator(), CLASSES, latent=4)
    method = GenerativeMetaCurriculum(classifier(norm=True, seed=0), teacher, from_noise=True)
    losses: dict[str, torch.Tensor] = {}
    batch = batch_of()
    batch["labeled"]["label"] = torch.zeros(6, 1, dtype=torch.long)
    method.step(batch, context(updates=losses))
    assert all(g.abs().max() > 0 for g in torch.autograd.grad(losses["teacher"], method.role_parameters("teacher")))
    wanted = method._wanted(torch.zeros(7, dtype=torch.long), torch.Generator().manual_seed(0))
    assert sorted(wanted.bincount(minlength=CLASSES).tolist()) == [2, 2, 3]


@pytest.mark.parametrize("first_order", [False, True])
def test_a_resumed_run_equals_an_uninterrupted_one(first_order, tmp_path):
    def run(folder, *, stop_at=None, resume=False):
        built = toy.method(GenerativeMetaCurriculum, norm=True, first_order=first_order)
        trainer = toy.trainer(built, toy.streams(type(built)), folder=tmp_path / folder, resume=resume)

        def stop(engine):
            if engine.state.iteration == stop_at:
                raise KeyboardInterrupt

        trainer.add_event_handler(Events.ITERATION_COMPLETED, stop)
        with contextlib.suppress(KeyboardInterrupt):
            trainer.run()
        return built

    whole = run("whole")
    run("cut", stop_at=4)
    assert toy.same_state(whole, run("cut", resume=True))


def test_a_single_image_and_wrong_numbers_are_refused():
    with pytest.raises(ValueError, match="2 or more"):
        toy.method(GenerativeMetaCurriculum).step(batch_of(1), context())
    with pytest.raises(ValueError, match="meta_share"):
        toy.method(GenerativeMetaCurriculum, meta_share=1.0)
    with pytest.raises(ValueError, match="channels"):
        PerturbingTeacher(2, mean=(0.1, 0.2))
