"""Networks in 8-bit integers: post-training static quantization on real data, behind a gate.

Weights are quantized per output channel, activations per tensor over the range that the calibration data make them
take (Jacob et al. 2018, arXiv:1712.05877). Normalization of the image and BatchNorm are folded before, so that a tile
network takes bytes. A file gets its name only if it is about as good as the network in float32: where the data have
labels, its AUC or Dice may be half a point lower; without labels only how often both say the same can be demanded.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from medkd.data.atomic import sync_folder
from medkd.data.volumes import read_volume
from medkd.deploy.bundle import LoadedBundle
from medkd.deploy.calibration import TileSamples, VolumeSamples, tile_samples, volume_samples
from medkd.deploy.export import write_onnx
from medkd.deploy.int8_gate import Gate, compare_tiles, compare_volumes
from medkd.deploy.onnx_network import TASK_KEY, OnnxNetwork, OnnxTiles, require_onnxruntime, task_entry
from medkd.deploy.slide_bundle import slide_task
from medkd.deploy.tile_program import MIDDLE, TileProgram
from medkd.deploy.windows import sample_windows
from medkd.errors import ConfigError
from medkd.wsi.fold import TileNetwork
from medkd.wsi.prediction import TileTask

logger = logging.getLogger(__name__)

_BATCH = 16


@dataclass(frozen=True)
class Int8Export:
    """A finished int8 export.

    Attributes:
        path: the file.
        gate: the comparison that it passed.
        calibrated_on: what with, in words.
        compared_on: what on, in words.
        size_bytes: of the file.
        float32_bytes: of the same program before quantization.
    """

    path: Path
    gate: Gate
    calibrated_on: str
    compared_on: str
    size_bytes: int
    float32_bytes: int


def export_int8(
    bundle: LoadedBundle,
    out: str | Path,
    data: str | Path,
    *,
    slide_mpp: float | None = None,
    dataset_dir: str | Path | None = None,
) -> Int8Export:
    """Write a bundle's network in int8, a tile network as :func:`quantize_tiles`, others as :func:`quantize_volumes`.

    Args:
        bundle: a loaded bundle; if its metadata has an entry ``slide``, its network takes tiles.
        out: the ONNX file to write.
        data: see :func:`~medkd.deploy.calibration.tile_samples` and :func:`~medkd.deploy.calibration.volume_samples`.
        slide_mpp: µm per level-0 pixel of a slide, in place of what it says.
        dataset_dir: where a datalist's paths start, if not at its folder.

    Raises:
        ConfigError: the network cannot be exported so, or the gate refuses; then nothing is written.
        InputError: the data cannot be used.
    """
    require_onnxruntime()
    if bundle.weights.suffix == ".ts":
        raise ConfigError(bundle.weights, "is TorchScript already", "export from a bundle with model.pt")
    if "slide" in bundle.metadata:
        task = slide_task(bundle)
        tiles = tile_samples(data, task, fold=bundle.fold, slide_mpp=slide_mpp, dataset_dir=dataset_dir)
        return quantize_tiles(bundle.network, task, tiles, out)
    volumes = volume_samples(data, fold=bundle.fold, dataset_dir=dataset_dir)
    return quantize_volumes(bundle, volumes, out)


def quantize_tiles(network: nn.Module, task: TileTask, samples: TileSamples, out: str | Path) -> Int8Export:
    """Write a tile network in int8: (B, S, S, 3) uint8 RGB → logits, for ``medkd slide predict`` or ONNX Runtime.

    Args:
        network: (B, 3, S, S) normalized images → (B, K) or (B, K, S, S) logits; stays as it is.
        task: what it expects of a tile.
        samples: real tiles to calibrate with and to compare on.
        out: the ONNX file to write.

    Raises:
        ConfigError: ONNX Runtime is not installed, the network cannot be exported, or the gate refuses; then nothing
            is written.
    """
    require_onnxruntime()
    tiles = TileNetwork(network, mean=task.mean, std=task.std, size=task.size)
    program = TileProgram(tiles).eval()
    batches = [samples.calibration[start : start + _BATCH] for start in range(0, len(samples.calibration), _BATCH)]
    with _workplace(Path(out)) as folder:
        write_onnx(program, torch.from_numpy(samples.calibration[:2]), folder / "float32.onnx", input_name="tiles")
        with _readable(folder):
            quantize_file(folder / "float32.onnx", folder / "int8.onnx", "tiles", batches, bytes_in=program.keeps_bytes)
            _add_metadata(folder / "int8.onnx", {TASK_KEY: task_entry(task)})
        gate = compare_tiles(tiles, OnnxTiles(folder / "int8.onnx"), task, samples)
        return _accept(folder, Path(out), gate, samples.calibrated_on, samples.compared_on)


def quantize_volumes(bundle: LoadedBundle, samples: VolumeSamples, out: str | Path) -> Int8Export:
    """Write a segmentation network in int8: (B, C, *window) float32 → (B, K, *window) logits.

    Args:
        bundle: a loaded bundle.
        samples: real volumes to calibrate with and to compare on.
        out: the ONNX file to write.

    Raises:
        ConfigError: as :func:`quantize_tiles`.
        InputError: a volume cannot be used.
    """
    require_onnxruntime()
    windows = torch.cat([sample_windows(bundle, read_volume(image)) for image in samples.calibration])
    network = bundle.network.cpu().eval()
    with _workplace(Path(out)) as folder:
        write_onnx(network, windows[:2], folder / "float32.onnx", input_name="image")
        with _readable(folder):
            batches = [windows[start : start + 1].numpy() for start in range(len(windows))]
            quantize_file(folder / "float32.onnx", folder / "int8.onnx", "image", batches)
        quantized = dataclasses.replace(bundle, network=OnnxNetwork(folder / "int8.onnx"), device=torch.device("cpu"))
        gate = compare_volumes(bundle, quantized, samples)
        return _accept(folder, Path(out), gate, samples.calibrated_on, samples.compared_on)


def quantize_file(
    source: Path, out: Path, input_name: str, batches: Sequence[npt.NDArray[Any]], *, bytes_in: bool = False
) -> None:
    """Quantize an ONNX file: weights per channel, activations over the range they take on the given input.

    Args:
        source: the float32 file.
        out: the file to write.
        input_name: of the file's only input.
        batches: real input.
        bytes_in: the first convolution takes uint8 input minus 128: the file is to take the bytes there as they are.
    """
    import onnx
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Batches(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            self._left = iter(batches)

        def get_next(self) -> dict[str, npt.NDArray[Any]] | None:
            batch = next(self._left, None)
            return None if batch is None else {input_name: batch}

    prepared = out.with_suffix(".prepared.onnx")
    with _quiet():
        quant_pre_process(str(source), str(prepared))
        model = onnx.load(str(prepared))
        options: dict[str, Any] = {}
        if bytes_in:
            first = next(node for node in model.graph.node if node.op_type == "Conv").input[0]
            exact = {"scale": np.array([1], np.float32), "zero_point": np.array([MIDDLE], np.uint8)}
            options["TensorQuantOverrides"] = {first: [exact | {"quant_type": quantization.QuantType.QUInt8}]}
        quantization.quantize_static(
            str(prepared), str(out), Batches(), quant_format=quantization.QuantFormat.QDQ, per_channel=True,
            activation_type=quantization.QuantType.QUInt8, weight_type=quantization.QuantType.QInt8,
            calibrate_method=quantization.CalibrationMethod.MinMax, extra_options=options,
        )  # fmt: skip
        model = onnx.load(str(out))
        _keep_logits_exact(model)
        if bytes_in:
            _hand_on_bytes(model, first)
        onnx.checker.check_model(model)
        onnx.save(model, str(out))


def _hand_on_bytes(model: Any, first: str) -> None:
    """Take out the conversion to float, the subtraction of 128 and the quantization that undoes both."""
    graph = model.graph
    cast = next(node for node in graph.node if node.op_type == "Cast")
    middle = next(node for node in graph.node if node.op_type == "Sub" and node.input[0] == cast.output[0])
    quantized = next(node for node in graph.node if node.op_type == "QuantizeLinear" and node.input[0] == first)
    replaced = {middle.output[0]: cast.input[0], quantized.output[0]: quantized.input[0]}
    for node in graph.node:
        for place, name in enumerate(node.input):
            node.input[place] = replaced.get(name, name)
    for node in (cast, middle, quantized):
        graph.node.remove(node)
    used = {name for node in graph.node for name in node.input}
    for tensor in [tensor for tensor in graph.initializer if tensor.name not in used]:
        graph.initializer.remove(tensor)
    del graph.value_info[:]  # of another type now


def _keep_logits_exact(model: Any) -> None:
    """Leave out the quantization of what a last linear layer gives: 256 logits would tie many tiles."""
    graph = model.graph
    made_by = {name: node for node in graph.node for name in node.output}
    chain = [made_by[graph.output[0].name]]
    while len(chain) < 3 and chain[-1].input and chain[-1].input[0] in made_by:
        chain.append(made_by[chain[-1].input[0]])
    if [node.op_type for node in chain] == ["DequantizeLinear", "QuantizeLinear", "Gemm"]:
        chain[2].output[0] = chain[0].output[0]
        graph.node.remove(chain[0])
        graph.node.remove(chain[1])


def _add_metadata(file: Path, entries: dict[str, str]) -> None:
    import onnx

    model = onnx.load(str(file))
    onnx.helper.set_model_props(model, entries)
    onnx.save(model, str(file))


@contextlib.contextmanager
def _workplace(out: Path) -> Iterator[Path]:
    """A folder beside ``out``, gone afterwards."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as folder:
        yield Path(folder)


