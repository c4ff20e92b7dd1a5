"""Pixels of pyramid levels through OpenSlide, whose errors concern one tile and not the handle."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import numpy as np
import openslide
from numpy.typing import NDArray
from PIL import ImageCms

from medkd.wsi.level_pixels import BadTile, Pixels, cells, note_bad
from medkd.wsi.slide_files import open_slide

_WHITE = (255, 255, 255)
_CELL = 256  # level pixels; where OpenSlide does not tell a tile size


class OpenSlideLevels:
    """Reads any format OpenSlide does; safe between threads, and after a fork.

    Args:
        path: of the slide.

    Attributes:
        properties: what the file says about itself.
        dimensions: (width, height) of every level.
        downsamples: of every level, as OpenSlide computes them.
        icc_profile: its bytes, empty if it is damaged; None if there is none.
        background: RGB that shows through transparent pixels.
        bad: the tiles that could not be decoded so far.

    Raises:
        InputError: see ``open_slide``.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._pid = os.getpid()
        self._slide: openslide.OpenSlide | None = open_slide(path)
        self.bad: dict[BadTile, None] = {}
        self.properties: dict[str, str] = dict(self._slide.properties)
        self.dimensions: tuple[tuple[int, int], ...] = self._slide.level_dimensions
        self.downsamples: tuple[float, ...] = self._slide.level_downsamples
        self.icc_profile = _icc_profile(self._slide)
        self.background = _color(self.properties.get("openslide.background-color", ""))
        self._cells: list[tuple[int, int]] = [
            (
                int(self.properties.get(f"openslide.level[{level}].tile-width", _CELL)),
                int(self.properties.get(f"openslide.level[{level}].tile-height", _CELL)),
            )
            for level in range(self._slide.level_count)
        ]

    def read(self, level: int, x: int, y: int, width: int, height: int) -> Pixels:
        """A box of level pixels that lies inside the level.

        Where the downsample is not a whole number, OpenSlide can only begin at a level-0 pixel: then the box begins
        up to half a level-0 pixel away and its ``origin`` says where.
        """
        if not any(_touches(tile, level, x, y, width, height) for tile in self.bad):
            try:
                return self._read_box(self._handle(), level, x, y, width, height)
            except openslide.OpenSlideError:
                self._forget_handle()
        return self._read_cells(level, x, y, width, height)

    def close(self) -> None:
        """Free the handle. Reading opens it again."""
        self._leave_parent()
        with self._lock:
            slide, self._slide = self._slide, None
        if slide is not None:
            slide.close()

    def _read_box(self, slide: openslide.OpenSlide, level: int, x: int, y: int, width: int, height: int) -> Pixels:
        downsample = self.downsamples[level]
        corner = round(x * downsample), round(y * downsample)
        rgba = np.asarray(slide.read_region(corner, level, (width, height)))
        rgb, valid = over_background(rgba, self.background)
        return Pixels(rgb, valid, (corner[0] / downsample, corner[1] / downsample))

    def _read_cells(self, level: int, x: int, y: int, width: int, height: int) -> Pixels:
        """Tile by tile, so that one bad tile does not take its neighbors with it.

        On a handle of its own: on the shared one the error of another thread would look like ours.
        """
        rgb = np.empty((height, width, 3), np.uint8)
        valid = np.ones((height, width), bool)
        slide = open_slide(self._path)
        for cell_x, cell_y, left, top, right, bottom in cells(self._cells[level], x, y, width, height):
            rows, columns = slice(top - y, bottom - y), slice(left - x, right - x)
            tile = BadTile(level, cell_x, cell_y, *self._cells[level])
            rgb[rows, columns], valid[rows, columns] = self.background, False
            if tile in self.bad:
                continue
            try:
                box = self._read_box(slide, level, left, top, right - left, bottom - top)
            except openslide.OpenSlideError as error:
                note_bad(self._path, tile, error, self.bad)
                slide.close()
                slide = open_slide(self._path)
                continue
            rgb[rows, columns] = box.rgb
            valid[rows, columns] = True if box.valid is None else box.valid
        slide.close()
        return Pixels(rgb, None if valid.all() else valid, (float(x), float(y)))

    def _handle(self) -> openslide.OpenSlide:
        self._leave_parent()
        slide = self._slide
        if slide is None:
            with self._lock:
                if self._slide is None:
                    self._slide = open_slide(self._path)
                slide = self._slide
        return slide

    def _leave_parent(self) -> None:
        """After a fork: the parent's handle shares file positions with it, and its lock may be held for ever."""
        if self._pid != os.getpid():
            self._lock, self._slide, self._pid = threading.Lock(), None, os.getpid()

    def _forget_handle(self) -> None:
        """After its first error OpenSlide refuses everything. Other threads may hold the handle: do not close it."""
        with self._lock:
            self._slide = None


def _touches(tile: BadTile, level: int, x: int, y: int, width: int, height: int) -> bool:
    across = tile.x < x + width and x < tile.x + tile.width
    return tile.level == level and across and tile.y < y + height and y < tile.y + tile.height


def over_background(
    rgba: NDArray[np.uint8], background: tuple[int, int, int]
) -> tuple[NDArray[np.uint8], NDArray[np.bool_] | None]:
    """Lay (h, w, 4) pixels over ``background``; also where there was something, None if everywhere."""
    alpha = rgba[..., 3]
    if alpha.min(initial=255) == 255:
        return np.ascontiguousarray(rgba[..., :3]), None
    weight = alpha[..., None].astype(np.float32) / 255
    mixed = rgba[..., :3] * weight + np.array(background, np.float32) * (1 - weight)
    return np.rint(mixed).astype(np.uint8), alpha > 0


def _icc_profile(slide: openslide.OpenSlide) -> bytes | None:
    try:
        profile = slide.color_profile
    except ImageCms.PyCMSError:
        return b""
    return profile.tobytes() if profile is not None else None


def _color(text: str) -> tuple[int, int, int]:
    try:
        value = bytes.fromhex(text)
    except ValueError:
        return _WHITE
    return (value[0], value[1], value[2]) if len(value) == 3 else _WHITE
