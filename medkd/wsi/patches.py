"""Patches to train on: tiles of slides where a grid says, tiles in folders, and how to split and balance them.

Both datasets yield what the engine's streams and MONAI's transforms take: a dictionary with the image (3, H, W) uint8
and, where it is known, the label. They draw no random number of their own, so inside a ``medkd.data.Stream`` an item
depends on (seed, epoch, index) alone.
"""

from __future__ import annotations

import os
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from medkd.data.datalists import Case, Datalist
from medkd.data.splits import split_datalist
from medkd.data.tile_images import TILE_SUFFIXES, read_tile_image, read_tile_mask
from medkd.errors import ConfigError, InputError
from medkd.wsi.grid import TileGrid
from medkd.wsi.slides import Slide

Item = dict[str, Any]
Transform = Callable[[Item], Any]

UNLABELED = -1
_OPEN_SLIDES = 16  # handles a process keeps open


@dataclass(frozen=True, eq=False)
class LabeledGrid:
    """The tiles of one slide and what is known of them.

    Attributes:
        slide: the slide's file.
        grid: where its tiles lie.
        labels: (N,) class of each tile, -1 where there is none; None where nothing is known.
        patient: whose slide it is; the slide itself where empty.
        slide_mpp: µm per level-0 pixel, where the file's own word must be overridden.
    """

    slide: Path
    grid: TileGrid
    labels: NDArray[np.int64] | None = None
    patient: str = ""
    slide_mpp: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "slide", Path(self.slide))
        if self.labels is not None and self.labels.shape != (len(self.grid),):
            raise InputError(self.slide, f"has {len(self.grid)} tiles and {self.labels.shape} labels", "label its grid")

    @property
    def group(self) -> str:
        """Its patient, or the slide's name where none is given."""
        return self.patient or self.grid.slide_name


class _TileCache:
    """Pixels already read, up to a number of bytes; what was read first stays."""

    def __init__(self, megabytes: float) -> None:
        self._left = int(megabytes * 2**20)
        self._kept: dict[int, NDArray[Any]] = {}

    def get(self, index: int, read: Callable[[], NDArray[Any]]) -> NDArray[Any]:
        pixels = self._kept.get(index)
        if pixels is None:
            pixels = read()
            if pixels.nbytes <= self._left:
                self._left -= pixels.nbytes
                self._kept[index] = pixels
        return pixels


