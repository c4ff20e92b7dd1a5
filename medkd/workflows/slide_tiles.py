"""``medkd slide tile``: from a slide to its tissue, its tiles and, on request, labelled images to train with."""

from __future__ import annotations

import csv
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from medkd.data.atomic import atomic_write, sync_folder
from medkd.data.datalists import Datalist, read_datalist, write_datalist
from medkd.errors import ConfigError, InputError
from medkd.wsi.annotations import Annotation, rasterize, read_annotations, write_annotations
from medkd.wsi.grid import TileGrid
from medkd.wsi.overview import draw_overview
from medkd.wsi.slides import Slide
from medkd.wsi.tile_labels import label_tiles
from medkd.wsi.tissue import find_tissue, read_tissue

logger = logging.getLogger(__name__)

OUTSIDE = "background"
Progress = Callable[[int, int], None]
_AT_ONCE = 64  # tiles read ahead of the one that is written


@dataclass(frozen=True)
class TileResult:
    """What was made of one slide.

    Attributes:
        name: of the outputs.
        status: ``empty-tissue`` where no tile has enough tissue, which is no failure.
        n_tiles: tiles in the grid.
        files: what was written; a folder stands for the images in it.
        label_counts: tiles per class, with annotations.
        failed_tiles: x and y of tiles that could not be read and so have no image.
    """

    name: str
    status: Literal["done", "empty-tissue"]
    n_tiles: int
    files: tuple[Path, ...]
    label_counts: dict[str, int] = field(default_factory=dict)
    failed_tiles: tuple[tuple[int, int], ...] = ()


def tile_slide(
    slide: Slide | str | Path,
    out: str | Path,
    *,
    size: int = 256,
    mpp: float = 0.5,
    slide_mpp: float | None = None,
    overlap: int = 0,
    min_tissue: float = 0.5,
    border: Literal["pad", "drop"] = "pad",
    tissue: str | Path | None = None,
    exclude_pen: bool = True,
    exclude_fat: bool = True,
    save_images: bool = False,
    annotations: str | Path | None = None,
    classes: Sequence[str] | None = None,
    outside: str | None = OUTSIDE,
    rule: Literal["center", "fraction"] = "center",
    min_fraction: float = 0.5,
    masks: bool = False,
    patient: str | None = None,
    name: str | None = None,
    threads: int = 2,
    progress: Progress | None = None,
) -> TileResult:
    """Find a slide's tissue, lay tiles over it and write them.

    Always written: ``<name>.h5`` (the :class:`TileGrid`), ``<name>_overview.png`` and ``<name>_tissue.geojson`` (to be
    corrected in QuPath and given back as ``tissue``). With ``save_images``: ``<name>_tiles/<name>_x<X>_y<Y>.png``.
    With ``annotations``: labels in the ``.h5``, ``<name>_labels.csv`` and, with both, ``<name>_datalist.json``, whose
    cases have the index of their class as label and which :func:`join_datalists` joins over slides; tiles without a
    class are under ``unlabeled``. Every file and folder appears whole or not at all.

    Args:
        slide: an open slide, or the path of one.
        out: the folder; made when missing.
        size: side of a tile in pixels as the network sees it.
        mpp: µm per pixel as the network sees it.
        slide_mpp: overrides the µm per pixel that the slide's file states; for a path only.
        overlap: pixels (at ``mpp``) that neighboring tiles share.
        min_tissue: smallest tissue fraction of a tile.
        border: whether tiles may reach over the slide's edge (``pad``) or not (``drop``).
        tissue: GeoJSON or image of the tissue, instead of finding it.
        exclude_pen: see :func:`find_tissue`.
        exclude_fat: see :func:`find_tissue`.
        save_images: write the tiles as PNG.
        annotations: QuPath's GeoJSON of this slide.
        classes: names of the labels in their order, the one of ``outside`` among them; without it ``outside`` and
            then the file's own classes by name. Several slides need the same: see :func:`find_classes`.
        outside: class of tiles in no annotation; ``None`` leaves them without.
        rule: how a tile gets its class, see :func:`label_tiles`.
        min_fraction: see :func:`label_tiles`.
        masks: write the class of every pixel as ``<name>_masks/<name>_x<X>_y<Y>.png`` (index of the class)
            and use these as labels, for segmentation.
        patient: whose slide it is, for the datalist; the slide's name when not given.
        name: of the outputs, instead of the slide's.
        threads: that read tiles.
        progress: called with images done and in all.

    Raises:
        InputError: the slide, the annotations or the tissue mask cannot be used.
        ConfigError: a parameter that makes no sense.
    """
    if masks and not (save_images and annotations):
        raise ConfigError("--masks", "needs tiles and annotations", "add --save-images and --annotations")
    if masks and outside is None:
        raise ConfigError("--masks", "needs a class for what is in no annotation", "name it")
    if not isinstance(slide, Slide):
        with Slide(slide, mpp=slide_mpp) as opened:
            return tile_slide(
                opened, out, size=size, mpp=mpp, overlap=overlap, min_tissue=min_tissue, border=border, tissue=tissue,
                exclude_pen=exclude_pen, exclude_fat=exclude_fat, save_images=save_images, annotations=annotations,
                classes=classes, outside=outside, rule=rule, min_fraction=min_fraction, masks=masks, patient=patient,
                name=name, threads=threads, progress=progress,
            )  # fmt: skip
    regions = [] if annotations is None else read_annotations(annotations, offset=slide.bounds[:2])
    if annotations is not None and classes is None:
        classes = _classes([regions], outside)
    found = (
        find_tissue(slide, exclude_pen=exclude_pen, exclude_fat=exclude_fat)
        if tissue is None
        else read_tissue(tissue, slide)
    )
    grid = TileGrid.build(
        slide, size=size, mpp=mpp, overlap=overlap, min_tissue=min_tissue, tissue=found, border=border
    )
    name = name or slide.name
    if found.pen is not None and found.pen.any():
        logger.info("%s: %.2g mm² left out as ink", name, found.pen.sum() * found.mpp**2 / 1e6)
    grid = replace(grid, slide_name=name)
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{name}{ending}" for ending in (".h5", "_overview.png", "_tissue.geojson")]
    labels = None
    if annotations is not None:
        labels = label_tiles(
            grid, regions, classes=classes or (), rule=rule, min_fraction=min_fraction, outside=outside
        )
    grid.save(files[0], labels=labels, classes=classes)
    draw_overview(slide, grid, found, files[1], labels=labels, classes=classes or ())
    write_annotations(files[2], found.annotations(), offset=slide.bounds[:2])
    if labels is not None:
        files.append(_write_labels(folder / f"{name}_labels.csv", grid, labels, classes or ()))
    failed: tuple[tuple[int, int], ...] = ()
    if save_images and len(grid):
        saved, failed = _save_images(slide, grid, folder / f"{name}_tiles", threads, progress)
        files.append(folder / f"{name}_tiles")
        if masks:
            background = list(classes or ()).index(outside or "")
            _save_masks(grid, regions, classes or (), background, folder / f"{name}_masks", saved)
            files.append(folder / f"{name}_masks")
        if labels is not None and saved.any():
            files.append(folder / f"{name}_datalist.json")
            _write_datalist(files[-1], grid, labels, classes or (), saved, patient=patient or name, masks=masks)
    counts = {} if labels is None else _count(labels, classes or ())
    return TileResult(name, "done" if len(grid) else "empty-tissue", len(grid), tuple(files), counts, failed)


