"""How fast a slide's tissue is found and tiles are laid over it, beside the loops of tiatoolbox and wsinfer.

Run ``OMP_NUM_THREADS=1 python benchmarks/speed/slide_tissue.py``. It writes pyramids of 40 000 and 80 000 pixels a side
(0.25 µm per pixel, islands of the tissue photograph that scikit-image ships; the finest levels repeat two tiles, as
nobody here reads them) to a temporary folder, opens them and finds the tiles of 256 px at 0.5 µm that are half tissue,
in interleaved rounds (process CPU time, medians), and prints one JSON line.

- ``tiatoolbox``: what ``tissue_mask("otsu")``, ``get_coordinates`` and ``filter_coordinates`` of 2.0.1 do, re-enacted
  with OpenSlide (the package cannot share an environment with medkd): thumbnail at 8 µm laid on white, Otsu of the gray
  values, one look at the mask per tile.
- ``wsinfer``: the functions of its ``patchlib`` where wsinfer is installed, otherwise the same steps of 0.6.1
  re-enacted, which needs shapely: thumbnail of 2048 pixels, saturation, closing, polygons, a tree of tile centers.

Beside ``medkd``, ``medkd_with_ink`` does not look for pen marks, and ``medkd_otsu`` takes the plain threshold of
tiatoolbox for a mask, so that the same work is compared: reading, one threshold, the grid.

Proof: the tiles that medkd and tiatoolbox's loop keep from one and the same mask must be the same; and how well the
masks (Dice with the drawn islands) and the kept tiles (intersection over union with medkd's) of all agree.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import openslide
import simplejpeg
from PIL import Image
from skimage.data import immunohistochemistry
from skimage.filters import threshold_otsu
from skimage.morphology import closing, remove_small_holes, remove_small_objects

from medkd.data.jpeg_tiff import JpegLevel, write_jpeg_tiff
from medkd.wsi.grid import TileGrid
from medkd.wsi.slides import Slide
from medkd.wsi.tissue import TissueMask, find_tissue

GOALS = {"tiatoolbox": 5.0, "wsinfer": 10.0}
MPP, SIZE, TILE_MPP, MIN_TISSUE = 0.25, 256, 0.5, 0.5
DOWNSAMPLE = 32  # of the masks: 8 µm per pixel
TILE_LEVEL0 = round(SIZE * TILE_MPP / MPP)
DOWNSAMPLES = {"levels_1_4_16": (1, 4, 16), "levels_1_4_16_32": (1, 4, 16, 32)}  # scanners make the one or the other
JPEG_TILE = 256
FINEST_DRAWN = 16  # coarser levels are true to the picture


def draw(side: int) -> tuple[np.ndarray, np.ndarray]:
    """The slide at 4 µm per pixel, and where its tissue is."""
    size = side // FINEST_DRAWN
    waves = cv2.GaussianBlur(np.random.default_rng(0).normal(size=(size, size)), (0, 0), size / 25)
    inside = waves > np.quantile(waves, 0.7)
    photograph = cv2.resize(immunohistochemistry(), (64, 64), interpolation=cv2.INTER_AREA)
    quarter = np.concatenate([photograph, photograph[:, ::-1]], axis=1)
    block = np.concatenate([quarter, quarter[::-1]])
    repeats = -(-size // len(block))
    tissue = np.tile(block, (repeats, repeats, 1))[:size, :size]
    glass = np.random.default_rng(1).normal(243, 1.5, (size, size, 1)).clip(0, 255).astype(np.uint8).repeat(3, 2)
    return np.where(inside[..., None], tissue, glass), inside


def write_slide(path: Path, side: int, downsamples: tuple[int, ...]) -> np.ndarray:
    """Returns where the tissue is, at 4 µm per pixel."""
    picture, inside = draw(side)
    with path.open("wb") as file:
        write_jpeg_tiff(file, [level(picture, inside, side, downsample) for downsample in downsamples], big=True)
    return inside


def level(picture: np.ndarray, inside: np.ndarray, side: int, downsample: int) -> JpegLevel:
    length = side // downsample
    encode = simplejpeg.encode_jpeg
    kind = {"quality": 80, "colorspace": "RGB", "colorsubsampling": "420"}
    count = -(-length // JPEG_TILE)
    if downsample >= FINEST_DRAWN:
        shrunk = cv2.resize(picture, (length, length), interpolation=cv2.INTER_AREA)
        full = np.full((count * JPEG_TILE, count * JPEG_TILE, 3), 243, np.uint8)
        full[:length, :length] = shrunk
        tiles = [
            encode(np.ascontiguousarray(full[y : y + JPEG_TILE, x : x + JPEG_TILE]), **kind)
            for y in range(0, count * JPEG_TILE, JPEG_TILE)
            for x in range(0, count * JPEG_TILE, JPEG_TILE)
        ]
    else:
        two = [encode(np.full((JPEG_TILE, JPEG_TILE, 3), value, np.uint8), **kind) for value in (243, 160)]
        coarse = cv2.resize(inside.astype(np.float32), (count, count), interpolation=cv2.INTER_AREA) > 0.5
        tiles = [two[int(tissue)] for tissue in coarse.ravel()]
    return JpegLevel(length, length, tiles, (JPEG_TILE, JPEG_TILE), (MPP * downsample, MPP * downsample))


def medkd(path: Path, find: Callable[[Slide], TissueMask] = find_tissue) -> tuple[np.ndarray, np.ndarray]:
    """Mask at its own resolution, and the corners of the tiles."""
    with Slide(path, mpp=MPP) as slide:
        tissue = find(slide)
        grid = TileGrid.build(slide, size=SIZE, mpp=TILE_MPP, min_tissue=MIN_TISSUE, tissue=tissue)
    return tissue.mask, grid.coords


def below_otsu(slide: Slide) -> TissueMask:
    gray = cv2.cvtColor(slide.thumbnail(slide.dimensions[0] // DOWNSAMPLE), cv2.COLOR_RGB2GRAY)
    threshold, _ = cv2.threshold(gray, 0, 255, cv2.THRESH_OTSU)
    return TissueMask(gray < threshold, MPP * DOWNSAMPLE, DOWNSAMPLE)


def tiatoolbox(path: Path) -> tuple[np.ndarray, np.ndarray]:
    slide = openslide.OpenSlide(path)
    wanted = DOWNSAMPLE
    best = slide.get_best_level_for_downsample(wanted + 1e-6)
    pixels = np.array(slide.read_region((0, 0), best, slide.level_dimensions[best]))
    size = tuple(round(length / wanted) for length in slide.dimensions)
    if pixels.shape[1::-1] != size:
        pixels = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
    white = Image.fromarray(np.full((*pixels.shape[:2], 4), 255, np.uint8))
    white.alpha_composite(Image.fromarray(pixels).convert("RGBA"))
    thumbnail = np.array(white.convert("RGB"))
    gray = np.zeros((1, *np.shape([thumbnail])[1:-1]), np.uint8).tolist()
    gray[0] = cv2.cvtColor(thumbnail, cv2.COLOR_RGB2GRAY)
    threshold = threshold_otsu(np.concatenate([np.array(image).flatten() for image in gray]))
    mask = np.array([cv2.cvtColor(thumbnail, cv2.COLOR_RGB2GRAY) < threshold])[0]
    width, height = slide.dimensions
    slide.close()
    return mask, keep_one_by_one(mask.astype(np.uint8), width, height)


def keep_one_by_one(mask: np.ndarray, width: int, height: int) -> np.ndarray:
    """Corners of the tiles, found as ``filter_coordinates`` does."""
    x, y = np.meshgrid(np.arange(0, width, TILE_LEVEL0), np.arange(0, height, TILE_LEVEL0))
    corners = np.stack([x.ravel(), y.ravel()], axis=-1)
    boxes = np.concatenate([corners, corners + TILE_LEVEL0], axis=1).astype(np.float32)
    for axis, length in ((0, width), (1, height)):
        limit = mask.shape[1 - axis]
        boxes[:, [axis, axis + 2]] = np.clip(boxes[:, [axis, axis + 2]] * (limit / length), 0, limit)

    def has_tissue(box: np.ndarray) -> bool:
        part = mask[box[1] : box[3], box[0] : box[2]]
        area, tissue = int(np.prod(part.shape)), int(np.count_nonzero(part))
        return (tissue == area or tissue > area * MIN_TISSUE) and tissue > 0 and area > 0

    return corners[np.array([has_tissue(box) for box in list(boxes.astype(np.int32))])]


def wsinfer_steps() -> tuple[str, Callable[[Path], tuple[np.ndarray, np.ndarray]]] | None:
    """How wsinfer is measured, and its function; None where neither it nor shapely is installed."""
    try:
        from wsinfer.patchlib.patch import get_multipolygon_from_binary_arr, get_patch_coordinates_within_polygon
        from wsinfer.patchlib.segment import segment_tissue
    except ImportError:
        try:
            import shapely
        except ImportError:
            return None
        return "re-enacted", lambda path: wsinfer_reenacted(path, shapely)

    def package(path: Path) -> tuple[np.ndarray, np.ndarray]:
        slide = openslide.OpenSlide(path)
        thumbnail = slide.get_thumbnail((2048, 2048)).convert("RGB")
        width, height = slide.dimensions
        slide.close()
        pixel = width / thumbnail.size[0]
        um2 = (pixel * MPP) ** 2
        mask = segment_tissue(
            np.asarray(thumbnail), min_object_size_px=round(200**2 / um2), min_hole_size_px=round(190**2 / um2)
        )
        found = get_multipolygon_from_binary_arr(mask.astype(np.uint8) * 255, scale=(pixel, pixel))
        assert found is not None
        return mask, get_patch_coordinates_within_polygon(width, height, TILE_LEVEL0, TILE_LEVEL0 // 2, found[0])

    return "package", package


def wsinfer_reenacted(path: Path, shapely: Any) -> tuple[np.ndarray, np.ndarray]:
    slide = openslide.OpenSlide(path)
    thumbnail = slide.get_thumbnail((2048, 2048)).convert("RGB")
    width, height = slide.dimensions
    slide.close()
    pixel = width / thumbnail.size[0]
    um2 = (pixel * MPP) ** 2
    saturation = cv2.medianBlur(cv2.cvtColor(np.asarray(thumbnail), cv2.COLOR_RGB2HSV)[..., 1], 7)
    mask = closing(saturation > 7, np.ones((6, 6)))
    mask = remove_small_objects(mask, max_size=round(200**2 / um2) - 1)
    mask = remove_small_holes(mask, max_size=round(190**2 / um2) - 1)
    contours, hierarchy = cv2.findContours(mask.astype(np.uint8) * 255, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    tissue = shapely.MultiPolygon()
    for inside in (False, True):  # outlines are joined, then holes are cut out
        for contour, (_, _, _, parent) in zip(contours, hierarchy[0], strict=True):
            if len(contour) > 2 and (parent >= 0) == inside:
                part = shapely.Polygon(contour[:, 0] * pixel)
                part = part if part.is_valid else part.buffer(0)
                tissue = tissue.difference(part) if inside else tissue.union(part)
    half = TILE_LEVEL0 // 2
    centers = list(itertools.product(range(half, width, TILE_LEVEL0), range(half, height, TILE_LEVEL0)))
    tree = shapely.STRtree([shapely.Point(center) for center in centers])
    return mask, np.array(centers)[np.sort(tree.query(tissue, predicate="contains"))] - half


def ratios(seconds: dict[str, float], arm: str) -> dict[str, float]:
    """How many times the peers' time one of ours takes."""
    return {peer: round(seconds[peer] / seconds[arm], 1) for peer in GOALS if peer in seconds}


