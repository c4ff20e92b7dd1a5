"""Where on a slide a network looks: the tiles, said in level-0 pixels and in microns.

The grid is decided once and saved; prediction, export and training all read it, so that nobody computes an origin
twice. The file is the HDF5 that CLAM and TRIDENT read.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import cv2
import h5py
import numpy as np
from numpy.typing import ArrayLike, NDArray

from medkd import __version__
from medkd.data.atomic import atomic_write
from medkd.errors import ConfigError, InputError

if TYPE_CHECKING:
    from medkd.wsi.slides import Slide
    from medkd.wsi.tissue import TissueMask

FORMAT = "medkd tiles 1"
NATIVE_MPP_OF_1X = 10.0  # a 10x objective gives about 1 µm per pixel; TRIDENT counts magnification this way
_LEVEL_TOLERANCE = 0.01  # a pyramid level whose resolution differs by less is the one asked for
_ROUNDING = 1e-6  # of a share of a tile
_MAKE_AGAIN = "make it again with `medkd slide tile`"


@dataclass(frozen=True, eq=False)
class TileGrid:
    """The tiles of one slide.

    Attributes:
        coords: int64 (N, 2), x and y of each tile's corner in level-0 pixels, row by row.
        tissue_fraction: float32 (N,), share of each tile's area that is tissue; what lies off the slide is
            not. NaN where tissue was not looked for.
        size: side of a tile in pixels as the network sees it.
        mpp: µm per pixel as the network sees it.
        overlap: pixels (at ``mpp``) that neighboring tiles share.
        size_level0: side of a tile in level-0 pixels, not rounded.
        slide_name: the slide's file name without suffix.
        slide_fingerprint: what identifies the slide's content.
        slide_mpp: µm per level-0 pixel the grid was made with.
        dimensions: (width, height) of level 0.
        bounds: x, y, width, height of the slide's non-empty area, which the grid covers.
        pyramid_level: the level that has the grid's resolution; ``None`` where tiles must be resampled.
    """

    coords: NDArray[np.int64]
    tissue_fraction: NDArray[np.float32]
    size: int
    mpp: float
    overlap: int
    size_level0: float
    slide_name: str
    slide_fingerprint: str
    slide_mpp: float
    dimensions: tuple[int, int]
    bounds: tuple[int, int, int, int]
    pyramid_level: int | None = None

    def __len__(self) -> int:
        return len(self.coords)

    @property
    def centers(self) -> NDArray[np.float64]:
        """(N, 2) x and y of the tiles' centers in level-0 pixels."""
        return self.coords.astype(np.float64) + self.size_level0 / 2

    @classmethod
    def build(
        cls,
        slide: Slide,
        *,
        size: int,
        mpp: float,
        overlap: int = 0,
        min_tissue: float = 0.5,
        tissue: TissueMask | None = None,
        border: Literal["pad", "drop"] = "pad",
    ) -> TileGrid:
        """Lay tiles over a slide and keep those with enough tissue.

        Origins are multiples of the exact distance between tiles, each rounded once, so they never drift. The grid
        starts at the corner of the slide's non-empty area.

        Args:
            slide: the slide.
            size: side of a tile in pixels as the network sees it.
            mpp: µm per pixel as the network sees it.
            overlap: pixels (at ``mpp``) that neighboring tiles share.
            min_tissue: the smallest tissue fraction of a tile that is kept; 0 keeps every tile.
            tissue: where the tissue is; found in the slide when not given and needed.
            border: ``pad`` lets the last tiles reach over the edge, so that all of the slide is covered; ``drop``
                leaves them out.

        Raises:
            ConfigError: a parameter that makes no grid.
            InputError: the slide does not say its µm per pixel.
        """
        _refuse_bad_parameters(size, mpp, overlap, min_tissue, border)
        scale = mpp / slide.mpp
        size_level0 = size * scale
        step = (size - overlap) * scale
        left, top, width, height = slide.bounds
        x = left + _origins(width, size_level0, step, border)
        y = top + _origins(height, size_level0, step, border)
        coords = np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2)
        if tissue is None and min_tissue > 0:
            from medkd.wsi.tissue import find_tissue

            tissue = find_tissue(slide)
        if tissue is None:
            fraction = np.full(len(coords), np.nan, np.float32)
        else:
            fraction = area_fractions(tissue.mask, tissue.downsample, x, y, size_level0)
            keep = fraction >= min_tissue - _ROUNDING
            coords, fraction = coords[keep], fraction[keep]
        return cls(
            coords=coords,
            tissue_fraction=fraction,
            size=size,
            mpp=float(mpp),
            overlap=overlap,
            size_level0=size_level0,
            slide_name=slide.name,
            slide_fingerprint=slide.fingerprint,
            slide_mpp=slide.mpp,
            dimensions=slide.dimensions,
            bounds=slide.bounds,
            pyramid_level=_matching_level(slide, scale),
        )

    def require_slide(self, slide: Slide) -> None:
        """Refuse a slide that this grid was not made from.

        Raises:
            InputError: its content, its size or its µm per pixel differ.
        """
        where = f"tiles of {self.slide_name}"
        if slide.fingerprint != self.slide_fingerprint or tuple(slide.dimensions) != tuple(self.dimensions):
            raise InputError(where, f"were made from another slide than {slide.path}", _MAKE_AGAIN)
        if not math.isclose(slide.mpp, self.slide_mpp, rel_tol=1e-6):
            problem = f"were made for {self.slide_mpp:g} µm per pixel, but {slide.path} now has {slide.mpp:g}"
            raise InputError(where, problem, "give the same --slide-mpp, or make the tiles again")

    def save(
        self, path: str | Path, *, labels: NDArray[np.int64] | None = None, classes: Sequence[str] | None = None
    ) -> None:
        """Write the grid as HDF5; the file appears whole or not at all, and damage to it is noticed when it is read.

        ``coords`` carries what CLAM (``patch_size``, ``patch_level``, ``downsample``, ``level_dim``, ``name``) and
        TRIDENT (``patch_size``, ``patch_size_level0``, ``level0_magnification``, ``target_magnification``,
        ``overlap``, ``name``, ``level0_width``, ``level0_height``) read. CLAM reads tiles straight from a level of
        the pyramid: where none has the grid's resolution its ``patch_level`` is left out, so that CLAM stops instead
        of reading tiles of another size. Magnifications are 10 / mpp, unrounded, so that their ratio is the true one.

        Args:
            path: the file; its folder must exist.
            labels: int64 (N,) index into ``classes``, -1 where a tile has none.
            classes: the names of the labels.
        """
        coords, fraction = np.asarray(self.coords, np.int64), np.asarray(self.tissue_fraction, np.float32)
        memory = io.BytesIO()
        with h5py.File(memory, "w") as file:
            said = _add(file, "coords", coords.reshape(-1, 2)).attrs
            said.update(self._attributes())
            said["sha256"] = _digest(said, coords, fraction)
            _add(file, "tissue_fraction", fraction)
            if labels is not None:
                labels = np.asarray(labels, np.int64)
                said = _add(file, "labels", labels).attrs
                said["classes"] = json.dumps(list(classes or ()))
                said["sha256"] = _digest(said, labels)
        with atomic_write(path, "wb") as output:
            output.write(memory.getbuffer())

    def _attributes(self) -> dict[str, Any]:
        attributes: dict[str, Any] = {
            "patch_size": self.size,
            "patch_size_level0": round(self.size_level0),
            "level0_magnification": NATIVE_MPP_OF_1X / self.slide_mpp,
            "target_magnification": NATIVE_MPP_OF_1X / self.mpp,
            "overlap": self.overlap,
            "name": self.slide_name,
            "level0_width": self.dimensions[0],
            "level0_height": self.dimensions[1],
            "bounds": np.asarray(self.bounds, np.int64),
            "mpp": self.mpp,
            "slide_mpp": self.slide_mpp,
            "size_level0": self.size_level0,
            "slide_fingerprint": self.slide_fingerprint,
            "format": FORMAT,
            "medkd_version": __version__,
        }
        if self.pyramid_level is not None:
            downsample = self.mpp / self.slide_mpp
            level_size = np.round(np.asarray(self.dimensions) / downsample).astype(np.int64)
            attributes |= {"patch_level": self.pyramid_level, "downsample": np.array([downsample, downsample])}
            attributes |= {"level_dim": level_size, "downsampled_level_dim": level_size}
        return attributes

    @classmethod
    def load(cls, path: str | Path) -> TileGrid:
        """Read a grid that :meth:`save` wrote.

        Raises:
            InputError: the file is missing, damaged, or lacks what a grid must say.
        """
        path = Path(path)
        with _opened(path) as file:
            try:
                attributes = dict(file["coords"].attrs)
                if attributes.get("format") != FORMAT:
                    problem = "is not a file of tiles this version of medkd can read (it does not say for which slide)"
                    raise InputError(path, problem, _MAKE_AGAIN)
                coords, fraction = _values(file, "coords"), _values(file, "tissue_fraction")
                _refuse_changed(attributes, coords, fraction)
                grid = cls(
                    coords=coords,
                    tissue_fraction=fraction,
                    size=int(attributes["patch_size"]),
                    mpp=float(attributes["mpp"]),
                    overlap=int(attributes["overlap"]),
                    size_level0=float(attributes["size_level0"]),
                    slide_name=str(attributes["name"]),
                    slide_fingerprint=str(attributes["slide_fingerprint"]),
                    slide_mpp=float(attributes["slide_mpp"]),
                    dimensions=(int(attributes["level0_width"]), int(attributes["level0_height"])),
                    bounds=tuple(int(value) for value in attributes["bounds"]),  # type: ignore[arg-type]
                    pyramid_level=int(attributes["patch_level"]) if "patch_level" in attributes else None,
                )
            except (OSError, KeyError, ValueError, TypeError, RuntimeError) as error:
                raise _damaged(path, error) from None
        grid._refuse_impossible(path)
        return grid

    def _refuse_impossible(self, path: Path) -> None:
        shapes_fit = self.coords.shape == (len(self.coords), 2) and self.tissue_fraction.shape == (len(self.coords),)
        types_fit = self.coords.dtype == np.int64 and self.tissue_fraction.dtype == np.float32
        positive = self.size > 0 and self.mpp > 0 and self.slide_mpp > 0 and 0 <= self.overlap < self.size
        if not (shapes_fit and types_fit and positive and len(self.bounds) == 4):
            raise InputError(path, "holds tiles that contradict each other", _MAKE_AGAIN)


