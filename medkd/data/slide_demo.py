"""A small slide to learn and test with: islands of real tissue on empty glass.

What is real: every pixel of tissue. It comes from the photograph of human colonic glands that scikit-image ships
(FHL2 protein in brown, DAB; nuclei in blue, hematoxylin; made at the Center for Microscopy and Molecular Imaging,
Charleroi; no known copyright restrictions). What is made: that it is a slide. The photograph is mirrored side by side
until it fills the slide and cut along smooth outlines, and what lies outside is glass. No result on it says anything
about patients.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import simplejpeg
from numpy.typing import NDArray

from medkd.data.atomic import atomic_write
from medkd.data.jpeg_tiff import JpegLevel, write_jpeg_tiff
from medkd.errors import InputError

MPP = 0.5
"""Micrometers per level-0 pixel. The photograph has no scale bar: its nuclei are about 14 pixels across their short
axis, those of colonic epithelium about 7 µm, which makes 0.5 µm per pixel, an ordinary 20x scan."""
TILE = 256
"""Pixels along a side of a stored tile."""

_Image = NDArray[np.uint8]
_NAME = "demo_slide.tiff"
_TISSUE_COLUMNS = slice(64, 512)  # left of them the photograph shows the inside of a gland, as empty as glass
_GLASS_LEVEL, _GLASS_NOISE = 243.0, 1.5
_EDGE_SOFTNESS = 1.5  # pixels over which tissue fades into glass
_QUALITY = 80
_SMALLEST_LEVEL = 512  # pixels
_ISLANDS = ((0.30, 0.32, 0.20), (0.70, 0.28, 0.14), (0.66, 0.70, 0.22), (0.22, 0.76, 0.11))
"""Center x, center y and mean radius, as shares of the slide's side."""
_BUMPS = ((2, 0.16), (3, 0.10), (5, 0.06), (9, 0.02))  # waves around an outline, and their share of its radius
_CORNERS = 240


def demo_slide(out: str | Path, *, tiles: int = 16, seed: int = 0) -> Path:
    """Write a tiled pyramidal JPEG TIFF of real tissue with a known outline; takes seconds and a few MB.

    Beside it goes ``<name>_tissue.geojson``: the outlines of the tissue as QuPath reads them, in level-0 pixels. They
    are exact: outside there is glass only, inside tissue only (with the small hollows that glands have).

    Args:
        out: the file to write if it ends in .tif or .tiff, else the folder for ``demo_slide.tiff``.
        tiles: tiles of 256 pixels along each side of level 0, 4 or more; 16 makes 4096 × 4096 pixels.
        seed: of the outlines' shape and of the noise of the glass.

    Returns:
        The path of the slide.

    Raises:
        InputError: if ``tiles`` is below 4.
    """
    if tiles < 4:
        raise InputError("demo_slide", f"tiles must be 4 or more, not {tiles}", "ask for 4 or more")
    path = Path(out)
    if path.suffix.lower() not in (".tif", ".tiff"):
        path = path / _NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    side = tiles * TILE
    outlines = _outlines(side, np.random.default_rng(seed))
    with atomic_write(path.with_name(f"{path.stem}_tissue.geojson")) as file:
        json.dump(_feature_collection(outlines, seed), file)
    with atomic_write(path, "wb") as file:
        write_jpeg_tiff(file, _levels(side, outlines, seed))
    return path


def _levels(side: int, outlines: list[NDArray[np.int32]], seed: int) -> Iterator[JpegLevel]:
    """Finest first; each must be written before the next is asked for."""
    half = np.empty((side // 2, side // 2, 3), np.uint8)

    def finest() -> Iterator[bytes]:
        for top, stripe in _stripes(side, outlines, seed):
            half[top // 2 : (top + TILE) // 2] = _halved(stripe)
            yield from _encoded(stripe)

    yield _level(finest(), side, side)
    level = half
    while len(level) >= _SMALLEST_LEVEL:
        yield _level(_encoded(level), len(level), side)
        level = _halved(level)


def _level(tiles: Iterator[bytes], side: int, full_side: int) -> JpegLevel:
    mpp = MPP * full_side / side
    return JpegLevel(side, side, tiles, (TILE, TILE), (mpp, mpp))


def _stripes(side: int, outlines: list[NDArray[np.int32]], seed: int) -> Iterator[tuple[int, _Image]]:
    """Top row and (256, side, 3) pixels of one row of tiles after another."""
    tissue = _photograph()
    tissue = np.concatenate([tissue, tissue[:, ::-1]], axis=1)
    tissue = np.concatenate([tissue, tissue[::-1]], axis=0)
    columns = np.arange(side) % tissue.shape[1]
    margin = 8  # so that softened edges agree between stripes
    for top in range(0, side, TILE):
        inside = np.zeros((TILE + 2 * margin, side), np.float32)
        for outline in outlines:
            cv2.fillPoly(inside, [outline - np.array([0, top - margin], np.int32)], (1.0,))
        soft = np.asarray(cv2.GaussianBlur(inside, (0, 0), _EDGE_SOFTNESS))[margin:-margin, :, None]
        rows = np.arange(top, top + TILE) % tissue.shape[0]
        noise = np.random.default_rng((seed, top)).normal(_GLASS_LEVEL, _GLASS_NOISE, (TILE, side, 1))
        mixed = soft * tissue[rows][:, columns] + (1 - soft) * noise.astype(np.float32)
        yield top, np.clip(np.rint(mixed), 0, 255).astype(np.uint8)


def _photograph() -> _Image:
    from skimage.data import immunohistochemistry

    return immunohistochemistry()[:, _TISSUE_COLUMNS]


def _halved(image: _Image) -> _Image:
    return np.asarray(cv2.resize(image, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA), np.uint8)


def _encoded(image: _Image) -> Iterator[bytes]:
    """Tiles row by row, the last ones filled up with their own border."""
    rows, columns = (-size % TILE for size in image.shape[:2])
    padded = np.pad(image, ((0, rows), (0, columns), (0, 0)), mode="edge")
    for top in range(0, padded.shape[0], TILE):
        for left in range(0, padded.shape[1], TILE):
            tile = np.ascontiguousarray(padded[top : top + TILE, left : left + TILE])
            yield simplejpeg.encode_jpeg(tile, quality=_QUALITY, colorspace="RGB", colorsubsampling="420")


def _outlines(side: int, rng: np.random.Generator) -> list[NDArray[np.int32]]:
    """(n, 2) corners x, y of every island, level-0 pixels."""
    angles = np.linspace(0, 2 * np.pi, _CORNERS, endpoint=False)
    outlines = []
    for center_x, center_y, radius in _ISLANDS:
        waves = sum(share * np.cos(count * angles + rng.uniform(0, 2 * np.pi)) for count, share in _BUMPS)
        distance = side * radius * 0.75 * (1 + waves)
        corners = np.stack([center_x * side + distance * np.cos(angles), center_y * side + distance * np.sin(angles)])
        outlines.append(np.rint(corners.T).astype(np.int32))
    return outlines


def _feature_collection(outlines: list[NDArray[np.int32]], seed: int) -> dict[str, Any]:
    features = [
        {
            "type": "Feature",
            "id": str(uuid.uuid5(uuid.NAMESPACE_OID, f"medkd demo slide {seed} island {index}")),
            "geometry": {"type": "Polygon", "coordinates": [[*outline.tolist(), outline[0].tolist()]]},
            "properties": {"objectType": "annotation", "classification": {"name": "Tissue", "color": [0, 160, 0]}},
        }
        for index, outline in enumerate(outlines)
    ]
    return {"type": "FeatureCollection", "features": features}
