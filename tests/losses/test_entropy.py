"""Entropies and self-information against loops, reference values and their limits."""

from __future__ import annotations

import math

import pytest
import torch

from medkd.losses import entropy
from medkd.losses.consistency import self_information_consistency


@pytest.fixture
def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    k = torch.arange(160, dtype=torch.float64)
    return (2 * torch.sin(0.37 * k)).reshape(2, 5, 4, 4), (2 * torch.cos(0.23 * k)).reshape(2, 5, 4, 4)


def elements(logits: torch.Tensor) -> list[list[float]]:
    """Class probabilities of each element, by hand."""
    rows = logits.movedim(1, -1).reshape(-1, logits.shape[1]).tolist()
    exponentials = [[math.exp(value) for value in row] for row in rows]
    return [[value / sum(row) for value in row] for row in exponentials]


def entropies(logits: torch.Tensor) -> list[float]:
    return [-sum(p * math.log(p) for p in row) for row in elements(logits)]


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def test_self_information_consistency_equals_the_reference(inputs):
    assert self_information_consistency(*inputs).item() == pytest.approx(0.2152082158, abs=1e-10)


def test_self_information_consistency_equals_a_loop_and_is_no_difference_of_entropies(inputs):
    a, b = inputs
    terms = [
        sum((p * math.log2(p + 1e-8) - q * math.log2(q + 1e-8)) ** 2 for p, q in zip(row, other, strict=True))
        for row, other in zip(elements(a), elements(b), strict=True)
    ]
    assert self_information_consistency(a, b).item() == pytest.approx(mean(terms), abs=1e-12)
    permuted = a.flip(1)  # the same entropies, other classes
    assert self_information_consistency(a, permuted).item() > 0.1
    assert self_information_consistency(a, a).item() == 0


def test_self_information_consistency_stops_the_gradient_at_the_target(inputs):
    a, b = (tensor.clone().requires_grad_() for tensor in inputs)
    self_information_consistency(a, b).backward()
    assert b.grad is None
    with pytest.raises(ValueError, match=r"\(2, 5, 4, 4\).*\(2, 4, 4, 4\)"):
        self_information_consistency(a, b[:, :4])


def test_normalized_entropy_equals_the_reference(inputs):
    a, _ = inputs
    # The reference adds 1e-6 inside the logarithm, which lowers it by 1e-6 × classes / log(classes).
    assert entropy.normalized_entropy(a).item() == pytest.approx(0.8800635053 + 5e-6 / math.log(5), abs=1e-8)


def test_entropies_equal_loops(inputs):
    a, _ = inputs
    values = entropies(a)
    mapped = entropy.entropy_map(a.softmax(1))
    assert mapped.shape == (2, 4, 4)
    assert mapped.flatten().tolist() == pytest.approx(values, abs=1e-12)
    assert entropy.mean_entropy(a).item() == pytest.approx(mean(values), abs=1e-12)
    assert entropy.normalized_entropy(a).item() == pytest.approx(mean(values) / math.log(5), abs=1e-12)
    charbonnier = [((value / math.log(5)) ** 2 + 1e-8) ** 1.7 for value in values]
    assert entropy.charbonnier_entropy(a, 1.7).item() == pytest.approx(mean(charbonnier), abs=1e-12)
    assert entropy.charbonnier_entropy(a).item() == pytest.approx(
        mean([((value / math.log(5)) ** 2 + 1e-8) ** 2 for value in values]), abs=1e-12
    )
    columns = [mean(list(column)) for column in zip(*elements(a), strict=True)]
    assert entropy.diversity(a).item() == pytest.approx(-sum(p * math.log(p) for p in columns), abs=1e-12)
    divergences = [sum(math.log(0.2 / p) / 5 for p in row) for row in elements(a)]
    assert entropy.uniform_divergence(a).item() == pytest.approx(mean(divergences), abs=1e-12)


