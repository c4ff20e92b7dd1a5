"""Tiles of a slide through a small network, from the file to probabilities, beside the loops that people run today.

Run ``OMP_NUM_THREADS=1 python benchmarks/speed/slide_inference.py [SLIDE …]``. All arms read the same 256 px tiles of
the same slide with the same 0.22 M student, in one process, one thread, no workers, in interleaved rounds; process CPU
time, medians. By default the slides are the demo slide, which medkd makes, and the small Aperio slide of the real data
where that is. It prints one JSON line with the ratios and the largest difference of a probability between the arms.

- ``medkd``: ``predict_slide``, everything from opening the slide on; bf16 where the hardware computes in it. As in the
  other arms the network is ready before the clock starts; ``ms_to_prepare`` is what folding it takes, once.
- ``medkd_float32``: the same in float32.
- ``medkd_int8``: the same with the network in 8-bit integers, as ``medkd export --int8`` writes it, calibrated with the
  pictures that the student was trained on; only where the real data are.
- ``monai``: ``PatchWSIDataset(reader="OpenSlide")``, a DataLoader, the network in float32.
- ``wsinfer_loop``: not the package (it needs torchvision) but its loop, acted out: OpenSlide read_region per tile, RGB,
  PIL resize, tensor, normalization, a DataLoader, TorchScript in float32.
- ``tiatoolbox_loop``: not the package (it needs torchvision) but the loop of its PatchPredictor, acted out; see
  ``run_tiatoolbox_loop``.
- ``reading``: medkd's tiles alone, without a network.

``bf16_difference`` is bf16 against float32 with the trained student of the bundle tissue_classification, and
``int8_difference`` the same of int8; ``decoder_difference`` is medkd in float32 against MONAI, which decodes JPEG with
another library. ``int8_gate`` says what int8 costs on labeled tiles of the pictures that the shipped student never saw,
which calibration did not see either: the AUC in float32 and in int8, for the 256 px file that is timed and for the
96 px that the student is for.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import dask.array
import numpy as np
import openslide
import torch
from monai.bundle import ConfigParser
from monai.data import PatchWSIDataset
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset

from medkd.data import demo_slide
from medkd.data.tile_images import read_tile_image, read_tile_mask
from medkd.deploy.bundle import load_bundle
from medkd.deploy.calibration import MOST_TILES, TileSamples
from medkd.deploy.int8_gate import Gate
from medkd.deploy.onnx_network import OnnxTiles
from medkd.deploy.quantize import quantize_tiles
from medkd.nets.precision import computes_in_bf16
from medkd.wsi.grid import TileGrid
from medkd.wsi.patches import cut_patches
from medkd.wsi.predict import TileTask, predict_slide, prepare_network
from medkd.wsi.slides import Slide
from medkd.wsi.tile_stream import tile_batches

GOALS = {"monai": 8.0, "wsinfer_loop": 4.0, "tiatoolbox_loop": 8.0}
INT8_GOAL = 11.0  # against MONAI
AGREEMENT = 0.02  # largest difference of a probability between arms, of which two use other JPEG decoders
SIZE, BATCH = 256, 32
CLASSES = ("normal", "tumor")
MEAN, STD = (0.6, 0.45, 0.7), (0.2, 0.2, 0.15)
ROOT = Path(__file__).resolve().parents[2]
BUNDLE = ROOT / "bundles" / "tissue_classification"
DATA = Path(os.environ.get("MEDKD_DATA", ROOT.parent / "shared" / "data"))
REAL_SLIDE = DATA / "slides" / "cmu_small_region.svs"
# The pictures of benchmarks/tissue_classification.py, µm per pixel, and the fold that the shipped student never saw.
PICTURES = {"camelyon_tiles": 0.5, "bcss_rois": 0.25}
FOLDS, HELD_OUT = 3, 0


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


class TiatoolboxTiles(Dataset[dict[str, Any]]):
    """Tiles as TIAToolbox's WSIPatchDataset reads them; the slide stays open."""

    def __init__(self, path: Path, corners: list[tuple[int, int]], side: int) -> None:
        self.slide, self.corners, self.side = openslide.OpenSlide(path), corners, side
        self.mean, self.std = torch.tensor(MEAN), torch.tensor(STD)

    def __len__(self) -> int:
        return len(self.corners)

    def __getitem__(self, index: int) -> dict[str, Any]:
        x, y = self.corners[index]
        pixels = np.array(self.slide.read_region((x, y), 0, (self.side, self.side)))
        width, height = self.slide.dimensions
        assert 0 <= x <= width - self.side, "inside the slide nothing is padded"
        assert 0 <= y <= height - self.side, "inside the slide nothing is padded"
        if self.side != SIZE:
            shrinks = self.side > SIZE
            pixels = cv2.resize(pixels, (SIZE, SIZE), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC)
        tile = Image.fromarray(pixels).convert("RGBA")
        ground = Image.fromarray(np.full((SIZE, SIZE, 4), 255, np.uint8))
        ground.alpha_composite(tile)
        levels = torch.from_numpy(np.array(ground.convert("RGB"))).float().div(255)
        return {"image": (levels - self.mean) / self.std, "coords": np.array([x, y, x + self.side, y + self.side])}


