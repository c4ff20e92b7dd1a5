"""Named streams of training items, zipped into one batch, with an exact position.

Everything random is a function of (seed, stream, round, index): a batch does not depend on the number of workers,
on what was drawn before, or on where a run was interrupted.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Iterator, Mapping, Sized
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from monai.data.utils import list_data_collate
from monai.transforms import Randomizable
from torch.utils.data import DataLoader, Dataset, Sampler

from medkd.errors import ConfigError

Key = tuple[int, int]  # (round over the dataset, index in it)


class Stream:
    """One source of training items: a map-style dataset and how to draw batches from it.

    Items flow on over batches and epochs: each is drawn once per round over the dataset, in an order reshuffled every
    round, so that even a stream of three cases fills batches of eight.

    Args:
        dataset: map-style; random MONAI transforms in ``dataset.transform`` are reseeded for every item.
        batch_size: items per batch and process.
        shuffle: reshuffle every round.
        num_workers: loader processes.
        collate_fn: joins items; MONAI's by default.

    Raises:
        ConfigError: If the dataset is empty or ``batch_size`` is below 1.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        batch_size: int,
        *,
        shuffle: bool = True,
        num_workers: int = 0,
        collate_fn: Callable[[Any], Any] = list_data_collate,
    ) -> None:
        if not isinstance(dataset, Sized) or not len(dataset):
            raise ConfigError("stream", "its dataset is empty", "list at least one case for every stream")
        if batch_size < 1:
            raise ConfigError("batch_size", f"{batch_size} is below 1", "use 1 or more items per batch")
        self.dataset = dataset
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.num_workers = num_workers
        self.collate_fn = collate_fn

    def __len__(self) -> int:
        """Batches in one round over the dataset, rounded up."""
        size: int = len(self.dataset)
        return -(-size // (self.batch_size * _world()[1]))

    def batches(self, position: int, seed: int) -> Iterator[Any]:
        """Endless batches from batch number ``position`` on."""
        return iter(
            DataLoader(
                _SeededItems(self.dataset, seed),
                batch_sampler=_EndlessBatches(len(self.dataset), self.batch_size, position, seed, self.shuffle),
                num_workers=self.num_workers,
                collate_fn=self.collate_fn,
                pin_memory=torch.cuda.is_available(),
            )
        )


class Streams:
    """Named streams zipped into one batch dict: ``{"labeled": {...}, "unlabeled": {...}}``.

    Its whole state is one integer, the number of batches handed out; iteration goes on from there for ever, so worker
    processes keep prefetching over the end of an epoch. With several processes each one gets its own part of the
    joint batch.

    Args:
        length_of: the stream whose length is the epoch's; the others restart reshuffled.
        seed: seeds order and transforms.
        streams: name → :class:`Stream`.

    Raises:
        ConfigError: If ``length_of`` names no stream.
    """

    def __init__(self, *, length_of: str, seed: int = 0, **streams: Stream) -> None:
        if length_of not in streams:
            raise ConfigError("length_of", f"{length_of!r} is not a stream", f"use one of {sorted(streams)}")
        self.streams = streams
        self.length_of = length_of
        self.seed = seed
        self.position = 0

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the streams."""
        return tuple(self.streams)

    def __len__(self) -> int:
        """Batches in an epoch."""
        return len(self.streams[self.length_of])

    def seek(self, position: int) -> None:
        """Go to batch number ``position``, counted from the start of training."""
        self.position = position

    def set_epoch(self, epoch: int) -> None:
        """Go to the first batch of an epoch, counted from 0."""
        self.seek(epoch * len(self))

    def state_dict(self) -> dict[str, int]:
        """The position."""
        return {"position": self.position}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Restore the position."""
        self.seek(int(state["position"]))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yield batches from the current position on, without end."""
        sources = {
            name: stream.batches(self.position, self.seed ^ zlib.crc32(name.encode()))
            for name, stream in self.streams.items()
        }
        while True:
            batch = {name: next(source) for name, source in sources.items()}
            self.position += 1
            yield batch


class _EndlessBatches(Sampler[list[Key]]):
    """Keys of the batches from ``position`` on; this process's part of each joint batch."""

    def __init__(self, size: int, batch_size: int, position: int, seed: int, shuffle: bool) -> None:
        self.size, self.batch_size, self.position, self.seed, self.shuffle = size, batch_size, position, seed, shuffle

    def __iter__(self) -> Iterator[list[Key]]:
        rank, world = _world()
        joint = self.batch_size * world
        start = self.position * joint
        order_of = -1
        order = np.arange(self.size)
        while True:
            keys = []
            for item in range(start + rank, start + joint, world):
                round_, place = divmod(item, self.size)
                if self.shuffle and round_ != order_of:
                    order = np.random.default_rng([self.seed, round_]).permutation(self.size)
                    order_of = round_
                keys.append((round_, int(order[place])))
            start += joint
            yield keys


class _SeededItems(Dataset[Any]):
    """A dataset addressed by (round, index), every random number of an item drawn from (seed, round, index)."""

    def __init__(self, dataset: Dataset[Any], seed: int) -> None:
        self.dataset, self.seed = dataset, seed

    def __getitem__(self, key: Key) -> Any:
        round_, index = key
        seed = int(np.random.SeedSequence([self.seed, round_, index]).generate_state(1)[0])
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        transform = getattr(self.dataset, "transform", None)
        if isinstance(transform, Randomizable):
            transform.set_random_state(seed=seed)
        return self.dataset[index]


def _world() -> tuple[int, int]:
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1
