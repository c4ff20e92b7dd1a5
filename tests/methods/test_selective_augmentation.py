"""Which generated images are chosen: scores by hand, counts, order, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from medkd.errors import ConfigError, InputError
from medkd.methods.selective_augmentation import Scores, SelectiveAugmentation, select

# From the formula of a published program, in float64: mean square between two rows normalized to length 1, 80 columns.
DISTANCE_OF_ROWS = 0.0315809267


class Classifier(nn.Module):
    def __init__(self, dropout: float = 0.5) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.drop_channels = nn.Dropout2d(dropout)
        self.second = nn.Conv2d(6, 8, 3, stride=2, padding=1)
        self.drop = nn.Dropout(dropout)
        self.head = nn.Linear(8, 2)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        features = self.second(self.drop_channels(torch.relu(self.norm(self.first(image)))))
        return self.head(self.drop(torch.relu(features).mean(dim=(2, 3))))


def images(count: int, *, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    label = torch.arange(count) % 2
    return torch.randn(count, 3, 8, 8, generator=generator) + label[:, None, None, None], label


def fitted(**options: object) -> SelectiveAugmentation:
    judge = SelectiveAugmentation(Classifier(), ["first", "second"], **{"passes": 5, **options})
    real, label = images(12, seed=1)
    judge.fit([(real[:5], label[:5]), (real[5:], label[5:])])
    return judge


def test_the_distance_is_that_of_the_formula_by_loops():
    judge = fitted()
    image, label = images(4, seed=2)
    real, classes = images(12, seed=1)
    expected = torch.zeros(4)
    for name, feature in judge._features(image).items():
        reference = judge._features(real)[name]
        for index in range(4):
            centroid = reference[classes == label[index]].mean(dim=0)
            height, width = feature.shape[2:]
            for y in range(height):
                for x in range(width):
                    squared = (feature[index, :, y, x] - centroid[:, y, x]).square().sum()
                    expected[index] += squared / (height * width)
            torch.testing.assert_close(feature[index].norm(dim=0), torch.ones(height, width))
    torch.testing.assert_close(judge.score(image, label).distance, expected, atol=1e-5, rtol=1e-5)


def test_the_distance_of_two_vectors_is_the_published_value():
    rows = (2 * torch.sin(0.37 * torch.arange(160, dtype=torch.float64))).reshape(2, 80).float()
    network = nn.Sequential(nn.Identity(), nn.Dropout(0.5))
    judge = SelectiveAugmentation(network, ["0"], passes=1)
    judge.fit([(rows[:1], torch.zeros(1, dtype=torch.int64))])
    distance = judge.score(rows[1:], torch.zeros(1, dtype=torch.int64)).distance
    assert distance.item() / 80 == pytest.approx(DISTANCE_OF_ROWS, abs=1e-7)


def test_confidence_is_the_mean_over_thinned_networks_and_entropy_that_of_the_mean():
    judge = fitted(passes=400)
    image, label = images(6, seed=3)
    found = judge.score(image, label)
    network = judge.classifier.eval()
    network.drop.train()
    network.drop_channels.train()
    torch.manual_seed(0)
    with torch.no_grad():
        usual = torch.stack([network(image).softmax(dim=1) for _ in range(400)]).mean(dim=0)
    torch.testing.assert_close(found.confidence, usual[torch.arange(6), label], atol=0.05, rtol=0)
    entropy = -(usual * usual.log()).sum(dim=1)
    torch.testing.assert_close(found.entropy, entropy, atol=0.05, rtol=0)
    assert found.confidence.std() > 0


def test_scores_depend_neither_on_the_order_nor_on_the_batch_size_nor_on_global_randomness():
    image, label = images(9, seed=4)
    first = fitted(batch_size=9).score(image, label)
    torch.manual_seed(99)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(5))
    second = fitted(batch_size=2).score(image[order], label[order])
    for name in ("label", "predicted", "confidence", "entropy", "distance"):
        torch.testing.assert_close(getattr(second, name), getattr(first, name)[order], atol=1e-6, rtol=1e-5)


def test_the_classifier_is_left_as_it_was():
    judge = fitted()
    judge.classifier.train()
    judge.classifier.norm.eval()
    before = {name: value.clone() for name, value in judge.classifier.state_dict().items()}
    judge.score(*images(4))
    assert all(torch.equal(value, before[name]) for name, value in judge.classifier.state_dict().items())
    assert (judge.classifier.training, judge.classifier.norm.training) == (True, False)
    assert not any(module._forward_hooks for module in judge.classifier.modules())


def test_centroids_come_from_what_was_fitted_only():
    judge = fitted()
    before = {name: value.clone() for name, value in judge.centroids[0].items()}
    judge.score(*images(20, seed=6))
    assert all(torch.equal(value, judge.centroids[0][name]) for name, value in before.items())


def scores(count: int, seed: int) -> Scores:
    generator = torch.Generator().manual_seed(seed)
    label = torch.randint(0, 2, (count,), generator=generator)
    label[:2] = torch.tensor([0, 1])
    predicted = torch.where(torch.rand(count, generator=generator) < 0.8, label, 1 - label)
    predicted[:2] = label[:2]
    draw = [torch.rand(count, generator=generator) for _ in range(3)]
    return Scores(label, predicted, *draw)


def by_order(found: Scores, order: torch.Tensor) -> Scores:
    columns = (found.label, found.predicted, found.confidence, found.entropy, found.distance)
    return Scores(*(column[order] for column in columns))


@settings(max_examples=40, deadline=None)
@given(count=st.integers(2, 40), seed=st.integers(0, 999), keep=st.floats(0.05, 1.0), both=st.booleans())
def test_counts_are_exact_and_the_choice_is_that_of_any_order(count, seed, keep, both):
    found = scores(count, seed)
    rules = ("confidence", "distance") if both else ("distance",)
    chosen = select(found, keep=keep, confident=1.0, rules=rules)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    shuffled = select(by_order(found, order), keep=keep, confident=1.0, rules=rules)
    for value in (0, 1):
        own = found.label == value
        eligible = int((own & (found.predicted == value)).sum()) if both else int(own.sum())
        assert len(chosen[value]) == min(math.ceil(keep * int(own.sum())), eligible)
        assert order[shuffled[value]].tolist() == chosen[value].tolist()


def test_both_rules_first_drop_the_doubtful_and_then_keep_the_nearest():
    found = Scores(
        label=torch.zeros(6, dtype=torch.int64),
        predicted=torch.tensor([0, 0, 0, 0, 1, 0]),
        confidence=torch.full((6,), 0.8),
        entropy=torch.tensor([0.5, 0.1, 0.2, 0.3, 0.0, 0.6]),
        distance=torch.tensor([0.1, 0.9, 0.3, 0.2, 0.0, 0.05]),
    )
    assert select(found, keep=1 / 3, confident=0.5)[0].tolist() == [3, 2]
    assert select(found, keep=1 / 3, confident=0.5, rules=["confidence"])[0].tolist() == [1, 2]
    assert select(found, keep=1 / 3, confident=0.5, rules=["distance"])[0].tolist() == [4, 5]


def test_a_class_that_nothing_passes_is_refused_with_its_scores():
    found = scores(8, 0)
    nothing = Scores(found.label, 1 - found.label, found.confidence, found.entropy, found.distance)
    with pytest.raises(InputError, match=r"class 0: .* none of the \d+ .*confidence .*entropy .*distance"):
        select(nothing)


def test_bad_arguments_are_named():
    with pytest.raises(ConfigError, match="no dropout"):
        SelectiveAugmentation(Classifier(dropout=0.0), ["first"])
    with pytest.raises(ConfigError, match="none is named"):
        SelectiveAugmentation(Classifier(), [])
    with pytest.raises(ValueError, match="no module is named 'first_layer'"):
        SelectiveAugmentation(Classifier(), ["first_layer"])
    with pytest.raises(ConfigError, match="keep"):
        select(scores(4, 0), keep=0.6, confident=0.5)
    with pytest.raises(ConfigError, match="rules"):
        select(scores(4, 0), rules=["random"])
    judge = SelectiveAugmentation(Classifier(), ["first"])
    judge.fit([(torch.zeros(2, 3, 8, 8), torch.zeros(2, dtype=torch.int64))])
    with pytest.raises(InputError, match=r"\[1\]"):
        judge.score(*images(2))
    with pytest.raises(InputError, match="no real training image"):
        fitted().fit([])
