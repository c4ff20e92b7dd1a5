"""The features that a network's last layer classifies."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from medkd.errors import ConfigError


def classifier_name(network: nn.Module, name: str | None = None) -> str:
    """The name of the layer that turns features into logits: ``name``, or the last convolution that was registered.

    Args:
        network: (B, C, *S) → logits (B, K, *S).
        name: as in ``network.named_modules()``, where the guess would be wrong.

    Raises:
        ConfigError: If the network has no such module, or no convolution.
    """
    modules = dict(network.named_modules())
    if name is not None:
        if name not in modules or not name:
            raise ConfigError("classifier", f"the network has no module {name!r}", "name its last layer")
        return name
    found = [key for key, module in modules.items() if isinstance(module, _ConvNd)]
    if not found:
        raise ConfigError("classifier", "the network has no convolution", "name the layer that gives the logits")
    return found[-1]


def logits_and_features(network: nn.Module, image: torch.Tensor, classifier: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Run a network; also return what its classifier saw.

    Args:
        network: not scripted.
        image: (B, C, *S).
        classifier: name of the layer that turns features into logits.

    Returns:
        Logits (B, K, *S) and features (B, D, *S), both attached to the graph.

    Raises:
        ConfigError: If that layer works at another resolution than the logits have, or did not run.
    """
    seen: list[torch.Tensor] = []

    def keep(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
        seen.append(inputs[0])

    handle = network.get_submodule(classifier).register_forward_pre_hook(keep)
    try:
        logits = network(image)
    finally:
        handle.remove()
    if not seen or seen[-1].shape[2:] != logits.shape[2:]:
        shape = tuple(seen[-1].shape) if seen else "nothing"
        raise ConfigError(
            "classifier",
            f"{classifier!r} saw {shape} where the logits are {tuple(logits.shape)}",
            "name the layer that gives the logits from features of the same resolution",
        )
    return logits, seen[-1]
