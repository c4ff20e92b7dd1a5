"""Networks made ready for fast inference on uint8 tiles, with unchanged results.

BatchNorm is folded into the convolution before it. The normalization of the image, (x / 255 - mean) / std, is folded
into the first convolution: not by padding with zeros, which would darken the border, but by padding the raw tile with
the mean, whose normalized value is the zero that the network was trained with. The result is the same up to rounding.
"""

from __future__ import annotations

import copy
import itertools
import logging
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from medkd.errors import ConfigError
from medkd.wsi.pool import PoolAfterRelu, replaceable

logger = logging.getLogger(__name__)

_MIDDLE = 128
_AGREEMENT = 1e-3  # allowed between a folded network and the original, as a share of the largest output

Padding = tuple[int, int, int, int]  # left, right, top, bottom
Step = tuple[
    str | None, str, bool
]  # whose output (None: the image, "": no module's), into which module, and nowhere else


class RawTileNetwork(nn.Module):
    """A network that takes raw tiles: (B, S, S, 3) uint8 RGB → float32 logits; normalizing them is its own work.

    Attributes:
        mean: per channel, of RGB scaled to 0..1, that it normalizes with.
        std: per channel, of RGB scaled to 0..1.
        size: side of the tiles it was made for.
        device: where it computes.
        dtype: what it computes in.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: int
    device: torch.device
    dtype: torch.dtype


class TileNetwork(RawTileNetwork):
    """A network made ready for raw tiles: (B, S, S, 3) uint8 RGB → what the network gives, in float32.

    One thread at a time may call it.

    Args:
        network: takes (B, 3, S, S) normalized images; is copied and put in eval mode, the original stays as it is.
        mean: per channel, of RGB scaled to 0..1.
        std: per channel, of RGB scaled to 0..1.
        size: side of the tile that the folded network is compared with the original on.
        device: where to compute.
        dtype: float32 or bfloat16, what to compute in.

    Attributes:
        mean: as given.
        std: as given.
        size: as given.
        device: as given.
        dtype: as given.
        folded_norms: how many BatchNorms were folded.

    Raises:
        ConfigError: the network cannot run on such tiles.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        size: int,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.mean, self.std = tuple(map(float, mean)), tuple(map(float, std))
        self.size, self.device, self.dtype = size, torch.device(device), dtype
        self.network = _copy(network)
        self.padding: Padding | None = None
        self.folded_norms = 0
        self._stem = ""
        self._levels = _Levels(mean, std)
        self._fold(network, size)
        if self.padding is not None:
            _round_input(self.network.get_submodule(self._stem), self._levels, dtype)
        self._levels.move(self.device, dtype)
        self.network = self.network.to(device=self.device, dtype=dtype)
        if not isinstance(self.network, torch.jit.ScriptModule):
            self.network = self.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.requires_grad_(False)

    @property
    def folded_input(self) -> bool:
        """Whether the normalization of the image is part of the first convolution."""
        return self.padding is not None

    @property
    def stem(self) -> str:
        """Name of the convolution that the normalization is part of; empty where it is part of none."""
        return self._stem if self.folded_input else ""

    @torch.inference_mode()
    def forward(self, tiles: torch.Tensor) -> torch.Tensor:
        """(B, S, S, 3) uint8 on the network's device → float32 logits."""
        images = self._levels.normalized(tiles) if self.padding is None else self._levels.padded(tiles, self.padding)
        output = self.network(images)
        return output.float() if isinstance(output, torch.Tensor) else output

    @torch.no_grad()
    def _fold(self, network: nn.Module, size: int) -> None:
        """Fold what can be, and take it back if that changes the answer to a tile of noise."""
        generator = torch.Generator().manual_seed(0)
        tiles = torch.randint(0, 256, (1, size, size, 3), dtype=torch.uint8, generator=generator)
        expected = _answer(self.network, self._levels.normalized(tiles), size)
        if isinstance(self.network, torch.jit.ScriptModule) or not isinstance(expected, torch.Tensor):
            return  # a finished program runs as it is; anything but a tensor is refused where its shape is checked
        stem, pairs, pools = _plan(self.network)
        for convolution, norm in pairs:
            _fold_norm(self.network, convolution, norm)
        for pool in pools:
            _replace(self.network, pool, PoolAfterRelu())
        self.folded_norms = len(pairs)
        if stem is not None:
            self._stem, self.padding = stem, _fold_input(self.network.get_submodule(stem), self._levels)
        difference = float((self(tiles) - expected).abs().max()) / max(float(expected.abs().max()), 1e-6)
        if not difference <= _AGREEMENT:
            logger.warning("folding would change the network's output by %.2g of its size: not done", difference)
            self.network, self.padding, self.folded_norms = _copy(network), None, 0