def run_tiatoolbox_loop(path: Path, grid: TileGrid, network: nn.Module) -> np.ndarray:
    """Probabilities (N, 2) of the corners in order, as TIAToolbox's PatchPredictor gets them on whole slides.

    Acted out from WSIPatchDataset, ``infer_patches``, ``_infer_batch`` and ``OpenSlideWSIReader.read_bounds`` of
    https://github.com/TissueImageAnalytics/tiatoolbox/tree/6fc8a2ec4fc6076d4c573568fa23c79dba1b0471/tiatoolbox
    (models/dataset/dataset_abc.py, models/engine/engine_abc.py, models/architecture/vanilla.py,
    wsicore/wsireader.py): a pixel region by OpenSlide, a composite with white, the normalization per tile, collation
    by torch's DataLoader, channels first per batch, softmax, dask arrays. Left out, to its advantage: its tissue mask,
    its choice of a level for every tile, its result files.
    """
    corners = [(int(x), int(y)) for x, y in grid.coords]
    loader = DataLoader(TiatoolboxTiles(path, corners, round(grid.size_level0)), batch_size=BATCH)
    found, places = [], []
    for batch in loader:
        images = batch["image"].to(device="cpu", dtype=torch.float32).permute(0, 3, 1, 2).contiguous()
        with torch.inference_mode():
            output = network(images).softmax(1)
        found.append(dask.array.from_array(output.cpu().numpy()))
        places.append(dask.array.from_array(np.array(batch["coords"])))
    probabilities, coordinates = dask.array.concatenate(found), dask.array.concatenate(places)
    dask.compute(probabilities.argmax(axis=1), coordinates)
    return probabilities.compute()


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


def labeled_tiles(size: int, *, held_out: bool) -> tuple[np.ndarray, np.ndarray]:
    """(N, S, S, 3) tiles and (N,) labels of the pictures that the shipped student was trained on, or never saw."""
    tiles: list[np.ndarray] = []
    labels: list[int] = []
    for folder, mpp in PICTURES.items():
        files = sorted((DATA / folder / "images").glob("*.jpg"))
        for number, file in enumerate(files):
            if (number * FOLDS // len(files) == HELD_OUT) != held_out:
                continue
            image = read_tile_image(file)[..., ::-1]  # both are stored with red and blue swapped
            mask = read_tile_mask(DATA / folder / "masks" / file.name, threshold=127)
            if mpp != 0.5:
                shape = tuple(round(side * mpp / 0.5) for side in mask.shape[::-1])
                image = cv2.resize(image, shape, interpolation=cv2.INTER_AREA)
                mask = cv2.resize(mask, shape, interpolation=cv2.INTER_NEAREST)
            for _, _, label, tile in cut_patches(image, mask, size=size, center=32, step=96):
                tiles.append(np.ascontiguousarray(tile))
                labels.append(label)
    return np.stack(tiles), np.array(labels)


def quantized(network: nn.Module, size: int, folder: Path) -> tuple[OnnxTiles, Gate]:
    """The student in int8 and how it compares; calibrated with pictures it was trained on, compared on others."""
    training, _ = labeled_tiles(size, held_out=False)
    training = training[np.linspace(0, len(training) - 1, min(len(training), MOST_TILES)).round().astype(int)]
    tiles, labels = labeled_tiles(size, held_out=True)
    task = TileTask(task="classification", size=size, mpp=0.5, mean=MEAN, std=STD, classes=CLASSES)
    samples = TileSamples(training, tiles, labels, "training pictures", "held-out pictures")
    result = quantize_tiles(network, task, samples, folder / f"int8_{size}.onnx")
    return OnnxTiles(result.path), result.gate


def measure(arms: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median process CPU seconds of each arm over interleaved rounds."""
    times: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(rounds):
        for name, arm in arms.items():
            start = time.process_time()
            arm()
            times[name].append(time.process_time() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def compare(path: Path, rounds: int, network: nn.Module, trained: bool, int8: OnnxTiles | None) -> dict[str, Any]:
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
        "tiatoolbox_loop": lambda: run_tiatoolbox_loop(path, grid, network),
        "reading": lambda: read_alone(path, grid),
        "to_prepare": lambda: prepare_network(network, task),
    }
    if int8 is not None:
        arms["medkd_int8"] = lambda: run_medkd(path, grid, int8)
    found = {name: arm() for name, arm in arms.items()}  # also warms everything up

    def differs(one: str, other: str) -> float:
        return round(float(np.abs(found[one] - found[other]).max()), 6)

    seconds = measure(arms, rounds)
    to_prepare = seconds.pop("to_prepare")
    ratio = {peer: round(seconds[peer] / seconds["medkd"], 2) for peer in GOALS}
    result = {
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
    if int8 is not None:
        result["ratio_int8"] = {peer: round(seconds[peer] / seconds["medkd_int8"], 2) for peer in GOALS}
        result["int8_difference"] = differs("medkd_int8", "medkd_float32")
        result["goals_met"]["int8"] = result["ratio_int8"]["monai"] >= INT8_GOAL
    return result


def describe(gate: Gate) -> dict[str, Any]:
    rounded = {name: round(value, 5) for name, value in dataclasses.asdict(gate).items() if isinstance(value, float)}
    return rounded | {"metric": gate.metric, "drop": round(gate.drop or 0, 5), "tiles": gate.compared}


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
        network, trained = student()
        int8, results = None, {}
        if trained and all((DATA / name).is_dir() for name in PICTURES):
            made = {size: quantized(network, size, Path(folder)) for size in (SIZE, 96)}
            int8 = made[SIZE][0]
            results["int8_gate"] = {size: describe(gate) for size, (_, gate) in made.items()}
        results |= {path.stem: compare(path, options.rounds, network, trained, int8) for path in slides}
    print(json.dumps({"benchmark": "slide_inference", "rounds": options.rounds} | results))


if __name__ == "__main__":
    main()
