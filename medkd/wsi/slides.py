"""A whole-slide image: what it is, and its pixels at any resolution."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms

from medkd.errors import InputError
from medkd.wsi.level_pixels import BadTile, Pixels
from medkd.wsi.openslide_levels import OpenSlideLevels
from medkd.wsi.resample import LEVEL_FITS, Resampling
from medkd.wsi.resolution import find_resolution
from medkd.wsi.slide_files import fingerprint, inspect
from medkd.wsi.tiff_directories import TiffDirectory
from medkd.wsi.tiff_tiles import FAST_VENDORS, TiffTiles

__all__ = ["BadTile", "Region", "Slide"]

_COARSEST = 1000  # level-0 pixels per pixel; what is read at once grows with its square
_BLOCK = 4096  # level pixels along a side held at once


class Region(NamedTuple):
    """What ``Slide.read_region`` returns.

    Attributes:
        pixels: (h, w, 3) uint8 RGB.
        valid: None if all pixels are good, else (h, w) bool, False where a tile could not be decoded or the scanner
            stored nothing. Pixels outside the slide are good: they are background.
    """

    pixels: NDArray[np.uint8]
    valid: NDArray[np.bool_] | None


class Slide:
    """A slide of any format that OpenSlide reads.

    Coordinates are level-0 pixels, x to the right and y down, fractions allowed. Pixels are uint8 RGB. One object may
    serve several threads; other processes open their own when it is sent to them or after a fork.

    Args:
        path: of the slide; for a DICOM slide any one of its files.
        mpp: µm per level-0 pixel; overrides what the file says.
        fast: decode the JPEG tiles of Aperio and plain tiled TIFFs without OpenSlide. The pixels are the same, within
            2 grey levels.
        icc: convert colors to sRGB by the slide's ICC profile, where it has one (after resampling).

    Attributes:
        path: as given.
        name: of the file, without suffix.
        vendor: as OpenSlide names it.
        reader: ``"tiff"`` if tiles are decoded without OpenSlide, else ``"openslide"``.
        dimensions: (width, height) of level 0.
        level_dimensions: (width, height) of every level.
        level_downsamples: of every level, as OpenSlide computes them.
        objective_power: magnification of the objective, None if the file does not say.
        background: RGB that fills what lies outside the slide.
        icc_profile: its bytes, empty if it is damaged; None if there is none.
        bounds: (x, y, width, height) of the non-empty area; everything where the file names none.

    Raises:
        InputError: if the file is missing, may not be read, is a folder, empty, truncated, text, unsupported or
            without pixels, if ``mpp`` cannot be true, or if ``icc`` is asked for and the profile is damaged.
    """

    def __init__(self, path: str | Path, *, mpp: float | None = None, fast: bool = True, icc: bool = False) -> None:
        self.path = Path(path)
        self.name = self.path.stem
        self._arguments = (mpp, fast, icc)
        directories = inspect(self.path)
        self._openslide = OpenSlideLevels(self.path)
        properties = self._openslide.properties
        self.level_dimensions = self._openslide.dimensions
        self.level_downsamples = self._openslide.downsamples
        self.icc_profile = self._openslide.icc_profile
        self.background = self._openslide.background
        self.dimensions = self.level_dimensions[0]
        self.vendor = properties.get("openslide.vendor", "unknown")
        self.objective_power = _positive(properties.get("openslide.objective-power", ""))
        self.bounds = _bounds(properties, self.dimensions)
        self._quick_hash = properties.get("openslide.quickhash-1", "")
        self._resolution = find_resolution(self.path, properties, mpp)
        self._scales = [_true_downsample(self.dimensions, size) for size in self.level_dimensions]
        self._to_srgb = _srgb_transform(self.path, self.icc_profile) if icc and self.icc_profile is not None else None
        self._tiff = self._open_tiff(directories) if fast else None
        self.reader = "openslide" if self._tiff is None else "tiff"

    @property
    def mpp(self) -> float:
        """Micrometers per level-0 pixel.

        Raises:
            InputError: if neither the file nor the user gave one that can be true.
        """
        return self._resolution.require(self.path)

    @property
    def mpp_source(self) -> str:
        """Who says so: ``"vendor"``, ``"TIFF resolution"`` or ``"user"``; empty where nobody does."""
        return self._resolution.source

    @property
    def bad_tiles(self) -> list[BadTile]:
        """The tiles that could not be decoded so far."""
        return [*self._openslide.bad, *(self._tiff.bad if self._tiff is not None else ())]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256, in hex, of the file's length, places and pixels, not of its name; see ``slide_files.fingerprint``.

        Raises:
            InputError: if the file cannot be read any more.
        """
        return fingerprint(self.path, f"{self.dimensions} {self._quick_hash}")

    def read(self, x: float, y: float, size: tuple[int, int], *, mpp: float) -> NDArray[np.uint8]:
        """Pixels at ``mpp`` µm per pixel; see ``read_region``, which also tells which of them are good."""
        return self.read_region(x, y, size, mpp=mpp).pixels

    def read_region(self, x: float, y: float, size: tuple[int, int], *, mpp: float) -> Region:
        """Pixels at ``mpp`` µm per pixel.

        They come from the coarsest level that is not coarser than ``mpp`` (0.5 % is forgiven), from level 0 if all
        are. Filter: the mean over as many pixels of the level as one pixel of the result covers,
        with linear interpolation (see ``medkd.wsi.resample``).

        Args:
            x: left edge, level-0 pixels.
            y: top edge, level-0 pixels.
            size: (width, height) in pixels of the result.
            mpp: µm per pixel of the result.

        Raises:
            InputError: if the slide's own resolution is not known.
            ValueError: if a number is not finite, ``size`` or ``mpp`` is not positive, or ``mpp`` is over 1000 times
                that of level 0.
        """
        if not (math.isfinite(mpp) and mpp > 0):
            raise ValueError(f"mpp must be positive, not {mpp}")
        scale = mpp / self.mpp
        if scale > _COARSEST:
            raise ValueError(f"mpp {mpp:g} is over {_COARSEST} times that of level 0 ({self.mpp:g})")
        return self._read_scaled(x, y, size, (scale, scale))

    def read_level(self, x: int, y: int, size: tuple[int, int], level: int) -> NDArray[np.uint8]:
        """Pixels of one level, as ``openslide.read_region`` gives them, but RGB over the background.

        Args:
            x: left edge, level-0 pixels. Between two pixels of the level they are interpolated linearly.
            y: top edge, level-0 pixels.
            size: (width, height) in pixels of the level.
            level: 0 is the finest.
        """
        _check_box(x, y, size)
        downsample = self.level_downsamples[level]
        region = self._read_from(level, (x / downsample, y / downsample), (1.0, 1.0), size)
        return self._in_color(region).pixels

    def thumbnail(self, longest_side: int) -> NDArray[np.uint8]:
        """The whole slide, ``longest_side`` pixels wide or high (its own size if that is smaller).

        It is larger than asked for if one pixel of it would cover over 1000 level-0 pixels along a side.

        Raises:
            ValueError: if ``longest_side`` is not positive.
        """
        width, height = self.dimensions
        if longest_side < 1:
            raise ValueError(f"longest_side must be positive, not {longest_side}")
        factor = min(max(1.0, max(width, height) / longest_side), _COARSEST)
        size = max(1, round(width / factor)), max(1, round(height / factor))
        return self._read_scaled(0, 0, size, (width / size[0], height / size[1])).pixels

    def facts(self) -> dict[str, Any]:
        """What may be told about the slide, as JSON: no dates, users, barcodes, label or macro images."""
        return {
            "name": self.name,
            "vendor": self.vendor,
            "reader": self.reader,
            "width": self.dimensions[0],
            "height": self.dimensions[1],
            "levels": [
                {"width": width, "height": height, "downsample": round(downsample, 4)}
                for (width, height), downsample in zip(self.level_dimensions, self.level_downsamples, strict=True)
            ],
            "mpp": self._resolution.mpp,
            "mpp_source": self._resolution.source or None,
            "mpp_problem": self._resolution.problem or None,
            "objective_power": self.objective_power,
            "bounds": list(self.bounds),
            "background": list(self.background),
            "icc_profile": self.icc_profile is not None,
            "fingerprint": self.fingerprint,
        }

    def close(self) -> None:
        """Free files and memory. Reading again opens them again."""
        self._openslide.close()
        if self._tiff is not None:
            self._tiff.close()

    def __enter__(self) -> Slide:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (str(self.path.absolute()), *self._arguments)

    def __repr__(self) -> str:
        return f"Slide({str(self.path)!r}, {self.dimensions[0]} × {self.dimensions[1]} px, {self.vendor})"

    def _open_tiff(self, directories: list[TiffDirectory]) -> TiffTiles | None:
        if self.vendor not in FAST_VENDORS:
            return None
        sparse = self.vendor == "generic-tiff"
        tiles = TiffTiles(self.path, directories, self.level_dimensions, self.background, sparse=sparse)
        fast = [level in tiles for level in range(len(self.level_dimensions))]
        if all(fast):
            self._openslide.close()  # not needed any more
        return tiles if any(fast) else None

    def _read_scaled(self, x: float, y: float, size: tuple[int, int], scale: tuple[float, float]) -> Region:
        """``scale``: level-0 pixels per pixel of the result, along x and y."""
        _check_box(x, y, size)
        level = self._best_level(min(scale))
        down_x, down_y = self._scales[level]
        return self._in_color(
            self._read_from(level, (x / down_x, y / down_y), (scale[0] / down_x, scale[1] / down_y), size)
        )

    def _best_level(self, scale: float) -> int:
        fitting = [level for level, down in enumerate(self._scales) if max(down) <= scale * LEVEL_FITS]
        return max(fitting, key=lambda level: self._scales[level], default=0)

    def _read_from(
        self, level: int, start: tuple[float, float], scale: tuple[float, float], size: tuple[int, int]
    ) -> Region:
        """In pixels of the level, block by block, so that a thumbnail of a slide without pyramid fits in memory."""
        size = int(size[0]), int(size[1])
        blocks = list(_blocks(size, scale))
        if len(blocks) == 1:
            return self._read_block(level, start, scale, size)
        pixels, valid = np.empty((size[1], size[0], 3), np.uint8), np.ones((size[1], size[0]), bool)
        for left, top, width, height in blocks:
            corner = start[0] + left * scale[0], start[1] + top * scale[1]
            block = self._read_block(level, corner, scale, (width, height))
            pixels[top : top + height, left : left + width] = block.pixels
            if block.valid is not None:
                valid[top : top + height, left : left + width] = block.valid
        return Region(pixels, None if valid.all() else valid)

    def _read_block(
        self, level: int, start: tuple[float, float], scale: tuple[float, float], size: tuple[int, int]
    ) -> Region:
        resampling = Resampling(start, scale, size)
        source = self._read_padded(level, *resampling.box)
        if source is None:
            return Region(np.full((size[1], size[0], 3), self.background, np.uint8), None)
        pixels = resampling.pixels(source.rgb, source.origin)
        if source.valid is None:
            return Region(pixels, None)
        valid = resampling.mask(source.valid, source.origin)
        return Region(pixels, None if valid.all() else valid)

    def _read_padded(self, level: int, x: int, y: int, width: int, height: int) -> Pixels | None:
        """A box of the level with background around what lies outside; None if all of it does."""
        level_width, level_height = self.level_dimensions[level]
        left, top, right, bottom = max(x, 0), max(y, 0), min(x + width, level_width), min(y + height, level_height)
        if left >= right or top >= bottom:
            return None
        levels = self._tiff if self._tiff is not None and level in self._tiff else self._openslide
        inside = levels.read(level, left, top, right - left, bottom - top)
        if (right - left, bottom - top) == (width, height):
            return inside
        rgb = np.full((height, width, 3), self.background, np.uint8)
        rows, columns = slice(top - y, bottom - y), slice(left - x, right - x)
        rgb[rows, columns] = inside.rgb
        valid = None
        if inside.valid is not None:
            valid = np.ones((height, width), bool)
            valid[rows, columns] = inside.valid
        return Pixels(rgb, valid, (inside.origin[0] - (left - x), inside.origin[1] - (top - y)))

    def _in_color(self, region: Region) -> Region:
        if self._to_srgb is None:
            return region
        converted = ImageCms.applyTransform(Image.fromarray(region.pixels), self._to_srgb)
        return Region(np.array(converted, np.uint8), region.valid)


