"""Round trips, latent means and hints against loops and reference values."""

from __future__ import annotations

import pytest
import torch

from medkd.losses.hints import feature_hint
from medkd.losses.translation import cycle_l1, latent_kl


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_latent_kl_equals_the_reference():
    k = torch.arange(128, dtype=torch.float64)
    mean = torch.sin(0.7 * k + 0.1 * k**1.5).reshape(1, 8, 4, 4)
    assert latent_kl(mean).item() == pytest.approx(0.4949781202, abs=1e-10)


def test_latent_kl_is_twice_the_divergence_from_the_unit_gaussian():
    mean = draw(2, 3, 4)
    divergence = torch.distributions.kl_divergence(
        torch.distributions.Normal(mean, 1.0), torch.distributions.Normal(torch.zeros_like(mean), 1.0)
    )
    assert latent_kl(mean).item() == pytest.approx(2 * divergence.mean().item(), abs=1e-12)
    assert latent_kl(torch.zeros(2, 3)).item() == 0


def test_cycle_l1_equals_a_loop_and_is_zero_after_a_perfect_round_trip():
    a, b = draw(2, 1, 3, 4), draw(2, 1, 3, 4, seed=1)
    pairs = zip(a.flatten().tolist(), b.flatten().tolist(), strict=True)
    assert cycle_l1(a, b).item() == pytest.approx(sum(abs(p - q) for p, q in pairs) / 24, abs=1e-12)
    assert cycle_l1(a, a).item() == 0
    assert cycle_l1(a + 0.25, a).item() == pytest.approx(0.25)


def test_hint_equals_a_loop_over_layers():
    student, teacher = (
        [draw(2, 3, 4, 4), draw(2, 5, 2, 2, seed=1)],
        [draw(2, 3, 4, 4, seed=2), draw(2, 5, 2, 2, seed=3)],
    )
    total = 0.0
    for a, b in zip(student, teacher, strict=True):
        pairs = list(zip(a.flatten().tolist(), b.flatten().tolist(), strict=True))
        total += sum((p - q) ** 2 for p, q in pairs) / len(pairs)
    assert feature_hint(student, teacher).item() == pytest.approx(total, abs=1e-12)
    assert feature_hint(student, student).item() == 0


def test_the_teacher_and_its_input_get_no_gradient_unless_asked_for():
    student, image = draw(2, 3).requires_grad_(), draw(2, 3, seed=1).requires_grad_()
    feature_hint([student], [image * 2]).backward()
    assert image.grad is None
    assert student.grad.abs().sum() > 0
    feature_hint([student], [image * 2], stop_gradient=False).backward()
    assert image.grad.abs().sum() > 0


def test_gradients_agree_with_finite_differences():
    a, b = draw(2, 1, 3).requires_grad_(), draw(2, 1, 3, seed=1).requires_grad_()
    for loss in (
        cycle_l1,
        lambda x, y: feature_hint([x, x], [y, 2 * y], stop_gradient=False),
        lambda x, y: latent_kl(x * y),
    ):
        assert torch.autograd.gradcheck(loss, (a, b))


def test_half_precision_is_computed_in_float32():
    a, b = draw(4, 1, 8, 8).bfloat16(), draw(4, 1, 8, 8, seed=1).bfloat16()
    for loss in (cycle_l1, lambda x, y: feature_hint([x], [y]), lambda x, y: latent_kl(x)):
        assert loss(a, b).dtype == torch.float32
        assert loss(a, b).item() == pytest.approx(loss(a.double(), b.double()).item(), rel=1e-5)


def test_wrong_shapes_are_named():
    with pytest.raises(ValueError, match=r"\(2, 1, 3\).*\(2, 1, 4\)"):
        cycle_l1(draw(2, 1, 3), draw(2, 1, 4))
    with pytest.raises(ValueError, match=r"layer 1.*\(2, 3\).*\(2, 4\)"):
        feature_hint([draw(2), draw(2, 3)], [draw(2), draw(2, 4)])
    with pytest.raises(ValueError, match="1 of the student and 2 of the teacher"):
        feature_hint([draw(2)], [draw(2), draw(2)])
    with pytest.raises(ValueError, match="at least one"):
        feature_hint([], [])
