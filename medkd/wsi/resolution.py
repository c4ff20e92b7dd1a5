"""How many micrometers a pixel of a slide is wide, and who says so."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from medkd.errors import InputError

logger = logging.getLogger(__name__)

SMALLEST_MPP, LARGEST_MPP = 0.05, 20.0
"""Bounds of a believable slide, µm per pixel: finer than any objective, coarser than any overview scan."""
_TOLERANCE = 0.01  # of the ratio between two resolutions that still count as one
_REMEDY = "give its µm per pixel with --slide-mpp (Python: Slide(path, mpp=...))"
_MICROMETERS = {"centimeter": 10_000.0, "inch": 25_400.0}


@dataclass(frozen=True)
class Resolution:
    """What is known about the size of a level-0 pixel.

    Attributes:
        mpp: µm per pixel, or None where it is not known.
        source: ``"vendor"``, ``"TIFF resolution"`` or ``"user"``; empty where unknown.
        problem: why ``mpp`` is None; empty where it is known.
    """

    mpp: float | None
    source: str
    problem: str = ""

    def require(self, path: Path) -> float:
        """Micrometers per pixel.

        Raises:
            InputError: if it is not known.
        """
        if self.mpp is None:
            raise InputError(path, self.problem, _REMEDY)
        return self.mpp


def find_resolution(path: Path, properties: Mapping[str, str], user_mpp: float | None) -> Resolution:
    """What the user says, else what the vendor's properties say, else what the TIFF resolution tags say.

    A value that cannot be true is never replaced by the next source in silence: it makes the resolution unknown.

    Args:
        path: of the slide, for messages.
        properties: those of OpenSlide.
        user_mpp: µm per level-0 pixel, or None. It wins over the file, with a warning when they differ by over 1 %.

    Raises:
        InputError: if ``user_mpp`` is not a number between ``SMALLEST_MPP`` and ``LARGEST_MPP``.
    """
    in_file = _of_file(properties)
    if user_mpp is None:
        return in_file
    problem = _problem(float(user_mpp), float(user_mpp))
    if problem:
        raise InputError(path, f"the given --slide-mpp cannot be true: {problem}", "give the µm per pixel of level 0")
    if in_file.mpp is not None and not _same(in_file.mpp, float(user_mpp)):
        logger.warning(
            "%s: the file says %.4g µm per pixel (%s), --slide-mpp says %.4g; using %.4g",
            path, in_file.mpp, in_file.source, user_mpp, user_mpp,
        )  # fmt: skip
    return Resolution(float(user_mpp), "user")


def _of_file(properties: Mapping[str, str]) -> Resolution:
    # For TIFFs of no vendor OpenSlide copies the resolution tags to its own property when their unit is centimeter.
    plain_tiff = properties.get("openslide.vendor") == "generic-tiff"
    if not plain_tiff and ("openslide.mpp-x" in properties or "openslide.mpp-y" in properties):
        x = properties.get("openslide.mpp-x", properties.get("openslide.mpp-y", ""))
        y = properties.get("openslide.mpp-y", x)
        return _checked(_number(x), _number(y), "vendor")
    if "aperio.MPP" in properties:  # OpenSlide leaves its own property out where this one is not a number
        value = _number(properties["aperio.MPP"])
        return _checked(value, value, "vendor")
    unit = _MICROMETERS.get(properties.get("tiff.ResolutionUnit", ""))
    if unit is None or "tiff.XResolution" not in properties:
        return Resolution(None, "", "says nowhere how many µm a pixel is wide")
    x_per_unit = _number(properties["tiff.XResolution"])
    y_per_unit = _number(properties.get("tiff.YResolution", properties["tiff.XResolution"]))
    x_mpp, y_mpp = (unit / value if value else value for value in (x_per_unit, y_per_unit))
    return _checked(x_mpp, y_mpp, "TIFF resolution")


def _checked(x: float, y: float, source: str) -> Resolution:
    problem = _problem(x, y)
    return (
        Resolution(None, "", f"its {source} cannot be true: {problem}") if problem else Resolution((x + y) / 2, source)
    )


def _problem(x: float, y: float) -> str:
    for value in (x, y):
        if not math.isfinite(value):
            return "µm per pixel is not a number"
        if not SMALLEST_MPP <= value <= LARGEST_MPP:
            return f"{value:.6g} µm per pixel is outside {SMALLEST_MPP:g} to {LARGEST_MPP:g}"
    if not _same(x, y):
        return f"pixels are not square ({x:.6g} × {y:.6g} µm)"
    return ""


def _same(a: float, b: float) -> bool:
    return abs(a - b) <= _TOLERANCE * min(a, b)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