def overlap(one: np.ndarray, other: np.ndarray) -> float:
    """Intersection over union of two sets of corners."""
    a, b = {tuple(corner) for corner in one.tolist()}, {tuple(corner) for corner in other.tolist()}
    return len(a & b) / len(a | b)


def dice(mask: np.ndarray, truth: np.ndarray) -> float:
    mask = cv2.resize(mask.astype(np.uint8), truth.shape[1::-1], interpolation=cv2.INTER_NEAREST) > 0
    return float(2 * (mask & truth).sum() / (mask.sum() + truth.sum()))


def same_tiles_of_one_mask(path: Path) -> bool:
    with Slide(path, mpp=MPP) as slide:
        mask = find_tissue(slide).mask
        tissue = TissueMask(mask, MPP * DOWNSAMPLE, DOWNSAMPLE)
        ours = TileGrid.build(
            slide, size=SIZE, mpp=TILE_MPP, min_tissue=MIN_TISSUE + 1e-3, tissue=tissue, border="drop"
        )
        theirs = keep_one_by_one(mask.astype(np.uint8), *slide.dimensions)
    inside = (theirs + TILE_LEVEL0 <= np.asarray(slide.dimensions)).all(1)
    return bool(np.array_equal(ours.coords, theirs[inside]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    cv2.setNumThreads(1)
    loops: dict[str, Callable[[Path], tuple[np.ndarray, np.ndarray]]] = {
        "medkd": medkd,
        "medkd_with_ink": lambda path: medkd(path, partial(find_tissue, exclude_pen=False)),
        "medkd_otsu": lambda path: medkd(path, below_otsu),
        "tiatoolbox": tiatoolbox,
    }
    how = {"tiatoolbox": "re-enacted", "wsinfer": "not installed"}
    if (found := wsinfer_steps()) is not None:
        how["wsinfer"], loops["wsinfer"] = found
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for pyramid, downsamples in DOWNSAMPLES.items():
            for side in (40_000, 80_000):
                path = Path(folder) / f"{pyramid}_{side}.tiff"
                truth = write_slide(path, side, downsamples)
                outputs = {name: loop(path) for name, loop in loops.items()}
                times: dict[str, list[float]] = {name: [] for name in loops}
                for _ in range(rounds):
                    for name, loop in loops.items():
                        start = time.process_time()
                        loop(path)
                        times[name].append(time.process_time() - start)
                median = {name: statistics.median(values) for name, values in times.items()}
                results[path.stem] = {
                    "ms": {name: round(1e3 * seconds, 1) for name, seconds in median.items()},
                    "ratio": ratios(median, "medkd"),
                    "ratio_with_ink": ratios(median, "medkd_with_ink"),
                    "ratio_otsu": ratios(median, "medkd_otsu"),
                    "tiles": {name: len(output[1]) for name, output in outputs.items()},
                    "mask_dice_with_truth": {
                        name: round(dice(output[0], truth), 3) for name, output in outputs.items()
                    },
                    "tiles_iou_with_medkd": {
                        name: round(overlap(output[1], outputs["medkd"][1]), 3) for name, output in outputs.items()
                    },
                    "same_tiles_of_one_mask": same_tiles_of_one_mask(path),
                }
                path.unlink()
    goals_met: dict[str, Any] = {
        pyramid: {name: results[f"{pyramid}_40000"]["ratio"].get(name, 0) >= goal for name, goal in GOALS.items()}
        for pyramid in DOWNSAMPLES
    }
    goals_met["same_tiles_of_one_mask"] = all(result["same_tiles_of_one_mask"] for result in results.values())
    print(json.dumps({"benchmark": "slide_tissue", "rounds": rounds, "peers": how, "goals_met": goals_met} | results))


if __name__ == "__main__":
    main()