def _srgb_transform(path: Path, profile: bytes) -> ImageCms.ImageCmsTransform:
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        intent = ImageCms.Intent(ImageCms.getDefaultIntent(source))
        # Without the one-pixel cache a transform may serve several threads.
        return ImageCms.buildTransform(
            source, ImageCms.createProfile("sRGB"), "RGB", "RGB", intent, ImageCms.Flags.NOCACHE
        )
    except (ImageCms.PyCMSError, OSError, ValueError) as error:
        raise InputError(path, f"has an unusable ICC profile ({error})", "read it without ICC") from None


def _reopen(path: str, mpp: float | None, fast: bool, icc: bool) -> Slide:
    return Slide(path, mpp=mpp, fast=fast, icc=icc)


def _check_box(x: float, y: float, size: tuple[int, int]) -> None:
    if not (math.isfinite(x) and math.isfinite(y)):
        raise ValueError(f"x and y must be finite, not {x}, {y}")
    if size[0] < 1 or size[1] < 1:
        raise ValueError(f"size must be positive, not {size}")


def _blocks(size: tuple[int, int], scale: tuple[float, float]) -> Iterator[tuple[int, int, int, int]]:
    """Left, top, width, height of parts of the result that need at most ``_BLOCK`` level pixels along a side."""
    step_x, step_y = (max(1, int(_BLOCK / max(1.0, value))) for value in scale)
    for top in range(0, size[1], step_y):
        for left in range(0, size[0], step_x):
            yield left, top, min(step_x, size[0] - left), min(step_y, size[1] - top)


def _true_downsample(full: tuple[int, int], level: tuple[int, int]) -> tuple[float, float]:
    """Along x and y. A scanner halves exactly and drops the odd last pixel, so a nearly whole ratio is a whole one."""
    whole = round(full[0] / level[0])
    if all(abs(finest - whole * coarse) < whole for finest, coarse in zip(full, level, strict=True)):
        return float(whole), float(whole)
    return full[0] / level[0], full[1] / level[1]


def _positive(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) and value > 0 else None


def _bounds(properties: dict[str, str], dimensions: tuple[int, int]) -> tuple[int, int, int, int]:
    whole = (0, 0, *dimensions)
    try:
        x, y, width, height = (int(properties[f"openslide.bounds-{key}"]) for key in ("x", "y", "width", "height"))
    except (KeyError, ValueError):
        return whole
    return (x, y, width, height) if width > 0 and height > 0 else whole
