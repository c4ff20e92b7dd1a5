"""Finding lesions on slides: the free-response ROC as CAMELYON16 defines it.

A detection inside a lesion finds it, with the highest probability among those inside; further ones count for nothing.
A detection outside all lesions is a false positive, on slides with and without lesions alike. Isolated tumor cells,
lesions under 275 µm, are neither: they need not be found, and a detection in one is not wrong.

Source: Ehteshami Bejnordi et al. 2017, JAMA 318(22), doi:10.1001/jama.2017.14585, and its evaluation procedure.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import ndimage
from scipy.sparse import csr_matrix
from scipy.spatial import cKDTree

from medkd.metrics.statistics import Interval, resampling_blocks, resampling_weights

Array = npt.NDArray[np.float64]

FALSE_POSITIVES_PER_SLIDE = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
LESION_GAP_UM = 75.0  # parts of a lesion nearer to each other than five tumor cells are one lesion
ISOLATED_UM = 275.0  # longest axis below which a lesion is isolated tumor cells


@dataclass(frozen=True, eq=False)
class Lesions:
    """The lesions of one slide.

    Attributes:
        labels: int (H, W), number of the lesion a pixel is in, from 1; 0 for none.
        count: how many there are.
        isolated: numbers of those too small to count.
    """

    labels: npt.NDArray[np.int32]
    count: int
    isolated: frozenset[int]

    @property
    def counted(self) -> list[int]:
        """Numbers of those to be found."""
        return [number for number in range(1, self.count + 1) if number not in self.isolated]


@dataclass(frozen=True, eq=False)
class SlideDetections:
    """What was detected on one slide.

    Attributes:
        slide: its name.
        patient: whose it is.
        lesions: (L,) highest probability of a detection inside each lesion that counts; NaN where there is none.
        false_positives: (F,) probabilities of the detections outside all lesions.
    """

    slide: str
    patient: str
    lesions: Array
    false_positives: Array


@dataclass(frozen=True, eq=False)
class Froc:
    """The curve and what is read off it.

    Attributes:
        sensitivities: mean false positives per slide → share of the lesions found.
        score: their mean, CAMELYON16's second ranking.
        false_positives_per_slide: (T,) of the curve, increasing, from 0.
        sensitivity: (T,) of the curve.
        n_lesions: lesions that count.
        n_slides: slides.
    """

    sensitivities: dict[float, float]
    score: float
    false_positives_per_slide: Array
    sensitivity: Array
    n_lesions: int
    n_slides: int


def find_lesions(mask: npt.NDArray[np.bool_], mpp: float) -> Lesions:
    """The lesions of an annotation mask.

    As in CAMELYON16, parts nearer than 75 µm are joined by growing the mask by half of that, holes are filled, and what
    then touches, diagonally too, is one lesion.

    Args:
        mask: (H, W) True inside annotated tumor; 4 to 16 µm per pixel suit.
        mpp: µm per pixel of the mask.
    """
    if not mask.any():
        return Lesions(np.zeros(mask.shape, np.int32), 0, frozenset())
    grown = ndimage.distance_transform_edt(~mask) < LESION_GAP_UM / (2 * mpp)
    labels, count = ndimage.label(ndimage.binary_fill_holes(grown), structure=np.ones((3, 3)))
    boxes = ndimage.find_objects(labels)
    isolated = {
        number for number, box in enumerate(boxes, start=1) if _longest_axis(labels[box] == number) * mpp < ISOLATED_UM
    }
    return Lesions(labels.astype(np.int32), int(count), frozenset(isolated))


def find_detections(centers: npt.ArrayLike, probabilities: npt.ArrayLike, *, radius: float) -> tuple[Array, Array]:
    """The local maxima of tile probabilities: the highest first, each silencing all others within a radius.

    Args:
        centers: (N, 2) x and y.
        probabilities: (N,); NaN is no detection.
        radius: in the unit of the centers; one tile's diagonal keeps one detection per spot.

    Returns:
        (D, 2) centers and (D,) probabilities, decreasing; among equals the first in the list comes first.
    """
    points, values = np.asarray(centers, np.float64).reshape(-1, 2), np.asarray(probabilities, np.float64)
    known = np.flatnonzero(~np.isnan(values))
    points, values = points[known], values[known]
    if not len(points):
        return points, values
    tree = cKDTree(points)
    free = np.ones(len(points), bool)
    kept = []
    for index in np.argsort(-values, kind="stable"):
        if free[index]:
            kept.append(index)
            free[tree.query_ball_point(points[index], radius)] = False
    return points[kept], values[kept]


def match_detections(
    slide: str,
    patient: str,
    points: npt.ArrayLike,
    probabilities: npt.ArrayLike,
    lesions: Lesions,
    *,
    downsample: float,
) -> SlideDetections:
    """Which lesion each detection is in.

    Args:
        slide: its name.
        patient: whose it is.
        points: (D, 2) x and y of the detections in level-0 pixels.
        probabilities: (D,).
        lesions: of the slide.
        downsample: level-0 pixels per pixel of the lesion map.
    """
    places = np.floor(np.asarray(points, np.float64).reshape(-1, 2) / downsample).astype(int)
    values = np.asarray(probabilities, np.float64)
    height, width = lesions.labels.shape
    inside = (places >= 0).all(1) & (places[:, 0] < width) & (places[:, 1] < height)
    hit = np.zeros(len(places), np.int64)
    hit[inside] = lesions.labels[places[inside, 1], places[inside, 0]]
    best = [values[hit == number].max(initial=-math.inf) for number in lesions.counted]
    found = np.array([math.nan if value == -math.inf else value for value in best])
    return SlideDetections(slide, patient, found, values[hit == 0])


def froc_curve(
    slides: Sequence[SlideDetections], *, false_positives_per_slide: Sequence[float] = FALSE_POSITIVES_PER_SLIDE
) -> Froc:
    """The FROC curve of a set of slides, and its sensitivities at given false positives per slide.

    Between points of the curve it is linear; beyond its last point sensitivity stays as it is. The curve goes down to
    the least probability of any detection; where every lesion is found CAMELYON16's script stops one point earlier.

    Args:
        slides: what was detected on each.
        false_positives_per_slide: where to read the curve.

    Returns:
        The curve; sensitivities and score are NaN without a lesion.

    Raises:
        ValueError: no slide.
    """
    curves = _Curves(slides)
    fps, sensitivity = (rows[0] for rows in curves.of(np.ones((1, len(slides)))))
    read = np.interp(false_positives_per_slide, fps, sensitivity) if curves.n_lesions else [math.nan]
    values = dict(zip(false_positives_per_slide, np.broadcast_to(read, len(false_positives_per_slide)), strict=True))
    sensitivities = {float(at): float(value) for at, value in values.items()}
    score = float(np.mean(list(sensitivities.values())))
    return Froc(sensitivities, score, fps, sensitivity, curves.n_lesions, len(slides))


def froc_intervals(
    slides: Sequence[SlideDetections],
    *,
    false_positives_per_slide: Sequence[float] = FALSE_POSITIVES_PER_SLIDE,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[Interval, dict[float, Interval]]:
    """The FROC score and each sensitivity with percentile bootstrap intervals over patients.

    A resampled patient brings all its slides. Resamples without a lesion are left out.

    Returns:
        The score's interval, and those of the sensitivities; bounds are NaN with fewer than two patients.

    Raises:
        ValueError: no slide, or a confidence or number of resamples out of range.
    """
    if not 0 < confidence < 1 or resamples < 1:
        raise ValueError(f"confidence {confidence} must lie between 0 and 1, resamples {resamples} be at least 1")
    estimate = froc_curve(slides, false_positives_per_slide=false_positives_per_slide)
    curves = _Curves(slides)
    people = np.unique([slide.patient for slide in slides], return_inverse=True)[1]
    n_patients = int(people.max()) + 1
    found = []
    if n_patients > 1 and curves.n_lesions:
        generator = np.random.default_rng(seed)
        for size in resampling_blocks(resamples, 4 * curves.n_points + n_patients):
            weights = resampling_weights(n_patients, size, generator)[:, people]
            for fps, sensitivity in zip(*curves.of(weights), strict=True):
                found.append(np.interp(false_positives_per_slide, fps, sensitivity))
    table = np.array(found).reshape(-1, len(false_positives_per_slide))
    table = table[~np.isnan(table).any(axis=1)]
    ends = [(1 - confidence) / 2, (1 + confidence) / 2]

    def interval(value: float, values: Array) -> Interval:
        low, high = np.quantile(values, ends) if len(values) else (math.nan, math.nan)
        return Interval(value, float(low), float(high), len(slides), 0, n_patients, 1, confidence)

    each = {at: interval(value, table[:, column]) for column, (at, value) in enumerate(estimate.sensitivities.items())}
    return interval(estimate.score, table.mean(axis=1)), each


class _Curves:
    """FROC curves of resampled slides: detections sorted once, since a resample only changes how often slides count."""

    def __init__(self, slides: Sequence[SlideDetections]) -> None:
        if not slides:
            raise ValueError("there is no slide to evaluate")
        hits = [slide.lesions[~np.isnan(slide.lesions)] for slide in slides]
        self.n_lesions = sum(len(slide.lesions) for slide in slides)
        thresholds = np.unique(np.concatenate([*hits, *(slide.false_positives for slide in slides)]))[::-1]
        self.n_points = len(thresholds) + 1
        self._lesions = np.array([len(slide.lesions) for slide in slides], float)
        self._hits = _table(hits, thresholds)
        self._false = _table([slide.false_positives for slide in slides], thresholds)

    def of(self, weights: Array) -> tuple[Array, Array]:
        """(R, T) false positives per slide and sensitivities for (R, slides) weights; NaN where no lesion is drawn."""
        lesions = (weights @ self._lesions)[:, None]
        false = np.cumsum(weights @ self._false, axis=1) / weights.sum(axis=1, keepdims=True)
        hits = np.cumsum(weights @ self._hits, axis=1)
        return false, np.divide(hits, lesions, out=np.full(hits.shape, np.nan), where=lesions > 0)


def _table(values: Sequence[Array], thresholds: Array) -> csr_matrix:
    """(slides, 1 + thresholds) how many values of a slide equal each threshold; these decrease, column 0 stays 0."""
    rows = np.repeat(np.arange(len(values)), [len(own) for own in values])
    flat = np.concatenate([*values, np.empty(0)])
    columns = len(thresholds) - np.searchsorted(thresholds[::-1], flat)
    return csr_matrix((np.ones(len(flat)), (rows, columns)), shape=(len(values), 1 + len(thresholds)))


def _longest_axis(mask: npt.NDArray[np.bool_]) -> float:
    """Length in pixels of the long axis of the ellipse with the same second moments."""
    places = np.argwhere(mask).astype(float)
    spread = np.cov(places.T, bias=True) if len(places) > 1 else np.zeros((2, 2))
    largest = np.linalg.eigvalsh(spread + np.eye(2) / 12)[-1]  # a pixel is a square, not a point
    return float(4 * math.sqrt(largest))
