"""Which slides a batch works on, under which names, and which share of them is this process's."""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from medkd.errors import ConfigError, InputError
from medkd.wsi.resolution import LARGEST_MPP, SMALLEST_MPP

RESERVED = ("failures", "summary", "datalist")  # files of the whole batch


@dataclass(frozen=True)
class ListedSlide:
    """One slide of a batch.

    Attributes:
        path: absolute.
        name: of its outputs, unique in the batch.
        mpp: µm per pixel at level 0 where the user says it; None to believe the file.
        patient: whose it is, where the table says it.
    """

    path: Path
    name: str
    mpp: float | None = None
    patient: str | None = None


def list_slides(
    slides: Sequence[str | Path],
    slides_csv: str | Path | None = None,
    *,
    slide_mpp: float | None = None,
    deidentify: bool = False,
) -> list[ListedSlide]:
    """The slides of a batch, those named first, then those of a table.

    Args:
        slides: files.
        slides_csv: a table with the columns ``slide`` (a path, relative to the table) and, optionally, ``mpp`` and
            ``patient``.
        slide_mpp: µm per pixel of every slide for which the table does not say it.
        deidentify: name them slide-0001, slide-0002, …

    Raises:
        ConfigError: no slide at all, names that clash, an impossible ``slide_mpp``.
        InputError: a table that cannot be used; no slide of several is there.
    """
    if slide_mpp is not None:
        _check_mpp(slide_mpp, "--slide-mpp")
    found = [ListedSlide(Path(os.path.abspath(slide)), Path(slide).stem, slide_mpp) for slide in slides]
    if slides_csv is not None:
        found += [
            replace(slide, mpp=slide_mpp if slide.mpp is None else slide.mpp) for slide in _read_table(Path(slides_csv))
        ]
    if not found:
        raise ConfigError("SLIDE", "is missing", "name slides, or a table of them with --slides")
    if not any(os.path.exists(slide.path) for slide in found):
        where = "SLIDE" if deidentify else str(found[0].path)
        more = f", nor do the other {len(found) - 1}" if len(found) > 1 else ""
        raise InputError(where, f"does not exist{more}", "check the path")
    if deidentify:
        return [replace(slide, name=f"slide-{number:04d}", patient=None) for number, slide in enumerate(found, start=1)]
    _require_distinct_names([slide.path for slide in found])
    return found


def _require_distinct_names(paths: Sequence[Path]) -> None:
    """Outputs are named after slides, so two of one name would overwrite each other."""
    seen: dict[str, Path] = {}
    for path in paths:
        if path.stem in RESERVED:
            raise ConfigError(path, f"its outputs would be mistaken for {path.stem}.* of the batch", "rename the slide")
        if path.stem in seen:
            raise ConfigError(
                path, f"has the name of {seen[path.stem]}, and outputs are named after slides", "rename one of them"
            )
        seen[path.stem] = path


def _read_table(table: Path) -> list[ListedSlide]:
    try:
        text = table.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise InputError(table, "does not exist", "check the path") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise InputError(table, f"cannot be read ({reason})", "give a CSV file") from None
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        rows, header = list(reader), reader.fieldnames or ()
    except csv.Error as error:
        raise InputError(table, f"is not a CSV table ({error})", "correct it") from None
    if "slide" not in header:
        problem = f"has no column 'slide' (it has {', '.join(header) or 'none'})"
        raise InputError(table, problem, "its first line must name the columns, as slide,mpp")
    if not rows:
        raise InputError(table, "lists no slide", "add a line for each slide")
    folder = Path(os.path.abspath(table)).parent
    found = []
    for line, row in enumerate(rows, start=2):
        name = (row["slide"] or "").strip()
        if not name:
            raise InputError(f"{table}, row {line}", "names no slide", "fill in the column 'slide'")
        path = Path(os.path.abspath(folder / name))
        patient = (row.get("patient") or "").strip() or None
        found.append(ListedSlide(path, path.stem, _mpp_of(row, f"{table}, row {line}"), patient))
    return found


def _mpp_of(row: dict[str, str | None], where: str) -> float | None:
    text = (row.get("mpp") or "").strip()
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        raise InputError(where, f"mpp {text!r} is not a number", "give µm per pixel, or leave it empty") from None
    _check_mpp(value, where)
    return value


def _check_mpp(value: float, where: str) -> None:
    if not math.isfinite(value) or not SMALLEST_MPP <= value <= LARGEST_MPP:
        problem = f"{value:g} µm per pixel is outside {SMALLEST_MPP:g} to {LARGEST_MPP:g}"
        raise InputError(where, problem, "give the µm per pixel of level 0")


def parse_shard(text: str) -> tuple[int, int]:
    """``I/N`` as (I, N), I from 1 to N.

    Raises:
        ConfigError: It is not that.
    """
    first, _, second = text.partition("/")
    if not (first.strip().isdecimal() and second.strip().isdecimal()) or not 1 <= int(first) <= int(second):
        raise ConfigError("--shard", f"{text!r} is no share of the list", "write 1/8 to 8/8, counting from 1")
    return int(first), int(second)


def take_shard(slides: Sequence[ListedSlide], shard: tuple[int, int] | None) -> list[ListedSlide]:
    """The slides of shard I of N: every N-th of the list in the order of the paths.

    The shards of a list are disjoint and complete, and do not depend on the order in which it was given.
    """
    if shard is None:
        return list(slides)
    return sorted(slides, key=lambda slide: (str(slide.path), slide.name))[shard[0] - 1 :: shard[1]]
