from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from scipy.spatial.distance import cdist

from medkd.metrics import assd_mm, hd95_mm, surface, surface_dice, surface_scores

SPACINGS = [(1.0, 1.0, 1.0), (5.0, 1.25, 1.25), (0.1, 0.1, 0.1), (0.7, 3.3, 0.7), (10.0, 1.367, 1.367), (0.3, 0.9, 2.7)]
TOLERANCES = [0.0, 0.3, 1.0, 2.0, 2.5, 5.0]
KINDS = ["blob", "noise", "point", "empty", "full", "box"]


def random_mask(generator, shape, kind):
    if kind == "empty":
        return np.zeros(shape, bool)
    if kind == "full":
        return np.ones(shape, bool)
    if kind == "noise":
        return generator.random(shape) < generator.uniform(0.05, 0.6)
    mask = np.zeros(shape, bool)
    if kind == "point":
        mask[tuple(generator.integers(n) for n in shape)] = True
    elif kind == "box":
        corners = [sorted(generator.integers(0, n + 1, size=2)) for n in shape]
        mask[tuple(slice(low, high) for low, high in corners)] = True
    else:
        field = ndimage.gaussian_filter(generator.standard_normal(shape), 1.5)
        mask = field > np.quantile(field, generator.uniform(0.3, 0.9))
    return mask


def random_pairs(n):
    """Yield (pred, reference, spacing, tolerance): every kind against every kind, 2-D and 3-D, tiny, with empties."""
    generator = np.random.default_rng(20240229)
    kinds = itertools.cycle([*itertools.product(KINDS, KINDS), *[("blob", "blob"), ("copy", "blob")] * 12])
    for _ in range(n):
        shape = tuple(generator.integers(1, 11, size=generator.integers(2, 4)))
        first, second = next(kinds)
        reference = random_mask(generator, shape, second)
        pred = np.roll(reference, 1, axis=-1) if first == "copy" else random_mask(generator, shape, first)
        spacing = SPACINGS[generator.integers(len(SPACINGS))][: len(shape)]
        yield pred.astype(np.uint8), reference.astype(np.uint8), spacing, float(generator.choice(TOLERANCES))


def brute_force(pred, reference, spacing, tolerance):
    """HD95, ASSD and surface Dice from the full matrix of distances between scipy's surfaces."""
    cross = ndimage.generate_binary_structure(pred.ndim, 1)
    points = []
    for mask in (pred == 1, reference == 1):
        surface_voxels = mask & ~ndimage.binary_erosion(mask, cross, border_value=0)
        points.append(np.argwhere(surface_voxels) * np.asarray(spacing))
    if not len(points[0]) and not len(points[1]):
        return math.nan, math.nan, math.nan
    if not len(points[0]) or not len(points[1]):
        return math.inf, math.inf, 0.0
    matrix = cdist(*points)
    there, back = matrix.min(axis=1), matrix.min(axis=0)
    pooled = np.concatenate([there, back])
    hd95 = max(np.percentile(there, 95), np.percentile(back, 95))
    return hd95, pooled.mean(), np.mean(pooled <= tolerance * (1 + 1e-7))


def test_500_random_pairs_equal_brute_force():
    empties = 0
    for pred, reference, spacing, tolerance in random_pairs(500):
        score = surface_scores(pred, reference, spacing_mm=spacing, classes=[1], tolerance_mm=tolerance)[1]
        expected = brute_force(pred, reference, spacing, tolerance)
        assert (score.hd95, score.assd) == pytest.approx(expected[:2], abs=1e-9, nan_ok=True)
        assert score.surface_dice == pytest.approx(expected[2], abs=1e-12, nan_ok=True)
        empties += not math.isfinite(score.hd95)
    assert 50 < empties < 300


def test_500_random_pairs_equal_monai_where_both_have_the_class():
    from monai.metrics import compute_average_surface_distance, compute_hausdorff_distance, compute_surface_dice

    compared = 0
    for pred, reference, spacing, tolerance in random_pairs(500):
        if not (pred.any() and reference.any()):
            continue  # MONAI returns NaN for a missed structure's HD95, which its mean then leaves out
        score = surface_scores(pred, reference, spacing_mm=spacing, classes=[1], tolerance_mm=tolerance)[1]
        pair = [torch.from_numpy(labels)[None, None].bool() for labels in (pred, reference)]
        hd95 = compute_hausdorff_distance(*pair, include_background=True, percentile=95, spacing=spacing)
        assd = compute_average_surface_distance(*pair, include_background=True, symmetric=True, spacing=spacing)
        nsd = compute_surface_dice(*pair, [tolerance], include_background=True, spacing=spacing)
        assert score.hd95 == pytest.approx(hd95.item(), abs=1e-4)
        assert score.assd == pytest.approx(assd.item(), abs=1e-4)
        assert score.surface_dice == pytest.approx(nsd.item(), abs=1e-6)
        compared += 1
    assert compared > 250


