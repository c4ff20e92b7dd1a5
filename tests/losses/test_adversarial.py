"""Critic losses and accuracy against loops, at their limits, over scales."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from medkd.losses.adversarial import critic_accuracy, domain_bce, hinge, hinge_to_fool, least_squares


@pytest.fixture
def scales() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 1, side, side, generator=generator, dtype=torch.float64) for side in (4, 2)]


@pytest.mark.parametrize("real", [True, False])
def test_least_squares_equals_a_loop_and_sums_over_scales(scales, real):
    total = 0.0
    for scale in scales:
        values = scale.flatten().tolist()
        total += sum((value - (1 if real else 0)) ** 2 for value in values) / len(values)
    assert least_squares(scales, real).item() == pytest.approx(total, abs=1e-12)
    assert least_squares(tuple(scales[:1]), real).item() == least_squares(scales[0], real).item()


def test_a_critic_at_its_targets_has_no_loss_and_one_at_the_middle_a_quarter():
    assert least_squares(torch.ones(3), True).item() == least_squares(torch.zeros(3), False).item() == 0
    assert least_squares(torch.full((3,), 0.5), True).item() == 0.25


@pytest.mark.parametrize("is_source", [True, False])
def test_domain_bce_equals_a_loop_with_source_as_class_zero(scales, is_source):
    total = 0.0
    for scale in scales:
        target = [1 / (1 + math.exp(-value)) for value in scale.flatten().tolist()]
        total -= sum(math.log(1 - p if is_source else p) for p in target) / len(target)
    assert domain_bce(scales, is_source).item() == pytest.approx(total, abs=1e-12)
    torchs = functional.binary_cross_entropy_with_logits(
        scales[0], torch.full_like(scales[0], 0.0 if is_source else 1.0)
    )
    assert domain_bce(scales[0], is_source).item() == pytest.approx(torchs.item(), abs=1e-12)


def test_an_undecided_critic_has_log_two_and_a_sure_one_is_finite():
    assert domain_bce(torch.zeros(5), True).item() == pytest.approx(math.log(2))
    sure = torch.tensor([-1e4, 1e4], requires_grad=True)
    loss = domain_bce(sure, True)
    loss.backward()
    assert loss.item() == pytest.approx(5000)
    assert torch.isfinite(sure.grad).all()


@pytest.mark.parametrize("loss", [least_squares, domain_bce])
@pytest.mark.parametrize("truth", [True, False])
def test_gradients_agree_with_finite_differences(scales, loss, truth):
    logits = [scale.requires_grad_() for scale in scales]
    assert torch.autograd.gradcheck(lambda *maps: loss(list(maps), truth), logits)


def test_accuracy_counts_each_side_half():
    real, fake = torch.tensor([0.9, 0.6, 0.2, 0.7]), torch.tensor([[0.1], [0.6]])
    assert critic_accuracy(real, fake).item() == pytest.approx((3 / 4 + 1 / 2) / 2)
    assert critic_accuracy([real, real], [fake, fake - 1]).item() == pytest.approx((3 / 4 + 3 / 4) / 2)
    assert critic_accuracy(real - 0.5, fake - 0.5, threshold=0.0).item() == pytest.approx(0.625)


@pytest.mark.parametrize("constant", [-3.0, 0.5, 3.0])
def test_a_critic_that_says_one_thing_of_everything_has_accuracy_one_half(constant):
    assert critic_accuracy(torch.full((2, 1, 3, 3), constant), torch.full((4,), constant)).item() == 0.5


def test_accuracy_is_a_float32_scalar_without_gradient():
    accuracy = critic_accuracy(torch.ones(2, dtype=torch.float64, requires_grad=True), torch.zeros(2))
    assert (accuracy.item(), accuracy.shape, accuracy.dtype, accuracy.requires_grad) == (1.0, (), torch.float32, False)


@pytest.mark.parametrize("loss", [least_squares, domain_bce])
def test_half_precision_is_computed_in_float32(loss):
    logits = torch.full((1 << 12,), 0.1, dtype=torch.bfloat16)
    assert loss(logits, True).dtype == torch.float32
    assert loss(logits, True).item() == pytest.approx(loss(logits.double(), True).item(), rel=1e-5)


def test_empty_maps_are_refused():
    with pytest.raises(ValueError, match=r"\[\]"):
        least_squares([], True)
    with pytest.raises(ValueError, match=r"\(2, 0\)"):
        domain_bce([torch.ones(2), torch.ones(2, 0)], True)
    with pytest.raises(ValueError, match="fake_logits"):
        critic_accuracy(torch.ones(2), torch.ones(0))


@pytest.mark.parametrize("real", [True, False])
def test_hinge_equals_a_loop_sums_over_scales_and_is_zero_beyond_the_margin(scales, real):
    sign = 1 if real else -1
    total = sum(sum(max(0.0, 1 - sign * z) for z in scale.flatten().tolist()) / scale.numel() for scale in scales)
    assert hinge(scales, real).item() == pytest.approx(total, abs=1e-12)
    assert hinge(torch.full((3,), 1.5 * sign), real).item() == 0
    assert hinge_to_fool(scales).item() == pytest.approx(-sum(scale.mean().item() for scale in scales), abs=1e-12)
    assert hinge(torch.full((4,), 0.1, dtype=torch.bfloat16), real).dtype == torch.float32
    with pytest.raises(ValueError, match="logits"):
        hinge_to_fool([])
