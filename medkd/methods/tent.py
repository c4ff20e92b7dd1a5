"""TENT and BN adaptation: adapt a trained network to new images by its normalization layers alone.

Paper: Wang, Shelhamer, Liu, Olshausen, Darrell 2021, "Tent: Fully Test-time Adaptation by Entropy Minimization", ICLR
2021, arXiv:2006.10726; BN adaptation: Schneider et al. 2020, arXiv:2006.16971. Code read: DequanWang/tent (MIT; nothing
copied).
Roles: student, of which only scales and shifts of normalization layers are trained. Streams: target {image (B, C, *S)}.

Differs: trained by a trainer, running statistics follow the target images with the layers' momentum and are what ships;
the release always normalizes by the batch at hand, as `VolumeAdapter` does.
Differs: only normalization layers are in train mode, so that dropout does not disturb the entropy.
Differs: every voxel is a sample, and a batch is some slices of one volume.
Differs: `VolumeAdapter` forgets after each volume unless told otherwise; the release adapts online without a reset.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from typing import ClassVar, Self

import torch
from torch import nn

from medkd.engine.context import StepContext
from medkd.engine.method import Batch, Method
from medkd.losses.entropy import mean_entropy
from medkd.nets.normalization import affine_parameters, batch_norm_layers, batch_statistics, require_batch_norm


class Tent(Method):
    """L = mean entropy of target predictions, minimized over the scales and shifts of normalization layers.

    The paper's optimizer: Adam 1e-3, one step per batch. On single volumes the rate matters: Adam 1e-4 is common in
    medical work, and repeated passes make predictions worse in the end. Small structures can vanish: watch the Dice of
    each class.

    Args:
        student: (B, C, *S) → logits (B, K, *S), trained on the source.
        entropy_weight: weight of the entropy; 0 trains nothing, so that only BatchNorm's running statistics follow the
            target (BN adaptation).
        any_norm: also take the scales and shifts of InstanceNorm, GroupNorm and LayerNorm.

    Raises:
        ConfigError: If the student has no BatchNorm, or with ``any_norm`` no normalization layer with scale and shift.
    """

    paper: ClassVar[str] = "Wang et al. 2021, ICLR, arXiv:2006.10726"
    roles: ClassVar[tuple[str, ...]] = ("student",)
    streams: ClassVar[tuple[str, ...]] = ("target",)
    batch_coupled: ClassVar[bool] = True  # BatchNorm

    def __init__(self, student: nn.Module, *, entropy_weight: float = 1.0, any_norm: bool = False) -> None:
        super().__init__()
        if not entropy_weight:
            require_batch_norm(student, "BN adaptation")
        _train_only(student, affine_parameters(student, "TENT", any_norm=any_norm))
        self.student = student
        self.entropy_weight = entropy_weight

    def train(self, mode: bool = True) -> Self:
        """Set train mode for BatchNorm layers alone."""
        super().train(mode)
        self.student.eval()
        for layer in batch_norm_layers(self.student):
            layer.train(mode)
        return self

    def losses(self, batch: Batch, ctx: StepContext) -> dict[str, torch.Tensor]:
        """The entropy of the predictions."""
        entropy = mean_entropy(self.student(batch["target"]["image"]))
        return {"entropy_loss": self.entropy_weight * entropy, "target_entropy": entropy}

    def step(self, batch: Batch, ctx: StepContext) -> dict[str, torch.Tensor]:
        """Update scales and shifts; with ``entropy_weight=0`` only let the statistics follow."""
        if self.entropy_weight:
            return super().step(batch, ctx)
        with torch.no_grad():
            terms = self.losses(batch, ctx)
        return {"loss": terms["entropy_loss"], **terms}


class VolumeAdapter:
    """Predicts volumes and adapts to each while doing so: TENT at test time.

    Each batch of slices is predicted with its own BatchNorm statistics, then one step lowers the entropy of that
    prediction. The network handed in is never changed; :attr:`network` is the adapted copy.

    Args:
        network: (B, C, *S) → logits (B, K, *S); eval or train mode does not matter.
        learning_rate: of Adam; the paper has 1e-3.
        steps: updates per batch.
        batch_size: slices per batch, at most; a volume is split evenly.
        reset_per_volume: begin every volume with the network handed in; False goes on adapting, as the paper does.
        any_norm: also adapt InstanceNorm, GroupNorm and LayerNorm.

    Raises:
        ConfigError: If the network has no such layers.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        learning_rate: float = 1e-3,
        steps: int = 1,
        batch_size: int = 16,
        reset_per_volume: bool = True,
        any_norm: bool = False,
    ) -> None:
        self.source = copy.deepcopy(network).eval()
        self.learning_rate = learning_rate
        self.steps = steps
        self.batch_size = batch_size
        self.reset_per_volume = reset_per_volume
        self.any_norm = any_norm
        self.reset()

    def reset(self) -> None:
        """Forget everything adapted to so far."""
        self.network = copy.deepcopy(self.source)
        parameters = affine_parameters(self.network, "TENT", any_norm=self.any_norm)
        _train_only(self.network, parameters)
        self.optimizer = torch.optim.Adam(parameters, lr=self.learning_rate)

    def __call__(self, slices: torch.Tensor) -> torch.Tensor:
        """Predict a volume's slices and adapt.

        Args:
            slices: (Z, C, *S) on the network's device.

        Returns:
            Logits (Z, K, *S), detached: each batch's before the last update made on it, as in the release.
        """
        if self.reset_per_volume:
            self.reset()
        parts = [self._adapt(part) for part in _even_batches(slices, self.batch_size)]
        return torch.cat(parts)

    @torch.enable_grad()
    def _adapt(self, part: torch.Tensor) -> torch.Tensor:
        for _ in range(self.steps):
            if batch_norm_layers(self.network):
                with batch_statistics(self.network):
                    logits = self.network(part)
            else:
                logits = self.network(part)
            self.optimizer.zero_grad(set_to_none=True)
            mean_entropy(logits).backward()
            self.optimizer.step()
        return logits.detach()


def adapt(network: nn.Module, slices: torch.Tensor, **settings: float | int | bool) -> torch.Tensor:
    """TENT on one volume: logits (Z, K, *S) of its slices (Z, C, *S); the network stays as it is.

    Args:
        network: (B, C, *S) → logits (B, K, *S).
        slices: of one volume.
        settings: of :class:`VolumeAdapter`.

    Raises:
        ConfigError: If the network has no BatchNorm (or, with ``any_norm``, no affine normalization).
    """
    return VolumeAdapter(network, **settings)(slices)  # type: ignore[arg-type]


@torch.no_grad()
def adapt_batch_norm(network: nn.Module, slices: torch.Tensor, *, batch_size: int = 16) -> torch.Tensor:
    """BN adaptation on one volume: logits with the statistics of the volume's own slices; the network stays as it is.

    Args:
        network: (B, C, *S) → logits (B, K, *S).
        slices: (Z, C, *S) on the network's device.
        batch_size: slices that share statistics, at most; a volume is split evenly.

    Returns:
        Logits (Z, K, *S).

    Raises:
        ConfigError: If the network has no BatchNorm.
    """
    with batch_statistics(network):
        return torch.cat([network(part) for part in _even_batches(slices, batch_size)])


def _train_only(network: nn.Module, parameters: Iterable[nn.Parameter]) -> None:
    network.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(True)


def _even_batches(slices: torch.Tensor, batch_size: int) -> tuple[torch.Tensor, ...]:
    """Batches of nearly one size, so that the last is not too small for its statistics."""
    return torch.tensor_split(slices, math.ceil(len(slices) / batch_size))
