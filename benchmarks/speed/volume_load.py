"""How fast a .nii.gz is loaded with every check, beside nibabel and MONAI, and what the checks cost.

Run ``OMP_NUM_THREADS=1 python benchmarks/speed/volume_load.py``. It writes three volumes made from a fixed seed to a
temporary folder, loads them in interleaved rounds (process CPU time, medians) and prints one JSON line.

- ``nibabel``: ``np.asarray(nibabel.load(path).dataobj, dtype=float32)``, which checks nothing.
- ``monai``: ``LoadImage()`` (NibabelReader), which checks nothing.
- ``medkd``: ``read_volume`` (``read_label`` for the label map): checksums, header, geometry, values.
- ``medkd_unchecked``: the same decompression and conversion without any of that.
- ``monai_medkd``: ``LoadImage(reader=VolumeReader)``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from isal import igzip_lib
from monai.transforms import LoadImage
from scipy.ndimage import gaussian_filter, zoom

from medkd.data.volumes import VolumeReader, read_label, read_volume

GOALS = {"monai": 4.0, "nibabel": 1.5}
INTEGRITY_GOAL = 0.10


def write_volumes(folder: Path) -> dict[str, Path]:
    """Smooth scans with noise: a CT and its label map of clinical size, and a smaller MR stored as float32."""
    paths = {}
    for name, shape, stored in (
        ("ct_int16", (512, 512, 100), np.int16),
        ("mr_float32", (192, 192, 96), np.float32),
        ("label_uint8", (512, 512, 100), np.uint8),
    ):
        rng = np.random.default_rng(0)
        coarse = gaussian_filter(rng.standard_normal([size // 4 for size in shape]), 3)
        smooth = zoom(coarse / np.abs(coarse).max(), 4, order=1)
        noisy = 600 * smooth + rng.normal(0, 12, shape)
        array = (smooth > 0.2).astype(stored) if name == "label_uint8" else np.round(noisy).astype(stored)
        paths[name] = folder / f"{name}.nii.gz"
        nib.save(nib.Nifti1Image(array, np.diag([-0.8, -0.8, 2.5, 1.0])), paths[name])
    return paths


def load_unchecked(path: Path) -> np.ndarray:
    """The floor: decompress and convert in the same blocks and to the same type, checking nothing."""
    proxy = nib.load(path).dataobj
    stored, shape, skip = proxy.dtype, proxy.shape, proxy.offset
    values = np.empty(int(np.prod(shape)), np.uint8 if "label" in path.name else np.float32)
    decoder = igzip_lib.IgzipDecompressor(igzip_lib.DECOMP_DEFLATE)
    position = 0
    with path.open("rb", buffering=0) as file:
        packed = file.read(1 << 20)
        packed = packed[10 + (packed.index(b"\0", 10) - 9 if packed[3] & 8 else 0) :]  # gzip header and file name
        rest = b""
        while position < values.size:
            if not packed and decoder.needs_input:
                packed = file.read(1 << 20)
            block, packed = memoryview(rest + decoder.decompress(packed, 1 << 18))[skip:], b""
            skip = 0
            whole = len(block) // stored.itemsize * stored.itemsize
            rest = bytes(block[whole:])
            raw = np.frombuffer(block[:whole], stored)
            values[position : position + raw.size] = raw
            position += raw.size
    return values.reshape(shape, order="F")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    warnings.simplefilter("ignore")
    monai_load, monai_medkd = LoadImage(), LoadImage(reader=VolumeReader)
    loaders: dict[str, Callable[[Path], Any]] = {
        "medkd": lambda path: (read_label if "label" in path.name else read_volume)(path).array,
        "medkd_unchecked": load_unchecked,
        "nibabel": lambda path: np.asarray(nib.load(path).dataobj, dtype=np.float32),
        "monai": monai_load,
        "monai_medkd": monai_medkd,
    }
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, path in write_volumes(Path(folder)).items():
            arrays = {loader: np.asarray(load(path)) for loader, load in loaders.items()}
            equal = all(np.array_equal(array, arrays["medkd"]) for array in arrays.values())
            del arrays
            times: dict[str, list[float]] = {loader: [] for loader in loaders}
            for _ in range(rounds):
                for loader, load in loaders.items():
                    start = time.process_time()
                    load(path)
                    times[loader].append(time.process_time() - start)
            median = {loader: statistics.median(values) for loader, values in times.items()}
            checks = statistics.median(
                full / bare - 1 for full, bare in zip(times["medkd"], times["medkd_unchecked"], strict=True)
            )
            results[name] = {
                "ms": {loader: round(1e3 * seconds, 2) for loader, seconds in median.items()},
                "ratio": {peer: round(median[peer] / median["medkd"], 2) for peer in ("monai", "nibabel")},
                "ratio_inside_monai": round(median["monai"] / median["monai_medkd"], 2),
                "integrity_share": round(checks, 3),
                "arrays_equal": equal,
            }
    goals_met = {
        name: {peer: result["ratio"][peer] >= goal for peer, goal in GOALS.items()}
        | {"integrity": result["integrity_share"] <= INTEGRITY_GOAL, "arrays_equal": result["arrays_equal"]}
        for name, result in results.items()
    }
    print(json.dumps({"benchmark": "volume_load", "rounds": rounds, "goals_met": goals_met} | results))


if __name__ == "__main__":
    main()
