"""Order, position and randomness of streams."""

from __future__ import annotations

from collections import Counter
from itertools import islice

import pytest
import torch
from engine import toy
from monai.data import Dataset

from medkd.data import Stream, Streams
from medkd.errors import ConfigError
from medkd.methods.mean_teacher import MeanTeacher


def names(size: int, stream: str = "a") -> Dataset:
    return Dataset([{"case": f"{stream}{k}"} for k in range(size)])


def test_every_item_is_drawn_once_per_round_even_from_a_stream_shorter_than_a_batch():
    streams = Streams(length_of="b", a=Stream(names(3), 4), b=Stream(names(8), 2))
    drawn = [case for batch in islice(streams, 6) for case in batch["a"]["case"]]
    assert Counter(drawn) == {"a0": 8, "a1": 8, "a2": 8}
    assert all(set(drawn[k : k + 3]) == {"a0", "a1", "a2"} for k in range(0, 24, 3))


def test_rounds_are_shuffled_differently():
    streams = Streams(length_of="a", a=Stream(names(8), 8))
    rounds = [batch["a"]["case"] for batch in islice(streams, 3)]
    assert rounds[0] != rounds[1] != rounds[2]


def flatten(batches):
    return [
        (name, list(part["case"]), torch.as_tensor(part["image"])) for batch in batches for name, part in batch.items()
    ]


@pytest.mark.parametrize("workers", [0, 2])
def test_going_on_from_any_position_gives_the_same_batches(workers):
    whole = flatten(islice(toy.streams(MeanTeacher), 7))
    later = toy.streams(MeanTeacher, workers=workers)
    later.load_state_dict({"position": 3})
    rest = flatten(islice(later, 4))
    for a, b in zip(whole[6:], rest, strict=True):
        assert a[:2] == b[:2]
        assert torch.equal(a[2], b[2])


def test_the_position_counts_what_was_handed_out():
    streams = toy.streams(MeanTeacher)
    iterator = iter(streams)
    for _ in range(3):
        next(iterator)
    assert streams.state_dict() == {"position": 3}


def test_set_epoch_goes_to_its_first_batch():
    streams = toy.streams(MeanTeacher)
    streams.set_epoch(2)
    assert streams.position == 2 * len(streams)


def test_seeds_change_order_and_noise():
    a, b = (flatten(islice(toy.streams(MeanTeacher, seed=seed), 4)) for seed in (0, 1))
    assert [x[1] for x in a] != [x[1] for x in b]


def test_no_shuffle_keeps_the_order():
    streams = Streams(length_of="a", a=Stream(names(4), 2, shuffle=False))
    assert [batch["a"]["case"] for batch in islice(streams, 3)] == [["a0", "a1"], ["a2", "a3"], ["a0", "a1"]]


def test_bad_streams_are_refused():
    with pytest.raises(ConfigError, match="empty"):
        Stream(names(0), 2)
    with pytest.raises(ConfigError, match="batch_size"):
        Stream(names(2), 0)
    with pytest.raises(ConfigError, match="unlabelled"):
        Streams(length_of="unlabelled", a=Stream(names(2), 1))
