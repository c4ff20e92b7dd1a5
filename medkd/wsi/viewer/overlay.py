"""What a model said about a slide, as `slide predict` wrote it: tiles, contours and heatmap."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medkd.errors import InputError
from medkd.wsi.slides import Slide

GEOMETRY = ("x", "y", "width", "height")
PROBABILITY = "prob_"
HEX_COLOR = re.compile(r"#[0-9a-f]{6}", re.ASCII | re.IGNORECASE)
TILE_FEATURE = b'"objectType":"tile"'
MAX_HEAD_BYTES = 65_536
REMEDY = "name the folder that `medkd slide predict` wrote for this slide"


@dataclass(frozen=True)
class Tile:
    """One tile of a prediction; lengths in level-0 pixels, None for a class where the tile failed."""

    x: float
    y: float
    width: float
    height: float
    probabilities: dict[str, float | None]

    def as_json(self) -> dict[str, Any]:
        """For the page."""
        return {name: getattr(self, name) for name in (*GEOMETRY, "probabilities")}


class TileTable:
    """The rows of a prediction's CSV, found by position.

    Args:
        geometry: (N, 4) x, y, width, height in level-0 pixels.
        probabilities: (N, K), NaN where a tile failed.
        classes: the K class names.
    """

    def __init__(
        self, geometry: NDArray[np.float64], probabilities: NDArray[np.float64], classes: tuple[str, ...]
    ) -> None:
        order = np.argsort(geometry[:, 1], kind="stable")
        self.geometry, self.probabilities, self.classes = geometry[order], probabilities[order], classes
        self._max_height = float(self.geometry[:, 3].max(initial=0.0))

    def __len__(self) -> int:
        return len(self.geometry)

    def at(self, x: float, y: float) -> Tile | None:
        """The tile over a point; where several overlap, the one whose center is nearest."""
        tops = self.geometry[:, 1]
        first = int(np.searchsorted(tops, y - self._max_height, side="right"))
        last = int(np.searchsorted(tops, y, side="right"))
        left, top, width, height = self.geometry[first:last].T
        over = np.flatnonzero((left <= x) & (x < left + width) & (y < top + height))
        if not len(over):
            return None
        distances = np.hypot(left[over] + width[over] / 2 - x, top[over] + height[over] / 2 - y)
        return self._tile(first + int(over[np.argmin(distances)]))

    def strongest(self, class_name: str, count: int) -> list[Tile]:
        """The tiles with the highest probability of a class, no two of them neighbors.

        Raises:
            KeyError: the prediction has no such class.
        """
        if class_name not in self.classes:
            raise KeyError(class_name)
        scores = self.probabilities[:, self.classes.index(class_name)]
        ranked = np.argsort(-np.where(np.isnan(scores), -np.inf, scores), kind="stable")
        chosen: list[int] = []
        centers = self.geometry[:, :2] + self.geometry[:, 2:] / 2
        for index in ranked[: 200 * count]:  # far enough down to leave the first hot spot, and bounded
            if np.isnan(scores[index]) or len(chosen) == count:
                break
            apart = np.abs(centers[chosen] - centers[index]) >= 1.5 * self.geometry[index, 2:]
            if apart.any(axis=1).all():
                chosen.append(int(index))
        return [self._tile(index) for index in chosen]

    def _tile(self, index: int) -> Tile:
        values = (None if math.isnan(value) else float(value) for value in self.probabilities[index])
        x, y, width, height = (float(value) for value in self.geometry[index])
        return Tile(x, y, width, height, dict(zip(self.classes, values, strict=True)))


@dataclass(frozen=True)
class Heatmap:
    """A transparent picture and where it lies, in level-0 pixels; it may reach past the slide."""

    path: Path
    x: float
    y: float
    width: float
    height: float
    class_name: str | None
    legend: tuple[str, ...]  # colors from probability 0 to 1, as #rrggbb

    def as_json(self) -> dict[str, Any]:
        """For the page."""
        extent = [self.x, self.y, self.width, self.height]
        return {"extent": extent, "class": self.class_name, "legend": self.legend}


@dataclass(frozen=True)
class Overlay:
    """A slide's prediction; what the folder lacks is None.

    Attributes:
        name: of the prediction's files.
        tiles: their probabilities.
        contours: the GeoJSON.
        heatmap: the picture to lay over the slide.
        colors: (red, green, blue) of the classes, where the prediction says so.
        failed: how many tiles could not be read.
    """

    name: str
    tiles: TileTable | None
    contours: Path | None
    heatmap: Heatmap | None
    colors: dict[str, list[int]]
    failed: int


def find_overlay(folder: str | Path, slide: Slide) -> Overlay:
    """The prediction of a slide among those in a folder: the one of its name, else the one of its fingerprint.

    Raises:
        InputError: the folder holds none, one of another slide, or one that cannot be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(folder, "is not a folder", REMEDY)
    summary_path = _summary_of(folder, slide)
    summary = _read_summary(summary_path)
    table, contours = (summary_path.with_name(summary_path.stem + suffix) for suffix in (".csv", ".geojson"))
    return Overlay(
        name=summary_path.stem,
        tiles=read_tile_table(table) if table.is_file() else None,
        contours=contours if contours.is_file() else None,
        heatmap=_read_heatmap(summary_path, summary.get("overlay")),
        colors=_read_colors(summary.get("colors")),
        failed=len(summary.get("failed_tiles") or ()),
    )


