"""Features of VGG-19, for perceptual and contextual losses."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Self

import torch
from torch import nn

from medkd.errors import InputError

_BLOCKS = (2, 2, 4, 4, 4)
_WIDTHS = (64, 128, 256, 512, 512)
_NAMES = tuple(f"conv{block}_{i}" for block, count in enumerate(_BLOCKS, 1) for i in range(1, count + 1))
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class VGGFeatures(nn.Module):
    """VGG-19 up to the last layer asked for, frozen and always in eval mode; see :func:`vgg19_features`."""

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, layers: Sequence[str]) -> None:
        super().__init__()
        unknown = [name for name in layers if name not in _NAMES]
        if unknown or not layers:
            raise ValueError(f"layers of VGG-19 are {', '.join(_NAMES)}; got {', '.join(layers) or 'none'}")
        self.layer_names = tuple(layers)
        self.features = _convolutions(1 + max(map(_NAMES.index, layers)))
        self._taken = {_positions()[name] + 1: name for name in layers}  # after the ReLU
        self.register_buffer("mean", torch.tensor(_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(_STD).view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False).eval()

    def forward(self, image: torch.Tensor) -> list[torch.Tensor]:
        """(B, 1 or 3, H, W) in [-1, 1] → the features, in the order of ``layers``.

        Raises:
            ValueError: If the image has another number of channels or of axes.
        """
        if image.dim() != 4 or image.shape[1] not in (1, 3):
            raise ValueError(f"VGG-19 takes images (B, 1 or 3, H, W), got {tuple(image.shape)}")
        features = ((image + 1) / 2 - self.mean) / self.std
        taken = {}
        for position, layer in enumerate(self.features):
            features = layer(features)
            if position in self._taken:
                taken[self._taken[position]] = features
        return [taken[name] for name in self.layer_names]

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode."""
        return super().train(False)


def vgg19_features(
    layers: Sequence[str] = ("conv3_3", "conv3_4", "conv4_1"), *, weights: str | Path | None, seed: int = 0
) -> VGGFeatures:
    """VGG-19 as a fixed feature extractor for 2-D images in [-1, 1].

    Grey images are repeated to three channels; images are normalized as ImageNet's. ``conv3_3`` names the third
    convolution of the third block, taken after its ReLU, at a quarter of the resolution. Gradients reach the image.

    Args:
        layers: ``conv<block>_<index>``; the default are the ones that CMEDL's contextual loss compares.
        weights: a file with torchvision's state dict of VGG-19 (its classifier is not used), or None: random weights
            drawn from ``seed``, which compare textures but have never seen an image.
        seed: of the random weights.

    Raises:
        ValueError: If a layer is unknown.
        InputError: If the file cannot be read or does not hold VGG-19.

    Source: Simonyan and Zisserman, arXiv:1409.1556, configuration E.
    """
    network = VGGFeatures(layers)
    if weights is None:
        generator = torch.Generator().manual_seed(seed)
        for layer in network.features:
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu", generator=generator)
                nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
        return network
    state = _read_state_dict(Path(weights))
    network.features.load_state_dict({name: state[f"features.{name}"] for name in network.features.state_dict()})
    return network


def _positions() -> dict[str, int]:
    """Index of every convolution in torchvision's ``features``: each is followed by a ReLU, each block by a pool."""
    positions, at = {}, 0
    for name in _NAMES:
        if name.endswith("_1") and at:
            at += 1
        positions[name] = at
        at += 2
    return positions


def _convolutions(count: int) -> nn.Sequential:
    """The first ``count`` convolutions of VGG-19 with their ReLUs and pools, numbered as torchvision does."""
    layers: list[nn.Module] = []
    channels = 3
    for block, (repeats, width) in enumerate(zip(_BLOCKS, _WIDTHS, strict=True)):
        if block:
            layers.append(nn.MaxPool2d(2))
        for _ in range(repeats):
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
            channels = width
            count -= 1
            if count == 0:
                return nn.Sequential(*layers)
    return nn.Sequential(*layers)


def _read_state_dict(path: Path) -> dict[str, torch.Tensor]:
    """A file's state dict, if it is torchvision's VGG-19."""
    remedy = "give a file with torchvision's vgg19 state dict"
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(path, "there is no such file", remedy) from None
    except (OSError, RuntimeError, EOFError, UnpicklingError):
        raise InputError(path, "is no file of plain PyTorch weights", remedy) from None
    if not isinstance(state, dict):
        raise InputError(path, f"holds a {type(state).__name__}, no state dict", remedy)
    with torch.device("meta"):
        wanted = {f"features.{name}": value.shape for name, value in _convolutions(len(_NAMES)).state_dict().items()}
    missing = [name for name in wanted if name not in state]
    surplus = [name for name in state if name not in wanted and not str(name).startswith("classifier.")]
    wrong = [n for n in wanted if n in state and getattr(state[n], "shape", None) != wanted[n]]
    for kind, names in (("lacks", missing), ("has the unknown key", surplus), ("has another shape of", wrong)):
        if names:
            raise InputError(path, f"is not VGG-19: it {kind} {names[0]}", remedy)
    return state
