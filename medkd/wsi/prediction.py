"""What a network says about a slide, before it is written to files."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from medkd.errors import ConfigError
from medkd.wsi.class_map import ClassMap

if TYPE_CHECKING:
    from medkd.wsi.grid import TileGrid

Task = Literal["classification", "segmentation"]
Activation = Literal["softmax", "sigmoid"]


@dataclass(frozen=True)
class TileTask:
    """What a network expects of a tile and what its outputs mean.

    Attributes:
        task: ``classification``: one probability vector per tile; ``segmentation``: one per pixel.
        size: tile side in pixels at ``mpp``.
        mpp: µm per pixel the network was trained at.
        overlap: pixels at ``mpp`` that neighboring tiles share.
        mean: per channel, of RGB scaled to 0..1.
        std: per channel, of RGB scaled to 0..1.
        classes: names in the order of the network's output channels; of a segmentation, the first is background.
        activation: what turns the network's output into probabilities.

    Raises:
        ConfigError: a value that cannot be right, named.
    """

    task: Task
    size: int
    mpp: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    classes: tuple[str, ...]
    overlap: int = 0
    activation: Activation = "softmax"

    def __post_init__(self) -> None:
        checks = {
            "task": self.task in ("classification", "segmentation"),
            "size": self.size >= 1,
            "mpp": math.isfinite(self.mpp) and self.mpp > 0,
            "overlap": 0 <= self.overlap < self.size,
            "mean": len(self.mean) == 3 and all(math.isfinite(value) for value in self.mean),
            "std": len(self.std) == 3 and all(math.isfinite(value) and value > 0 for value in self.std),
            "classes": len(self.classes) >= 1 and len(set(self.classes)) == len(self.classes) and all(self.classes),
            "activation": self.activation in ("softmax", "sigmoid"),
        }
        for name, fine in checks.items():
            if not fine:
                raise ConfigError(f"slide task: {name}", f"{getattr(self, name)!r} cannot be right", "correct it")
        if len(self.classes) == 1 and self.activation == "softmax":
            raise ConfigError("slide task: activation", "softmax over one class is always 1", "use 'sigmoid'")


@dataclass(frozen=True, eq=False)
class Heatmap:
    """Mean class probabilities on a coarse grid.

    Attributes:
        values: (K, h, w) float32, probabilities; NaN where nothing was predicted.
        x: level-0 x of the left edge, in pixels.
        y: level-0 y of the top edge, in pixels.
        pixel_level0: side of one heatmap pixel in level-0 pixels.
    """

    values: NDArray[np.float32]
    x: float
    y: float
    pixel_level0: float


@dataclass(frozen=True, eq=False)
class SlidePrediction:
    """A network's answer for every tile of a slide, and the stitched maps of a segmentation.

    Attributes:
        grid: the tiles.
        classes: K names.
        task: classification or segmentation.
        activation: what the probabilities were made with.
        probabilities: (N, K) float32; NaN rows are failed tiles. Of a segmentation, the mean over the tile's pixels.
        failed: level-0 x, y and the reason, for each tile without a prediction.
        heatmap: class probabilities on a coarse grid; None without a single predicted tile.
        class_map: of a segmentation, the class of every pixel, on disk.
        precision: ``float32``, ``bfloat16`` or ``int8``, what the network computed in.
        device: where it computed, for example ``cpu``.
        seconds: how long it took, by part: ``total``, ``waiting`` (for tiles), ``network``.
    """

    grid: TileGrid
    classes: tuple[str, ...]
    task: Task
    activation: Activation
    probabilities: NDArray[np.float32]
    failed: list[tuple[int, int, str]]
    heatmap: Heatmap | None
    class_map: ClassMap | None = None
    precision: str = "float32"
    device: str = "cpu"
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def predicted(self) -> NDArray[np.bool_]:
        """(N,) whether a tile has a prediction."""
        return np.logical_not(np.isnan(self.probabilities).any(axis=1))

    @property
    def reported_classes(self) -> tuple[int, ...]:
        """Indices of the classes worth an outline and a heatmap: all but the first, which means "nothing here"."""
        return tuple(range(1, len(self.classes))) if len(self.classes) > 1 else (0,)

    def close(self) -> None:
        """Give back the disk space of the stitched maps."""
        if self.class_map is not None:
            self.class_map.close()