def find_classes(files: Iterable[str | Path], *, outside: str | None = OUTSIDE) -> tuple[str, ...]:
    """The classes of several annotation files, in the order in which all of them should use them.

    Args:
        files: GeoJSON.
        outside: class of tiles in no annotation, which comes first.

    Raises:
        InputError: a file cannot be used.
    """
    return _classes([read_annotations(file) for file in files], outside)


def join_datalists(out: str | Path, names: Iterable[str]) -> Path | None:
    """Write ``datalist.json`` with the labelled tiles of several slides.

    Args:
        out: the folder of :func:`tile_slide`.
        names: of its outputs; those without a datalist (no tissue, no images) are passed over.

    Returns:
        The file, or ``None`` where no slide has a datalist.

    Raises:
        InputError: a datalist cannot be read, or two name their classes differently.
    """
    folder = Path(out)
    parts = [read_datalist(path) for name in names if (path := folder / f"{name}_datalist.json").is_file()]
    if not parts:
        return None
    for part in parts[1:]:
        if part.labels != parts[0].labels:
            problem = f"names its classes {part.labels}, but {parts[0].path} {parts[0].labels}"
            raise InputError(str(part.path), problem, "tile the slides again with the same classes")
    joined = parts[0].model_copy(
        update={
            section: [case for part in parts for case in part.cases(section)] for section in ("training", "unlabeled")
        }
    )
    write_datalist(joined, folder / "datalist.json")
    return folder / "datalist.json"


def _classes(files: Sequence[Sequence[Annotation]], outside: str | None) -> tuple[str, ...]:
    named = {region.name for regions in files for region in regions if region.name and not region.name.endswith("*")}
    return (*([] if outside is None else [outside]), *sorted(named - {outside}))


def _count(labels: NDArray[np.int64], classes: Sequence[str]) -> dict[str, int]:
    return {name: int((labels == index).sum()) for index, name in enumerate(classes)}


