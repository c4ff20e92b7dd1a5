"""A slide and a prediction made for the viewer's tests, and a server that shows them."""

from __future__ import annotations

import csv
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from PIL import Image

from medkd.wsi.slides import Slide
from medkd.wsi.viewer import Overlay, ViewerServer

WIDTH, HEIGHT, MPP = 1300, 900, 0.5
TILE = 128


def write_slide(path: Path, *, mpp: float | None = MPP) -> Path:
    """A tiled TIFF in which red tells x and green tells y."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    pixels = np.stack([x * 255 / WIDTH, y * 255 / HEIGHT, np.full_like(x, 128)], axis=-1).astype(np.uint8)
    resolution: dict[str, Any] = (
        {} if mpp is None else {"resolution": (1e4 / mpp, 1e4 / mpp), "resolutionunit": "CENTIMETER"}
    )
    tifffile.imwrite(path, pixels, tile=(256, 256), photometric="rgb", **resolution)
    return path


def write_prediction(folder: Path, name: str, fingerprint: str) -> Path:
    """Two rows of ten tiles; the probability of tumor grows with x, and one tile failed."""
    folder.mkdir(exist_ok=True)
    with (folder / f"{name}.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["x", "y", "width", "height", "prob_normal", "prob_tumor"])
        for y in (0, TILE):
            for x in range(0, 10 * TILE, TILE):
                tumor = x / (10 * TILE)
                writer.writerow([x, y, TILE, TILE, *(["nan", "nan"] if (x, y) == (0, TILE) else [1 - tumor, tumor])])
    ring = [[640, 0], [1280, 0], [1280, 256], [640, 256], [640, 0]]
    feature = {
        "type": "Feature",
        "geometry": {"type": "Polygon", "coordinates": [ring]},
        "properties": {"objectType": "annotation", "classification": {"name": "tumor", "color": [200, 0, 0]}},
    }
    (folder / f"{name}.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": [feature]}))
    Image.fromarray(np.full((2, 10, 4), 200, dtype=np.uint8)).save(folder / f"{name}_overlay.png")
    place = {"file": f"{name}_overlay.png", "x": 0, "y": 0, "width": 10 * TILE, "height": 2 * TILE, "class": "tumor"}
    (folder / f"{name}.json").write_text(json.dumps({"fingerprint": fingerprint, "overlay": place}))
    return folder


@contextmanager
def served(slide: Slide, overlay: Overlay | None = None) -> Iterator[ViewerServer]:
    server = ViewerServer(slide, overlay)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.stop()
        thread.join()
        server.close()
