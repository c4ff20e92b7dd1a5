"""Networks that start from weights the user has, rather than from random numbers."""

from __future__ import annotations

import logging
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import nn

from medkd.errors import InputError

logger = logging.getLogger(__name__)

_REMEDY = "give a state dict of the same network, as torch.save writes it"


def with_weights(network: nn.Module, weights: str | Path | None, *, classifier: str = "fc") -> nn.Module:
    """Start a network from a file; all but its classifier, whose classes are others.

    torchvision's ResNets fit MONAI's with ``spatial_dims=2, n_input_channels=3, conv1_t_stride=2,
    bias_downsample=False``.

    Args:
        network: changed in place.
        weights: a file with a state dict, read without unpickling; None leaves the network as it is.
        classifier: name of the layer that keeps its own weights.

    Returns:
        The network.

    Raises:
        InputError: If the file cannot be read, or lacks a weight, has one too many or one of another shape.
    """
    if weights is None:
        return network
    path = Path(weights)
    state = {name: value for name, value in _read(path).items() if not _of(name, classifier)}
    wanted = {name: value for name, value in network.state_dict().items() if not _of(name, classifier)}
    # Counters of BatchNorm, which older files lack, matter only to a cumulative average that nothing here uses.
    missing = [name for name in wanted if name not in state and not name.endswith("num_batches_tracked")]
    surplus = [name for name in state if name not in wanted]
    wrong = [name for name in wanted if name in state and state[name].shape != wanted[name].shape]
    for kind, names in (("lacks", missing), ("has the unknown key", surplus), ("has another shape of", wrong)):
        if names:
            raise InputError(path, f"does not fit {type(network).__name__}: it {kind} {names[0]}", _REMEDY)
    network.load_state_dict(state, strict=False)
    logger.info("started %s from %s", type(network).__name__, path)
    return network


def _of(name: str, classifier: str) -> bool:
    return name.startswith(f"{classifier}.")


def _read(path: Path) -> dict[str, torch.Tensor]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(path, "there is no such file", _REMEDY) from None
    except (OSError, RuntimeError, EOFError, UnpicklingError):
        raise InputError(path, "is no file of plain PyTorch weights", _REMEDY) from None
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise InputError(path, "holds no state dict", _REMEDY)
    return state
