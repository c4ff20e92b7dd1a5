"""The memory of recent images."""

from __future__ import annotations

import pytest
import torch

from medkd.nets.recent_images import RecentImages


def test_the_last_images_are_kept_in_order():
    recent = RecentImages(3)
    images = torch.arange(5.0).reshape(5, 1, 1, 1)
    recent.add(images[:2])
    recent.add(images[2:])
    assert [part.flatten().tolist() for part in recent.batches(2, torch.device("cpu"))] == [[2, 3], [4]]
    assert len(recent) == 3


def test_kept_images_do_not_change_with_the_batch_they_came_from():
    recent = RecentImages(2)
    image = torch.zeros(1, 1, 2, 2)
    recent.add(image)
    image += 1
    assert recent.batches(1, image.device)[0].sum() == 0


def test_they_survive_in_the_state_dict():
    recent, restored = RecentImages(4), RecentImages(4)
    assert RecentImages(4).state_dict()["_extra_state"].numel() == 0
    recent.add(torch.randn(3, 1, 2, 2))
    restored.load_state_dict(recent.state_dict())
    assert torch.equal(restored.get_extra_state(), recent.get_extra_state())


def test_an_empty_memory_has_no_batches():
    assert RecentImages(4).batches(2, torch.device("cpu")) == []


def test_other_shapes_and_sizes_are_refused():
    with pytest.raises(ValueError, match="at least 1"):
        RecentImages(0)
    recent = RecentImages(4)
    recent.add(torch.zeros(1, 1, 2, 2))
    with pytest.raises(ValueError, match="as before"):
        recent.add(torch.zeros(1, 1, 3, 3))
