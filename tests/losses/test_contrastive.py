"""NT-Xent against reference values and properties."""

from __future__ import annotations

import math

import pytest
import torch

from medkd.losses.contrastive import nt_xent


def views() -> tuple[torch.Tensor, torch.Tensor]:
    k = torch.arange(64, dtype=torch.float64)
    rows = torch.sin(0.9 * k + 0.03 * k**1.7).reshape(8, 8)
    return rows[:4], rows[4:]


@pytest.mark.parametrize(("temperature", "expected"), [(0.07, 10.7457011457), (0.1, 7.6476620506), (0.5, 2.4721869002)])
def test_values_of_the_published_code(temperature, expected):
    assert nt_xent(*views(), temperature).item() == pytest.approx(expected, abs=1e-9)


def test_equal_projections_cost_the_logarithm_of_the_choices():
    same = torch.ones(5, 3)
    assert nt_xent(same, same).item() == pytest.approx(math.log(9), rel=1e-6)


def test_order_of_images_and_of_views_and_lengths_do_not_matter():
    first, second = views()
    expected = nt_xent(first, second)
    order = torch.tensor([2, 0, 3, 1])
    for other in (nt_xent(first[order], second[order]), nt_xent(second, first), nt_xent(3 * first, 0.1 * second)):
        torch.testing.assert_close(other, expected)


def test_partners_are_told_from_strangers():
    first = torch.eye(4)
    assert nt_xent(first, first, 0.05) < 1e-6 < 10 < nt_xent(first, first.roll(1, 0), 0.05)


def test_gradient_equals_finite_differences():
    first, second = (part.clone().requires_grad_() for part in views())
    assert torch.autograd.gradcheck(lambda a, b: nt_xent(a, b, 0.5), (first, second))


def test_half_precision_is_computed_in_float32():
    first, second = (part.float() for part in views())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert nt_xent(first, second, 0.07).item() == pytest.approx(10.7457011457, abs=1e-4)


@pytest.mark.parametrize(
    ("shapes", "temperature", "word"),
    [(((4, 3), (5, 3)), 0.5, "second"), (((1, 3), (1, 3)), 0.5, "negatives"), (((4, 3), (4, 3)), 0.0, "temperature")],
)
def test_refuses_what_has_no_meaning(shapes, temperature, word):
    with pytest.raises(ValueError, match=word):
        nt_xent(*(torch.randn(shape) for shape in shapes), temperature)
