"""A slide as the 256 px JPEG tiles that a browser asks for."""

from __future__ import annotations

import io
import math
import threading
from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from medkd.errors import InputError
from medkd.wsi.slides import Slide

TILE_PX = 256
OVERLAP_PX = 2  # more, to the right and below: between the steps of the zoom, tiles would not meet without a gap
JPEG_QUALITY = 88
MAX_SOURCE_PX = 4096 * 4096  # more than this is never decoded for one tile
MAX_FACTOR = 512  # nor is more than this asked of one read; `Slide` refuses a thousandfold
ENCODED_CACHE_BYTES = 64 * 2**20
COMPOSED_CACHE_BYTES = 32 * 2**20
UNREADABLE_COLORS = ((196, 64, 150), (240, 214, 232))  # stripes that no stain shows

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class BoundedCache(Generic[Key, Value]):
    """The values used last, within a number of bytes; safe between threads.

    Args:
        max_bytes: what all values together may weigh.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.held_bytes = 0
        self._values: OrderedDict[Key, tuple[Value, int]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Key) -> Value | None:
        """The value of a key, or None."""
        with self._lock:
            if key not in self._values:
                return None
            self._values.move_to_end(key)
            return self._values[key][0]

    def put(self, key: Key, value: Value, weight: int) -> None:
        """Keep a value that weighs this many bytes; the ones unused for longest make room for it."""
        with self._lock:
            self.held_bytes += weight - self._values.pop(key, (None, 0))[1]
            self._values[key] = (value, weight)
            while self.held_bytes > self.max_bytes and self._values:
                self.held_bytes -= self._values.popitem(last=False)[1][1]


class DeepZoom:
    """The pyramid of tiles over a slide: at ``max_zoom`` a tile's pixel is a slide's, each zoom below halves that.

    Tiles reach `OVERLAP_PX` into their right and lower neighbors, and are cut at the border of the slide. Pixels that
    the file could not give are striped, so that nobody takes them for tissue or glass. Where the slide has no small
    level, a tile is put together from the four below it, so that memory stays bounded whatever the slide's size.

    Args:
        slide: any open slide; one without a known resolution is shown too.

    Attributes:
        mpp: µm per pixel at level 0, or None where it is unknown.
    """

    def __init__(self, slide: Slide) -> None:
        self.mpp = known_mpp(slide)
        # Zooming needs ratios only, so any resolution does where the slide states none.
        self.slide = slide if self.mpp is not None else Slide(slide.path, mpp=1.0)
        self.width, self.height = slide.dimensions
        self.max_zoom = max(0, math.ceil(math.log2(max(self.width, self.height) / TILE_PX)))
        self._encoded: BoundedCache[tuple[int, int, int], bytes] = BoundedCache(ENCODED_CACHE_BYTES)
        self._composed: BoundedCache[tuple[int, int, int], NDArray[np.uint8]] = BoundedCache(COMPOSED_CACHE_BYTES)

    def size_at(self, zoom: int) -> tuple[int, int]:
        """Width and height, in pixels, of the whole slide at a zoom."""
        factor = self._factor(zoom)
        return math.ceil(self.width / factor), math.ceil(self.height / factor)

    def tile(self, zoom: int, column: int, row: int) -> bytes:
        """One tile as JPEG.

        Raises:
            KeyError: the slide has no such tile.
        """
        key = (zoom, column, row)
        self._size(*key)
        encoded = self._encoded.get(key)
        if encoded is None:
            encoded = encode_jpeg(self._overlapping(*key))
            self._encoded.put(key, encoded, len(encoded))
        return encoded

    def overview(self, longest_side: int) -> bytes:
        """The whole slide as one JPEG."""
        zoom = next(z for z in range(self.max_zoom + 1) if z == self.max_zoom or max(self.size_at(z)) >= longest_side)
        width, height = self.size_at(zoom)
        canvas = self._pasted(zoom, 0, 0, (width, height))
        canvas.thumbnail((longest_side, longest_side), Image.Resampling.LANCZOS)
        return encode_jpeg(np.asarray(canvas))

    def close(self) -> None:
        """Close what was opened here; the slide that was given stays open."""
        if self.mpp is None:
            self.slide.close()

    def _factor(self, zoom: int) -> int:
        return int(2 ** (self.max_zoom - zoom))

    def _size(self, zoom: int, column: int, row: int, overlap: int = 0) -> tuple[int, int]:
        """Width and height of a tile.

        Raises:
            KeyError: the slide has no such tile.
        """
        if not 0 <= zoom <= self.max_zoom:
            raise KeyError((zoom, column, row))
        left = [side - index * TILE_PX for side, index in zip(self.size_at(zoom), (column, row), strict=True)]
        if column < 0 or row < 0 or min(left) <= 0:
            raise KeyError((zoom, column, row))
        width, height = (min(TILE_PX + overlap, side) for side in left)
        return width, height

    def _overlapping(self, zoom: int, column: int, row: int) -> NDArray[np.uint8]:
        size = self._size(zoom, column, row, OVERLAP_PX)
        if self._can_be_read(zoom):
            return self._read(zoom, column, row, size)
        return np.asarray(self._pasted(zoom, column, row, size))

    def _pasted(self, zoom: int, column: int, row: int, size: tuple[int, int]) -> Image.Image:
        """So many pixels from the corner of a tile on, put together from as many tiles as it takes."""
        canvas = Image.new("RGB", size, self.slide.background)
        for down in range(math.ceil(size[1] / TILE_PX)):
            for right in range(math.ceil(size[0] / TILE_PX)):
                part = Image.fromarray(self._pixels(zoom, column + right, row + down))
                canvas.paste(part, (right * TILE_PX, down * TILE_PX))
        return canvas

    def _can_be_read(self, zoom: int) -> bool:
        """Whether a tile of a zoom can be read at once, without decoding too much for it."""
        factor = self._factor(zoom)
        finer = max((level for level in self.slide.level_downsamples if level <= factor * 1.01), default=1.0)
        return zoom == self.max_zoom or (factor <= MAX_FACTOR and (TILE_PX * factor / finer) ** 2 <= MAX_SOURCE_PX)

    def _read(self, zoom: int, column: int, row: int, size: tuple[int, int]) -> NDArray[np.uint8]:
        factor = self._factor(zoom)
        x, y = (index * TILE_PX * factor for index in (column, row))
        region = self.slide.read_region(x, y, size, mpp=self.slide.mpp * factor)
        return region.pixels if region.valid is None else striped(region.pixels, region.valid)

    def _pixels(self, zoom: int, column: int, row: int) -> NDArray[np.uint8]:
        """A tile without overlap, (height, width, 3)."""
        size = self._size(zoom, column, row)
        if self._can_be_read(zoom):
            return self._read(zoom, column, row, size)
        key = (zoom, column, row)
        composed = self._composed.get(key)
        if composed is None:
            finer = self.size_at(zoom + 1)
            left = [side - 2 * index * TILE_PX for side, index in zip(finer, (column, row), strict=True)]
            canvas = Image.new("RGB", (2 * size[0], 2 * size[1]), self.slide.background)
            below = self._pasted(zoom + 1, 2 * column, 2 * row, (min(2 * size[0], left[0]), min(2 * size[1], left[1])))
            canvas.paste(below, (0, 0))
            composed = np.asarray(canvas.resize(size, Image.Resampling.BOX))
            self._composed.put(key, composed, composed.nbytes)
        return composed


def known_mpp(slide: Slide) -> float | None:
    """µm per pixel at level 0, or None where the slide does not say."""
    try:
        return slide.mpp
    except InputError:
        return None


def striped(pixels: NDArray[np.uint8], valid: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Pixels (H, W, 3) with diagonal stripes wherever ``valid`` (H, W) is false."""
    rows, columns = np.nonzero(~valid)
    marked = pixels.copy()
    marked[rows, columns] = np.asarray(UNREADABLE_COLORS, dtype=np.uint8)[(rows + columns) // 8 % 2]
    return marked


def encode_jpeg(pixels: NDArray[np.uint8]) -> bytes:
    """An (H, W, 3) image as JPEG with full color resolution: stains differ by hue."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return buffer.getvalue()