def read_tile_labels(path: str | Path) -> tuple[NDArray[np.int64], list[str]]:
    """The labels of the tiles in a file that ``TileGrid.save(labels=…)`` wrote.

    Returns:
        int64 (N,) index into the class names, -1 where a tile has none; and the class names.

    Raises:
        InputError: the file is missing or damaged, or its tiles have no labels.
    """
    path = Path(path)
    with _opened(path) as file:
        if "labels" not in file:
            raise InputError(path, "holds tiles without labels", "make it with `medkd slide tile --annotations`")
        try:
            labels, attributes = _values(file, "labels"), dict(file["labels"].attrs)
            _refuse_changed(attributes, labels)
            return labels, [str(name) for name in json.loads(attributes["classes"])]
        except (OSError, KeyError, ValueError, TypeError, RuntimeError) as error:
            raise _damaged(path, error) from None


def area_fractions(
    mask: NDArray[np.bool_], downsample: float, x: ArrayLike, y: ArrayLike, size: float
) -> NDArray[np.float32]:
    """Share of each tile that the mask covers, exact for a mask of square pixels.

    Args:
        mask: (H, W), whose corner is the origin.
        downsample: level-0 pixels per pixel of the mask.
        x: origins of the tiles' columns, level-0 pixels.
        y: origins of their rows.
        size: side of a tile, level-0 pixels.

    Returns:
        float32 (rows x columns,), row by row.
    """
    pixels = np.ascontiguousarray(mask, bool).view(np.uint8)
    integral = cv2.integral(pixels)  # 32 bits: enough for masks of 2 gigapixels
    # Between its corners the integral of a pixel is bilinear, so interpolating it is exact; first along y, then x.
    left, top = np.asarray(x, np.float64), np.asarray(y, np.float64)
    strips = _interpolate(integral, (top + size) / downsample) - _interpolate(integral, top / downsample)
    area = _interpolate(strips.T, (left + size) / downsample) - _interpolate(strips.T, left / downsample)
    return np.clip(area.T.reshape(-1) * (downsample / size) ** 2, 0, 1).astype(np.float32)


