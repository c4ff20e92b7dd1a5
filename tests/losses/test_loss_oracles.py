"""Losses against values computed with the reference implementations in float64 on the same inputs."""

from __future__ import annotations

import math

import pytest
import torch

from medkd.losses.consistency import probability_mse
from medkd.losses.distillation import soft_target_kl, softened_mse
from medkd.losses.segmentation import dice_ce_loss


@pytest.fixture
def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    k = torch.arange(160, dtype=torch.float64)
    a = (2 * torch.sin(0.37 * k)).reshape(2, 5, 4, 4)
    b = (2 * torch.cos(0.23 * k)).reshape(2, 5, 4, 4)
    return a, b, (torch.arange(32) % 5).reshape(2, 4, 4)


def test_dice_ce_equals_the_reference(inputs):
    a, _, y = inputs
    # MONAI takes the norm of a float32 label map, which costs 6e-9.
    assert dice_ce_loss(a, y).item() == pytest.approx(1.2499262964, abs=2e-8)


def test_probability_mse_equals_the_reference(inputs):
    a, b, _ = inputs
    assert probability_mse(a, b).item() == pytest.approx(0.0590919022, abs=1e-10)


def test_soft_target_kl_equals_the_reference_per_pixel_mean(inputs):
    a, b, _ = inputs
    assert soft_target_kl(a, b, 1.0).item() == pytest.approx(0.7364805247, abs=1e-9)


def test_softened_mse_equals_the_reference_with_and_without_t_squared(inputs):
    a, b, _ = inputs
    assert softened_mse(a, b, 20.0, t_squared=False).item() == pytest.approx(0.0009992104, abs=1e-10)
    assert softened_mse(a, b, 20.0).item() == pytest.approx(0.0799368298 * 5, abs=1e-9)


def test_soft_target_kl_equals_a_loop():
    student, teacher = torch.randn(2, 3, 4, 2), torch.randn(2, 3, 4, 2)
    t, total = 3.0, 0.0
    for n in range(2):
        for i in range(4):
            for j in range(2):
                p = torch.softmax(teacher[n, :, i, j] / t, 0)
                q = torch.softmax(student[n, :, i, j] / t, 0)
                total += sum(float(p[c]) * math.log(float(p[c]) / float(q[c])) for c in range(3))
    assert soft_target_kl(student, teacher, t).item() == pytest.approx(total / 16 * t**2, rel=1e-4)


@pytest.mark.parametrize(
    "loss", [lambda s, t: soft_target_kl(s, t, 20.0), lambda s, t: softened_mse(s, t, 20.0), probability_mse]
)
def test_agreeing_networks_have_no_loss_and_the_teacher_gets_no_gradient(loss):
    student = torch.randn(2, 3, 4, requires_grad=True)
    teacher = student.detach().clone().requires_grad_()
    assert loss(student, teacher).item() == pytest.approx(0.0, abs=1e-6)
    loss(student, teacher * 2).backward()
    assert teacher.grad is None
    assert student.grad is not None


def test_t_squared_keeps_the_gradient_size_over_temperatures():
    torch.manual_seed(0)
    teacher = 3 * torch.randn(4, 4, 8, 8)
    norms = {}
    for temperature in (1.0, 20.0):
        student = 3 * torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(1))
        student.requires_grad_()
        softened_mse(student, teacher, temperature).backward()
        norms[temperature] = student.grad.norm().item()
    assert 0.1 < norms[20.0] / norms[1.0] < 10


def test_per_sample_dice_does_not_couple_the_batch():
    torch.manual_seed(0)
    logits, label = torch.randn(4, 3, 8, 8), torch.randint(0, 3, (4, 1, 8, 8))
    whole = dice_ce_loss(logits, label, per_sample=True)
    halves = (
        dice_ce_loss(logits[:2], label[:2], per_sample=True) + dice_ce_loss(logits[2:], label[2:], per_sample=True)
    ) / 2
    assert whole.item() == pytest.approx(halves.item(), abs=1e-6)
    joint = (dice_ce_loss(logits[:2], label[:2]) + dice_ce_loss(logits[2:], label[2:])) / 2
    assert abs(dice_ce_loss(logits, label).item() - joint.item()) > 1e-5


def test_wrong_shapes_are_named():
    with pytest.raises(ValueError, match=r"\(2, 3, 4\).*\(2, 3, 5\)"):
        softened_mse(torch.zeros(2, 3, 4), torch.zeros(2, 3, 5), 2.0)
    with pytest.raises(ValueError, match="label must be"):
        dice_ce_loss(torch.zeros(2, 3, 4, 4), torch.zeros(2, 4, 5))
    with pytest.raises(ValueError, match="temperature"):
        soft_target_kl(torch.zeros(2, 3, 4), torch.zeros(2, 3, 4), 0.0)