class GridTiles(Dataset[Any]):
    """The tiles of several slides, read from the slides when they are asked for.

    Items are ``image`` (a tensor (3, S, S), uint8, S the grid's size at its µm per pixel), ``label`` (int, where there
    is one), ``patient``, ``slide``, ``x``, ``y`` (level-0 pixels), ``case`` (a name unique within the slide) and
    ``file`` (the same name where MONAI's savers look for it). Every process opens its own handles, at most 16 at a
    time, when it first reads; nothing is open while the dataset is being copied to a worker.

    Args:
        sources: the slides with their grids.
        transform: applied to each item; random MONAI transforms are seeded by the engine.
        keep_unlabeled: keep tiles without a label. Left out by default where their slide has labels, since they are
            ambiguous rather than normal.
        cache_mb: keep up to so many MB of decoded tiles per process; 0 streams every tile from its slide.

    Raises:
        ConfigError: no tile at all, or grids whose tiles differ in size or µm per pixel.
    """

    def __init__(
        self,
        sources: Sequence[LabeledGrid],
        *,
        transform: Transform | None = None,
        keep_unlabeled: bool = False,
        cache_mb: float = 0.0,
    ) -> None:
        self.sources = list(sources)
        self.transform = transform
        kinds = {(source.grid.size, source.grid.mpp) for source in self.sources}
        if len(kinds) > 1:
            raise ConfigError("grids", f"differ in (size, mpp): {sorted(kinds)}", "make them all alike")
        pairs = [
            np.stack([np.full(len(chosen), number), chosen], axis=1)
            for number, source in enumerate(self.sources)
            for chosen in [_chosen(source, keep_unlabeled)]
        ]
        self._index = np.concatenate(pairs) if pairs else np.empty((0, 2), dtype=np.int64)
        if not len(self._index):
            raise ConfigError("grids", "have no tile to give", "lower --min-tissue, or label some tiles")
        self._cache_mb = cache_mb
        self._forget_handles()

    def __len__(self) -> int:
        return len(self._index)

    @property
    def labels(self) -> NDArray[np.int64]:
        """(N,) the label of every item, -1 where there is none."""
        return np.array([self._label(index) for index in range(len(self))], dtype=np.int64)

    @property
    def groups(self) -> list[str]:
        """The slide of every item."""
        return [self.sources[number].grid.slide_name for number in self._index[:, 0]]

    def __getitem__(self, index: int) -> Any:
        number, tile = (int(part) for part in self._index[index])
        source = self.sources[number]
        x, y = (int(part) for part in source.grid.coords[tile])
        pixels = self._cache().get(int(index), lambda: self._read(number, x, y))
        item: Item = {
            "image": _to_tensor(pixels),
            "patient": source.group,
            "slide": source.grid.slide_name,
            "x": x,
            "y": y,
            "case": f"{source.grid.slide_name}_x{x}_y{y}",
        }
        item["file"] = {"filename_or_obj": item["case"]}
        if (label := self._label(index)) != UNLABELED:
            item["label"] = label
        return item if self.transform is None else self.transform(item)

    def __getstate__(self) -> dict[str, Any]:
        """Without handles and cached pixels, which stay with the process that has them."""
        return {**self.__dict__, "_process": 0, "_slides": OrderedDict(), "_tiles": None}

    def _label(self, index: int) -> int:
        number, tile = self._index[index]
        labels = self.sources[number].labels
        return UNLABELED if labels is None else int(labels[tile])

    def _forget_handles(self) -> None:
        self._process = os.getpid()
        self._slides: OrderedDict[int, Slide] = OrderedDict()
        self._tiles: _TileCache | None = None

    def _cache(self) -> _TileCache:
        if self._process != os.getpid():
            self._forget_handles()  # those of the parent process, which a fork hands down, must not be shared
        if self._tiles is None:
            self._tiles = _TileCache(self._cache_mb)
        return self._tiles

    def _read(self, number: int, x: int, y: int) -> NDArray[np.uint8]:
        grid = self.sources[number].grid
        return self._open(number).read(x, y, (grid.size, grid.size), mpp=grid.mpp)

    def _open(self, number: int) -> Slide:
        if number in self._slides:
            self._slides.move_to_end(number)
            return self._slides[number]
        source = self.sources[number]
        slide = Slide(source.slide, mpp=source.slide_mpp)
        try:
            source.grid.require_slide(slide)
        except BaseException:
            slide.close()
            raise
        if len(self._slides) >= _OPEN_SLIDES:
            self._slides.popitem(last=False)[1].close()
        self._slides[number] = slide
        return slide


class FolderTiles(Dataset[Any]):
    """Tiles that lie in image files: the items of a datalist, or a folder with one subfolder per class.

    Items are those given, with ``image`` read as a tensor (3, H, W), uint8; a ``label`` that is a file is read as a
    mask (1, H, W), uint8, an integer stays the class of the tile.

    Args:
        items: dictionaries with ``image`` (a path) and, where known, ``label``; ``Datalist.section`` gives them.
        transform: applied to each item; random MONAI transforms are seeded by the engine.
        mask_threshold: for masks kept as JPEG: 1 above it, 0 elsewhere.
        cache_mb: keep up to so many MB of decoded images per process; 0 reads files every time.

    Raises:
        ConfigError: there is no item.
    """

    def __init__(
        self,
        items: Sequence[Mapping[str, Any]],
        *,
        transform: Transform | None = None,
        mask_threshold: int | None = None,
        cache_mb: float = 0.0,
    ) -> None:
        self.items = [dict(item) for item in items]
        if not self.items:
            raise ConfigError("tiles", "there is none", "name a folder or a datalist with tiles")
        self.transform = transform
        self.mask_threshold = mask_threshold
        self._cache = _TileCache(cache_mb)

    @classmethod
    def from_folder(cls, root: str | Path, *, classes: Sequence[str] | None = None, **options: Any) -> FolderTiles:
        """Tiles of a folder with one subfolder per class.

        Args:
            root: the folder.
            classes: the subfolders in the order of their labels; all of them by name by default.
            **options: as for the class.

        Raises:
            InputError: the folder or a class is not there, or has no image.
        """
        return cls(list(_folder_items(Path(root), classes)), **options)

    def __len__(self) -> int:
        return len(self.items)

    @property
    def labels(self) -> NDArray[np.int64]:
        """(N,) the class of every item, -1 where it has none or a mask."""
        found = [item.get("label", UNLABELED) for item in self.items]
        return np.array([label if isinstance(label, int) else UNLABELED for label in found], dtype=np.int64)

    @property
    def groups(self) -> list[str]:
        """The slide of every item, or its patient where it names none."""
        return [str(item.get("slide") or item.get("patient") or item["image"]) for item in self.items]

    def __getitem__(self, index: int) -> Any:
        item = dict(self.items[index])
        item["image"] = _to_tensor(self._cache.get(2 * index, lambda: read_tile_image(self.items[index]["image"])))
        if isinstance(label := item.get("label"), str | Path):
            mask = self._cache.get(2 * index + 1, lambda: read_tile_mask(label, threshold=self.mask_threshold))
            if mask.shape != tuple(item["image"].shape[1:]):
                problem = f"its size {mask.shape} is not {tuple(item['image'].shape[1:])}, that of its image"
                raise InputError(label, problem, "give the mask of this tile")
            item["label"] = torch.from_numpy(mask.astype(np.uint8, copy=True))[None]
        return item if self.transform is None else self.transform(item)

    def __getstate__(self) -> dict[str, Any]:
        """Without cached pixels, which stay with the process that has them."""
        return {**self.__dict__, "_cache": _TileCache(self._cache._left / 2**20)}