def test_distance_transform_and_tree_agree(monkeypatch):
    for pred, reference, spacing, _ in random_pairs(60):
        results = []
        for threshold in (0.0, math.inf):  # always the transform, always the tree
            monkeypatch.setattr(surface, "_QUERIES_PER_VOXEL_FOR_TRANSFORM", threshold)
            results.append(surface_scores(pred, reference, spacing_mm=spacing, classes=[1])[1])
        assert results[0].hd95 == pytest.approx(results[1].hd95, abs=1e-9, nan_ok=True)
        assert results[0].assd == pytest.approx(results[1].assd, abs=1e-9, nan_ok=True)


def test_speckle_takes_the_distance_transform_and_equals_brute_force():
    generator = np.random.default_rng(3)
    pred, reference = (generator.random((2, 12, 12, 12)) < 0.5).astype(np.uint8)
    score = surface_scores(pred, reference, spacing_mm=(2.0, 1.0, 0.5), classes=[1], tolerance_mm=1.0)[1]
    assert (score.hd95, score.assd, score.surface_dice) == pytest.approx(
        brute_force(pred, reference, (2.0, 1.0, 0.5), 1.0), abs=1e-9
    )


def test_two_points_are_as_far_apart_as_the_spacing_says():
    pred, reference = np.zeros((4, 5, 6), int), np.zeros((4, 5, 6), int)
    pred[0, 1, 2] = reference[3, 1, 2] = 7
    keywords = {"spacing_mm": (2.5, 1.0, 1.0), "classes": [7]}
    assert hd95_mm(pred, reference, **keywords) == {7: 7.5}
    assert assd_mm(pred, reference, **keywords) == {7: 7.5}
    assert surface_dice(pred, reference, **keywords, tolerance_mm=7.4) == {7: 0.0}
    assert surface_dice(pred, reference, **keywords, tolerance_mm=7.5) == {7: 1.0}


def test_hd95_is_the_larger_of_the_directed_linear_percentiles_and_assd_pools():
    # Distances of the prediction's 20 pixels in the column: 0..19 px; of the one reference pixel: 0.
    pred, reference = np.zeros((20, 3), int), np.zeros((20, 3), int)
    pred[:, 1] = 1
    reference[0, 1] = 1
    assert hd95_mm(pred, reference, spacing_mm=(1, 1), classes=[1])[1] == pytest.approx(18.05)  # 0.95 × 19
    assert hd95_mm(reference, pred, spacing_mm=(1, 1), classes=[1])[1] == pytest.approx(18.05)
    assert assd_mm(pred, reference, spacing_mm=(1, 1), classes=[1])[1] == pytest.approx(190 / 21)


def test_tolerance_holds_three_tenths_of_a_millimeter():
    pred, reference = np.zeros((1, 9), int), np.zeros((1, 9), int)
    pred[0, 0] = reference[0, 3] = 1
    assert surface_dice(pred, reference, spacing_mm=(0.1, 0.1), classes=[1], tolerance_mm=0.3) == {1: 1.0}


def test_empty_prediction_has_infinite_distance_and_no_surface_dice():
    pred, reference = np.zeros((5, 5, 5), int), np.zeros((5, 5, 5), int)
    reference[2, 2, 2] = 1
    for first, second in ((pred, reference), (reference, pred)):
        score = surface_scores(first, second, spacing_mm=(1, 1, 1), classes=[1])[1]
        assert (score.hd95, score.assd, score.surface_dice) == (math.inf, math.inf, 0.0)


def test_class_in_neither_map_is_nan():
    blank = np.zeros((5, 5), int)
    score = surface_scores(blank, blank, spacing_mm=(1, 1), classes=[4])[4]
    assert all(math.isnan(value) for value in (score.hd95, score.assd, score.surface_dice))


def test_identical_maps_are_at_distance_zero():
    labels = np.random.default_rng(0).integers(0, 3, size=(6, 7, 8))
    for score in surface_scores(labels, labels, spacing_mm=(3, 2, 1), classes=[0, 1, 2], tolerance_mm=0.0).values():
        assert (score.hd95, score.assd, score.surface_dice) == (0.0, 0.0, 1.0)


def test_outside_of_the_array_is_background():
    whole = np.ones((5, 5), bool)
    rim = surface.surface_mask(whole)
    assert rim.sum() == 16
    assert not rim[1:-1, 1:-1].any()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from(SPACINGS), st.permutations(range(3)), st.integers(0, 3))
