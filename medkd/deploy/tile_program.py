"""A tile network as one program of raw tiles, in a shape that computes well in 8-bit integers.

The tiles stay bytes until the first convolution: x - 128 with scale 1 is what quantization makes of a byte anyway, so
nothing is lost there but the fraction of the grey level that the border is filled with.

A first convolution has three input channels, which wastes integer instructions that add groups of four. Neighboring
pixels of a row lie side by side in memory, so a row of pixels is also, without moving a byte, a shorter row of groups
of pixels with many channels. :func:`widen` writes the convolution as one of such groups, with neighboring results as
further output channels and zeros where a result does not look. The numbers are the same.
"""

from __future__ import annotations

import copy
import logging
import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from medkd.wsi.fold import TileNetwork
from medkd.wsi.pool import PoolAfterRelu

logger = logging.getLogger(__name__)

MIDDLE = 128  # the byte that stands for 0 in front of a folded first convolution
_LEAST_OUTPUTS = 32  # of a widened convolution: what a matrix product of integers wants side by side


class TileProgram(nn.Module):
    """(B, S, S, 3) uint8 RGB → logits, in float32, to be exported.

    Args:
        tiles: a network folded in float32; stays as it is.

    Attributes:
        keeps_bytes: whether the first convolution takes bytes counted from 128, because normalization is part of it.
    """

    def __init__(self, tiles: TileNetwork) -> None:
        super().__init__()
        self.size, self.keeps_bytes = tiles.size, tiles.folded_input
        self.network = _exportable(tiles.network)
        levels = torch.tensor([255.0 * value for value in tiles.mean], dtype=torch.float64)
        self.register_buffer("mean", levels.float())
        self.register_buffer("std", torch.tensor([255.0 * value for value in tiles.std]))
        self.register_buffer("border", levels.round().clamp(0, 255).to(torch.uint8))
        self._padding = tiles.padding or (0, 0, 0, 0)
        self._wide = False
        if self.keeps_bytes:
            wider = widen(self.network, tiles.stem, self.size + sum(self._padding[:2]))
            if wider is not None:
                self.network, missing = wider
                left, right, top, bottom = self._padding
                self._padding, self._wide = (left, right + missing, top, bottom), True

    def forward(self, tiles: torch.Tensor) -> torch.Tensor:
        """(B, S, S, 3) uint8 → logits."""
        if not self.keeps_bytes:
            images = (tiles.float() - self.get_buffer("mean")) / self.get_buffer("std")
            return self.network(images.permute(0, 3, 1, 2))
        levels = self._padded(tiles).float() - MIDDLE
        return self.network(levels if self._wide else levels.permute(0, 3, 1, 2))

    def _padded(self, tiles: torch.Tensor) -> torch.Tensor:
        left, right, top, bottom = self._padding
        rows = [self._border(tiles, self.size, left), tiles, self._border(tiles, self.size, right)]
        tiles = torch.cat([part for part in rows if part is not None], 2)
        width = self.size + left + right
        columns = [self._border(tiles, top, width), tiles, self._border(tiles, bottom, width)]
        return torch.cat([part for part in columns if part is not None], 1)

    def _border(self, tiles: torch.Tensor, height: int, width: int) -> torch.Tensor | None:
        border: torch.Tensor = self.get_buffer("border")
        return border.expand(tiles.shape[0], height, width, 3) if height and width else None


