"""One picture of a slide with its tissue and its tiles, to see at a glance whether they are where they should be."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import matplotlib
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from medkd.data.atomic import atomic_write
from medkd.wsi.grid import TileGrid
from medkd.wsi.tissue import TissueMask

if TYPE_CHECKING:
    from medkd.wsi.slides import Slide

Color = tuple[int, int, int]

TISSUE: Color = (0, 128, 96)
INK: Color = (230, 110, 0)
TILE: Color = (20, 60, 160)
TEXT: Color = (40, 40, 40)
CLASSES: tuple[Color, ...] = (  # told apart by the color-blind too (Okabe and Ito)
    (0, 114, 178), (213, 94, 0), (0, 158, 115), (204, 121, 167), (240, 228, 66), (86, 180, 233), (230, 159, 0),
)  # fmt: skip
NO_CLASS: Color = (150, 150, 150)

_FILL = 0.18  # how much of a tile's color covers the picture
_LABEL_FILL = 0.40
_EDGE = 0.75
_SMALLEST_OUTLINED = 5.0  # picture pixels; smaller tiles are shown by their color alone


def draw_overview(
    slide: Slide,
    grid: TileGrid,
    tissue: TissueMask | None,
    path: str | Path,
    *,
    labels: NDArray[np.int64] | None = None,
    classes: Sequence[str] = (),
    longest_side: int = 1600,
) -> None:
    """Write a PNG of the slide's non-empty area: tissue outlined, tiles shaded (by class where they have one).

    Below it stand a scale bar, a legend and what the tiles are. The file appears whole or not at all.

    Args:
        slide: the slide.
        grid: its tiles.
        tissue: its tissue; ``None`` draws no outline.
        path: the PNG.
        labels: int64 (N,) index into ``classes``, -1 where a tile has none.
        classes: the names of the labels.
        longest_side: pixels of the picture's longer side, without the legend.

    Raises:
        InputError: the slide does not say its µm per pixel.
    """
    left, top, width, height = slide.bounds
    downsample = max(width, height) / longest_side
    size = max(1, round(width / downsample)), max(1, round(height / downsample))
    picture = slide.read(left, top, size, mpp=slide.mpp * downsample)
    picture = _with_tiles(picture, grid, (left, top), downsample, labels, classes)
    if tissue is not None:
        thickness = max(2, longest_side // 600)
        for mask, color in ((tissue.mask, TISSUE), (tissue.pen, INK)):
            if mask is not None:
                _outline(picture, mask, tissue.downsample / downsample, (left, top), downsample, color, thickness)
    footer = _footer(picture.shape[1], slide.mpp * downsample, grid, tissue, labels, classes)
    whole = cv2.cvtColor(np.concatenate([picture, footer]), cv2.COLOR_RGB2BGR)
    _, encoded = cv2.imencode(".png", whole, [cv2.IMWRITE_PNG_COMPRESSION, 3])
    with atomic_write(path, "wb") as file:
        file.write(encoded.tobytes())


def _with_tiles(
    picture: NDArray[Any],
    grid: TileGrid,
    origin: tuple[int, int],
    downsample: float,
    labels: NDArray[np.int64] | None,
    classes: Sequence[str],
) -> NDArray[Any]:
    """The picture with every tile shaded and, where tiles are large enough to see, outlined."""
    side = grid.size_level0 / downsample
    corners = (grid.coords - np.asarray(origin)) / downsample
    first, last = np.round(corners).astype(int), np.round(corners + side).astype(int)
    shaded, outlined = picture.copy(), picture.copy()
    colors = [TILE] * len(grid) if labels is None else [_class_color(label) for label in labels.tolist()]
    for (x0, y0), (x1, y1), color in zip(first.tolist(), last.tolist(), colors, strict=True):
        cv2.rectangle(shaded, (x0, y0), (x1 - 1, y1 - 1), color, cv2.FILLED)
        cv2.rectangle(outlined, (x0, y0), (x1, y1), color, 1)
    fill = _FILL if labels is None else _LABEL_FILL
    result = cv2.addWeighted(shaded, fill, picture, 1 - fill, 0)
    if side >= _SMALLEST_OUTLINED:
        on_edge = (outlined != picture).any(axis=2)
        edge = _EDGE * outlined[on_edge].astype(np.float32) + (1 - _EDGE) * picture[on_edge]
        result[on_edge] = edge.astype(np.uint8)
    return result


def _outline(
    picture: NDArray[Any],
    mask: NDArray[np.bool_],
    scale: float,
    origin: tuple[int, int],
    downsample: float,
    color: Color,
    thickness: int,
) -> None:
    """Draw the border of a mask, whose pixels are ``scale`` pixels of the picture wide."""
    x, y = np.asarray(origin) / downsample
    place = np.array([[scale, 0, scale / 2 - 0.5 - x], [0, scale, scale / 2 - 0.5 - y]])
    values = cv2.warpAffine(
        mask.astype(np.uint8) * 255, place, picture.shape[1::-1], flags=cv2.INTER_LINEAR,
        borderMode=cv2.BORDER_CONSTANT,
    )  # fmt: skip
    contours, _ = cv2.findContours((values > 127).astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    cv2.drawContours(picture, contours, -1, (255, 255, 255), thickness + 2, cv2.LINE_AA)
    cv2.drawContours(picture, contours, -1, color, thickness, cv2.LINE_AA)


def _footer(
    width: int,
    mpp: float,
    grid: TileGrid,
    tissue: TissueMask | None,
    labels: NDArray[np.int64] | None,
    classes: Sequence[str],
) -> NDArray[np.uint8]:
    """Scale bar, legend and facts, as wide as the picture and as many lines high as they take."""
    text = 18 if width >= 500 else 11
    font = ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", text)
    gap, line = text, round(1.8 * text)
    bar, bar_text = _scale_bar(mpp, width)
    items = [*_legend(grid, tissue, labels, classes), *_facts(grid, tissue)]
    canvas = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    x, y = 2 * gap + bar + round(canvas.textlength(bar_text, font=font)) + 2 * gap, gap // 2
    placed = []
    for color, words in items:
        needed = round(canvas.textlength(words, font=font)) + (text + gap // 2 if color else 0)
        if x + needed > width - gap and x > gap:
            x, y = gap, y + line
        placed.append((x, y, color, words))
        x += needed + 2 * gap
    image = Image.new("RGB", (width, y + line + gap // 2), (255, 255, 255))
    draw = ImageDraw.Draw(image)
    draw.line([(0, 0), (width, 0)], fill=(200, 200, 200))
    middle = gap // 2 + line // 2
    draw.rectangle([gap, middle - 3, gap + bar, middle + 2], fill=TEXT)
    draw.text((gap + bar + gap // 2, middle), bar_text, fill=TEXT, font=font, anchor="lm")
    for x, y, color, words in placed:
        middle = y + line // 2
        if color:
            draw.rectangle([x, middle - text // 2, x + text, middle + text // 2], fill=color)
            x += text + gap // 2
        draw.text((x, middle), words, fill=TEXT, font=font, anchor="lm")
    return np.asarray(image)


def _legend(
    grid: TileGrid, tissue: TissueMask | None, labels: NDArray[np.int64] | None, classes: Sequence[str]
) -> Iterator[tuple[Color | None, str]]:
    if tissue is not None:
        yield TISSUE, "tissue" if tissue.mask.any() else "no tissue found"
        if tissue.pen is not None and tissue.pen.any():
            yield INK, "ink"
    if labels is None:
        yield TILE, _count(len(grid))
        return
    for index, name in enumerate(classes):
        yield _class_color(index), f"{name}: {_count(int((labels == index).sum()))}"
    if (labels < 0).any():
        yield NO_CLASS, f"no class: {_count(int((labels < 0).sum()))}"


def _facts(grid: TileGrid, tissue: TissueMask | None) -> Iterator[tuple[Color | None, str]]:
    overlap = f", overlap {grid.overlap} px" if grid.overlap else ""
    yield None, f"{grid.size} px at {grid.mpp:g} µm/px ({_length(grid.size * grid.mpp)}){overlap}"
    if tissue is not None:
        yield None, f"{tissue.area_mm2:.3g} mm² of tissue"


def _count(tiles: int) -> str:
    return f"{tiles:,} tile{'' if tiles == 1 else 's'}".replace(",", "\u2009")


def _scale_bar(mpp: float, width: int) -> tuple[int, str]:
    """Pixels and text of the longest bar of 1, 2 or 5 × a power of ten µm that takes a sixth of the width at most."""
    most = mpp * width / 6
    power = 10.0 ** math.floor(math.log10(most))
    length = max(step * power for step in (1, 2, 5) if step * power <= most * (1 + 1e-9))
    return max(1, round(length / mpp)), _length(length)


def _length(micrometers: float) -> str:
    return f"{micrometers / 1000:g} mm" if micrometers >= 1000 else f"{micrometers:g} µm"


def _class_color(label: int) -> Color:
    return NO_CLASS if label < 0 else CLASSES[label % len(CLASSES)]