@contextlib.contextmanager
def _readable(folder: Path) -> Iterator[None]:
    """Turn what the quantizer raises, which is anything, into one line."""
    try:
        yield
    except Exception as error:
        logger.debug("quantization failed", exc_info=True)
        reason = (str(error).replace(str(folder), "").strip().splitlines() or [type(error).__name__])[0][:160]
        raise ConfigError("--int8", f"the network cannot be quantized ({reason})", "export it in float32") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the quantizer, which logs advice to the root logger."""
    root = logging.getLogger()
    former = root.level
    root.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        root.setLevel(former)


def _accept(folder: Path, out: Path, gate: Gate, calibrated_on: str, compared_on: str) -> Int8Export:
    """Give the file its name if the gate lets it pass.

    Raises:
        ConfigError: It does not.
    """
    if not gate.passed:
        if gate.drop is not None:
            problem = f"{gate.metric} falls from {gate.float32:.4f} in float32 to {gate.int8:.4f} in int8"
        else:
            problem = f"int8 and float32 give the same class to {100 * gate.agreement:.2f} % only"
        raise ConfigError(
            out, f"{problem} ({compared_on}): not written", "calibrate with more and other data, or stay in float32"
        )
    file = folder / "int8.onnx"
    file.chmod(0o644)
    sizes = (file.stat().st_size, (folder / "float32.onnx").stat().st_size)
    os.replace(file, out)
    sync_folder(out.parent)
    return Int8Export(out, gate, calibrated_on, compared_on, *sizes)