def test_scores_ignore_padding_axis_order_flips_memory_layout_and_swapping(seed, spacing, axes, pad):
    generator = np.random.default_rng(seed)
    pred, reference = generator.integers(0, 3, size=(2, 4, 5, 6))
    expected = surface_scores(pred, reference, spacing_mm=spacing, classes=[1, 2])
    moved = [np.flip(np.pad(labels, pad).transpose(axes), axis=0) for labels in (reference, pred)]
    for layout in (np.ascontiguousarray, np.asfortranarray, lambda labels: labels):
        got = surface_scores(layout(moved[0]), moved[1], spacing_mm=[spacing[axis] for axis in axes], classes=[1, 2])
        for label in (1, 2):
            assert got[label].hd95 == pytest.approx(expected[label].hd95, abs=1e-9, nan_ok=True)
            assert got[label].assd == pytest.approx(expected[label].assd, abs=1e-9, nan_ok=True)
            assert got[label].surface_dice == pytest.approx(expected[label].surface_dice, abs=1e-12, nan_ok=True)


def test_fortran_ordered_pair_equals_c_ordered_pair():
    pred, reference = np.random.default_rng(1).integers(0, 2, size=(2, 4, 6, 9))
    keywords = {"spacing_mm": (4.0, 2.0, 1.0), "classes": [1]}
    expected = surface_scores(pred, reference, **keywords)[1]
    got = surface_scores(np.asfortranarray(pred), np.asfortranarray(reference), **keywords)[1]
    assert (got.hd95, got.assd) == pytest.approx((expected.hd95, expected.assd), abs=1e-9)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0.1, 20.0))
def test_distances_scale_with_the_spacing(seed, factor):
    pred, reference = np.random.default_rng(seed).integers(0, 2, size=(2, 5, 7))
    pred[0, 0] = reference[4, 6] = 1
    unit = surface_scores(pred, reference, spacing_mm=(1.0, 2.0), classes=[1])[1]
    scaled = surface_scores(pred, reference, spacing_mm=(factor, 2 * factor), classes=[1])[1]
    assert (scaled.hd95, scaled.assd) == pytest.approx((factor * unit.hd95, factor * unit.assd), rel=1e-9)


def test_arguments_are_left_as_they_were():
    pred, reference = np.random.default_rng(0).integers(0, 3, size=(2, 5, 5, 5))
    copies = pred.copy(), reference.copy()
    surface_scores(pred, reference, spacing_mm=(1, 1, 1), classes=[1, 2])
    assert np.array_equal(pred, copies[0])
    assert np.array_equal(reference, copies[1])


@pytest.mark.parametrize(
    ("spacing", "message"),
    [
        ((1.0, 1.0), "one number per axis of a 3-D"),
        (1.0, "one number per axis"),
        ((1.0, 0.0, 1.0), "positive and finite"),
        ((1.0, -1.0, 1.0), "positive and finite"),
        ((1.0, math.nan, 1.0), "positive and finite"),
        ((1.0, math.inf, 1.0), "positive and finite"),
    ],
)
def test_unusable_spacing_is_refused_even_when_there_is_nothing_to_measure(spacing, message):
    blank = np.zeros((3, 3, 3), int)
    with pytest.raises(ValueError, match=message):
        hd95_mm(blank, blank, spacing_mm=spacing, classes=[1])


@pytest.mark.parametrize("tolerance", [-1.0, math.nan, math.inf])
def test_unusable_tolerance_is_refused(tolerance):
    blank = np.zeros((3, 3), int)
    with pytest.raises(ValueError, match="tolerance_mm must be finite"):
        surface_dice(blank, blank, spacing_mm=(1, 1), classes=[1], tolerance_mm=tolerance)


def test_mismatched_shapes_and_real_valued_maps_are_refused():
    with pytest.raises(ValueError, match="same shape"):
        assd_mm(np.zeros((3, 3), int), np.zeros((3, 4), int), spacing_mm=(1, 1), classes=[1])
    with pytest.raises(ValueError, match="integer label map"):
        assd_mm(np.zeros((3, 3)), np.zeros((3, 3), int), spacing_mm=(1, 1), classes=[1])


def test_real_hippocampus_labels_equal_scipy_distance_transforms(real_data):
    nibabel = pytest.importorskip("nibabel")
    files = sorted((real_data / "msd_hippocampus" / "labels").glob("*.nii.gz"))[:3]
    if not files:
        pytest.skip("msd_hippocampus is not in the real data")
    for file in files:
        image = nibabel.load(file)
        reference = np.asarray(image.dataobj).astype(np.int16)
        pred = np.roll(reference, (1, 2), axis=(0, 1))
        spacing = tuple(float(size) * (1 + axis) for axis, size in enumerate(image.header.get_zooms()))
        scores = surface_scores(pred, reference, spacing_mm=spacing, classes=[1, 2])
        for label, score in scores.items():
            masks = [np.pad(labels == label, 1) for labels in (pred, reference)]
            rims = [mask & ~ndimage.binary_erosion(mask) for mask in masks]
            there, back = (ndimage.distance_transform_edt(~rims[1 - i], sampling=spacing)[rims[i]] for i in (0, 1))
            assert score.hd95 == pytest.approx(max(np.percentile(there, 95), np.percentile(back, 95)), abs=1e-9)
            assert score.assd == pytest.approx(np.concatenate([there, back]).mean(), abs=1e-9)
