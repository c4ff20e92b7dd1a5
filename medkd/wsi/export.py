"""A slide's prediction as files: the summary comes last, so that its presence means that all of them are complete."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from medkd import __version__
from medkd.data.atomic import atomic_write
from medkd.wsi.export_csv import write_csv
from medkd.wsi.export_geojson import class_colors, write_geojson
from medkd.wsi.export_heatmap import write_overlay, write_picture
from medkd.wsi.export_ome_tiff import write_ome_tiff
from medkd.wsi.prediction import SlidePrediction

if TYPE_CHECKING:
    from medkd.wsi.slides import Slide

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
_TOP = 10  # tiles in the slide's top-k score
_PACKAGES = ("torch", "numpy", "openslide-python", "openslide-bin", "tifffile", "opencv-python-headless")


def write_prediction(
    prediction: SlidePrediction,
    slide: Slide,
    folder: str | Path,
    *,
    name: str | None = None,
    threshold: float = 0.5,
    details: Mapping[str, Any] | None = None,
) -> list[Path]:
    """Write a prediction's files; each appears whole or not at all.

    ``<name>.csv``, ``<name>.geojson``, ``<name>_heatmap.png``, ``<name>_overlay.png``, ``<name>_heatmap.ome.tiff`` and,
    last, ``<name>.json``. Without a single predicted tile there is no overlay and no OME-TIFF.

    Args:
        prediction: what to write.
        slide: its slide.
        folder: where to; made if absent.
        name: what to call the slide in file names and inside files; the slide's own name by default.
        threshold: smallest probability of a tile inside an outline.
        details: further entries of the summary, for example which model it was; must fit JSON.

    Returns:
        The files written, the summary last.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    name = slide.name if name is None else name
    summary_file = folder / f"{name}.json"
    summary_file.unlink(missing_ok=True)  # whatever it described is about to change
    files = [folder / f"{name}.csv", folder / f"{name}.geojson", folder / f"{name}_heatmap.png"]
    overlay_file, tiff_file = folder / f"{name}_overlay.png", folder / f"{name}_heatmap.ome.tiff"
    write_csv(prediction, files[0])
    objects = write_geojson(prediction, files[1], threshold=threshold)
    write_picture(prediction, slide, files[2], name=name)
    overlay = write_overlay(prediction, overlay_file)
    tiff = write_ome_tiff(prediction, tiff_file)
    for file, written in ((overlay_file, overlay), (tiff_file, tiff)):
        if written is None:
            file.unlink(missing_ok=True)  # from a former prediction
        else:
            files.append(file)
    content = {
        **summarize(prediction, name=name),
        "objects": objects,
        "threshold": threshold,
        "overlay": overlay,
        "heatmap": tiff,
        "files": [file.name for file in files],
        **(details or {}),
    }
    with atomic_write(summary_file) as handle:
        json.dump(content, handle, indent=2, ensure_ascii=False, allow_nan=False)
        handle.write("\n")
    return [*files, summary_file]


def summarize(prediction: SlidePrediction, *, name: str) -> dict[str, Any]:
    """What ``<name>.json`` says about a prediction, apart from its files.

    A slide's ``scores`` are, per class, the mean over its predicted tiles and the mean of its ten most probable tiles.
    """
    grid = prediction.grid
    done = prediction.predicted
    values = prediction.probabilities[done].astype(np.float64)
    seconds = {part: round(value, 3) for part, value in prediction.seconds.items()}
    total = prediction.seconds.get("total", 0.0)
    top = np.sort(values, axis=0)[::-1][:_TOP]
    winners = values.argmax(1) if len(values) else np.zeros(0, int)
    return {
        "format_version": FORMAT_VERSION,
        "name": name,
        "status": "done" if len(grid) else "empty-tissue",
        "fingerprint": grid.slide_fingerprint,
        "task": prediction.task,
        "activation": prediction.activation,
        "classes": list(prediction.classes),
        "colors": {n: list(c) for n, c in zip(prediction.classes, class_colors(prediction.classes), strict=True)},
        "dimensions": list(grid.dimensions),
        "bounds": list(grid.bounds),
        "slide_mpp": grid.slide_mpp,
        "mpp": grid.mpp,
        "tile": {"size": grid.size, "overlap": grid.overlap, "size_level0": grid.size_level0},
        "counts": {
            "tiles": len(grid),
            "predicted": int(done.sum()),
            "failed": len(prediction.failed),
            "by_class": {n: int((winners == k).sum()) for k, n in enumerate(prediction.classes)},
        },
        "failed_tiles": [{"x": x, "y": y, "reason": reason} for x, y, reason in prediction.failed],
        "scores": {
            n: {
                "mean": float(values[:, k].mean()) if len(values) else None,
                "top_k": float(top[:, k].mean()) if len(values) else None,
                "k": len(top),
            }
            for k, n in enumerate(prediction.classes)
        },
        "precision": prediction.precision,
        "device": prediction.device,
        "seconds": seconds,
        "tiles_per_second": round(len(grid) / total, 2) if total else None,
        "versions": {"medkd": __version__, **{package: _version(package) for package in _PACKAGES}},
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
