"""Which normalization layers a network has, and running it with the statistics of the batch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from medkd.errors import ConfigError


def batch_norm_layers(network: nn.Module) -> list[_BatchNorm]:
    """The network's BatchNorm layers, in a fixed order."""
    return [module for module in network.modules() if isinstance(module, _BatchNorm)]


def require_batch_norm(network: nn.Module, method: str) -> list[_BatchNorm]:
    """The network's BatchNorm layers.

    Args:
        network: any network.
        method: what needs them, for the message.

    Raises:
        ConfigError: If there is none.
    """
    found = batch_norm_layers(network)
    if not found:
        raise ConfigError(
            "student",
            f"{method} needs BatchNorm, and the network has {_normalizations(network)}",
            'build it with norm="batch" (MONAI\'s networks default to others)',
        )
    return found


def affine_parameters(network: nn.Module, method: str, *, any_norm: bool = False) -> list[nn.Parameter]:
    """Scales and shifts of the normalization layers.

    Args:
        network: any network.
        method: what needs them, for the message.
        any_norm: also take those of InstanceNorm, GroupNorm and LayerNorm.

    Raises:
        ConfigError: If the layers wanted are not there or have no scale and shift.
    """
    if not any_norm:
        layers: list[nn.Module] = list(require_batch_norm(network, method))
    else:
        layers = [module for module in network.modules() if _is_normalization(module)]
    found = [parameter for layer in layers for parameter in layer.parameters(recurse=False)]
    if not found:
        raise ConfigError(
            "student",
            f"{method} trains the scales and shifts of normalization layers, and the network has "
            f"{_normalizations(network)} without affine parameters",
            'build it with norm="batch", or with affine ones such as norm=("instance", {"affine": True}) and any_norm',
        )
    return found


@contextmanager
def batch_statistics(network: nn.Module) -> Iterator[None]:
    """While it lasts, the network is in eval mode but BatchNorm uses each batch's own statistics.

    Running statistics are neither used nor changed; every mode is put back at the end.

    Raises:
        ConfigError: If the network has no BatchNorm.
    """
    layers = require_batch_norm(network, "the use of batch statistics")
    modes = [(module, module.training) for module in network.modules()]
    kept = [(layer, layer.track_running_stats, layer.running_mean, layer.running_var, layer.num_batches_tracked)
            for layer in layers]  # fmt: skip
    network.eval()
    try:
        for layer in layers:
            # Without running statistics a layer uses the batch's, in eval mode too.
            layer.track_running_stats = False
            layer.running_mean = layer.running_var = layer.num_batches_tracked = None
        yield
    finally:
        for layer, tracks, mean, variance, count in kept:
            layer.track_running_stats = tracks
            layer.running_mean, layer.running_var, layer.num_batches_tracked = mean, variance, count
        for module, mode in modes:
            module.training = mode


def _is_normalization(module: nn.Module) -> bool:
    return isinstance(module, _BatchNorm | _InstanceNorm | nn.GroupNorm | nn.LayerNorm)


def _normalizations(network: nn.Module) -> str:
    names = sorted({type(module).__name__ for module in network.modules() if _is_normalization(module)})
    return ", ".join(names) or "no normalization layer"
