"""What a network costs: parameters, multiply-accumulates, size on disk, time and memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from medkd.data.volumes import Volume
from medkd.deploy.bundle import LoadedBundle
from medkd.deploy.predict import predict_volume
from medkd.deploy.windows import sample_volume, sample_windows

_RESET_PEAK = Path("/proc/self/clear_refs")  # writing 5 resets VmHWM, the peak resident size (Linux)


@dataclass(frozen=True)
class Cost:
    """The cost of one bundle.

    Attributes:
        name: the bundle.
        parameters: of the network.
        macs: multiply-accumulates of one window (floating-point operations / 2; matrix products and convolutions).
        window: (C, *size) of that window.
        size_bytes: of the file with the weights.
        window_ms: median time of the network on one window.
        volume_ms: median time from the volume in memory to its label map.
        peak_memory_bytes: beyond what was in use before, over one volume; None where the system cannot tell.
        memory_is: what the peak measures: ``"device"`` or ``"process"``.
        device: where it was measured.
        threads: CPU threads.
    """

    name: str
    parameters: int
    macs: int
    window: tuple[int, ...]
    size_bytes: int
    window_ms: float
    volume_ms: float
    peak_memory_bytes: int | None
    memory_is: str
    device: str
    threads: int


def count_parameters(network: nn.Module) -> int:
    """Number of values in the network's parameters."""
    return sum(parameter.numel() for parameter in network.parameters())


def count_macs(network: nn.Module, window: torch.Tensor) -> int:
    """Multiply-accumulates of one forward pass.

    Args:
        network: any module.
        window: (1, C, *S).
    """
    was_training = network.training
    network.eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(window)
    network.train(was_training)
    return int(counter.get_total_flops()) // 2


def profile_bundles(bundles: Sequence[LoadedBundle], *, image: Volume | None = None, rounds: int = 7) -> list[Cost]:
    """Measure several bundles on one image, in turn and interleaved, so that drift hits all alike.

    Args:
        bundles: loaded bundles.
        image: the image; MNI152 by default.
        rounds: timed repetitions after one that is not counted; the medians are reported.
    """
    volume = image or sample_volume()
    windows = [sample_windows(bundle, volume, count=1).to(bundle.device) for bundle in bundles]
    window_times = interleaved_times_ms(
        {place: _forward(bundle, window) for place, (bundle, window) in enumerate(zip(bundles, windows, strict=True))},
        rounds,
    )
    volume_times = interleaved_times_ms(
        {place: _prediction(bundle, volume) for place, bundle in enumerate(bundles)}, max(3, rounds // 2)
    )
    return [
        Cost(
            name=bundle.name,
            parameters=count_parameters(bundle.network),
            macs=count_macs(bundle.network, window),
            window=tuple(window.shape[1:]),
            size_bytes=bundle.weights.stat().st_size,
            window_ms=window_times[place],
            volume_ms=volume_times[place],
            peak_memory_bytes=_peak_memory(bundle, volume),
            memory_is="device" if bundle.device.type == "cuda" else "process",
            device=str(bundle.device),
            threads=torch.get_num_threads(),
        )
        for place, (bundle, window) in enumerate(zip(bundles, windows, strict=True))
    ]


def interleaved_times_ms(work: Mapping[Any, Callable[[], None]], rounds: int) -> dict[Any, float]:
    """Median time of each piece of work, run in turn ``rounds`` times after one warm-up of each."""
    times: dict[Any, list[float]] = {key: [] for key in work}
    for run in work.values():
        run()
    for _ in range(rounds):
        for key, run in work.items():
            start = time.perf_counter()
            run()
            times[key].append(1000 * (time.perf_counter() - start))
    return {key: statistics.median(found) for key, found in times.items()}


def _forward(bundle: LoadedBundle, window: torch.Tensor) -> Callable[[], None]:
    def run() -> None:
        with torch.inference_mode():
            bundle.network(window)
        _wait(bundle.device)

    return run


def _prediction(bundle: LoadedBundle, volume: Volume) -> Callable[[], None]:
    def run() -> None:
        predict_volume(bundle, volume)
        _wait(bundle.device)

    return run


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _peak_memory(bundle: LoadedBundle, volume: Volume) -> int | None:
    """Peak of one prediction: allocated device memory, or resident memory of the process where Linux can tell."""
    if bundle.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(bundle.device)
        before = torch.cuda.memory_allocated(bundle.device)
        predict_volume(bundle, volume)
        return int(torch.cuda.max_memory_allocated(bundle.device) - before)
    if not _RESET_PEAK.exists():
        return None
    _RESET_PEAK.write_text("5")
    before = _resident_bytes("VmRSS")
    predict_volume(bundle, volume)
    return max(0, _resident_bytes("VmHWM") - before)


def _resident_bytes(field: str) -> int:
    """A line of /proc/self/status, which counts in kB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))