def _summary_of(folder: Path, slide: Slide) -> Path:
    by_name = folder / f"{slide.name}.json"
    if by_name.is_file() and _read_summary(by_name).get("fingerprint") == slide.fingerprint:
        return by_name
    for summary in sorted(folder.glob("*.json")):  # under --deidentify the names say nothing
        if _read_summary(summary).get("fingerprint") == slide.fingerprint:
            return summary
    if by_name.is_file():
        raise InputError(by_name, f"is the prediction of another file than this {slide.path.name}", REMEDY)
    raise InputError(folder, f"holds no prediction of {slide.path.name}", REMEDY)


def _read_summary(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(path, f"cannot be read as JSON ({error})", REMEDY) from error
    return content if isinstance(content, dict) else {}


def _read_colors(stated: Any) -> dict[str, list[int]]:
    colors = stated.items() if isinstance(stated, dict) else ()
    return {str(name): [int(part) for part in color[:3]] for name, color in colors if _is_color(color)}


def _is_color(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(isinstance(part, int) for part in value)


def _read_heatmap(summary_path: Path, stated: Any) -> Heatmap | None:
    if not isinstance(stated, dict):
        return None
    name = stated.get("file")
    place: dict[str, Any] = {side: stated.get(side) for side in GEOMETRY}
    if not isinstance(name, str) or Path(name).name != name or Path(name).suffix != ".png":
        raise InputError(summary_path, "names no picture of its own folder as its overlay", REMEDY)
    if not all(isinstance(value, int | float) and math.isfinite(value) for value in place.values()):
        raise InputError(summary_path, "does not say where its overlay lies", REMEDY)
    path, class_name = summary_path.with_name(name), stated.get("class")
    if not path.is_file():
        return None
    x, y, width, height = (float(place[side]) for side in GEOMETRY)
    legend = tuple(color for color in stated.get("legend") or () if HEX_COLOR.fullmatch(str(color)))
    return Heatmap(path, x, y, width, height, str(class_name) if class_name else None, legend)


def outlines_end(path: Path) -> tuple[int, bytes]:
    """How many bytes of a GeoJSON hold its outlines, and what must follow them to make it complete.

    `slide predict` writes a feature per line, outlines first, and then perhaps very many tiles, which the page asks
    for one by one. Any other file is taken whole.
    """
    with path.open("rb") as file:
        kept = len(file.readline(MAX_HEAD_BYTES))
        ending = b"\n]}\n"
        for line in file:
            if TILE_FEATURE in line:
                file.seek(kept - 2)
                return (kept - 2, ending) if file.read(2) == b",\n" else (kept, ending)
            kept += len(line)
    return kept, b""


def read_tile_table(path: Path) -> TileTable:
    """The tiles of a prediction's CSV; columns beside x, y, width, height and ``prob_<class>`` are left alone.

    Raises:
        InputError: a column is missing, or a line is not made of numbers.
    """
    with path.open(encoding="utf-8", newline="") as file:
        rows = csv.reader(file)
        header = next(rows, [])
        missing = [name for name in GEOMETRY if name not in header]
        classes = tuple(name.removeprefix(PROBABILITY) for name in header if name.startswith(PROBABILITY))
        if missing or not classes:
            absent = f"column {missing[0]}" if missing else f"column that starts with {PROBABILITY}"
            raise InputError(path, f"has no {absent}", REMEDY)
        columns = [header.index(name) for name in (*GEOMETRY, *(PROBABILITY + name for name in classes))]
        values = chain.from_iterable(_numbers(path, rows, columns))
        numbers = np.fromiter(values, dtype=np.float64).reshape(-1, len(columns))
    return TileTable(numbers[:, :4], numbers[:, 4:], classes)


def _numbers(path: Path, rows: Iterator[list[str]], columns: list[int]) -> Iterator[tuple[float, ...]]:
    for line, row in enumerate(rows, start=2):
        if not row:
            continue
        try:
            values = tuple(float(row[column]) if row[column] else math.nan for column in columns)
        except (IndexError, ValueError):
            raise InputError(path, f"line {line} is not what `medkd slide predict` writes", REMEDY) from None
        if not all(map(math.isfinite, values[:4])):
            raise InputError(path, f"line {line} has a tile without a place", REMEDY)
        yield values