def _write_labels(path: Path, grid: TileGrid, labels: NDArray[np.int64], classes: Sequence[str]) -> Path:
    with atomic_write(path, "w") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["x", "y", "label", "class", "tissue_fraction"])
        rows = zip(grid.coords.tolist(), labels.tolist(), grid.tissue_fraction.tolist(), strict=True)
        for (x, y), label, fraction in rows:
            writer.writerow([x, y, label, classes[label] if label >= 0 else "", f"{fraction:.4f}"])
    return path


def _file_name(grid: TileGrid, index: int) -> str:
    x, y = grid.coords[index].tolist()
    return f"{grid.slide_name}_x{x}_y{y}.png"


@contextmanager
def _whole_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill that gets its name, replacing an older one, when all is in it."""
    partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.", suffix=".partial"))
    try:
        partial.chmod(0o777 & ~_umask())
        yield partial
        sync_folder(partial)
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(partial, folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    sync_folder(folder.parent)


def _umask() -> int:
    value = os.umask(0)
    os.umask(value)
    return value


def _save_images(
    slide: Slide, grid: TileGrid, folder: Path, threads: int, progress: Progress | None
) -> tuple[NDArray[np.bool_], tuple[tuple[int, int], ...]]:
    """Write the tiles; returns which have an image, and the places of those that could not be read."""
    saved = np.zeros(len(grid), bool)

    def save(index: int) -> bool:
        x, y = grid.coords[index].tolist()
        pixels, valid = slide.read_region(x, y, (grid.size, grid.size), mpp=grid.mpp)
        if valid is not None:
            return False
        _write_png(partial / _file_name(grid, index), pixels[..., ::-1])
        return True

    with _whole_folder(folder) as partial, ThreadPoolExecutor(max(1, threads)) as pool:
        for start in range(0, len(grid), _AT_ONCE):
            stop = min(start + _AT_ONCE, len(grid))
            saved[start:stop] = list(pool.map(save, range(start, stop)))
            if progress is not None:
                progress(stop, len(grid))
    failed = tuple((int(x), int(y)) for x, y in grid.coords[~saved])
    if failed:
        logger.warning("%s: %d of its tiles could not be read and have no image", grid.slide_name, len(failed))
    return saved, failed


def _save_masks(
    grid: TileGrid,
    regions: Sequence[Annotation],
    classes: Sequence[str],
    background: int,
    folder: Path,
    saved: NDArray[np.bool_],
) -> None:
    """Write the map of classes of every tile that has an image."""
    downsample = grid.size_level0 / grid.size
    boxes = [_box(region) for region in regions]
    with _whole_folder(folder) as partial:
        for index in np.flatnonzero(saved).tolist():
            corner = grid.coords[index]
            near = [
                region
                for region, (low, high) in zip(regions, boxes, strict=True)
                if (low < corner + grid.size_level0).all() and (high > corner).all()
            ]
            shape = (grid.size, grid.size)
            painted = rasterize(near, shape, downsample, classes=classes, origin=tuple(corner.tolist()))
            _write_png(
                partial / _file_name(grid, index), np.where(painted > 0, painted - 1, background).astype(np.uint8)
            )


def _box(region: Annotation) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    points = np.concatenate([polygon[0] for polygon in region.polygons])
    return points.min(0), points.max(0)


def _write_png(path: Path, pixels: NDArray[Any]) -> None:
    done, encoded = cv2.imencode(".png", pixels)
    if not done:
        raise OSError(f"{path.name} could not be encoded as PNG")
    path.write_bytes(encoded.tobytes())


def _write_datalist(
    path: Path,
    grid: TileGrid,
    labels: NDArray[np.int64],
    classes: Sequence[str],
    saved: NDArray[np.bool_],
    *,
    patient: str,
    masks: bool,
) -> None:
    training, unlabeled = [], []
    for index in np.flatnonzero(saved).tolist():
        x, y = grid.coords[index].tolist()
        label = int(labels[index])
        file_name = _file_name(grid, index)
        case: dict[str, Any] = {"image": f"{grid.slide_name}_tiles/{file_name}", "patient": patient}
        case |= {"slide": grid.slide_name, "x": x, "y": y, "mpp": grid.mpp}
        if masks:
            case["label"] = f"{grid.slide_name}_masks/{file_name}"
            training.append(case)
        elif label >= 0:
            training.append(case | {"label": label, "class": classes[label]})
        else:
            unlabeled.append(case)
    content = {
        "name": f"tiles of {grid.slide_name}",
        "modality": "histology",
        "labels": {str(index): name for index, name in enumerate(classes)},
        "training": training,
        "unlabeled": unlabeled,
        "dataset_dir": path.parent,
    }
    write_datalist(Datalist.model_validate(content), path)
