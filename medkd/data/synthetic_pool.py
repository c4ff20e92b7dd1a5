"""Generated images on disk: every candidate with its scores, and which of them were chosen.

A pool is a folder with ``images/*.png``, ``scores.csv`` (one row per image) and ``contact_sheet.png``. The table is
written last: a folder with a table is complete.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from medkd.data.atomic import atomic_write
from medkd.data.picture_grid import Color, as_pixels, picture_grid
from medkd.errors import InputError

SCORES_FILE = "scores.csv"
CONTACT_SHEET_FILE = "contact_sheet.png"
KEPT: Color = (46, 160, 67)
LEFT_OUT: Color = (206, 206, 206)
_COLUMNS, _ROWS = 16, 3  # of a class in the contact sheet


def write_pool(
    folder: str | Path,
    image: torch.Tensor,
    label: torch.Tensor,
    names: Sequence[str],
    *,
    scores: Mapping[str, torch.Tensor],
    kept: Iterable[int],
    rank_by: str = "distance",
) -> Path:
    """Write a pool; an earlier one in the folder is replaced.

    Args:
        folder: made if absent.
        image: (N, 3, H, W) in [-1, 1].
        label: (N,) class each was generated for.
        names: of the classes.
        scores: columns (N,) of the table, such as confidence, entropy and distance.
        kept: positions of the chosen images.
        rank_by: the score that orders the contact sheet, smallest first.

    Returns:
        The folder.
    """
    folder = Path(folder)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    (folder / SCORES_FILE).unlink(missing_ok=True)
    pixels, labels, chosen = as_pixels(image), label.tolist(), {int(place) for place in kept}
    files = [f"images/{_plain(names[value])}_{number:05d}.png" for number, value in enumerate(labels)]
    for stale in set((folder / "images").glob("*.png")) - {folder / file for file in files}:
        stale.unlink()
    for file, picture in zip(files, pixels, strict=True):
        with atomic_write(folder / file, "wb") as out:
            Image.fromarray(picture).save(out, format="PNG")
    with atomic_write(folder / CONTACT_SHEET_FILE, "wb") as out:
        out.write(_contact_sheet(pixels, labels, scores[rank_by], chosen))
    columns = {name: values.tolist() for name, values in scores.items()}
    with atomic_write(folder / SCORES_FILE) as out:
        writer = csv.writer(out)
        writer.writerow(["file", "label", "class", "kept", *columns])
        for number, (file, value) in enumerate(zip(files, labels, strict=True)):
            own = [f"{column[number]:.6g}" for column in columns.values()]
            writer.writerow([file, value, names[value], int(number in chosen), *own])
    return folder


def read_pool(folder: str | Path) -> list[dict[str, Any]]:
    """The rows of a pool's table: file, label, class, kept (bool) and the scores as floats.

    Raises:
        InputError: There is no complete pool, or its table is damaged.
    """
    path = Path(folder) / SCORES_FILE
    if not path.is_file():
        raise InputError(path, "does not exist", "generate and select images first")
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return [_parsed(row) for row in csv.DictReader(file)]
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(path, f"is damaged ({error})", "generate and select images again") from None


def selected_items(folder: str | Path, *, everything: bool = False) -> list[dict[str, Any]]:
    """The chosen images as training items: image (absolute path), label, case and patient.

    They belong to no patient; their ``patient`` is "generated", so that a slide-wise balance takes them as one slide.

    Args:
        folder: of the pool.
        everything: all candidates, chosen or not.

    Raises:
        InputError: As :func:`read_pool`; or if nothing was chosen.
    """
    root = Path(folder).resolve()
    rows = [row for row in read_pool(folder) if row["kept"] or everything]
    if not rows:
        raise InputError(root, "no image was chosen", "look at scores.csv, and keep a larger share")
    return [
        {
            "image": str(root / row["file"]),
            "label": row["label"],
            "case": f"generated_{Path(row['file']).stem}",
            "patient": "generated",
        }
        for row in rows
    ]


def _parsed(row: Mapping[str, str]) -> dict[str, Any]:
    path = Path(row["file"])
    if path.is_absolute() or ".." in path.parts:
        raise ValueError(f"{path} lies outside of the pool")
    fixed = {"file": row["file"], "label": int(row["label"]), "class": row["class"], "kept": row["kept"] == "1"}
    return fixed | {name: float(value) for name, value in row.items() if name not in fixed}


def _plain(name: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in name)


def _contact_sheet(pixels: Any, labels: Sequence[int], ranks: torch.Tensor, chosen: set[int]) -> bytes:
    """Of every class pictures at even steps of its ranking, nearest first; framed in green if chosen."""
    rows, frames = [], []
    for value in sorted(set(labels)):
        own = [place for place, label in enumerate(labels) if label == value]
        own.sort(key=lambda place: (float(ranks[place]), place))
        shown = np.unique(np.linspace(0, len(own) - 1, min(_COLUMNS * _ROWS, len(own))).round().astype(int))
        for start in range(0, len(shown), _COLUMNS):
            places = [own[index] for index in shown[start : start + _COLUMNS]]
            rows.append(pixels[places])
            frames.append([KEPT if place in chosen else LEFT_OUT for place in places])
    return picture_grid(rows, frames)
