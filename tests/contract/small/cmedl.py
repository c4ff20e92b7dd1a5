"""Tiny networks of CMEDL for the contract tests."""

from __future__ import annotations

from typing import Any

import torch
from engine import toy
from torch import nn

from medkd.methods.cyclegan import CycleGAN


def segmenter(*, norm: bool, seed: int) -> nn.Sequential:
    """Convolutions whose last two are hinted at."""
    torch.manual_seed(seed)
    middle: list[nn.Module] = [nn.BatchNorm2d(4)] if norm else []
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), *middle, nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(),
        nn.Conv2d(4, toy.CLASSES, 1),
    )  # fmt: skip


def last_two(network: nn.Sequential) -> tuple[str, str]:
    """Names of the last two convolutions."""
    return (str(len(network) - 3), str(len(network) - 1))


def i2i(seed: int, **arguments: Any) -> CycleGAN:
    """A CycleGAN of four small convolutional networks."""
    torch.manual_seed(seed + 100)

    def generator() -> nn.Module:
        return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 1, 3, padding=1), nn.Tanh())

    def critic() -> nn.Module:
        return nn.Sequential(nn.Conv2d(1, 4, 4, stride=2, padding=1), nn.LeakyReLU(0.2), nn.Conv2d(4, 1, 3, padding=1))

    return CycleGAN(
        nn.ModuleDict({"to_target": generator(), "to_source": generator()}),
        nn.ModuleDict({"source": critic(), "target": critic()}),
        **{"pool_size": 3, **arguments},
    )


def feature_network(seed: int = 0) -> nn.Module:
    """One convolution, for the contextual loss."""
    torch.manual_seed(seed + 200)
    return nn.Sequential(nn.Conv2d(1, 6, 3, stride=2, padding=1), nn.ReLU())


def arguments(method_class: type[Any], *, norm: bool, seed: int) -> dict[str, Any]:
    """Constructor arguments."""
    student, teacher = segmenter(norm=norm, seed=seed), segmenter(norm=norm, seed=seed + 1)
    return {
        "student": student,
        "teacher": teacher,
        "i2i": i2i(seed),
        "feature_network": feature_network(seed),
        "student_layers": last_two(student),
        "teacher_layers": last_two(teacher),
    }


def quiet(method_class: type[Any]) -> dict[str, Any]:
    """Without image pools and with Dice per sample, a joint batch is the mean of its parts."""
    return {"i2i": i2i(0, pool_size=0), "segmentation_loss": toy.per_sample_loss}
