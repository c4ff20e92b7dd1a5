"""A bundle as a WSInfer model, which WSInfer and QuPath's WSInfer extension run: config.json and a TorchScript file.

The keys of config.json are those of the WSInfer model zoo's published schema (spec_version 1.0). WSInfer and QuPath
apply the softmax themselves, so the network gives logits.
"""

from __future__ import annotations

import copy
import json
import logging
import os
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import torch

from medkd.data.atomic import atomic_write, sync_folder
from medkd.errors import ConfigError

if TYPE_CHECKING:
    from medkd.wsi.prediction import TileTask

logger = logging.getLogger(__name__)

SPEC_VERSION = "1.0"
CONFIG, WEIGHTS = "config.json", "torchscript_model.pt"
_TOLERANCE = 1e-4  # allowed between the export and the network, as a share of the largest logit
_TYPES: dict[str, type | tuple[type, ...]] = {
    "spec_version": str,
    "architecture": str,
    "num_classes": int,
    "patch_size_pixels": int,
    "spacing_um_px": (int, float),
    "class_names": list,
    "transform": list,
}  # the schema's required keys
_TRANSFORMS = ("Resize", "ToTensor", "Normalize")


@dataclass(frozen=True)
class WsinferExport:
    """What was written, and the proof that it equals the network.

    Attributes:
        config: config.json.
        weights: the TorchScript file: (B, 3, S, S) normalized images → (B, K) logits.
        largest_difference: between its logits and the network's.
        largest_logit: of the network, for scale.
        tiles: how many tiles of a real tissue photograph that was measured on.
    """

    config: Path
    weights: Path
    largest_difference: float
    largest_logit: float
    tiles: int


def export_wsinfer(bundle: str | Path, out: str | Path, *, trust: str | None = None) -> WsinferExport:
    """Write a bundle's network as a WSInfer model.

    Args:
        bundle: a bundle whose metadata says that it classifies tiles.
        out: the folder to write ``config.json`` and ``torchscript_model.pt`` to; made if absent.
        trust: SHA-256 of all files of the bundle; needed only for code beyond the allow-list.

    Raises:
        ConfigError: the bundle does not classify tiles with softmax, cannot be exported, or the export differs.
    """
    from medkd.deploy.bundle import load_bundle
    from medkd.deploy.slide_bundle import slide_task

    loaded = load_bundle(bundle, trust=trust)
    task = slide_task(loaded)
    if task.task != "classification":
        raise ConfigError(loaded.path, f"is a {task.task}", "WSInfer runs tile classifiers only")
    if task.activation != "softmax":
        raise ConfigError(loaded.path, f"uses {task.activation}", "WSInfer applies softmax: train it with softmax")
    config = wsinfer_config(task, architecture=type(loaded.network).__name__, name=loaded.name)
    tiles = normalized_tiles(task)
    network = copy.deepcopy(loaded.network).cpu().eval()
    with torch.inference_mode():
        expected = network(tiles)
    if tuple(expected.shape) != (len(tiles), len(task.classes)):
        raise ConfigError(
            loaded.path, f"gives {tuple(expected.shape)} for {len(tiles)} tiles", f"name its classes: {task.classes}"
        )
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    difference = _write_torchscript(network, tiles, expected, out / WEIGHTS)
    with atomic_write(out / CONFIG) as file:
        json.dump(config, file, indent=4, ensure_ascii=False)
        file.write("\n")
    return WsinferExport(out / CONFIG, out / WEIGHTS, difference, float(expected.abs().max()), len(tiles))


def wsinfer_config(task: TileTask, *, architecture: str, name: str) -> dict[str, Any]:
    """The content of config.json.

    Raises:
        ConfigError: the published schema does not allow it.
    """
    config = {
        "spec_version": SPEC_VERSION,
        "name": name,
        "architecture": architecture,
        "num_classes": len(task.classes),
        "patch_size_pixels": task.size,
        "spacing_um_px": task.mpp,
        "class_names": list(task.classes),
        "transform": [
            {"name": "Resize", "arguments": {"size": task.size}},
            {"name": "ToTensor"},
            {"name": "Normalize", "arguments": {"mean": list(task.mean), "std": list(task.std)}},
        ],
    }
    check_wsinfer_config(config)
    return config


def check_wsinfer_config(config: dict[str, Any]) -> None:
    """Check a config.json against the rules of the zoo's published schema.

    Raises:
        ConfigError: a key is missing or its value is not allowed.
    """
    for key, kind in _TYPES.items():
        if key not in config:
            raise ConfigError(CONFIG, f"{key} is missing", "add it")
        if not isinstance(config[key], kind) or isinstance(config[key], bool):
            raise ConfigError(CONFIG, f"{key} is {config[key]!r}", f"give {kind}")
    names, transform = config["class_names"], config["transform"]
    rules = {
        "spec_version": config["spec_version"] == SPEC_VERSION,
        "num_classes": config["num_classes"] >= 1 and config["num_classes"] == len(names),
        "patch_size_pixels": config["patch_size_pixels"] >= 1,
        "spacing_um_px": config["spacing_um_px"] > 0,
        "class_names": all(isinstance(name, str) for name in names) and len(set(names)) == len(names),
        "transform": all(
            isinstance(step, dict)
            and step.get("name") in _TRANSFORMS
            and set(step) <= {"name", "arguments"}
            and isinstance(step.get("arguments", {}), dict)
            for step in transform
        ),
    }
    for key, fine in rules.items():
        if not fine:
            raise ConfigError(CONFIG, f"{key} is {config[key]!r}", "see the WSInfer model zoo's schema")


def normalized_tiles(task: TileTask) -> torch.Tensor:
    """(4, 3, S, S) normalized tiles of a real tissue photograph, turned four ways."""
    from skimage.data import immunohistochemistry

    photograph = immunohistochemistry()
    tile = cv2.resize(photograph, (task.size, task.size), interpolation=cv2.INTER_AREA)
    turned = np.stack([np.rot90(tile, turns) for turns in range(4)])
    levels = torch.from_numpy(turned).permute(0, 3, 1, 2).float() / 255
    return (levels - torch.tensor(task.mean)[:, None, None]) / torch.tensor(task.std)[:, None, None]


def _write_torchscript(network: torch.nn.Module, tiles: torch.Tensor, expected: torch.Tensor, path: Path) -> float:
    """Write the network and return the largest difference of what was written; it gets its name only if it agrees."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".partial")
    os.close(descriptor)
    temporary = Path(name)
    try:
        torch.jit.save(_as_program(network, tiles), str(temporary))
        written = torch.jit.load(str(temporary), map_location="cpu").eval()
        with torch.no_grad():
            found = torch.cat([written(tiles[:1]), written(tiles[1:])])  # any batch size
        difference = float((found - expected).abs().max())
        if not difference <= _TOLERANCE * max(float(expected.abs().max()), 1.0):
            raise ConfigError(path, f"the export differs from the network by {difference:.3g}", "export it otherwise")
        temporary.chmod(0o644)
        os.replace(temporary, path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)
    return difference


def _as_program(network: torch.nn.Module, tiles: torch.Tensor) -> torch.jit.ScriptModule:
    if isinstance(network, torch.jit.ScriptModule):
        return network
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return torch.jit.script(network)
        except Exception as error:
            logger.info("cannot be scripted (%s): traced instead", str(error).strip().splitlines()[0][:160])
        try:
            return torch.jit.trace(network, tiles, check_trace=False)
        except Exception as error:
            raise ConfigError("network_def", f"cannot be made TorchScript ({error})", "simplify its forward") from error
