"""Real data for an int8 export: what to calibrate with, and other data to compare on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from medkd.data.datalists import read_datalist
from medkd.data.tile_images import TILE_SUFFIXES, is_tile_image, read_tile_image
from medkd.errors import ConfigError, InputError
from medkd.wsi.prediction import TileTask

MOST_TILES = 512  # to calibrate with, evenly from what is given; more hardly change the ranges
MOST_VOLUMES = 8

Tiles = npt.NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class TileSamples:
    """Tiles for a tile network.

    Attributes:
        calibration: (N, S, S, 3) uint8 RGB.
        comparison: (M, S, S, 3) uint8 RGB, none of them in ``calibration``.
        labels: (M,) class indices of ``comparison``; None where they are not known.
        calibrated_on: where ``calibration`` is from, in words.
        compared_on: where ``comparison`` is from, in words.
    """

    calibration: Tiles
    comparison: Tiles
    labels: npt.NDArray[np.int64] | None
    calibrated_on: str
    compared_on: str


@dataclass(frozen=True)
class VolumeSamples:
    """Volumes for a segmentation network.

    Attributes:
        calibration: files.
        comparison: dicts of ``image`` and, where known, ``label``; files.
        calibrated_on: where ``calibration`` is from, in words.
        compared_on: where ``comparison`` is from, in words.
    """

    calibration: list[str]
    comparison: list[dict[str, str]]
    calibrated_on: str
    compared_on: str


def tile_samples(
    path: str | Path,
    task: TileTask,
    *,
    fold: int | None = None,
    slide_mpp: float | None = None,
    dataset_dir: str | Path | None = None,
) -> TileSamples:
    """Tiles from a datalist, a folder of images or a slide.

    Args:
        path: a datalist (``.json``): calibrates with its training tiles, compares on its labelled validation tiles;
            or a folder of tile images, or a slide: calibrates with every second tile, compares on the others.
        task: what the network expects of a tile.
        fold: the fold the network held out, if it was trained in folds.
        slide_mpp: µm per level-0 pixel of a slide, in place of what it says.
        dataset_dir: where a datalist's paths start, if not at its folder.

    Raises:
        ConfigError, InputError: nothing there can be used, named.
    """
    path = Path(path)
    if path.suffix.lower() == ".json":
        training, validation = _sections(path, dataset_dir, fold)
        chosen = _evenly(training, MOST_TILES)
        labels = [item.get("label") for item in validation]
        known = task.task == "classification" and all(isinstance(label, int) for label in labels)
        return TileSamples(
            _read([Path(item["image"]) for item in chosen], task),
            _read([Path(item["image"]) for item in validation], task),
            np.array(labels, np.int64) if known else None,
            f"{len(chosen)} training tiles",
            f"{len(validation)} validation tiles",
        )
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if is_tile_image(file))
        tiles, where = _read(_evenly(files, 2 * MOST_TILES), task), "images"
    else:
        tiles, where = _slide_tiles(path, task, slide_mpp), "tiles of the slide"
    if len(tiles) < 2:
        raise InputError(path, f"gives {len(tiles)} tiles, calibration and comparison need 2", "give more data")
    first, second = tiles[::2], tiles[1::2]
    return TileSamples(first, second, None, f"{len(first)} {where}", f"{len(second)} other {where}")


def volume_samples(
    path: str | Path, *, fold: int | None = None, dataset_dir: str | Path | None = None
) -> VolumeSamples:
    """Volumes from a datalist, a folder of NIfTI files or one volume.

    Args:
        path: a datalist (``.json``): calibrates with its training images, compares on its validation images; or a
            folder: calibrates with every second file, compares on the others; or one volume, which is used for both.
        fold: the fold the network held out, if it was trained in folds.
        dataset_dir: where a datalist's paths start, if not at its folder.

    Raises:
        ConfigError, InputError: nothing there can be used, named.
    """
    path = Path(path)
    if path.suffix.lower() == ".json":
        training, validation = _sections(path, dataset_dir, fold)
        chosen = [str(item["image"]) for item in _evenly(training, MOST_VOLUMES)]
        keys: tuple[str, ...] = ("image", "label")
        compared = [{key: str(item[key]) for key in keys if key in item} for item in validation]
        return VolumeSamples(chosen, compared, f"{len(chosen)} training images", f"{len(compared)} validation images")
    files = sorted(str(file) for file in path.glob("*.nii*")) if path.is_dir() else []
    if len(files) > 1:
        first, second = files[::2][:MOST_VOLUMES], files[1::2][:MOST_VOLUMES]
        of = f"of {len(files)} volumes"
        compared = [{"image": file} for file in second]
        return VolumeSamples(first, compared, f"{len(first)} {of}", f"{len(second)} {of}, others")
    one = files[0] if files else str(path)
    return VolumeSamples([one], [{"image": one}], "one volume", "the volume it was calibrated with")


def _sections(
    path: Path, dataset_dir: str | Path | None, fold: int | None
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    listed = read_datalist(path, dataset_dir)
    fold = fold if fold in listed.folds else None
    training, validation = (listed.section(name, fold=fold) for name in ("training", "validation"))
    if not training or not validation:
        raise ConfigError(path, "needs a training and a validation section", "run `medkd data split`")
    return training, validation


def _evenly(items: Sequence[Any], most: int) -> list[Any]:
    places = np.unique(np.linspace(0, len(items) - 1, min(len(items), most)).round().astype(int))
    return [items[place] for place in places]


def _read(files: list[Path], task: TileTask) -> Tiles:
    if not files:
        return np.empty((0, task.size, task.size, 3), np.uint8)
    tiles = []
    for file in files:
        tile = read_tile_image(file)
        if tile.shape != (task.size, task.size, 3):
            raise InputError(
                file,
                f"is {tile.shape[1]}×{tile.shape[0]} px, the network takes {task.size}×{task.size}",
                f"cut tiles with `medkd slide tile --size {task.size} --mpp {task.mpp:g} --save-images`",
            )
        tiles.append(tile)
    return np.stack(tiles)


def _slide_tiles(path: Path, task: TileTask, slide_mpp: float | None) -> Tiles:
    from medkd.wsi.grid import TileGrid
    from medkd.wsi.slides import Slide
    from medkd.wsi.tile_stream import tile_batches

    if path.suffix.lower() in set(TILE_SUFFIXES) - {".tif", ".tiff"}:
        raise InputError(path, "is one picture", "give a folder of tiles, a slide or a datalist")
    with Slide(path, mpp=slide_mpp) as slide:
        grid = TileGrid.build(slide, size=task.size, mpp=task.mpp, overlap=task.overlap)
        if not len(grid):
            raise InputError(path, "has no tissue to calibrate with", "give another slide")
        places = np.array(_evenly(range(len(grid)), 2 * MOST_TILES))
        batches = tile_batches(slide, grid, batch_size=32, threads=0, order=places)
        return np.concatenate([batch.pixels for batch in batches])
