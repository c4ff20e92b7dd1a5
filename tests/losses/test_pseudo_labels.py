"""Pseudo labels and the losses on them: loops, hand-made cases, limits."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medkd.losses.pseudo_labels import (
    IGNORE,
    class_balanced_pseudo_labels,
    class_centroids,
    class_thresholds,
    masked_cross_entropy,
    prototype_weights,
    shot_pseudo_labels,
    symmetric_cross_entropy,
)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(st.integers(0, 2**20), st.integers(0, 60), st.integers(0, 20))
@settings(max_examples=60, deadline=None)
def test_without_ties_the_asked_share_of_each_class_exceeds_its_threshold(seed, n, twentieths):
    generator = torch.Generator().manual_seed(seed)
    confidence = (torch.randperm(1000, generator=generator)[:n] + 1).double() / 1001
    prediction = torch.randint(0, 3, (n,), generator=generator)
    thresholds = class_thresholds(confidence, prediction, classes=4, portion=twentieths / 20)
    for index in range(4):
        own = confidence[prediction == index]
        assert int((own > thresholds[index]).sum()) == twentieths * len(own) // 20
    assert thresholds[3] == 1


def test_class_balanced_labels_take_the_largest_factor_over_the_threshold():
    probabilities = torch.tensor([[0.6, 0.3, 0.1], [0.5, 0.4, 0.1], [0.4, 0.3, 0.3], [0.9, 0.05, 0.05]])
    thresholds = torch.tensor([0.8, 0.35, 0.5])
    # 0.6/0.8, 0.3/0.35 < 1;  0.4/0.35 > 1;  none;  0.9/0.8 > 1
    assert class_balanced_pseudo_labels(probabilities, thresholds).tolist() == [IGNORE, 1, IGNORE, 0]


def test_class_balanced_labels_equal_a_loop_on_maps():
    probabilities = draw(2, 3, 4, 5).softmax(1)
    thresholds = torch.tensor([0.5, 0.3, 0.4], dtype=torch.float64)
    labels = class_balanced_pseudo_labels(probabilities, thresholds)
    assert labels.shape == (2, 4, 5)
    assert labels.dtype == torch.int64
    for row, label in zip(probabilities.movedim(1, -1).reshape(-1, 3).tolist(), labels.flatten().tolist(), strict=True):
        factors = [p / t for p, t in zip(row, thresholds.tolist(), strict=True)]
        best = max(range(3), key=factors.__getitem__)
        assert label == (best if factors[best] > 1 else IGNORE)


def test_an_equal_threshold_keeps_the_confident_predictions():
    probabilities = draw(1, 4, 50, seed=3).softmax(1)
    labels = class_balanced_pseudo_labels(probabilities, torch.full((4,), 0.5))
    confidence, prediction = probabilities.max(dim=1)
    assert torch.equal(labels, torch.where(confidence > 0.5, prediction, IGNORE))


def test_masked_cross_entropy_equals_a_loop():
    logits, label = draw(2, 3, 4), torch.tensor([[0, IGNORE, 2, 1], [IGNORE, 1, 1, 0]])
    weight = draw(2, 4, seed=1).abs()
    total, weighted = 0.0, 0.0
    for n in range(2):
        for i in range(4):
            if label[n, i] != IGNORE:
                values = logits[n, :, i].tolist()
                loss = math.log(sum(map(math.exp, values))) - values[label[n, i]]
                total, weighted = total + loss, weighted + loss * weight[n, i].item()
    assert masked_cross_entropy(logits, label).item() == pytest.approx(total / 6, abs=1e-12)
    assert masked_cross_entropy(logits, label[:, None], weight=weight[:, None]).item() == pytest.approx(weighted / 6)
    assert masked_cross_entropy(logits, label, weight=weight).item() == pytest.approx(weighted / 6, abs=1e-12)


def test_a_weight_per_image_scales_that_image_and_the_loss_scales_with_it():
    logits, label = draw(2, 3, 4), torch.randint(0, 3, (2, 4), generator=torch.Generator().manual_seed(0))
    whole = masked_cross_entropy(logits, label)
    assert masked_cross_entropy(logits, label, weight=torch.full((2,), 0.1)).item() == pytest.approx(0.1 * whole.item())
    only_first = masked_cross_entropy(logits, label, weight=torch.tensor([1.0, 0.0]))
    assert only_first.item() == pytest.approx(masked_cross_entropy(logits[:1], label[:1]).item() / 2)


@pytest.mark.parametrize("loss", [masked_cross_entropy, symmetric_cross_entropy])
def test_without_labels_the_loss_and_its_gradient_are_zero(loss):
    logits = draw(2, 3, 4).requires_grad_()
    value = loss(logits, torch.full((2, 4), IGNORE))
    value.backward()
    assert value.item() == 0
    assert logits.grad.abs().sum() == 0


def test_symmetric_cross_entropy_equals_a_loop():
    logits, label = draw(2, 3, 4), torch.tensor([[0, IGNORE, 2, 1], [IGNORE, 1, 1, 0]])
    total = 0.0
    for n in range(2):
        for i in range(4):
            if label[n, i] == IGNORE:
                continue
            exponentials = [math.exp(value) for value in logits[n, :, i].tolist()]
            p = [value / sum(exponentials) for value in exponentials]
            one_hot = [1.0 if c == label[n, i] else 1e-4 for c in range(3)]
            total += 0.1 * -math.log(p[label[n, i]]) - sum(a * math.log(b) for a, b in zip(p, one_hot, strict=True))
    assert symmetric_cross_entropy(logits, label).item() == pytest.approx(total / 6, abs=1e-12)


def test_the_reverse_term_bounds_what_a_wrong_label_costs():
    logits = torch.tensor([[-1e3, 1e3]])
    reverse = symmetric_cross_entropy(logits, torch.tensor([0]), cross_weight=0.0)
    assert reverse.item() == pytest.approx(-math.log(1e-4), rel=1e-5)
    assert symmetric_cross_entropy(logits, torch.tensor([1])).item() == 0
    cross = symmetric_cross_entropy(logits, torch.tensor([0]), cross_weight=1.0, reverse_weight=0.0)
    assert cross.item() == pytest.approx(masked_cross_entropy(logits, torch.tensor([0])).item())


@pytest.mark.parametrize("loss", [masked_cross_entropy, symmetric_cross_entropy])
def test_gradients_agree_with_finite_differences_and_half_precision_is_computed_in_float32(loss):
    logits, label = draw(2, 3, 2), torch.tensor([[0, IGNORE], [2, 1]])
    assert torch.autograd.gradcheck(lambda x: loss(x, label), logits.clone().requires_grad_())
    halves = logits.bfloat16()
    assert loss(halves, label).dtype == torch.float32
    assert loss(halves, label).item() == pytest.approx(loss(halves.double(), label).item(), rel=1e-5)


def test_centroids_equal_a_loop_and_a_class_without_weight_is_zero():
    features, weights = draw(2, 3, 4), draw(2, 3, 4, seed=1).softmax(1)
    weights[:, 2] = 0
    centroids, totals = class_centroids(features, weights)
    for k in range(3):
        shares = [(weights[n, k, i].item(), features[n, :, i]) for n in range(2) for i in range(4)]
        total = sum(share for share, _ in shares)
        assert totals[k].item() == pytest.approx(total, abs=1e-12)
        expected = sum(share * feature for share, feature in shares) / total if total else torch.zeros(3)
        assert centroids[k].tolist() == pytest.approx(expected.tolist(), abs=1e-12)


def test_prototype_weights_equal_a_loop():
    features, prototypes = draw(2, 3, 2, 2), draw(4, 3, seed=1)
    weights = prototype_weights(features, prototypes, tau=0.7)
    assert weights.shape == (2, 4, 2, 2)
    for n, i, j in torch.cartesian_prod(torch.arange(2), torch.arange(2), torch.arange(2)).tolist():
        distances = [math.dist(features[n, :, i, j].tolist(), prototype) for prototype in prototypes.tolist()]
        exponentials = [math.exp(-(d - min(distances)) / 0.7) for d in distances]
        expected = [value / sum(exponentials) for value in exponentials]
        assert weights[n, :, i, j].tolist() == pytest.approx(expected, abs=1e-12)


def test_features_at_a_prototype_choose_it_and_far_ones_do_not_overflow():
    prototypes = torch.eye(3) * 1e4
    weights = prototype_weights(prototypes, prototypes)
    assert torch.equal(weights, torch.eye(3))
    assert torch.allclose(prototype_weights(torch.zeros(1, 3), prototypes), torch.full((1, 3), 1 / 3))


def test_gradients_of_prototype_weights_agree_with_finite_differences():
    features, prototypes = draw(2, 3, 2).requires_grad_(), draw(2, 3, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(prototype_weights, (features, prototypes))
    assert torch.autograd.gradcheck(
        lambda f, p: class_centroids(f, p.softmax(0).T.expand(2, 3, 2))[0], (features, prototypes)
    )


def shot_by_loops(features: list[list[float]], probabilities: list[list[float]], allowed: list[int]) -> list[int]:
    rows = []
    for feature in features:
        extended = [*feature, 1.0]
        rows.append([value / math.hypot(*extended) for value in extended])
    weights = probabilities
    labels: list[int] = []
    for _ in range(2):
        centroids = {}
        for k in allowed:
            total = sum(weight[k] for weight in weights)
            if total > 0:
                columns = zip(*rows, strict=True)
                centroids[k] = [sum(w[k] * v for w, v in zip(weights, c, strict=True)) / total for c in columns]
        labels = []
        for row in rows:
            cosine = {
                k: sum(a * b for a, b in zip(row, centroid, strict=True)) / math.hypot(*centroid)
                for k, centroid in centroids.items()
            }
            labels.append(max(cosine, key=cosine.__getitem__))
        weights = [[1.0 if k == label else 0.0 for k in range(len(probabilities[0]))] for label in labels]
    return labels


@pytest.mark.parametrize("seed", range(5))
def test_shot_labels_equal_a_loop(seed):
    features, probabilities = draw(40, 4, seed=seed), (2 * draw(40, 3, seed=seed + 50)).softmax(1)
    expected = shot_by_loops(features.tolist(), probabilities.tolist(), [0, 1, 2])
    assert shot_pseudo_labels(features, probabilities).tolist() == expected


def test_shot_corrects_labels_by_the_clusters_of_features():
    truth = torch.arange(60) % 3
    features = 5 * torch.eye(3)[truth] + 0.3 * draw(60, 3).float()
    probabilities = (0.2 * torch.eye(3)[truth] + 0.5 * draw(60, 3, seed=1).float()).softmax(1)
    assert (probabilities.argmax(1) == truth).float().mean() < 0.7
    assert torch.equal(shot_pseudo_labels(features, probabilities), truth)


def test_shot_leaves_out_classes_predicted_too_rarely():
    features, probabilities = draw(20, 3), torch.eye(3, dtype=torch.float64)[torch.tensor([0] * 12 + [1] * 7 + [2])]
    labels = shot_pseudo_labels(features, probabilities, minimum_count=1)
    assert set(labels.tolist()) <= {0, 1}
    assert labels.tolist() == shot_by_loops(features.tolist(), probabilities.tolist(), [0, 1])
    with pytest.raises(ValueError, match="no class is predicted more than 12 times in 20"):
        shot_pseudo_labels(features, probabilities, minimum_count=12)


def test_wrong_shapes_are_named():
    maps = torch.zeros(2, 3, 4)
    with pytest.raises(ValueError, match=r"\(2, 3, 4\).*\(4,\)"):
        class_balanced_pseudo_labels(maps, torch.ones(4))
    with pytest.raises(ValueError, match="> 0"):
        class_balanced_pseudo_labels(maps, torch.tensor([1.0, 0.0, 1.0]))
    with pytest.raises(ValueError, match=r"\(3,\) and \(4,\)"):
        class_thresholds(torch.ones(3), torch.ones(4), classes=2, portion=0.5)
    with pytest.raises(ValueError, match="portion"):
        class_thresholds(torch.ones(3), torch.ones(3), classes=2, portion=1.5)
    with pytest.raises(ValueError, match=r"\(2, 3, 4\).*\(2, 5\)"):
        masked_cross_entropy(maps, torch.zeros(2, 5))
    with pytest.raises(ValueError, match=r"weight.*\(2, 4\).*\(3,\)"):
        masked_cross_entropy(maps, torch.zeros(2, 4), weight=torch.ones(3))
    with pytest.raises(ValueError, match=r"\(2, 3, 4\).*\(2, 3, 5\)"):
        class_centroids(maps, torch.zeros(2, 3, 5))
    with pytest.raises(ValueError, match=r"\(2, 3, 4\).*\(3, 4\)"):
        prototype_weights(maps, torch.zeros(3, 4))
    with pytest.raises(ValueError, match="tau"):
        prototype_weights(maps, torch.zeros(3, 3), tau=0.0)
    with pytest.raises(ValueError, match=r"\(5, 2\).*\(4, 3\)"):
        shot_pseudo_labels(torch.zeros(5, 2), torch.zeros(4, 3))
