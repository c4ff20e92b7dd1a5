"""A network over a whole slide, streamed: reader threads, a bounded queue, one network, results as they come.

>>> with Slide("slide.svs") as slide:
...     grid = TileGrid.build(slide, size=256, mpp=0.5)
...     prediction = predict_slide(network, slide, grid, classes=("normal", "tumor"), mean=mean, std=std)
...     write_prediction(prediction, slide, "out")
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from medkd.errors import ConfigError
from medkd.nets.precision import computes_in_bf16
from medkd.wsi.class_map import ClassMap
from medkd.wsi.fold import RawTileNetwork, TileNetwork
from medkd.wsi.prediction import Activation, Heatmap, SlidePrediction, Task, TileTask
from medkd.wsi.stitch import Lattice, Stitcher, tile_heatmap
from medkd.wsi.tile_stream import tile_batches

if TYPE_CHECKING:
    from medkd.wsi.grid import TileGrid
    from medkd.wsi.slides import Slide

__all__ = ["Heatmap", "SlidePrediction", "TileTask", "predict_slide", "prepare_network"]

logger = logging.getLogger(__name__)

_PRECISIONS: dict[bool | str, torch.dtype] = {False: torch.float32, "bf16": torch.bfloat16}
_CACHED_BYTES = 1_600_000  # of raw tiles per CPU thread: eight of 256 px, so that activations stay in its cache
_LARGEST_HEATMAP = 2048  # pixels a side
_SEGMENTATION_HEATMAP_MPP = 8.0


def predict_slide(
    network: nn.Module,
    slide: Slide,
    grid: TileGrid,
    *,
    classes: Sequence[str],
    mean: Sequence[float],
    std: Sequence[float],
    task: Task = "classification",
    activation: Activation = "softmax",
    batch_size: int = 32,
    threads: int = 2,
    device: str | torch.device = "cpu",
    amp: bool | str = "auto",
    heatmap_mpp: float | None = None,
    progress: Callable[[int, int], None] | None = None,
    scratch: str | Path | None = None,
) -> SlidePrediction:
    """Predict every tile of a slide; memory does not grow with the slide.

    The result does not depend on ``batch_size`` or ``threads`` (within 1e-5 in float32).

    Args:
        network: (B, 3, S, S) images, normalized → (B, K) logits, or (B, K, S, S) for a segmentation. It is copied;
            BatchNorm and the normalization of the image are folded where that changes nothing. For many slides, give
            what :func:`prepare_network` makes of it, which spares that work, or an int8 export
            (:class:`medkd.deploy.onnx_network.OnnxTiles`).
        slide: the slide.
        grid: its tiles.
        classes: K names; of a segmentation, the first is background.
        mean: per channel, of RGB scaled to 0..1.
        std: per channel, of RGB scaled to 0..1.
        task: ``classification`` or ``segmentation``.
        activation: ``softmax`` or ``sigmoid``.
        batch_size: tiles per step.
        threads: threads that read tiles beside the network; 0 reads between steps.
        device: where to compute; a prepared network stays where it is.
        amp: False for float32, ``"bf16"``, or ``"auto"``: bf16 where the hardware computes in it; a prepared network
            keeps its precision.
        heatmap_mpp: of a segmentation, µm per heatmap pixel, rounded to a multiple of the grid's mpp by a power of
            two and so that a side has at most 2048; by default about 8. A classification has one heatmap pixel per
            step of the grid.
        progress: called with (tiles done, tiles in all) after every batch.
        scratch: folder for the temporary class map of a segmentation.

    Raises:
        ConfigError: the grid, the classes and the network's output do not fit each other, or ``amp`` is unknown.
        InputError: the grid belongs to another slide, or the slide vanished.
    """
    start = time.perf_counter()
    expects = TileTask(
        task=task, size=grid.size, mpp=grid.mpp, overlap=grid.overlap, mean=_three(mean, "mean"),
        std=_three(std, "std"), classes=tuple(classes), activation=activation,
    )  # fmt: skip
    if batch_size < 1 or threads < 0:
        raise ConfigError("batch_size, threads", f"{batch_size}, {threads}", "use at least 1 and 0")
    grid.require_slide(slide)
    device = torch.device(device)
    tiles = _prepared(network, expects, device, amp)
    stitcher = _TileStitcher(expects, grid, heatmap_mpp, scratch) if task == "segmentation" and len(grid) else None
    probabilities = np.full((len(grid), len(classes)), np.nan, np.float32)
    reasons: dict[int, str] = {}
    seconds = {"waiting": 0.0, "network": 0.0}
    done = 0
    clock = time.perf_counter()
    # Closed at once when anything here raises, so that no reader thread outlives the call.
    with closing(tile_batches(slide, grid, batch_size=batch_size, threads=threads)) as batches:
        for batch in batches:
            seconds["waiting"] += time.perf_counter() - clock
            clock = time.perf_counter()
            reasons.update(batch.failed)
            if len(batch.indices):
                output = _probabilities(tiles, batch.pixels, expects)
                finite = np.isfinite(output).all(tuple(range(1, output.ndim)))
                reasons.update({int(index): "the network's output is not finite" for index in batch.indices[~finite]})
                indices, output = batch.indices[finite], output[finite]
                probabilities[indices] = output if output.ndim == 2 else output.mean((2, 3))
                if stitcher is not None:
                    stitcher.add(indices, output)
            done += len(batch.indices) + len(batch.failed)
            seconds["network"] += time.perf_counter() - clock
            if progress is not None:
                progress(done, len(grid))
            clock = time.perf_counter()
    class_map: ClassMap | None = None
    heatmap: Heatmap | None
    if stitcher is not None:
        class_map, heatmap = stitcher.finish()
    else:
        heatmap = tile_heatmap(grid, probabilities)
    seconds["total"] = time.perf_counter() - start
    failed = [(int(grid.coords[i, 0]), int(grid.coords[i, 1]), reasons[i]) for i in sorted(reasons)]
    return SlidePrediction(
        grid=grid, classes=expects.classes, task=task, activation=activation, probabilities=probabilities,
        failed=failed, heatmap=heatmap if len(failed) < len(grid) else None, class_map=class_map,
        precision=str(tiles.dtype).removeprefix("torch."), device=tiles.device.type, seconds=seconds,
    )  # fmt: skip


def prepare_network(
    network: nn.Module, task: TileTask, *, device: str | torch.device = "cpu", amp: bool | str = "auto"
) -> TileNetwork:
    """Fold a network once for many slides; it keeps its device and precision.

    Args:
        network: as for :func:`predict_slide`.
        task: what it expects of a tile.
        device: where to compute.
        amp: False for float32, ``"bf16"``, or ``"auto"``: bf16 where the hardware computes in it.

    Raises:
        ConfigError: the network cannot run on such tiles, or ``amp`` is unknown.
    """
    device = torch.device(device)
    return TileNetwork(
        network, mean=task.mean, std=task.std, size=task.size, device=device, dtype=_precision(amp, device)
    )


def _prepared(network: nn.Module, expects: TileTask, device: torch.device, amp: bool | str) -> RawTileNetwork:
    if not isinstance(network, RawTileNetwork):
        return prepare_network(network, expects, device=device, amp=amp)
    given, wanted = (network.mean, network.std), (expects.mean, expects.std)
    if given != wanted:
        raise ConfigError("network", f"was prepared with mean and std {given}, not {wanted}", "give the same")
    return network


def _three(values: Sequence[float], name: str) -> tuple[float, float, float]:
    if len(values) != 3:
        raise ConfigError(f"slide task: {name}", f"{list(values)!r} has not three values", "give one per RGB channel")
    return (float(values[0]), float(values[1]), float(values[2]))


def _precision(amp: bool | str, device: torch.device) -> torch.dtype:
    if amp == "auto":
        amp = "bf16" if computes_in_bf16(device) else False
    if amp not in _PRECISIONS:
        raise ConfigError("amp", f"{amp!r} is not a precision for slides", "use false, 'bf16' or 'auto'")
    return _PRECISIONS[amp]


@torch.inference_mode()
def _probabilities(tiles: RawTileNetwork, pixels: NDArray[np.uint8], expects: TileTask) -> NDArray[np.float32]:
    batch = torch.from_numpy(pixels)
    if tiles.device.type == "cuda":
        logits = tiles(batch.pin_memory().to(tiles.device, non_blocking=True))
    else:
        few = max(_CACHED_BYTES * torch.get_num_threads() // batch[0].nbytes, 1)
        parts = [tiles(part.to(tiles.device)) for part in batch.split(few)]
        logits = torch.cat(parts) if all(isinstance(part, torch.Tensor) for part in parts) else parts[0]
    if not isinstance(logits, torch.Tensor):
        raise ConfigError("network", f"gives a {type(logits).__name__}", "a slide needs one tensor of logits")
    wanted: tuple[int, ...] = (len(pixels), len(expects.classes))
    if expects.task == "segmentation":
        wanted += (expects.size, expects.size)
    if tuple(logits.shape) != wanted:
        raise ConfigError(
            "network",
            f"gives {tuple(logits.shape)} for {len(pixels)} tiles of {expects.size} px",
            f"a {expects.task} with {len(expects.classes)} classes needs {wanted}",
        )
    values = logits.softmax(1) if expects.activation == "softmax" else logits.sigmoid()
    return values.cpu().numpy()


class _TileStitcher:
    """Puts a grid's tiles where they belong on the slide's map."""

    def __init__(
        self, expects: TileTask, grid: TileGrid, heatmap_mpp: float | None, scratch: str | Path | None
    ) -> None:
        lattice = Lattice.of(grid)
        pixel = grid.size_level0 / grid.size
        if lattice.regular:
            self._corners = lattice.cells * (grid.size - grid.overlap)
        else:
            self._corners = np.rint((grid.coords - (lattice.x, lattice.y)) / pixel).astype(np.int64)
        reach = self._corners.max(0) + grid.size
        room = np.ceil((np.array(grid.dimensions) - (lattice.x, lattice.y)) / pixel - 1e-6).astype(np.int64)
        width, height = np.maximum(np.minimum(reach, room), 1).tolist()
        wanted = (heatmap_mpp or _SEGMENTATION_HEATMAP_MPP) / grid.mpp
        factor = 2 ** int(np.clip(np.round(np.log2(wanted)), 0, 8))
        while max(grid.dimensions) / (pixel * factor) > _LARGEST_HEATMAP and factor < 256:
            factor *= 2
        self._stitcher = Stitcher(
            width, height, n_classes=len(expects.classes), size=grid.size, overlap=grid.overlap,
            x=lattice.x, y=lattice.y, pixel_level0=pixel, heatmap_factor=factor, folder=scratch,
        )  # fmt: skip

    def add(self, indices: NDArray[np.int64], output: NDArray[np.float32]) -> None:
        """Add tiles, which come from the top of the slide to its bottom."""
        for (left, top), tile in zip(self._corners[indices].tolist(), output, strict=True):
            self._stitcher.finish_above(top)
            self._stitcher.add(tile, left, top)

    def finish(self) -> tuple[ClassMap, Heatmap]:
        return self._stitcher.finish()
