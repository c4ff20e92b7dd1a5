"""How fast patches are read from a slide, beside a loop over openslide.

Run ``OMP_NUM_THREADS=1 python benchmarks/speed/slide_reads.py [--slide FILE]``. Without a slide it writes one to a
temporary folder: 8192 × 8192 pixels of the tissue photograph that scikit-image ships, 256-pixel JPEG tiles, one level,
0.499 µm per pixel. Every round opens the slide anew (not timed, nor is the first read of each), reads the same patches
row by row with one thread, medkd and the peer in turn. Process CPU time, medians; one JSON line.

- ``aligned``: 256 px from positions that are multiples of 256, level 0.
- ``unaligned``: 224 px from positions that are multiples of 224, level 0.
- ``resampled``: 256 px at 1.0 µm per pixel. medkd: the filter of ``medkd.wsi.resample``, at the exact place. Peer: the
  whole pixels of level 0 that cover the patch best, reduced by ``cv2.resize`` with ``INTER_AREA``.
- ``tile_decode``: nothing but simplejpeg on every tile of the slide, the floor.

Equality: the largest difference, in grey levels, to openslide's pixels; of resampled patches, to openslide's pixels
under medkd's filter.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import openslide
import simplejpeg

from medkd.data.jpeg_tiff import JpegLevel, write_jpeg_tiff
from medkd.wsi.resample import Resampling
from medkd.wsi.slides import Slide

GOALS = {"aligned": 3.5, "unaligned": 3.0, "resampled": 5.0}
LARGEST_DIFFERENCE = 2
SIZES = {"aligned": 256, "unaligned": 224, "resampled": 256}
TARGET_MPP = 1.0

Read = Callable[[int, int], np.ndarray]


def write_slide(path: Path, side: int = 8192) -> Path:
    from skimage.data import immunohistochemistry

    photograph = immunohistochemistry()
    mosaic = np.concatenate([photograph, photograph[:, ::-1]], axis=1)
    mosaic = np.concatenate([mosaic, mosaic[::-1]], axis=0)
    mosaic = np.tile(mosaic, (-(-side // mosaic.shape[0]), -(-side // mosaic.shape[1]), 1))[:side, :side]
    # A different brightness everywhere: no two tiles are the same.
    mosaic = np.clip(mosaic * np.linspace(0.9, 1.05, side)[:, None, None], 0, 255).astype(np.uint8)

    def tiles() -> Iterator[bytes]:
        for top in range(0, side, 256):
            for left in range(0, side, 256):
                tile = np.ascontiguousarray(mosaic[top : top + 256, left : left + 256])
                yield simplejpeg.encode_jpeg(tile, quality=80, colorspace="RGB", colorsubsampling="420")

    with path.open("wb") as file:
        write_jpeg_tiff(file, [JpegLevel(side, side, tiles(), (256, 256), (0.499, 0.499))])
    return path


def positions(slide: Slide, case: str) -> list[tuple[int, int]]:
    step = SIZES[case] if case != "resampled" else int(SIZES[case] * TARGET_MPP / slide.mpp)
    width, height = slide.dimensions
    return [(x, y) for y in range(0, height - step - 1, step) for x in range(0, width - step - 1, step)]


def medkd_reader(slide: Slide, case: str) -> Read:
    size = (SIZES[case], SIZES[case])
    mpp = TARGET_MPP if case == "resampled" else slide.mpp
    return lambda x, y: slide.read(x, y, size, mpp=mpp)


def openslide_reader(slide: openslide.OpenSlide, case: str, mpp: float) -> Read:
    size = SIZES[case]
    if case != "resampled":
        return lambda x, y: np.asarray(slide.read_region((x, y), 0, (size, size)).convert("RGB"))
    wide = round(size * TARGET_MPP / mpp)

    def read(x: int, y: int) -> np.ndarray:
        pixels = np.asarray(slide.read_region((x, y), 0, (wide, wide)).convert("RGB"))
        return cv2.resize(pixels, (size, size), interpolation=cv2.INTER_AREA)

    return read


def seconds(read: Read, places: list[tuple[int, int]]) -> float:
    start = time.process_time()
    for x, y in places:
        read(x, y)
    return time.process_time() - start


def decode_tiles(path: Path) -> float:
    """Seconds of CPU to decode all tiles of level 0; their tables and color are put in place beforehand."""
    import tifffile

    with tifffile.TiffFile(path) as tiff, path.open("rb") as file:
        page = tiff.pages[0]
        tables, streams = (page.jpegtables or b"")[2:-2], []
        for offset, count in zip(page.dataoffsets, page.databytecounts, strict=True):
            file.seek(offset)
            streams.append(b"\xff\xd8" + tables + file.read(count)[2:])
    start = time.process_time()
    for stream in streams:
        simplejpeg.decode_jpeg(stream)
    return (time.process_time() - start) / len(streams)


def largest_difference(slide: Slide, peer: openslide.OpenSlide, case: str, places: list[tuple[int, int]]) -> int:
    read, size = medkd_reader(slide, case), SIZES[case]
    worst = 0
    for x, y in places:
        if case != "resampled":
            expected = openslide_reader(peer, case, slide.mpp)(x, y)
        else:
            scale = TARGET_MPP / slide.mpp
            resampling = Resampling((x, y), (scale, scale), (size, size))
            left, top, width, height = resampling.box
            source = np.asarray(peer.read_region((left, top), 0, (width, height)).convert("RGB"))
            expected = resampling.pixels(source, (left, top))
        worst = max(worst, int(np.abs(read(x, y).astype(int) - expected).max()))
    return worst


def measure(path: Path, rounds: int) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for case in SIZES:
        times: dict[str, list[float]] = {"medkd": [], "openslide": []}
        for _ in range(rounds):
            with Slide(path) as slide, openslide.OpenSlide(str(path)) as peer:
                places = positions(slide, case)
                readers = {"medkd": medkd_reader(slide, case), "openslide": openslide_reader(peer, case, slide.mpp)}
                for name, read in readers.items():
                    read(*places[0])
                    times[name].append(seconds(read, places[1:]) / (len(places) - 1))
        with Slide(path) as slide, openslide.OpenSlide(str(path)) as peer:
            difference = largest_difference(slide, peer, case, places)
        median = {name: statistics.median(values) for name, values in times.items()}
        ratio = statistics.median(b / a for a, b in zip(times["medkd"], times["openslide"], strict=True))
        results[case] = {
            "ms_per_patch": {name: round(1e3 * value, 3) for name, value in median.items()},
            "ratio": round(ratio, 2),
            "patches": len(places),
            "largest_difference": difference,
            "goal_met": ratio >= GOALS[case],
            "equal": difference <= LARGEST_DIFFERENCE,
        }
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slide", type=Path, help="an .svs or tiled TIFF with JPEG tiles")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    cv2.setNumThreads(1)
    with tempfile.TemporaryDirectory() as folder:
        path = arguments.slide or write_slide(Path(folder) / "photograph.tiff")
        floor = statistics.median(decode_tiles(path) for _ in range(arguments.rounds))
        results = measure(path, arguments.rounds)
    line = {"benchmark": "slide_reads", "slide": path.name, "rounds": arguments.rounds, "goals": GOALS}
    print(json.dumps(line | {"tile_decode_ms": round(1e3 * floor, 3)} | results))


if __name__ == "__main__":
    main()