def _origins(length: int, size: float, step: float, border: str) -> NDArray[np.int64]:
    """Origins along one side, from 0; a tile that would add or hang over half a level-0 pixel is not counted so."""
    slack = 0.5
    if border == "pad":
        count = max(1, math.ceil((length - (size - step) - slack) / step))
    else:
        count = max(0, math.floor((length - size + slack) / step) + 1)
    return np.round(np.arange(count) * step).astype(np.int64)


def _interpolate(rows: NDArray[Any], position: NDArray[np.float64]) -> NDArray[np.float64]:
    position = np.clip(position, 0, len(rows) - 1)
    below = np.minimum(position.astype(np.int64), len(rows) - 2)
    weight = (position - below)[:, None]
    return rows[below] * (1 - weight) + rows[below + 1] * weight


def _matching_level(slide: Slide, downsample: float) -> int | None:
    for level, own in enumerate(slide.level_downsamples):
        if math.isclose(own, downsample, rel_tol=_LEVEL_TOLERANCE):
            return level
    return None


def _refuse_bad_parameters(size: int, mpp: float, overlap: int, min_tissue: float, border: str) -> None:
    if size < 1:
        raise ConfigError("--size", f"{size} is no tile size", "give pixels, for example 256")
    if not (math.isfinite(mpp) and mpp > 0):
        raise ConfigError("--mpp", f"{mpp} is no resolution", "give µm per pixel, for example 0.5")
    if not 0 <= overlap < size:
        raise ConfigError("--overlap", f"{overlap} does not fit tiles of {size} pixels", f"give 0 to {size - 1}")
    if not 0 <= min_tissue <= 1:
        raise ConfigError("--min-tissue", f"{min_tissue} is no share of a tile", "give 0 to 1")
    if border not in ("pad", "drop"):
        raise ConfigError("--border", f"{border} is unknown", "use pad or drop")


