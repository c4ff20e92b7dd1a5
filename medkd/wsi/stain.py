"""Stains of H&E slides: separating them, giving tiles the look of another slide, and varying them for training.

Light is absorbed by each stain in proportion to its amount: the optical density ``-ln(I / I0)`` of a pixel is a sum of
stain vectors weighted by concentrations (Beer-Lambert). Macenko and Vahadane estimate the two vectors of an image in
different ways and share the rest; Reinhard only matches means and spreads of colors.

A tile without enough tissue has no stains to estimate: it comes back unchanged, never as an error.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Self

import cv2
import numpy as np
from numpy.typing import NDArray

from medkd.errors import InputError

Pixels = NDArray[np.uint8]  # (H, W, 3) RGB
Matrix = NDArray[np.float64]

LIGHT = 240.0  # the intensity of light that met no tissue, as Macenko's code takes it
TISSUE_DENSITY = 0.15  # optical density above which, in every channel, a pixel counts as tissue
MIN_TISSUE_PIXELS = 256  # fewer do not determine two stains
_MIN_ANGLE = np.deg2rad(2.0)  # between the stains; closer ones are one stain
_TOP_PERCENT = 99.0  # the percentile that stands for the strongest staining of an image

# Hematoxylin, eosin and a residual, unit optical densities in R, G, B (Ruifrok and Johnston 2001).
_HED = np.array([[0.650, 0.704, 0.286], [0.072, 0.990, 0.105], [0.268, 0.570, 0.776]])

_GRAYS = np.arange(256, dtype=np.float64)
_DENSITY = -np.log((_GRAYS + 1.0) / LIGHT)  # of every 8-bit value; 1 is added so that black has one


@dataclass(frozen=True)
class Stains:
    """The two stains of an image.

    Attributes:
        vectors: (2, 3) unit optical densities in R, G, B; hematoxylin, then eosin.
        strengths: (2,) 99th percentile of each stain's concentration.
    """

    vectors: Matrix
    strengths: Matrix


class _StainNormalizer(ABC):
    """Gives images the stain vectors and strengths of a target image."""

    def __init__(self) -> None:
        self.target: Stains | None = None

    def fit(self, image: Pixels) -> Self:
        """Take the stains of a target image, (H, W, 3) RGB uint8.

        Raises:
            InputError: the target has too little tissue.
            ValueError: not such an image.
        """
        self.target = self.stains(image)
        if self.target is None:
            raise InputError("target image", "has too little stained tissue", "choose a tile full of tissue")
        return self

    def stains(self, image: Pixels) -> Stains | None:
        """The stains of an image, (H, W, 3) RGB uint8; None where it has too little tissue or a single stain."""
        _require_rgb(image)
        density = _density(image)
        tissue = density[(density > TISSUE_DENSITY).all(axis=1)]
        if len(tissue) < MIN_TISSUE_PIXELS:
            return None
        vectors = self._estimate(tissue)
        if vectors is None or not np.isfinite(vectors).all():
            return None
        vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        if vectors[0, 0] < vectors[1, 0]:  # hematoxylin takes more red light than eosin
            vectors = vectors[::-1]
        if np.arccos(np.clip(vectors[0] @ vectors[1], -1, 1)) < _MIN_ANGLE:
            return None
        strengths = np.percentile(_concentrations(density, vectors), _TOP_PERCENT, axis=0)
        return Stains(vectors, strengths) if (strengths > 0).all() else None

    def __call__(self, image: Pixels, *, source: Stains | None = None) -> Pixels:
        """The image, (H, W, 3) RGB uint8, stained like the target.

        Args:
            image: a tile.
            source: stains of the slide it is from, so that all its tiles change alike; estimated from the tile without.

        Returns:
            A new image; the same pixels where the tile has no stains to speak of.

        Raises:
            ValueError: not such an image, or ``fit`` was not called.
        """
        if self.target is None:
            raise ValueError("fit a target image first")
        source = source or self.stains(image)
        _require_rgb(image)
        if source is None:
            return image.copy()
        # Concentrations of the source, scaled to the target's strengths and mixed anew, are one linear map of density.
        unmix = np.linalg.pinv(source.vectors)
        mix = unmix @ np.diag(self.target.strengths / source.strengths) @ self.target.vectors
        return _from_density(_density(image) @ mix, image.shape)

    @abstractmethod
    def _estimate(self, density: Matrix) -> Matrix | None:
        """(2, 3) stain vectors of any length from the (N, 3) densities of tissue pixels, or None."""


class Macenko(_StainNormalizer):
    """The stains are the extreme directions within the plane in which most densities lie.

    Args:
        percentile: of the angles in that plane that counts as extreme, on either side.

    Source: Macenko et al. 2009, ISBI, doi:10.1109/ISBI.2009.5193250.
    """

    def __init__(self, percentile: float = 1.0) -> None:
        super().__init__()
        self.percentile = percentile

    def _estimate(self, density: Matrix) -> Matrix | None:
        plane = np.linalg.eigh(np.cov(density.T))[1][:, 1:]  # the two largest of three
        plane = plane * np.where(plane.sum(axis=0) < 0, -1.0, 1.0)  # an eigenvector's sign is arbitrary
        projected = density @ plane
        angles = np.arctan2(projected[:, 1], projected[:, 0])
        # Angles near a half turn would wrap; measured from their mean direction they cannot.
        middle = np.arctan2(np.sin(angles).mean(), np.cos(angles).mean())
        away = (angles - middle + np.pi) % (2 * np.pi) - np.pi
        ends = middle + np.percentile(away, [self.percentile, 100 - self.percentile])
        vectors = np.stack([np.cos(ends), np.sin(ends)], axis=1) @ plane.T
        vectors *= np.where(vectors.sum(axis=1, keepdims=True) < 0, -1.0, 1.0)
        return np.asarray(vectors)


class Vahadane(_StainNormalizer):
    """The stains are a dictionary of two non-negative vectors that explains the densities sparsely.

    Minimizes ``½‖V - C D‖² + λ ΣC`` over concentrations C ≥ 0 and unit vectors D ≥ 0, alternating the exact solution
    for two concentrations with one sweep over the vectors, from Ruifrok's hematoxylin and eosin.

    Args:
        sparsity: λ, in units of optical density.
        rounds: most alternations.
        samples: tissue pixels looked at, evenly spaced over the image.

    Source: Vahadane et al. 2016, IEEE TMI 35(8), doi:10.1109/TMI.2016.2529665; the solver is ours.
    """

    def __init__(self, sparsity: float = 0.1, *, rounds: int = 100, samples: int = 20_000) -> None:
        super().__init__()
        self.sparsity = sparsity
        self.rounds = rounds
        self.samples = samples

    def _estimate(self, density: Matrix) -> Matrix | None:
        density = density[:: max(1, len(density) // self.samples)]
        vectors = _HED[:2] / np.linalg.norm(_HED[:2], axis=1, keepdims=True)
        for _ in range(self.rounds):
            codes = sparse_concentrations(density, vectors, self.sparsity)
            before, vectors = vectors, _improved_vectors(density, codes, vectors)
            if not vectors.any(axis=1).all():
                return None
            if np.abs(vectors - before).max() < 1e-5:
                break
        return vectors


class Reinhard:
    """Gives tissue the mean and spread of a target image in each channel of the L*a*b* color space.

    Statistics are over tissue alone, and only tissue changes, so that the glass stays white.

    Source: Reinhard et al. 2001, IEEE CG&A 21(5), doi:10.1109/38.946629, with CIE L*a*b* for their lαβ.
    """

    def __init__(self) -> None:
        self.target: tuple[Matrix, Matrix] | None = None

    def fit(self, image: Pixels) -> Self:
        """Take the colors of a target image, (H, W, 3) RGB uint8.

        Raises:
            InputError: the target has too little tissue.
            ValueError: not such an image.
        """
        self.target = self._statistics(image)
        if self.target is None:
            raise InputError("target image", "has too little stained tissue", "choose a tile full of tissue")
        return self

    def __call__(self, image: Pixels) -> Pixels:
        """The image, (H, W, 3) RGB uint8, in the target's colors; unchanged where it has too little tissue.

        Raises:
            ValueError: not such an image, or ``fit`` was not called.
        """
        if self.target is None:
            raise ValueError("fit a target image first")
        own = self._statistics(image)
        if own is None:
            return image.copy()
        (mean, spread), (wanted_mean, wanted_spread) = own, self.target
        lab = _lab(image)
        changed = ((lab - mean) / spread * wanted_spread + wanted_mean).astype(np.float32)
        rgb = np.clip(cv2.cvtColor(changed, cv2.COLOR_LAB2RGB), 0, 1)
        made = np.round(rgb * 255).astype(np.uint8)
        return np.where(_tissue(image)[..., None], made, image)

    def _statistics(self, image: Pixels) -> tuple[Matrix, Matrix] | None:
        _require_rgb(image)
        lab = _lab(image)[_tissue(image)].astype(np.float64)
        if len(lab) < MIN_TISSUE_PIXELS:
            return None
        return lab.mean(axis=0), np.maximum(lab.std(axis=0), 1e-3)


class StainJitter:
    """Vary the amounts of hematoxylin, eosin and residual at random, as laboratories and scanners do.

    Every stain's concentration is multiplied by a factor from 1 ± ``sigma`` and shifted by a term from ± ``bias``; the
    shift acts on tissue only, through its own density, so glass stays white.

    Args:
        sigma: largest relative change of a stain.
        bias: largest shift, in units of optical density.

    Source: Tellez et al. 2018, IEEE TMI 37(9), doi:10.1109/TMI.2018.2820199 (HED jitter).
    """

    def __init__(self, sigma: float = 0.1, bias: float = 0.02) -> None:
        if not (0 <= sigma < 1 and bias >= 0):
            raise ValueError(f"sigma {sigma} must lie in [0, 1) and bias {bias} must not be negative")
        self.sigma = sigma
        self.bias = bias
        unit = _HED / np.linalg.norm(_HED, axis=1, keepdims=True)
        self._unit, self._unmix = unit, np.linalg.inv(unit)

    def __call__(self, image: Pixels, generator: np.random.Generator | np.random.RandomState) -> Pixels:
        """A copy of the image, (H, W, 3) RGB uint8, stained a little otherwise.

        Raises:
            ValueError: not such an image.
        """
        _require_rgb(image)
        factors = generator.uniform(1 - self.sigma, 1 + self.sigma, 3)
        shifts = generator.uniform(-self.bias, self.bias, 3)
        density = _density(image)
        mixed = density @ (self._unmix @ np.diag(factors) @ self._unit)
        amount = np.clip(density.max(axis=1, keepdims=True) / TISSUE_DENSITY, 0, 1)
        return _from_density(mixed + amount * (shifts @ self._unit), image.shape)


def sparse_concentrations(density: Matrix, vectors: Matrix, sparsity: float) -> Matrix:
    """The exact C ≥ 0 that minimizes ``½‖V - C D‖² + λ ΣC`` for two stains.

    Args:
        density: V, (N, 3).
        vectors: D, (2, 3), unit length.
        sparsity: λ ≥ 0.

    Returns:
        (N, 2).
    """
    shared = float(vectors[0] @ vectors[1])
    gain = density @ vectors.T - sparsity
    determinant = max(1 - shared**2, 1e-12)
    both = (gain - shared * gain[:, ::-1]) / determinant  # where neither is held at 0
    alone = np.maximum(gain, 0)
    # Where one of both would be negative the optimum lies on an axis: the better of the two.
    first = alone[:, 0] >= alone[:, 1]
    single = np.stack([np.where(first, alone[:, 0], 0), np.where(first, 0, alone[:, 1])], axis=1)
    return np.where((both >= 0).all(axis=1, keepdims=True), both, single)


def _improved_vectors(density: Matrix, codes: Matrix, vectors: Matrix) -> Matrix:
    """One sweep of block coordinate descent over the unit, non-negative dictionary vectors."""
    vectors = vectors.copy()
    products, weights = codes.T @ density, codes.T @ codes
    for index in range(2):
        if weights[index, index] <= 0:
            vectors[index] = 0
            continue
        step = vectors[index] + (products[index] - weights[index] @ vectors) / weights[index, index]
        step = np.maximum(step, 0)
        length = np.linalg.norm(step)
        vectors[index] = step / length if length > 0 else 0
    return vectors


def _require_rgb(image: Pixels) -> None:
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or not image.size:
        raise ValueError(f"the image is {image.dtype} {image.shape}; stains need (H, W, 3) RGB, uint8")


def _density(image: Pixels) -> Matrix:
    """(H·W, 3) optical densities."""
    return _DENSITY[image.reshape(-1, 3)]


def _from_density(density: Matrix, shape: tuple[int, ...]) -> Pixels:
    """The image of the given shape that has these optical densities."""
    light = LIGHT * np.exp(-np.clip(density, -1.0, 50.0)) - 1.0  # beyond these all is white or black
    return np.clip(np.round(light), 0, 255).astype(np.uint8).reshape(shape)


def _concentrations(density: Matrix, vectors: Matrix) -> Matrix:
    """(N, 2) least-squares concentrations."""
    return density @ np.linalg.pinv(vectors)


def _tissue(image: Pixels) -> NDArray[np.bool_]:
    return np.asarray((_DENSITY[image] > TISSUE_DENSITY).all(axis=-1))


def _lab(image: Pixels) -> NDArray[np.float32]:
    return np.asarray(cv2.cvtColor(image.astype(np.float32) / 255, cv2.COLOR_RGB2LAB), dtype=np.float32)