class _Levels:
    """Grey levels as a network sees them: counted from 128, so that they are exact even in bfloat16's eight bits."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self.mean = torch.tensor([255.0 * value - _MIDDLE for value in mean], dtype=torch.float64)
        self.std = torch.tensor([255.0 * value for value in std], dtype=torch.float64)
        self._buffer: torch.Tensor | None = None
        self.move(torch.device("cpu"), torch.float32)

    def move(self, device: torch.device, dtype: torch.dtype) -> None:
        """Compute there, in that."""
        self._dtype = dtype
        self._border = self.mean.to(device, dtype)
        self._mean, self._variance = self.mean.to(device, torch.float32), self.std.square().to(device, torch.float32)
        self._buffer = None

    def normalized(self, tiles: torch.Tensor) -> torch.Tensor:
        """(B, H, W, 3) uint8 → (B, 3, H, W), (x / 255 - mean) / std, channels last in memory."""
        levels = _counted_from_middle(tiles).float().permute(0, 3, 1, 2)
        # As a BatchNorm, because that is fast with channels last and a broadcast over three channels is not.
        return functional.batch_norm(levels, self._mean, self._variance, eps=0.0).to(self._dtype)

    def padded(self, tiles: torch.Tensor, padding: Padding) -> torch.Tensor:
        """(B, H, W, 3) uint8 → (B, 3, H + …, W + …) levels with a border of the mean, channels last in memory."""
        left, right, top, bottom = padding
        count, height, width, channels = tiles.shape
        levels = _counted_from_middle(tiles)
        if not any(padding):
            return levels.to(self._dtype).permute(0, 3, 1, 2)
        shape = (count, height + top + bottom, width + left + right, channels)
        if self._buffer is None or self._buffer.shape[1:] != shape[1:] or len(self._buffer) < count:
            self._buffer = self._border.expand(shape).contiguous()
        images = self._buffer[:count]
        images[:, top : top + height, left : left + width].copy_(levels)
        return images.permute(0, 3, 1, 2)


def _counted_from_middle(tiles: torch.Tensor) -> torch.Tensor:
    """uint8 x → int8 x - 128, which is the same byte with its first bit turned."""
    return (tiles ^ _MIDDLE).view(torch.int8)


def _copy(network: nn.Module) -> nn.Module:
    with torch.no_grad():  # TorchScript copies its parameters with their history
        return copy.deepcopy(network).cpu().float().eval()


def _plan(network: nn.Module) -> tuple[str | None, list[tuple[str, str]], list[str]]:
    """What can be folded.

    Returns:
        The first convolution, if the image goes nowhere else; (convolution, BatchNorm) pairs; poolings after a ReLU.
    """
    traced = _trace(network)
    steps = traced if traced is not None else _chain(network)
    modules = dict(network.named_modules(remove_duplicate=False))
    owners = Counter(id(module) for module in modules.values())
    calls = Counter(target for _, target, _ in steps)

    def foldable(name: str, kinds: tuple[type, ...]) -> bool:
        module = modules[name]
        return type(module) in kinds and calls[name] == 1 and owners[id(module)] == 1 and not _has_hooks(module)

    pairs: list[tuple[str, str]] = []
    pools: list[str] = []
    stem = None
    for source, target, only_consumer in steps:
        if source == "":
            continue
        if source is None:
            if only_consumer and foldable(target, (nn.Conv2d,)):
                stem = target
        elif only_consumer and foldable(source, (nn.Conv2d,)) and foldable(target, (nn.BatchNorm2d,)):
            norm = modules[target]
            if norm.track_running_stats and norm.running_mean is not None:
                pairs.append((source, target))
        elif foldable(target, (nn.MaxPool2d,)) and replaceable(modules[target], modules[source]):
            pools.append(target)
    # Infinite weights could make NaNs, which only the plain pooling hands on whatever their sign.
    finite = all(bool(parameter.isfinite().all()) for parameter in network.parameters())
    return stem, pairs, pools if finite else []


def _trace(network: nn.Module) -> list[Step] | None:
    """Every module call with where its input comes from, or None if the forward pass depends on values."""
    try:
        graph: Any = torch.fx.Tracer().trace(network)
    except Exception as error:
        logger.debug("not traceable: %s", error)
        return None
    steps: list[Step] = []
    for node in graph.nodes:
        if node.op != "call_module":
            continue
        source = node.args[0] if len(node.args) == 1 and not node.kwargs else None
        if isinstance(source, torch.fx.Node) and source.op in ("call_module", "placeholder"):
            name = str(source.target) if source.op == "call_module" else None
            steps.append((name, str(node.target), len(source.users) == 1))
        else:
            steps.append(("", str(node.target), False))  # counts as a call; its source is no module
    return steps


def _chain(network: nn.Module) -> list[Step]:
    """The same for the nested plain Sequentials of a network that cannot be traced."""
    steps: list[Step] = []
    seen: set[str] = set()
    for prefix, module in network.named_modules():  # from the outside to the inside
        if type(module).forward is nn.Sequential.forward and not _has_hooks(module):
            leaves = _leaves(module, prefix)
            if not seen.intersection(leaves) and leaves:
                seen.update(leaves)
                steps.append((None if prefix == "" else "", leaves[0], prefix == ""))
                steps += [(first, second, True) for first, second in itertools.pairwise(leaves)]
    return steps


def _leaves(module: nn.Module, prefix: str) -> list[str]:
    names: list[str] = []
    for name, child in module.named_children():
        full = f"{prefix}.{name}" if prefix else name
        nested = type(child).forward is nn.Sequential.forward and not _has_hooks(child)
        names += _leaves(child, full) if nested else [full]
    return names


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or hasattr(module, "parametrizations"))


def _fold_norm(network: nn.Module, convolution: str, norm: str) -> None:
    conv, batch_norm = network.get_submodule(convolution), network.get_submodule(norm)
    assert isinstance(conv, nn.Conv2d)
    assert isinstance(batch_norm, nn.BatchNorm2d)
    assert batch_norm.running_mean is not None
    assert batch_norm.running_var is not None
    mean, variance = batch_norm.running_mean.double(), batch_norm.running_var.double()
    factor = _or(batch_norm.weight, 1.0, mean) / torch.sqrt(variance + batch_norm.eps)
    bias = (_or(conv.bias, 0.0, mean) - mean) * factor + _or(batch_norm.bias, 0.0, mean)
    conv.weight = nn.Parameter((conv.weight.double() * factor[:, None, None, None]).float())
    conv.bias = nn.Parameter(bias.float())
    _replace(network, norm, nn.Identity())


def _replace(network: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, own = name.rpartition(".")
    setattr(network.get_submodule(parent), own, module)


def _or(parameter: torch.Tensor | None, value: float, like: torch.Tensor) -> torch.Tensor:
    return torch.full_like(like, value) if parameter is None else parameter.double()


def _fold_input(conv: nn.Module, levels: _Levels) -> Padding:
    """Make a convolution of normalized images one of grey levels; returns the padding that is left to do."""
    assert isinstance(conv, nn.Conv2d)
    weight = conv.weight.double()
    std, mean = (_per_weight(values, conv) for values in (levels.std, levels.mean))
    scaled = weight / std[:, :, None, None]
    bias = _or(conv.bias, 0.0, weight[:, 0, 0, 0]) - (scaled * mean[:, :, None, None]).sum((1, 2, 3))
    conv.weight, conv.bias = nn.Parameter(scaled.float()), nn.Parameter(bias.float())
    if conv.padding_mode != "zeros":
        return (0, 0, 0, 0)  # reflected or repeated levels are levels: the convolution goes on padding
    left, right, top, bottom = conv._reversed_padding_repeated_twice
    conv.padding = (0, 0)
    return (left, right, top, bottom)


def _round_input(conv: nn.Module, levels: _Levels, dtype: torch.dtype) -> None:
    """Round the weights of a folded first convolution so that the mean's share, which is large, still cancels."""
    assert isinstance(conv, nn.Conv2d)
    assert conv.bias is not None
    lost = conv.weight.double() - conv.weight.to(dtype).double()
    bias = conv.bias.double() + (lost * _per_weight(levels.mean, conv)[:, :, None, None]).sum((1, 2, 3))
    conv.bias = nn.Parameter(bias.float())


def _per_weight(values: torch.Tensor, conv: nn.Conv2d) -> torch.Tensor:
    """(in,) values as (out, in per group), the order of a convolution's weights."""
    return values.view(conv.groups, -1).repeat_interleave(conv.out_channels // conv.groups, 0)


def _answer(network: nn.Module, images: torch.Tensor, size: int) -> Any:
    try:
        return network(images)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0][:200]
        raise ConfigError(
            "network", f"cannot run on tiles of {size} px ({reason})", "check size and channels"
        ) from error