def _add(file: h5py.File, name: str, values: NDArray[Any]) -> h5py.Dataset:
    rows = max(1, min(len(values), 4096))
    shape = values.shape[1:]
    return file.create_dataset(name, data=values, maxshape=(None, *shape), chunks=(rows, *shape))


def _values(file: h5py.File, name: str) -> NDArray[Any]:
    if file[name].nbytes > Path(file.filename).stat().st_size:  # they are not compressed, so this cannot be
        raise ValueError(f"{name} is larger than the file")
    return file[name][()]


def _digest(attributes: Mapping[str, Any], *arrays: NDArray[Any]) -> str:
    """What tells whether attributes or arrays were changed."""
    said = {name: np.asarray(value).tolist() for name, value in attributes.items() if name != "sha256"}
    digest = hashlib.sha256(json.dumps(said, sort_keys=True).encode())
    for array in arrays:
        digest.update(f"{array.dtype.str} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def _refuse_changed(attributes: Mapping[str, Any], *arrays: NDArray[Any]) -> None:
    if attributes["sha256"] != _digest(attributes, *arrays):
        raise ValueError("its checksum is wrong")


def _opened(path: Path) -> h5py.File:
    if not path.is_file():
        raise InputError(path, "does not exist" if not path.exists() else "is not a file", _MAKE_AGAIN)
    try:
        return h5py.File(path, "r")
    except OSError as error:
        raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception) -> InputError:
    return InputError(path, f"cannot be read as tiles ({error})", _MAKE_AGAIN)
