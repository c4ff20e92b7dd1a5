"""Tiles of a slide through a small network, from the file to probabilities, beside the loops that people run today.

Run ``OMP_NUM_THREADS=1 python benchmarks/speed/slide_inference.py [SLIDE …]``. All arms read the same 256 px tiles of
the same slide with the same 0.22 M student, in one process, one thread, no workers, in interleaved rounds; process CPU
time, medians. By default the slides are the demo slide, which medkd makes, and the small Aperio slide of the real data
where that is. It prints one JSON line with the ratios and the largest difference of a probability between the arms.

- ``medkd``: ``predict_slide``, everything from opening the slide on; bf16 where the hardware computes in it. As in the
  other arms the network is ready before the clock starts; ``ms_to_prepare`` is what folding it takes, once.
- ``medkd_float32``: the same in float32.
- ``monai``: ``PatchWSIDataset(reader="OpenSlide")``, a DataLoader, the network in float32.
- ``wsinfer_loop``: not the package (it needs torchvision) but its loop, acted out: OpenSlide read_region per tile, RGB,
  PIL resize, tensor, normalization, a DataLoader, TorchScript in float32.
- ``reading``: medkd's tiles alone, without a network.

``bf16_difference`` is bf16 against float32 with the trained student of the bundle tissue_classification;
``decoder_difference`` is medkd in float32 against MONAI, which decodes JPEG with another library.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import openslide
import torch
from monai.bundle import ConfigParser
from monai.data import PatchWSIDataset
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset

from medkd.data import demo_slide
from medkd.deploy.bundle import load_bundle
from medkd.nets.precision import computes_in_bf16
from medkd.wsi.grid import TileGrid
from medkd.wsi.predict import TileTask, predict_slide, prepare_network
from medkd.wsi.slides import Slide
from medkd.wsi.tile_stream import tile_batches

GOALS = {"monai": 8.0, "wsinfer_loop": 4.0}
AGREEMENT = 0.02  # largest difference of a probability between arms, of which two use other JPEG decoders
SIZE, BATCH = 256, 32
CLASSES = ("normal", "tumor")
MEAN, STD = (0.6, 0.45, 0.7), (0.2, 0.2, 0.15)
ROOT = Path(__file__).resolve().parents[2]
BUNDLE = ROOT / "bundles" / "tissue_classification"
REAL_SLIDE = Path(os.environ.get("MEDKD_DATA", ROOT.parent / "shared" / "data")) / "slides" / "cmu_small_region.svs"


def student() -> tuple[nn.Module, bool]:
    """The student of the bundle tissue_classification and whether it is trained."""
    torch.manual_seed(0)
    if (BUNDLE / "models").is_dir() and any((BUNDLE / "models").glob("model.*")):
        return load_bundle(BUNDLE).network, True
    parser = ConfigParser(json.loads((BUNDLE / "configs" / "inference.json").read_text()))
    return parser.get_parsed_content("network_def").eval(), False


class OpenSlideTiles(Dataset[torch.Tensor]):
    """Tiles as wsinfer reads them; the slide stays open."""

    def __init__(self, path: Path, corners: list[tuple[int, int]], side: int) -> None:
        self.slide, self.corners, self.side = openslide.OpenSlide(path), corners, side
        self.mean, self.std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]

    def __len__(self) -> int:
        return len(self.corners)

    def __getitem__(self, index: int) -> torch.Tensor:
        tile = self.slide.read_region(self.corners[index], 0, (self.side, self.side)).convert("RGB")
        tile = tile.resize((SIZE, SIZE), Image.Resampling.BICUBIC)
        levels = torch.from_numpy(np.array(tile)).permute(2, 0, 1).contiguous().float().div(255)
        return (levels - self.mean) / self.std


def run_wsinfer_loop(path: Path, grid: TileGrid, network: nn.Module) -> np.ndarray:
    """Probabilities (N, 2) of the corners in order."""
    corners = [(int(x), int(y)) for x, y in grid.coords]
    loader = DataLoader(OpenSlideTiles(path, corners, round(grid.size_level0)), batch_size=BATCH)
    with torch.no_grad():
        return torch.cat([network(batch).softmax(1) for batch in loader]).numpy()


def run_monai(path: Path, grid: TileGrid, network: nn.Module) -> np.ndarray:
    """Probabilities (N, 2) of the corners in order."""
    # MONAI says (row, column), and the corner of the tile where center_location is False.
    data = [{"image": str(path), "location": (int(y), int(x))} for x, y in grid.coords]
    tiles = PatchWSIDataset(
        data,
        patch_size=round(grid.size_level0),
        patch_level=0,
        include_label=False,
        center_location=False,
        reader="OpenSlide",
    )
    mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
    found = []
    with torch.no_grad():
        for batch in DataLoader(tiles, batch_size=BATCH):
            images = (batch["image"].as_tensor().float() / 255 - mean) / std
            found.append(network(images).softmax(1))
    return torch.cat(found).numpy()


def run_medkd(path: Path, grid: TileGrid, network: nn.Module) -> np.ndarray:
    """Probabilities (N, 2) of the corners in order."""
    with Slide(path) as slide:
        return predict_slide(
            network, slide, grid, classes=CLASSES, mean=MEAN, std=STD, batch_size=BATCH, threads=0
        ).probabilities


def read_alone(path: Path, grid: TileGrid) -> None:
    with Slide(path) as slide:
        for _ in tile_batches(slide, grid, batch_size=BATCH, threads=0):
            pass


def measure(arms: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median process CPU seconds of each arm over interleaved rounds."""
    times: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(rounds):
        for name, arm in arms.items():
            start = time.process_time()
            arm()
            times[name].append(time.process_time() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def compare(path: Path, rounds: int) -> dict[str, Any]:
    network, trained = student()
    with Slide(path) as slide:
        grid = TileGrid.build(slide, size=SIZE, mpp=slide.mpp, min_tissue=0, border="drop")
    task = TileTask(task="classification", size=SIZE, mpp=grid.mpp, mean=MEAN, std=STD, classes=CLASSES)
    low, exact = (prepare_network(network, task, amp=amp) for amp in ("auto", False))
    program = torch.jit.trace(network, torch.zeros(1, 3, SIZE, SIZE))
    arms: dict[str, Callable[[], Any]] = {
        "medkd": lambda: run_medkd(path, grid, low),
        "medkd_float32": lambda: run_medkd(path, grid, exact),
        "monai": lambda: run_monai(path, grid, network),
        "wsinfer_loop": lambda: run_wsinfer_loop(path, grid, program),
        "reading": lambda: read_alone(path, grid),
        "to_prepare": lambda: prepare_network(network, task),
    }
    found = {name: arm() for name, arm in arms.items()}  # also warms everything up

    def differs(one: str, other: str) -> float:
        return round(float(np.abs(found[one] - found[other]).max()), 6)

    seconds = measure(arms, rounds)
    to_prepare = seconds.pop("to_prepare")
    ratio = {peer: round(seconds[peer] / seconds["medkd"], 2) for peer in GOALS}
    return {
        "tiles": len(grid),
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "trained": trained,
        "bf16": computes_in_bf16(torch.device("cpu")),
        "ms_per_tile": {name: round(1e3 * value / len(grid), 3) for name, value in seconds.items()},
        "ms_to_prepare": round(1e3 * to_prepare, 1),
        "ratio": ratio,
        "ratio_float32": {peer: round(seconds[peer] / seconds["medkd_float32"], 2) for peer in GOALS},
        "bf16_difference": differs("medkd", "medkd_float32"),
        "decoder_difference": differs("medkd_float32", "monai"),
        "peers_difference": differs("monai", "wsinfer_loop"),
        "goals_met": {peer: ratio[peer] >= goal for peer, goal in GOALS.items()}
        | {"outputs_agree": max(differs("medkd", peer) for peer in GOALS) <= AGREEMENT},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("slide", nargs="*", type=Path, help="slides that OpenSlide opens")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        slides = options.slide or [demo_slide(Path(folder) / "demo.tiff", tiles=16)]
        if not options.slide and REAL_SLIDE.is_file():
            slides.append(REAL_SLIDE)
        results = {path.stem: compare(path, options.rounds) for path in slides}
    print(json.dumps({"benchmark": "slide_inference", "rounds": options.rounds} | results))


if __name__ == "__main__":
    main()
