"""Features of a network's inner modules, without touching the network."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle


class Taps:
    """Collects what named modules return while the context lasts; hooks are removed when it ends, on errors too.

    ``with Taps(network, ["decoder.3"]) as features: network(image)`` leaves ``features["decoder.3"]``, attached to
    the graph. A module that runs twice leaves its last output.

    Args:
        network: any module that is not scripted.
        names: module names as in ``network.named_modules()``.

    Raises:
        ValueError: If the network has no module of such a name; the nearest names are given.
    """

    def __init__(self, network: nn.Module, names: Iterable[str]) -> None:
        modules = dict(network.named_modules())
        self._modules = {name: modules[name] if name in modules else _refuse(name, modules) for name in names}
        self._handles: list[RemovableHandle] = []
        self._features: dict[str, torch.Tensor] = {}

    def __enter__(self) -> dict[str, torch.Tensor]:
        self._features = {}
        self._handles = [
            module.register_forward_hook(partial(_keep, self._features, name)) for name, module in self._modules.items()
        ]
        return self._features

    def __exit__(self, *_: object) -> None:
        while self._handles:
            self._handles.pop().remove()


def _keep(features: dict[str, torch.Tensor], name: str, _module: nn.Module, _inputs: Any, output: Any) -> None:
    if not isinstance(output, torch.Tensor):
        raise TypeError(f"module {name!r} returns {type(output).__name__}, not a tensor: tap one of its children")
    features[name] = output


def _refuse(name: str, modules: dict[str, nn.Module]) -> nn.Module:
    nearest = difflib.get_close_matches(name, [known for known in modules if known], n=5, cutoff=0.3)
    raise ValueError(f"no module is named {name!r}; the nearest names are {', '.join(nearest) or 'none'}")
