"""How near translated volumes come to a domain, while a translator is trained."""

from __future__ import annotations

from collections.abc import Sequence, Sized
from typing import Any

import torch
from monai.metrics import CumulativeIterationMetric
from torch import nn
from torch.utils.data import Dataset

from medkd.metrics.synthesis import kid
from medkd.nets.random_features import RandomFeatures

_BATCH = 64  # slices at a time


class NegativeKID(CumulativeIterationMetric):
    """Minus the kernel distance (KID) between translated slices and real slices of the target domain; 0 is best.

    Negative, so that larger is better, as handlers expect of a key metric. For
    ``monai.handlers.IgniteMetricHandler(metric_fn=NegativeKID(…))``.

    Args:
        reference: items with real target volumes ``image`` (C, X, Y, Z), scaled as the translations are; read once,
            when first needed. Slices lie across the last axis.
        max_volumes: at most so many of them, evenly spread.
        features: (B, C, X, Y) → (B, D); by default :class:`RandomFeatures`, which need no download. Their values rank
            translators of one task and compare with no published KID.
    """

    def __init__(self, reference: Dataset[Any], *, max_volumes: int = 16, features: nn.Module | None = None) -> None:
        super().__init__()
        self.reference = reference
        self.max_volumes = max_volumes
        self.features = features
        self._real: torch.Tensor | None = None

    def _compute_tensor(self, y_pred: torch.Tensor, y: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor:
        """Features (Z, D) of one translated volume (1, C, X, Y, Z); ``y`` is not used."""
        return self._of(y_pred[0])

    def aggregate(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Minus the KID of all volumes seen; NaN where there are fewer than two slices on a side."""
        translated = self.get_buffer()
        if self._real is None:
            self._real = self._real_features()
        if translated is None or min(len(translated), len(self._real)) < 2:
            return torch.tensor(float("nan"))
        return torch.tensor(-kid(translated, self._real, resamples=2).value)

    def _real_features(self) -> torch.Tensor:
        count = len(self.reference) if isinstance(self.reference, Sized) else 0
        wanted = min(count, self.max_volumes)
        volumes = [self.reference[place * count // wanted]["image"] for place in range(wanted)]
        return torch.cat([self._of(volume) for volume in volumes]) if volumes else torch.empty(0, 0)

    @torch.no_grad()
    def _of(self, volume: torch.Tensor) -> torch.Tensor:
        plain = torch.as_tensor(volume).as_subclass(torch.Tensor)
        if self.features is None:
            self.features = RandomFeatures(channels=len(plain))
        self.features.to(plain.device)
        slices: Sequence[torch.Tensor] = plain.permute(3, 0, 1, 2).float().split(_BATCH)
        return torch.cat([self.features(part) for part in slices]).cpu()
