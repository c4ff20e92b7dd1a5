"""Exported ONNX files as networks, computed by ONNX Runtime on the CPU."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from medkd.deploy.slide_bundle import read_slide_entry
from medkd.errors import ConfigError, InputError
from medkd.wsi.fold import RawTileNetwork
from medkd.wsi.prediction import TileTask

TASK_KEY = "medkd.slide"  # of the file's metadata: what a tile network expects, as in a bundle's metadata.json


class OnnxNetwork(nn.Module):
    """An ONNX file with one input and one output: (B, C, *S) float32 → what it gives, on the CPU.

    Args:
        file: the file.

    Raises:
        ConfigError: ONNX Runtime is not installed.
        InputError: the file cannot be used.
    """

    def __init__(self, file: str | Path) -> None:
        super().__init__()
        self._session = open_session(file)
        self._input = self._session.get_inputs()[0].name

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """The file's output, on the CPU."""
        values = np.ascontiguousarray(torch.Tensor(images.detach().cpu()).numpy())
        return torch.from_numpy(self._session.run(None, {self._input: values})[0])


class OnnxTiles(RawTileNetwork):
    """A tile network that ``medkd export --int8`` wrote: (B, S, S, 3) uint8 RGB → float32 logits.

    Args:
        file: the file.

    Attributes:
        task: what it expects of a tile and what its outputs mean.

    Raises:
        ConfigError: ONNX Runtime is not installed, or the file's description of its task is not valid.
        InputError: the file cannot be used.
    """

    def __init__(self, file: str | Path) -> None:
        super().__init__()
        self._session = open_session(file)
        self.task = _read_task(self._session, Path(file))
        self.mean, self.std, self.size = self.task.mean, self.task.std, self.task.size
        self.device, self.dtype = torch.device("cpu"), torch.int8

    def forward(self, tiles: torch.Tensor) -> torch.Tensor:
        """(B, S, S, 3) uint8 → float32 logits.

        Raises:
            ConfigError: tiles of another size than the file is for.
        """
        if tuple(tiles.shape[1:]) != (self.size, self.size, 3):
            side = "×".join(str(value) for value in tiles.shape[1:])
            raise ConfigError("network", f"is for tiles of {self.size} px, not {side}", "lay tiles of that size")
        return torch.from_numpy(self._session.run(None, {"tiles": tiles.cpu().contiguous().numpy()})[0])


def open_session(file: str | Path) -> Any:
    """An ONNX Runtime session on the CPU with as many threads as torch uses.

    Raises:
        ConfigError: ONNX Runtime is not installed.
        InputError: the file cannot be used.
    """
    file = Path(file)
    if not file.is_file():
        raise InputError(file, "does not exist", "check the path")
    onnxruntime = require_onnxruntime()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors
    try:
        return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        reason = str(error).strip().splitlines()[0][:160]
        raise InputError(file, f"is no ONNX file that can be run ({reason})", "export it again") from None


def require_onnxruntime() -> Any:
    """The package onnxruntime.

    Raises:
        ConfigError: It is not installed.
    """
    try:
        import onnxruntime
    except ImportError:
        raise ConfigError("onnxruntime", "is not installed", "run `pip install onnxruntime`") from None
    return onnxruntime


def task_entry(task: TileTask) -> str:
    """A task as JSON, for the file's metadata."""
    return json.dumps(asdict(task))


def _read_task(session: Any, file: Path) -> TileTask:
    text = session.get_modelmeta().custom_metadata_map.get(TASK_KEY)
    inputs = {entry.name: entry.type for entry in session.get_inputs()}
    if text is None or inputs != {"tiles": "tensor(uint8)"}:
        raise InputError(file, "does not say what it expects of a tile", "write it with `medkd export --int8`")
    try:
        entry = json.loads(text)
    except ValueError:
        raise InputError(file, f"its {TASK_KEY} is not JSON", "export it again") from None
    return read_slide_entry({"slide": entry}, file)
