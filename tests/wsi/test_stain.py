from __future__ import annotations

import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from skimage.data import immunohistochemistry
from sklearn.decomposition import sparse_encode

from medkd.errors import InputError
from medkd.wsi.stain import (
    LIGHT,
    TISSUE_DENSITY,
    Macenko,
    Reinhard,
    StainJitter,
    Vahadane,
    sparse_concentrations,
)

HEMATOXYLIN = np.array([0.65, 0.70, 0.29]) / np.linalg.norm([0.65, 0.70, 0.29])
EOSIN = np.array([0.21, 0.85, 0.48]) / np.linalg.norm([0.21, 0.85, 0.48])
NORMALIZERS = [Macenko, Vahadane, Reinhard]


def tissue(vectors=(HEMATOXYLIN, EOSIN), strength=(1.0, 0.8), seed=0, size=128):
    """A picture of two stains in known amounts: nuclei of one, matrix of the other, some of both."""
    source = np.random.default_rng(seed)
    amounts = source.gamma(2.0, 0.35, (size * size, 2)) * strength
    kind = source.integers(3, size=size * size)
    amounts[kind == 0, 1] *= 0.02
    amounts[kind == 1, 0] *= 0.02
    light = LIGHT * np.exp(-amounts @ np.array(vectors)) - 1
    return np.clip(np.round(light), 0, 255).astype(np.uint8).reshape(size, size, 3)


def degrees(a, b):
    return np.degrees(np.arccos(np.clip(a @ b / np.linalg.norm(a) / np.linalg.norm(b), -1, 1)))


@pytest.mark.parametrize("method", [Macenko, Vahadane])
def test_known_stains_are_found_and_hematoxylin_comes_first(method):
    stains = method().stains(tissue())
    assert degrees(stains.vectors[0], HEMATOXYLIN) < 4
    assert degrees(stains.vectors[1], EOSIN) < 4


@pytest.mark.parametrize("method", [Macenko, Vahadane])
def test_image_gets_the_stains_of_the_target(method):
    other = (np.array([0.55, 0.75, 0.36]), np.array([0.10, 0.80, 0.60]))
    target, image = tissue(seed=1), tissue(other, (0.6, 0.5), seed=2)
    normalizer = method().fit(target)
    before, after, wanted = (normalizer.stains(picture) for picture in (image, normalizer(image), target))
    for stain in range(2):
        assert degrees(after.vectors[stain], wanted.vectors[stain]) < 4
        assert degrees(before.vectors[stain], wanted.vectors[stain]) > degrees(
            after.vectors[stain], wanted.vectors[stain]
        )
    np.testing.assert_allclose(after.strengths, wanted.strengths, rtol=0.1)


def test_reinhard_gives_tissue_the_colors_of_the_target_and_leaves_glass_alone():
    target, image = tissue(seed=1), tissue(strength=(0.5, 0.4), seed=2)
    image[:20] = 245
    normalized = Reinhard().fit(target)(image)
    assert (normalized[:20] == 245).all()
    dark = (-np.log((image + 1.0) / LIGHT) > TISSUE_DENSITY).all(-1)
    wanted = (-np.log((target + 1.0) / LIGHT) > TISSUE_DENSITY).all(-1)
    # Clipping at black and white costs a little.
    np.testing.assert_allclose(normalized[dark].mean(0), target[wanted].mean(0), atol=6)


@pytest.mark.parametrize("method", NORMALIZERS)
def test_image_normalized_to_itself_stays_as_it_is(method):
    image = tissue()
    difference = np.abs(method().fit(image)(image).astype(int) - image)
    assert np.percentile(difference, 99) <= 4


@pytest.mark.parametrize("method", NORMALIZERS)
@pytest.mark.parametrize("blank", ["white", "black", "gray", "one stain", "specks", "noise on glass"])
def test_blank_tile_comes_back_unchanged_or_at_least_whole(method, blank):
    source = np.random.default_rng(0)
    image = np.full((64, 64, 3), 255, np.uint8)
    if blank == "black":
        image[:] = 0
    elif blank == "gray":
        image[:] = 128
    elif blank == "one stain":
        image[:] = (120, 60, 140)
    elif blank == "specks":
        image[:5, :5] = (90, 40, 120)
    elif blank == "noise on glass":
        image -= source.integers(0, 10, image.shape, dtype=np.uint8)
    normalized = method().fit(tissue())(image)
    assert normalized.shape == image.shape
    assert normalized.dtype == np.uint8
    if method is not Reinhard or blank not in ("black", "gray", "one stain"):  # it has a mean to shift
        np.testing.assert_array_equal(normalized, image)
        assert normalized is not image


