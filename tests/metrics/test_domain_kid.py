"""KID of translated volumes, as a key metric."""

from __future__ import annotations

import math

import torch
from monai.data import Dataset
from monai.handlers import IgniteMetricHandler

from medkd.metrics.domain_kid import NegativeKID
from medkd.metrics.synthesis import kid
from medkd.nets.random_features import RandomFeatures


def volumes(count: int, level: float, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [level + 0.2 * torch.randn(1, 16, 12, 3, generator=generator) for _ in range(count)]


def reference(level: float = 0.0) -> Dataset:
    return Dataset([{"image": volume} for volume in volumes(3, level, 0)])


def test_value_is_minus_the_kid_of_all_slices():
    metric, given = NegativeKID(reference()), volumes(2, 0.5, 1)
    metric(given[:1], given[:1])
    metric(given[1:], given[1:])
    features = RandomFeatures()

    def of(parts: list[torch.Tensor]) -> torch.Tensor:
        return torch.cat([features(part.permute(3, 0, 1, 2)) for part in parts])

    expected = -kid(of(given), of([item["image"] for item in reference().data]), resamples=2).value
    assert math.isclose(metric.aggregate().item(), expected, rel_tol=1e-4)


def test_translations_of_the_domain_score_higher_than_others():
    scores = []
    for level in (0.0, 0.3, 0.8):
        metric = NegativeKID(reference())
        metric(volumes(3, level, 5), None)
        scores.append(metric.aggregate().item())
    assert scores[0] > scores[1] > scores[2]
    assert abs(scores[0]) < 0.01


def test_reference_is_read_once_and_evenly():
    class Counted(Dataset):
        def __getitem__(self, index):
            read.append(index)
            return super().__getitem__(index)

    read: list[int] = []
    metric = NegativeKID(Counted([{"image": volume} for volume in volumes(9, 0.0, 0)]), max_volumes=3)
    for _ in range(2):
        metric.reset()
        metric(volumes(1, 0.0, 1), None)
        metric.aggregate()
    assert read == [0, 3, 6]


def test_nothing_to_compare_is_no_number():
    handler = IgniteMetricHandler(metric_fn=NegativeKID(Dataset([])), save_details=False)
    handler.reset()
    handler.update((volumes(1, 0.0, 1), volumes(1, 0.0, 1)))
    assert math.isnan(handler.compute())