class WideStem(nn.Module):
    """A convolution of groups of pixels: (B, H, W, C) → (B, K, H', W'), and a ReLU where one follows.

    Args:
        conv: (C → K) channels, without padding, dilation or groups.
        width: W, of the input of ``conv``.
        relu: whether a ReLU follows.

    Attributes:
        missing: columns that the input must have beyond ``width``, whatever they hold.
    """

    def __init__(self, conv: nn.Conv2d, width: int, *, relu: bool) -> None:
        super().__init__()
        outputs, channels, height, reach = conv.weight.shape
        step = conv.stride[1]
        self.together = max(math.ceil(_LEAST_OUTPUTS / outputs), math.ceil(2 / step))
        self.group = step * self.together
        groups = math.ceil(((self.together - 1) * step + reach) / self.group)
        self.columns, self.outputs, self.relu = (width - reach) // step + 1, outputs, relu
        self.missing = max((math.ceil(self.columns / self.together) - 1 + groups) * self.group - width, 0)
        self.missing += -(width + self.missing) % self.group
        weight = torch.zeros(self.together, outputs, height, groups * self.group, channels)
        for place in range(self.together):
            weight[place, :, :, place * step : place * step + reach] = conv.weight.detach().permute(0, 2, 3, 1)
        weight = weight.reshape(self.together * outputs, height, groups, self.group * channels).permute(0, 3, 1, 2)
        self.conv = nn.Conv2d(
            self.group * channels, self.together * outputs, (height, groups), stride=(conv.stride[0], 1)
        )  # fmt: skip
        bias = torch.zeros(outputs) if conv.bias is None else conv.bias.detach()
        self.conv.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
        self.conv.bias = nn.Parameter(bias.repeat(self.together), requires_grad=False)

    def forward(self, levels: torch.Tensor) -> torch.Tensor:
        """(B, H, W, C) → (B, K, H', W')."""
        count, height, width, channels = levels.shape
        groups = levels.reshape(count, height, width // self.group, self.group * channels)
        found = self.conv(groups.permute(0, 3, 1, 2))
        if self.relu:
            found = functional.relu(found)
        count, _, height, width = found.shape
        found = found.permute(0, 2, 3, 1).reshape(count, height, width * self.together, self.outputs)
        if width * self.together != self.columns:
            found = found[:, :, : self.columns]
        return found.permute(0, 3, 1, 2)


def widen(network: nn.Module, stem: str, width: int) -> tuple[nn.Module, int] | None:
    """A network whose first convolution takes (B, H, W + missing, C) in groups of pixels, and what is missing.

    Args:
        network: takes (B, C, H, W); stays as it is.
        stem: name of its first convolution, which is the only one to see the image.
        width: W.

    Returns:
        None where the convolution or the network does not allow it.
    """
    conv = network.get_submodule(stem)
    plain = isinstance(conv, nn.Conv2d) and conv.groups == 1 and conv.dilation == (1, 1) and conv.padding == (0, 0)
    if not plain:
        return None
    assert isinstance(conv, nn.Conv2d)
    try:
        graph: Any = torch.fx.symbolic_trace(copy.deepcopy(network))
    except Exception as error:
        logger.debug("the first convolution stays as it is: %s", error)
        return None
    calls = [node for node in graph.graph.nodes if node.op == "call_module" and node.target == stem]
    if len(calls) != 1 or calls[0].args[0].op != "placeholder":
        return None
    relu = _relu_after(graph, calls[0])
    wide = WideStem(conv, width, relu=relu is not None)
    graph.add_submodule("wide_stem", wide)
    with graph.graph.inserting_after(calls[0]):
        call = graph.graph.call_module("wide_stem", (calls[0].args[0],))
    (relu or calls[0]).replace_all_uses_with(call)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph.eval(), wide.missing


def _relu_after(graph: Any, node: Any) -> Any:
    """The ReLU that alone takes a node's output, be it through modules that do nothing, or None."""
    while len(node.users) == 1:
        node = next(iter(node.users))
        if node.op == "call_module" and type(graph.get_submodule(node.target)) is nn.Identity:
            continue
        called = type(graph.get_submodule(node.target)) if node.op == "call_module" else node.target
        return node if called in (nn.ReLU, functional.relu, torch.relu, "relu") else None
    return None


class _GlobalMean(nn.Module):
    """``AdaptiveAvgPool2d(1)`` in one plain operation."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean((2, 3), keepdim=True)


def _exportable(network: nn.Module) -> nn.Module:
    """A copy with standard operations in place of those that are only quick in PyTorch."""
    network = copy.deepcopy(network).cpu().eval()
    for name, module in list(network.named_modules()):
        if isinstance(module, PoolAfterRelu):
            network.set_submodule(name, nn.MaxPool2d(3, 2, 1))
        elif isinstance(module, nn.AdaptiveAvgPool2d) and module.output_size in (1, (1, 1), [1, 1]):
            network.set_submodule(name, _GlobalMean())
    return network
