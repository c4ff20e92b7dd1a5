from __future__ import annotations

import math

import pytest
import torch

from medkd.losses.classification import cross_entropy_loss


def test_value_by_hand_and_both_shapes_of_labels():
    logits = torch.tensor([[0.0, math.log(3.0)], [0.0, 0.0]])
    expected = (math.log(4 / 3) + math.log(2)) / 2
    for label in (torch.tensor([1, 0]), torch.tensor([[1], [0]]), torch.tensor([1, 0], dtype=torch.uint8)):
        assert cross_entropy_loss(logits, label).item() == pytest.approx(expected)


def test_smoothing_spreads_the_target():
    logits = torch.tensor([[2.0, 0.0]])
    label = torch.tensor([0])
    plain, other = (cross_entropy_loss(logits, torch.tensor([k])) for k in (0, 1))
    assert cross_entropy_loss(logits, label, label_smoothing=0.2).item() == pytest.approx(
        (0.9 * plain + 0.1 * other).item()
    )


def test_low_precision_logits_are_computed_in_float32():
    assert (
        cross_entropy_loss(torch.randn(4, 2, dtype=torch.bfloat16), torch.tensor([0, 1, 0, 1])).dtype == torch.float32
    )


@pytest.mark.parametrize(("logits", "label"), [((4, 2, 8, 8), (4,)), ((4, 2), (3,)), ((4, 2), (4, 2))])
def test_shapes_that_do_not_match_are_refused(logits, label):
    with pytest.raises(ValueError, match=r"\(B, K\)"):
        cross_entropy_loss(torch.zeros(logits), torch.zeros(label, dtype=torch.long))
