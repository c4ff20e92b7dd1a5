"""Where on a slide there is tissue: found from its colors, or given by the user."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
from numpy.typing import NDArray

from medkd.errors import ConfigError, InputError
from medkd.wsi.annotations import Annotation, rasterize, read_annotations
from medkd.wsi.contours import trace_regions

if TYPE_CHECKING:
    from medkd.wsi.slides import Slide

DEFAULT_MPP = 8.0
MIN_AREA_UM2 = 20_000.0  # a square of 0.14 mm
MAX_HOLE_UM2 = 5_000.0  # a lumen or a torn fiber of 80 µm

Image = NDArray[Any]  # uint8; OpenCV promises no more
Mask = NDArray[np.bool_]

# Share of 1. The least is above the noise of glass and JPEG, so that a blank slide stays blank; the threshold does not
# follow the tissue (as Otsu's does), so that a slide full of it stays full.
_SATURATION_OF_STAIN = (0.04, 0.08)
_DEVIATIONS = 9.0  # median absolute deviations of the glass: six standard deviations
_DARKEST_TISSUE = 40  # of 255: the color of what is darker, such as areas never scanned, says nothing
_BRIGHT, _COLORLESS, _UNIFORM = 200, 40, 2  # of 255: what can be glass, so that its tint can be taken out
_ENOUGH_TO_SEE_A_TINT = 40_000  # pixels; of larger images about as many are looked at
_SMALLEST_GLASS = 0.01  # share of the slide from which on the tint is believed
_STRUCTURE = 10  # of 255: how much darker
_JOINED_UM = 16.0  # half of the widest gap within tissue
_THIN_UM = 16.0  # half of the width of walls of fat cells, threads and dirt
_WIDEST_FAT_UM = 60.0  # half of the widest gap where fat counts as tissue
_NEVER_SCANNED = 8  # of 255: black without any noise is no ink
_Range = tuple[tuple[int, int, int], tuple[int, int, int]]  # hue in steps of 2 degrees, saturation, value
_SURELY_INK: tuple[_Range, ...] = (
    ((35, 70, _DARKEST_TISSUE), (88, 255, 255)),  # green
    ((94, 128, _DARKEST_TISSUE), (121, 255, 255)),  # blue
    ((177, 190, 100), (180, 255, 255)),  # red, on both sides of 0
    ((0, 190, 100), (5, 255, 255)),
    ((0, 0, _NEVER_SCANNED), (180, 90, 85)),  # black
)
_MAYBE_INK: tuple[_Range, ...] = (
    ((35, 20, 0), (88, 255, 255)),
    ((94, 60, 0), (121, 255, 255)),
    ((177, 120, 0), (180, 255, 255)),
    ((0, 120, 0), (5, 255, 255)),
    ((0, 0, 0), (180, 70, 140)),
)
_PEN_MIN_UM2 = 5_000.0
_PEN_FRINGE_UM = 150.0  # how far paler ink reaches around what is surely ink
_LEVEL_USED_AS_IS = 1.5  # a level up to this factor off the wanted resolution is not resampled
_SAME_LEVEL = 0.005  # scanners reduce by whole factors and drop odd last pixels
_ROWS_READ = 128  # of the mask at once
_PIXELS_IN_CACHE = 2**16  # worked on at once
_IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp"}


@dataclass(frozen=True, eq=False)
class TissueMask:
    """Which parts of a slide are tissue.

    Attributes:
        mask: bool (h, w); its corner is the corner of level 0.
        mpp: µm per pixel of the mask.
        downsample: level-0 pixels per pixel of the mask.
        pen: bool (h, w), what was left out as ink; ``None`` where nobody looked.
    """

    mask: Mask
    mpp: float
    downsample: float
    pen: Mask | None = None

    @property
    def area_mm2(self) -> float:
        """Area of the tissue."""
        return float(self.mask.sum()) * self.mpp**2 / 1e6

    def annotations(self) -> list[Annotation]:
        """The tissue as regions of class "Tissue" in level-0 pixels, for GeoJSON that a user may edit."""
        regions = trace_regions(self.mask)
        return [Annotation("Tissue", (tuple(ring * self.downsample for ring in region),)) for region in regions]


def find_tissue(
    slide: Slide,
    *,
    mpp: float = DEFAULT_MPP,
    min_area_um2: float = MIN_AREA_UM2,
    max_hole_um2: float = MAX_HOLE_UM2,
    exclude_pen: bool = True,
    exclude_fat: bool = True,
) -> TissueMask:
    """Find the tissue of a stained slide; a slide without any gives an empty mask.

    Tissue is what is more saturated than the slide's own glass, or pale with fine dark structure. The slide is read
    from the coarsest suitable level of its pyramid.

    Args:
        slide: the slide.
        mpp: µm per pixel of the mask, roughly: a pyramid level within a factor of 1.5 is used as it is, otherwise the
            mean of whole blocks of pixels.
        min_area_um2: smaller pieces are left out.
        max_hole_um2: smaller holes are filled.
        exclude_pen: leave out blue, green, red and black ink. Say no where the stain itself is green, pure blue or
            pure red (trichromes, Sirius red).
        exclude_fat: leave out what is as pale as glass for more than some 40 µm, such as the inside of fat cells, with
            the thin walls between; otherwise fat counts as tissue.

    Raises:
        InputError: the slide does not say its µm per pixel.
        ConfigError: a parameter that is no size.
    """
    for name, value in (("tissue resolution", mpp), ("tissue area", min_area_um2), ("hole area", max_hole_um2)):
        if not (math.isfinite(value) and value >= 0) or (name == "tissue resolution" and value == 0):
            raise ConfigError(name, f"{value} is no size", "give a positive number")
    pixels, downsample = _read_coarse(slide, mpp)
    own_mpp = slide.mpp * downsample
    color, threshold = _neutral(pixels)
    stain = [((0, math.floor(255 * threshold) + 1, _DARKEST_TISSUE), (180, 255, 255))]
    saturated, surely_ink = _in_ranges(color, stain, _SURELY_INK if exclude_pen else ())
    mask = _stained(saturated, color, own_mpp, exclude_fat)
    pen = _ink(surely_ink, color, own_mpp) if exclude_pen else None
    if pen is not None:
        mask[pen] = 0
    tissue = _without_specks(mask, own_mpp, min_area_um2, max_hole_um2, ink=pen)
    return TissueMask(tissue, own_mpp, downsample, pen)


def read_tissue(path: str | Path, slide: Slide, *, mpp: float = DEFAULT_MPP) -> TissueMask:
    """Read a tissue mask that somebody drew.

    Args:
        path: GeoJSON as QuPath writes it (regions whose class ends in ``*``, such as ``Ignore*``, are cut out), or an
            image of the whole slide of any size, in which what is brighter than half of its brightest is tissue.
        slide: the slide it belongs to.
        mpp: µm per pixel of the mask made from GeoJSON; finer where the slide is coarser.

    Raises:
        InputError: the file cannot be used, or the image has not the slide's shape.
    """
    path = Path(path)
    if path.suffix.lower() not in _IMAGE_SUFFIXES:
        return _tissue_from_regions(read_annotations(path, offset=slide.bounds[:2]), slide, mpp)
    if not path.is_file():
        raise InputError(path, "does not exist", "check the path of the tissue mask")
    image = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_GRAYSCALE) if path.stat().st_size else None
    if image is None:
        raise InputError(path, "cannot be read as an image", "give a PNG, JPEG or TIFF, or GeoJSON")
    (height, width), (slide_width, slide_height) = image.shape, slide.dimensions
    downsample = slide_width / width
    if abs(slide_height / downsample - height) > 1 + 0.01 * height:
        problem = f"is {width} x {height} pixels, but the slide is {slide_width} x {slide_height}: another shape"
        raise InputError(path, problem, "give a mask of the whole slide")
    return TissueMask(image > image.max() / 2, slide.mpp * downsample, downsample)


def _ink(surely: Image, color: Image, mpp: float) -> Mask:
    """Blue, green, red and black ink: strokes of colors that stained tissue does not have.

    What is surely ink must cover some area; paler ink around it then counts too.
    """
    smallest = _PEN_MIN_UM2 / mpp**2
    enough = cv2.countNonZero(surely) >= smallest  # most slides end here
    strokes = _large_parts(surely, smallest) if enough else np.zeros_like(surely)
    if not strokes.any():
        return strokes.view(bool)
    near = cv2.dilate(strokes, _disk(_PEN_FRINGE_UM / mpp))
    (maybe,) = _in_ranges(color, _MAYBE_INK)
    fringe = (near & maybe) | strokes
    return cv2.dilate(fringe, _disk(1.0)).view(bool)  # its outermost pixel is half glass


def _in_ranges(color: Image, *groups: Sequence[_Range]) -> list[Image]:
    """For each group of ranges (at most 8 in all) 1 where a pixel lies within any, ends included; 0 elsewhere."""
    tables = np.zeros((3, 256), np.uint8)  # a bit for every range that a value of hue, saturation or value lies in
    group_bits, bit = [0] * len(groups), 1
    for group, ranges in enumerate(groups):
        for limits in ranges:
            for table, low, high in zip(tables, *limits, strict=True):
                table[low : high + 1] |= bit
            group_bits[group] |= bit
            bit <<= 1
    found: list[Image] = [np.empty(color.shape[:2], np.uint8) for _ in groups]
    rows = max(1, _PIXELS_IN_CACHE // color.shape[1])
    for top in range(0, len(color), rows):
        hsv = cv2.split(cv2.cvtColor(color[top : top + rows], cv2.COLOR_RGB2HSV))
        hue, saturation, value = map(cv2.LUT, hsv, tables)
        within: Image = cv2.bitwise_and(cv2.bitwise_and(hue, saturation), value)
        for mask, bits in zip(found, group_bits, strict=True):
            np.not_equal(within & bits, 0, out=mask[top : top + rows].view(bool))
    return found


def _stained(saturated: Image, color: Image, mpp: float, exclude_fat: bool) -> Image:
    """1 where it is saturated or finely structured, in one piece over small gaps."""
    # Fibers and nuclei in tissue that is itself as pale as glass: darker than all around them within 20 µm or so.
    width = 2 * max(1, round(_JOINED_UM / mpp)) + 1
    square = np.ones((width, width), np.uint8)
    gray = cv2.cvtColor(color, cv2.COLOR_RGB2GRAY)
    structure = cv2.morphologyEx(gray, cv2.MORPH_BLACKHAT, square, dst=gray)
    _, structured = cv2.threshold(structure, _STRUCTURE - 1, 1, cv2.THRESH_BINARY, dst=structure)
    mask = cv2.bitwise_or(saturated, structured, dst=structured)
    if not exclude_fat:
        clean = _large_parts(mask, 3)
        return _morphology(cv2.MORPH_CLOSE, clean, _WIDEST_FAT_UM / mpp)
    # Nuclei of pale tissue are closer together than the walls of fat cells, and these walls are thin.
    joined = _morphology(cv2.MORPH_CLOSE, mask, _JOINED_UM / mpp)
    return _morphology(cv2.MORPH_OPEN, joined, _THIN_UM / mpp)


def _morphology(operation: int, mask: Image, radius: float) -> Image:
    """Closing or opening by a disk; what lies beyond the border is taken to be as at the border."""
    disk = _disk(radius)
    border = len(disk)
    padded = cv2.copyMakeBorder(mask, border, border, border, border, cv2.BORDER_REPLICATE)
    return cv2.morphologyEx(padded, operation, disk, dst=padded)[border:-border, border:-border]


def _without_specks(mask: Image, mpp: float, min_area_um2: float, max_hole_um2: float, *, ink: Mask | None) -> Mask:
    """The mask without small holes and small pieces; holes that touch the border or hold ink are not filled."""
    image = mask.astype(np.uint8)
    pieces, holes = _areas(image)
    smallest, largest = min_area_um2 / mpp**2, max_hole_um2 / mpp**2
    for hole in holes:
        x, y, width, height = cv2.boundingRect(hole.contour)
        if hole.area <= largest and (ink is None or not ink[y : y + height, x : x + width].any()):
            cv2.drawContours(image, [hole.contour], 0, 1, cv2.FILLED)
            pieces[hole.parent].area += hole.area
    for piece in pieces.values():
        if piece.area < smallest:
            cv2.drawContours(image, [piece.contour], 0, 0, cv2.FILLED)
    return image.view(bool)


def _large_parts(image: Image, min_pixels: float) -> Image:
    for piece in _areas(image)[0].values():
        if piece.area < min_pixels:
            cv2.drawContours(image, [piece.contour], 0, 0, cv2.FILLED)
    return image


@dataclass
class _Part:
    """A piece of a mask or a hole in one: its border, its area in pixels and, of a hole, the piece around it."""

    contour: NDArray[Any]
    area: float
    parent: int


def _areas(image: Image) -> tuple[dict[int, _Part], list[_Part]]:
    """Pieces and holes of an image of 0 and 1.

    A border passes through the centers of pixels of the piece, b of them, so by Pick's theorem the area A within it
    holds A + b / 2 + 1 centers with those on the border, and A - b / 2 + 1 without, be it as thin as a line.
    """
    contours, hierarchy = cv2.findContours(image, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    pieces: dict[int, _Part] = {}
    holes = []
    for index, contour in enumerate(contours):
        parent = int(hierarchy[0][index][3])
        half_border = len(contour) / 2 if len(contour) > 1 else 0
        if parent < 0:
            pieces[index] = _Part(contour, cv2.contourArea(contour) + half_border + 1, parent)
        else:
            holes.append(_Part(contour, cv2.contourArea(contour) - half_border + 1, parent))
    for hole in holes:
        pieces[hole.parent].area -= hole.area
    return pieces, holes


def _neutral(image: Image) -> tuple[Image, float]:
    """The image with its glass made neutral, since yellowed glass is no stain; and the saturation of stain (0 to 1).

    Glass is bright and of one color; pale tissue is less uniform, so that a slide full of it stays as it is.
    """
    lowest, highest = _SATURATION_OF_STAIN
    step = max(1, math.isqrt(image.shape[0] * image.shape[1] // _ENOUGH_TO_SEE_A_TINT))
    planes = red, green, blue = [image[::step, ::step, channel].copy() for channel in range(3)]
    brightest = np.maximum(np.maximum(red, green), blue)
    strength = brightest - np.minimum(np.minimum(red, green), blue)
    glass = (brightest >= _BRIGHT) & (strength <= _COLORLESS)
    if glass.mean() < _SMALLEST_GLASS:
        return image, lowest
    strengths = strength[glass].astype(np.float32)
    deviation = float(np.median(np.abs(strengths - np.median(strengths))))
    if deviation > _UNIFORM:
        return image, lowest
    threshold = min(max(_DEVIATIONS * deviation / 255, lowest), highest)
    color = np.array([np.median(plane[glass]) for plane in planes])
    if np.ptp(color) <= 1:
        return image, threshold
    table = np.arange(256)[:, None] * (color.max() / color)
    return cv2.LUT(image, np.clip(np.round(table), 0, 255).astype(np.uint8)[:, None]), threshold


def _disk(radius: float) -> NDArray[Any]:
    reach = max(1, round(radius))
    return cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * reach + 1, 2 * reach + 1))


def _read_coarse(slide: Slide, mpp: float) -> tuple[Image, float]:
    """The whole slide at about ``mpp``, and the level-0 pixels per pixel of it."""
    downsample = _choose_downsample(slide.level_downsamples, mpp / slide.mpp)
    width, height = (math.ceil(length / downsample) for length in slide.dimensions)
    pixels: Image = np.empty((height, width, 3), np.uint8)
    for top in range(0, height, _ROWS_READ):
        strip = pixels[top : top + _ROWS_READ]
        strip[:], valid = slide.read_region(0, top * downsample, (width, len(strip)), mpp=slide.mpp * downsample)
        if valid is not None:
            strip[~valid] = slide.background
    return pixels, downsample


def _choose_downsample(levels: Sequence[float], wanted: float) -> float:
    """One near the wanted at which reading is cheapest: that of a level, or a whole multiple of it."""
    levels = [round(own) if math.isclose(own, round(own), rel_tol=_SAME_LEVEL) else own for own in levels]
    near = [own for own in levels if wanted / _LEVEL_USED_AS_IS <= own <= wanted * _LEVEL_USED_AS_IS]
    if near:
        return min(near, key=lambda own: abs(math.log(own / wanted)))
    finer = max((own for own in levels if own < wanted), default=1.0)
    return finer * max(1, round(wanted / finer))


def _tissue_from_regions(regions: list[Annotation], slide: Slide, mpp: float) -> TissueMask:
    downsample = max(1.0, mpp / slide.mpp)
    width, height = slide.dimensions
    shape = math.ceil(height / downsample), math.ceil(width / downsample)
    drawn = rasterize([region for region in regions if not region.name.endswith("*")], shape, downsample)
    cut_out = rasterize([region for region in regions if region.name.endswith("*")], shape, downsample)
    return TissueMask((drawn > 0) & (cut_out == 0), slide.mpp * downsample, downsample)