@settings(max_examples=30)
@given(hnp.arrays(np.uint8, st.tuples(st.integers(1, 40), st.integers(1, 40), st.just(3))))
def test_no_picture_makes_a_normalizer_fail(image):
    for normalizer in FITTED:
        assert normalizer(image).shape == image.shape


FITTED = [method().fit(tissue(size=48)) for method in NORMALIZERS]


@pytest.mark.parametrize("method", NORMALIZERS)
def test_target_without_tissue_is_refused(method):
    with pytest.raises(InputError, match="too little stained tissue"):
        method().fit(np.full((64, 64, 3), 250, np.uint8))
    with pytest.raises(ValueError, match="fit a target image first"):
        method()(tissue())
    with pytest.raises(ValueError, match="uint8"):
        method().fit(tissue()[..., 0])


def test_stains_of_the_slide_change_all_its_tiles_alike():
    slide, target = tissue(seed=3), tissue(seed=4, strength=(1.5, 1.2))
    normalizer = Macenko().fit(target)
    stains = normalizer.stains(slide)
    tile = slide[:8, :8]  # too small to have stains of its own
    np.testing.assert_array_equal(normalizer(tile), tile)
    np.testing.assert_array_equal(normalizer(tile, source=stains), normalizer(slide, source=stains)[:8, :8])


def test_macenko_is_torchstains_on_a_real_photograph():
    torchstain = pytest.importorskip("torchstain")
    image = immunohistochemistry()
    target = tissue(seed=1)
    theirs = torchstain.normalizers.MacenkoNormalizer(backend="numpy")
    theirs.fit(target)
    ours = Macenko().fit(target)
    expected, _, _ = theirs.normalize(image, stains=False)
    np.testing.assert_allclose(ours.target.vectors, theirs.HERef.T, atol=1e-6)
    # They cut fractions off where we round.
    assert np.abs(ours(image).astype(int) - expected).max() <= 1


@pytest.mark.parametrize("sparsity", [0.01, 0.1, 0.5])
def test_concentrations_are_scikit_learns_non_negative_lasso(sparsity):
    vectors = np.stack([HEMATOXYLIN, EOSIN])
    density = np.random.default_rng(0).uniform(0, 2, (40, 3))
    found = sparse_concentrations(density, vectors, sparsity)
    expected = sparse_encode(density, vectors, algorithm="lasso_cd", alpha=sparsity, positive=True, max_iter=5000)

    def cost(codes):
        return 0.5 * ((density - codes @ vectors) ** 2).sum(1) + sparsity * codes.sum(1)

    assert (found >= 0).all()
    assert (cost(found) <= cost(expected) + 1e-6).all()


def test_real_photograph_normalizes_to_its_own_kind():
    image = immunohistochemistry()
    for method in NORMALIZERS:
        normalized = method().fit(image[:256])(image[256:])
        assert 0.5 < normalized.std() / image[256:].std() < 2


def test_jitter_changes_tissue_keeps_glass_and_repeats_itself():
    image = tissue()
    image[:30] = 240
    jitter = StainJitter(0.2, 0.05)
    first, again, other = (jitter(image, np.random.default_rng(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    assert np.abs(first[:30].astype(int) - 240).max() <= 2
    assert np.abs(first[30:].astype(int) - image[30:]).mean() > 2
    unchanged = StainJitter(0, 0)(image, np.random.default_rng(0))
    assert np.abs(unchanged.astype(int) - image).max() <= 1


def test_jitter_of_senseless_size_is_refused():
    with pytest.raises(ValueError, match="sigma"):
        StainJitter(sigma=1.0)


def test_stains_need_neither_torch_nor_monai():
    import subprocess

    code = "import sys, medkd.wsi.stain; sys.exit(str({'torch', 'monai'} & sys.modules.keys() or '') or 0)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
