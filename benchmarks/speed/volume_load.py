"""How fast a .nii.gz is loaded with every check, beside nibabel and MONAI, and what the checks cost.

Run ``OMP_NUM_THREADS=1 python benchmarks/speed/volume_load.py``. It writes three volumes made from a fixed seed to a
temporary folder, loads them in interleaved rounds (process CPU time, medians) and prints one JSON line.

- ``nibabel``: ``np.asarray(nibabel.load(path).dataobj, dtype=float32)``, which checks nothing.
- ``monai``: ``LoadImage()`` (NibabelReader), which checks nothing.
- ``medkd``: ``read_volume``: gzip checksums, header, geometry, finite and varying values.
- ``medkd_unchecked``: the same decompressor and conversion without checksum, geometry and value checks.
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
from scipy.ndimage import gaussian_filter

from medkd.data.volumes import VolumeReader, read_volume

SHAPE = (192, 192, 96)
GOALS = {"monai": 4.0, "nibabel": 1.5}
INTEGRITY_GOAL = 0.10


def write_volumes(folder: Path) -> dict[str, Path]:
    """A smooth scan with noise, as int16 (CT), float32 (MR) and a uint8 label map."""
    rng = np.random.default_rng(0)
    smooth = gaussian_filter(rng.standard_normal(SHAPE).astype(np.float32), 6)
    smooth /= np.abs(smooth).max()
    scan = 600 * smooth + rng.normal(0, 12, SHAPE)
    affine = np.diag([-0.9, -0.9, 2.5, 1.0])
    paths = {}
    for name, array in (
        ("int16", scan.astype(np.int16)),
        ("float32", np.round(scan).astype(np.float32)),
        ("uint8_label", (smooth > 0.2).astype(np.uint8) + (smooth > 0.5).astype(np.uint8)),
    ):
        paths[name] = folder / f"{name}.nii.gz"
        nib.save(nib.Nifti1Image(array, affine), paths[name])
    return paths


def load_unchecked(path: Path) -> np.ndarray:
    """The floor: decompress and convert block by block, checking nothing."""
    proxy = nib.load(path).dataobj
    stored, shape, offset = proxy.dtype, proxy.shape, proxy.offset
    packed = path.read_bytes()
    start = 10 + (packed.index(b"\0", 10) - 9 if packed[3] & 8 else 0)  # after the gzip header and file name
    decoder = igzip_lib.IgzipDecompressor(igzip_lib.DECOMP_DEFLATE)
    values = np.empty(int(np.prod(shape)), np.float32)
    rest = decoder.decompress(packed[start:], 1 << 18)[offset:]
    position = 0
    while rest:
        whole = len(rest) // stored.itemsize * stored.itemsize
        block = np.frombuffer(rest[:whole], stored)
        values[position : position + block.size] = block
        position += block.size
        rest = rest[whole:] + (b"" if decoder.eof else decoder.decompress(b"", 1 << 18))
    return values.reshape(shape, order="F")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    warnings.simplefilter("ignore")
    monai_load, monai_medkd = LoadImage(), LoadImage(reader=VolumeReader)
    loaders: dict[str, Callable[[Path], Any]] = {
        "medkd": lambda path: read_volume(path).array,
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
    images = [results[name] for name in ("int16", "float32")]
    goals_met = {peer: min(result["ratio"][peer] for result in images) >= goal for peer, goal in GOALS.items()}
    goals_met["integrity"] = max(result["integrity_share"] for result in images) <= INTEGRITY_GOAL
    goals_met["arrays_equal"] = all(result["arrays_equal"] for result in results.values())
    print(json.dumps({"benchmark": "volume_load", "shape": SHAPE, "rounds": rounds, "goals_met": goals_met} | results))


if __name__ == "__main__":
    main()
