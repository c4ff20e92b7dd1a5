"""The stage between a trained generator and the classifier that uses its images: generate, judge, choose, write."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import Dataset

from medkd.data.synthetic_pool import write_pool

logger = logging.getLogger(__name__)

_AT_ONCE = 64
_SCORES = ("predicted", "confidence", "entropy", "distance")


class Judge(Protocol):
    """What judges generated images, such as ``medkd.methods.selective_augmentation.SelectiveAugmentation``."""

    classifier: nn.Module

    def fit(self, batches: Any) -> None:
        """Learn from real training images."""

    def score(self, image: torch.Tensor, label: torch.Tensor) -> Any:
        """Scores of generated images."""


class SyntheticPoolStage:
    """Fill a folder with generated images, their scores, and which of them were chosen.

    The same seed and networks give the same files, so a run that is resumed writes them again as they were.

    Args:
        folder: the pool's; see :mod:`medkd.data.synthetic_pool`.
        generator: (B, latent + K), noise and one-hot class → (B, 3, H, W) in [-1, 1].
        judge: scores images in [-1, 1].
        rule: its scores → class → positions of the chosen images.
        real: the real training images without augmentation: items with image (3, H, W) in [-1, 1] and label.
        names: of the classes.
        latent: length of the noise.
        per_class: candidates of each class.
        device: where to compute.
        seed: of the noise.
    """

    def __init__(
        self,
        folder: str | Path,
        generator: nn.Module,
        judge: Judge,
        rule: Callable[[Any], Mapping[int, torch.Tensor]],
        real: Dataset[Any],
        *,
        names: Sequence[str],
        latent: int,
        per_class: int = 500,
        device: str | torch.device = "cpu",
        seed: int = 0,
    ) -> None:
        self.folder = Path(folder)
        self.generator = generator
        self.judge = judge
        self.rule = rule
        self.real = real
        self.names = list(names)
        self.latent = latent
        self.per_class = per_class
        self.device = torch.device(device)
        self.seed = seed

    def run(self) -> Path:
        """Generate, judge, choose and write; returns the folder.

        Raises:
            InputError: If nothing of a class is chosen; the message gives the distribution of the scores.
        """
        self.judge.classifier.to(self.device)
        self.judge.fit(self._real_batches())
        image, label = self._generated()
        scores = self.judge.score(image.to(self.device), label)
        chosen = self.rule(scores)
        columns = {name: getattr(scores, name) for name in _SCORES}
        kept = [place for places in chosen.values() for place in places.tolist()]
        write_pool(self.folder, image, label, self.names, scores=columns, kept=kept)
        logger.info(
            "kept %s of %d generated images of each class in %s",
            ", ".join(f"{len(places)} {self.names[value]}" for value, places in chosen.items()),
            self.per_class,
            self.folder,
        )
        return self.folder

    def _real_batches(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        size: int = len(self.real)  # type: ignore[arg-type]
        for start in range(0, size, _AT_ONCE):
            items = [self.real[index] for index in range(start, min(start + _AT_ONCE, size))]
            image = torch.stack([torch.as_tensor(item["image"]).as_subclass(torch.Tensor).float() for item in items])
            yield image.to(self.device), torch.tensor([int(item["label"]) for item in items])

    @torch.no_grad()
    def _generated(self) -> tuple[torch.Tensor, torch.Tensor]:
        self.generator.to(self.device).eval()
        label = torch.arange(len(self.names)).repeat_interleave(self.per_class)
        noise = torch.randn(len(label), self.latent, generator=torch.Generator().manual_seed(self.seed))
        code = torch.cat([noise, functional.one_hot(label, len(self.names)).float()], dim=1)
        parts = [self.generator(part.to(self.device)).float().cpu() for part in code.split(_AT_ONCE)]
        return torch.cat(parts), label