class BalancedTiles(Dataset[Any]):
    """A view of a dataset in which classes, and within a class its slides, come equally often.

    Item i is of class i modulo the number of classes; which slide and which tile is drawn with NumPy's global
    generator, which ``medkd.data.Stream`` seeds for every item. So a round over the view is balanced exactly, a large
    slide does not outweigh small ones, and an item depends on (seed, epoch, index) alone.

    Args:
        dataset: GridTiles or FolderTiles; unlabeled tiles are never drawn.
        length: items per round; by default as many as there are labeled tiles.
        by: ``"slide"`` draws a slide of the class first, ``"tile"`` any tile of the class.

    Raises:
        ConfigError: no tile has a class.
    """

    def __init__(
        self, dataset: GridTiles | FolderTiles, *, length: int | None = None, by: Literal["slide", "tile"] = "slide"
    ) -> None:
        self.dataset = dataset
        pools: dict[int, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
        for index, (label, group) in enumerate(zip(dataset.labels.tolist(), dataset.groups, strict=True)):
            if label != UNLABELED:
                pools[label][group if by == "slide" else ""].append(index)
        if not pools:
            raise ConfigError("tiles", "none has a class to balance by", "label them, or train without balancing")
        self._pools = [[np.array(tiles) for tiles in pools[label].values()] for label in sorted(pools)]
        self._length = length or sum(len(tiles) for pool in self._pools for tiles in pool)

    @property
    def transform(self) -> Any:
        """That of the dataset, so that the engine seeds it."""
        return self.dataset.transform

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Any:
        pool = self._pools[index % len(self._pools)]
        tiles = pool[np.random.randint(len(pool))]
        return self.dataset[int(tiles[np.random.randint(len(tiles))])]


def slide_tiles(
    slide: str | Path,
    *,
    size: int,
    mpp: float,
    overlap: int = 0,
    min_tissue: float = 0.5,
    slide_mpp: float | None = None,
    transform: Transform | None = None,
) -> GridTiles:
    """The tiles of one slide that hold tissue, for a MONAI configuration that predicts on it.

    Args:
        slide: the slide's file.
        size: side of a tile in pixels as the network sees it.
        mpp: µm per pixel as the network sees it.
        overlap: pixels (at ``mpp``) that neighboring tiles share.
        min_tissue: the smallest tissue fraction of a tile; 0 keeps all.
        slide_mpp: µm per level-0 pixel, where the file's own word must be overridden.
        transform: applied to each item.

    Raises:
        ConfigError: no tile has enough tissue, or parameters that make no grid.
        InputError: the slide cannot be used.
    """
    with Slide(slide, mpp=slide_mpp) as opened:
        grid = TileGrid.build(opened, size=size, mpp=mpp, overlap=overlap, min_tissue=min_tissue)
    return GridTiles([LabeledGrid(Path(slide), grid, slide_mpp=slide_mpp)], transform=transform)


def split_slides(
    sources: Sequence[LabeledGrid],
    *,
    validation: float = 0.0,
    test: float = 0.0,
    by: Literal["patient", "slide"] = "patient",
    seed: int = 0,
) -> dict[str, list[LabeledGrid]]:
    """Split slides so that no patient (or, if asked, no slide) is on two sides; strata are the slides' classes.

    A slide's class is the highest of its tiles, as a tumor slide is one with any tumor.

    Args:
        sources: the slides with their grids.
        validation: fraction of the patients.
        test: fraction of the patients.
        by: what must not be divided. ``"slide"`` is for data whose patients are unknown; say so with the results.
        seed: the same seed gives the same split, whatever the order of the slides.

    Returns:
        ``training``, ``validation`` and ``test``.

    Raises:
        ConfigError: fractions that make no sense.
        InputError: a slide twice, or too few patients.
    """
    by_path = {str(Path(os.path.abspath(source.slide))): source for source in sources}
    if len(by_path) < len(sources):
        raise InputError("slides", "one is listed twice", "list every slide once")
    classes = {path: _slide_class(source) for path, source in by_path.items()}
    names = {str(label): f"class {label}" for label in {0, *classes.values()}}
    cases = [
        Case(image=path, label=classes[path], patient=source.group if by == "patient" else path)
        for path, source in by_path.items()
    ]
    root = Path(os.path.abspath(os.sep))
    listed = Datalist(name="slides", labels=names, training=cases, dataset_dir=root)
    done = split_datalist(listed, validation=validation, test=test, seed=seed, stratify_by="label")
    return {
        "training": [by_path[case.image] for case in done.training],
        "validation": [by_path[case.image] for case in done.validation],
        "test": [by_path[case.image] for case in done.test],
    }


def cut_patches(
    image: NDArray[np.uint8], mask: NDArray[np.integer[Any]], *, size: int, center: int, step: int | None = None
) -> Iterator[tuple[int, int, int, NDArray[np.uint8]]]:
    """Cut a labeled picture into patches whose class is that of their center, whatever surrounds it.

    A patch is of class 1 if at least half of its central square is, of class 0 if none of it is, and is left out
    between the two.

    Args:
        image: (H, W, 3).
        mask: (H, W), nonzero for class 1.
        size: side of a patch, in pixels.
        center: side of its central square, in pixels.
        step: between patches, in pixels; ``size`` by default.

    Yields:
        x, y (corner, in pixels of the image), class, patch (size, size, 3).

    Raises:
        ValueError: sizes that do not fit each other.
    """
    if image.shape[:2] != mask.shape or not 0 < center <= size:
        raise ValueError(f"image {image.shape}, mask {mask.shape}, size {size} and center {center} do not fit")
    margin = (size - center) // 2
    for y in range(0, image.shape[0] - size + 1, step or size):
        for x in range(0, image.shape[1] - size + 1, step or size):
            top, left = y + margin, x + margin
            share = float((mask[top : top + center, left : left + center] != 0).mean())
            if share == 0 or share >= 0.5:
                yield x, y, int(share > 0), image[y : y + size, x : x + size]


def _chosen(source: LabeledGrid, keep_unlabeled: bool) -> NDArray[np.int64]:
    if source.labels is None or keep_unlabeled:
        return np.arange(len(source.grid))
    return np.flatnonzero(source.labels != UNLABELED)


def _slide_class(source: LabeledGrid) -> int:
    return max(0, int(source.labels.max(initial=0))) if source.labels is not None else 0


def _to_tensor(pixels: NDArray[Any]) -> torch.Tensor:
    """(H, W, 3) to a tensor (3, H, W) of its own memory."""
    return torch.from_numpy(np.moveaxis(pixels, -1, 0).copy())


def _folder_items(root: Path, classes: Sequence[str] | None) -> Iterator[Item]:
    if not root.is_dir():
        raise InputError(root, "is not a folder", "name a folder with one subfolder of tiles per class")
    names = list(classes) if classes is not None else sorted(part.name for part in root.iterdir() if part.is_dir())
    if not names:
        raise InputError(root, "has no subfolder", "put the tiles of each class into a subfolder")
    for label, name in enumerate(names):
        files = sorted(path for path in (root / name).rglob("*") if path.suffix.lower() in TILE_SUFFIXES)
        if not files:
            raise InputError(root / name, "has no image", f"put {', '.join(TILE_SUFFIXES)} files there")
        for path in files:
            yield {"image": str(path), "label": label, "class": name, "case": path.stem}
