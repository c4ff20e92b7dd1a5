"""Exports of a bundle's network that are proven equal to it on real input before they get their name."""

from __future__ import annotations

import contextlib
import copy
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from medkd.data.atomic import sync_folder
from medkd.data.volumes import Volume
from medkd.deploy.bundle import LoadedBundle
from medkd.deploy.windows import sample_volume, sample_windows
from medkd.errors import ConfigError

logger = logging.getLogger(__name__)

Format = Literal["torchscript", "onnx", "pt2"]
SUFFIXES: dict[Format, str] = {"torchscript": ".ts", "onnx": ".onnx", "pt2": ".pt2"}
_TOLERANCE = 1e-3  # largest difference allowed, as a share of the largest logit
_AGREEMENT = 0.999  # smallest share of voxels whose class must be the same


@dataclass(frozen=True)
class Export:
    """A finished export and the proof that it equals the network.

    Attributes:
        path: the file.
        format: which format.
        largest_difference: between its logits and the network's, over all windows.
        largest_logit: of the network, for scale.
        agreement: share of voxels with the same class.
        windows: (N, C, *size) of what was compared.
        image: the real image it was compared on.
        size_bytes: of the file.
    """

    path: Path
    format: Format
    largest_difference: float
    largest_logit: float
    agreement: float
    windows: tuple[int, ...]
    image: Path
    size_bytes: int


def export_model(
    bundle: LoadedBundle, out: str | Path, *, output_format: Format, image: Volume | None = None
) -> Export:
    """Export a bundle's network: image window in, logits out, any batch size.

    The export is loaded again from disk and compared with the network on windows of a real image. Only an export that
    agrees gets its name.

    Args:
        bundle: a loaded bundle.
        out: the file to write.
        output_format: ``torchscript``, ``onnx`` or ``pt2`` (torch.export).
        image: the image to compare on; MNI152 by default.

    Raises:
        ConfigError: the network cannot be exported so, or the export differs from it.
    """
    out = Path(out)
    if output_format not in get_args(Format):
        raise ConfigError("--format", f"{output_format} is unknown", f"use one of {', '.join(get_args(Format))}")
    if bundle.weights.suffix == ".ts" and output_format != "torchscript":
        raise ConfigError(bundle.weights, "is TorchScript already", "export from a bundle with model.pt")
    volume = image or sample_volume()
    windows = sample_windows(bundle, volume)
    network = copy.deepcopy(bundle.network).cpu().eval()
    with torch.inference_mode():
        expected = network(windows)
    out.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=out.parent, prefix=f".{out.name}.", suffix=SUFFIXES[output_format])
    os.close(descriptor)
    temporary = Path(name)
    try:
        _WRITERS[output_format](network, windows, temporary)
        found = _READERS[output_format](temporary)(windows)
        largest = float((found - expected).abs().max())
        scale = float(expected.abs().max())
        agreement = float((found.argmax(1) == expected.argmax(1)).float().mean())
        if not largest <= _TOLERANCE * max(scale, 1.0) or agreement < _AGREEMENT:
            raise ConfigError(
                out,
                f"the export differs from the network by {largest:.3g} (logits up to {scale:.3g}; "
                f"{100 * agreement:.2f} % of voxels agree)",
                "export to another format",
            )
        temporary.chmod(0o644)
        os.replace(temporary, out)
        sync_folder(out.parent)
    finally:
        temporary.unlink(missing_ok=True)
    return Export(out, output_format, largest, scale, agreement, tuple(windows.shape), volume.path, out.stat().st_size)


def _write_torchscript(network: torch.nn.Module, windows: torch.Tensor, file: Path) -> None:
    scripted = (
        network
        if isinstance(network, torch.jit.ScriptModule)
        else _attempt("scripted", lambda: torch.jit.script(network))
    )
    torch.jit.save(scripted, str(file))


def _write_onnx(network: torch.nn.Module, windows: torch.Tensor, file: Path) -> None:
    write_onnx(network, windows[:2], file, input_name="image")


def write_onnx(network: torch.nn.Module, sample: torch.Tensor, file: Path, *, input_name: str) -> None:
    """Write a network as ONNX, for any batch size, with the output ``pred``.

    Args:
        network: in eval mode.
        sample: input of it, at least two.
        file: to write.
        input_name: of the input.

    Raises:
        ConfigError: the network cannot be exported.
    """
    if len(sample) < 2:
        sample = torch.cat([sample, sample])[:2]  # of one, the exporter would fix the batch size

    def export() -> None:
        torch.onnx.export(
            network,
            (sample,),
            str(file),
            input_names=[input_name],
            output_names=["pred"],
            dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
            dynamo=True,
            external_data=False,
            verbose=False,
        )

    _attempt("exported to ONNX", export)


def _write_pt2(network: torch.nn.Module, windows: torch.Tensor, file: Path) -> None:
    def export() -> None:
        batch = torch.export.Dim("batch", min=1)
        torch.export.save(torch.export.export(network, (windows[:2],), dynamic_shapes=({0: batch},)), str(file))

    _attempt("exported with torch.export", export)


def _attempt(what: str, export: Callable[[], Any]) -> Any:
    try:
        with warnings.catch_warnings(), _quiet_exporters():
            warnings.simplefilter("ignore")
            return export()
    except Exception as error:
        logger.debug("export failed", exc_info=True)
        reason = str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__
        raise ConfigError("network_def", f"cannot be {what} ({reason})", "choose another --format") from error


@contextlib.contextmanager
def _quiet_exporters() -> Iterator[None]:
    """Silence torch's exporter, which warns of a torchvision that nothing here needs."""
    logger = logging.getLogger("torch.onnx")
    former = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(former)


def _read_torchscript(file: Path) -> Callable[[torch.Tensor], torch.Tensor]:
    module = torch.jit.load(str(file), map_location="cpu").eval()

    def run(windows: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return module(windows)

    return run


def _read_onnx(file: Path) -> Callable[[torch.Tensor], torch.Tensor]:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    return lambda windows: torch.from_numpy(session.run(None, {"image": windows.numpy()})[0])


def _read_pt2(file: Path) -> Callable[[torch.Tensor], torch.Tensor]:
    module = torch.export.load(str(file)).module()

    def run(windows: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return module(windows)

    return run


_WRITERS = {"torchscript": _write_torchscript, "onnx": _write_onnx, "pt2": _write_pt2}
_READERS = {"torchscript": _read_torchscript, "onnx": _read_onnx, "pt2": _read_pt2}