def test_self_information_sums_to_the_normalized_entropy(inputs):
    a, _ = inputs
    information = entropy.weighted_self_information(a)
    assert information.shape == a.shape
    first = elements(a)[0]
    expected = [-p * math.log2(p) / math.log2(5) for p in first]
    assert information[0, :, 0, 0].tolist() == pytest.approx(expected, abs=1e-12)
    assert information.sum(dim=1).mean().item() == pytest.approx(entropy.normalized_entropy(a).item(), abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_limits(dtype):
    unsure = torch.zeros(2, 3, 4, dtype=dtype)
    sure = torch.tensor([200.0, -200.0, 0.0], dtype=dtype).reshape(1, 3, 1).repeat(2, 1, 4)
    assert entropy.mean_entropy(unsure).item() == pytest.approx(math.log(3))
    assert entropy.normalized_entropy(unsure).item() == pytest.approx(1.0)
    assert entropy.diversity(unsure).item() == pytest.approx(math.log(3))
    assert entropy.uniform_divergence(unsure).item() == pytest.approx(0.0, abs=1e-6)
    assert entropy.charbonnier_entropy(unsure).item() == pytest.approx(1.0, abs=1e-6)
    for value in (entropy.mean_entropy(sure), entropy.diversity(sure)):
        assert value.item() == pytest.approx(0.0, abs=1e-7)
    assert entropy.charbonnier_entropy(sure).item() == pytest.approx(1e-16, abs=1e-15)
    different = torch.stack([sure[0], sure[0].roll(1, dims=0)])  # each sure, of different classes
    assert entropy.mean_entropy(different).item() == pytest.approx(0.0, abs=1e-7)
    assert entropy.diversity(different).item() == pytest.approx(math.log(2))


def agreement_with_fixed_logits(logits: torch.Tensor) -> torch.Tensor:
    target = torch.sin(torch.arange(logits.numel())).reshape(logits.shape).to(logits)
    return self_information_consistency(logits, target)


LOSSES = [
    entropy.mean_entropy,
    entropy.normalized_entropy,
    entropy.charbonnier_entropy,
    entropy.diversity,
    entropy.uniform_divergence,
    lambda logits: entropy.weighted_self_information(logits).square().sum(),
    agreement_with_fixed_logits,
]


@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_agree_with_finite_differences_and_stay_finite_where_probabilities_underflow(loss, inputs):
    assert torch.autograd.gradcheck(loss, inputs[0][:, :3, :2, :1].clone().requires_grad_())
    sure = torch.tensor([[300.0, 0.0, -300.0]] * 2, requires_grad=True)
    loss(sure).backward()
    assert torch.isfinite(sure.grad).all()


@pytest.mark.parametrize("loss", LOSSES)
def test_half_precision_is_computed_in_float32(loss, inputs):
    logits = inputs[0].bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(logits)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(loss(logits.double()).item(), rel=1e-5)


def test_confidence_is_that_of_the_most_likely_class_and_shares_are_per_image():
    probabilities = torch.tensor([[[0.97, 0.5], [0.03, 0.5]], [[0.2, 0.01], [0.8, 0.99]]])  # (B, K, S)
    assert entropy.confidence(probabilities).tolist() == [pytest.approx([0.97, 0.5]), pytest.approx([0.8, 0.99])]
    assert entropy.confident_share(probabilities, 0.968).tolist() == [0.5, 0.5]
    assert entropy.confident_share(probabilities, 0.8).tolist() == [0.5, 1.0]  # the threshold itself is sure enough
    assert entropy.confident_share(probabilities.requires_grad_(), 0.0).requires_grad is False


@pytest.mark.parametrize("function", [*LOSSES[:6], entropy.entropy_map, entropy.confidence])
@pytest.mark.parametrize("shape", [(4,), (2, 1, 3)])
def test_tensors_without_classes_are_refused(function, shape):
    with pytest.raises(ValueError, match=f"{shape}".replace("(", r"\(").replace(")", r"\)")):
        function(torch.zeros(shape))


def test_charbonnier_needs_a_positive_exponent():
    with pytest.raises(ValueError, match="eta"):
        entropy.charbonnier_entropy(torch.zeros(1, 2), 0.0)
