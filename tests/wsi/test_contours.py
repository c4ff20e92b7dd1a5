from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from matplotlib.path import Path as Outline
from scipy import ndimage

from medkd.wsi import contours
from medkd.wsi.contours import TooManyCorners, coarser, trace_regions, trace_rows

MASKS = arrays(bool, array_shapes(min_dims=2, max_dims=2, max_side=9))


def rasterize_back(regions, shape):
    """How many regions cover each pixel's center; holes subtract."""
    ys, xs = np.mgrid[: shape[0], : shape[1]]
    centers = np.stack([xs.ravel() + 0.5, ys.ravel() + 0.5], axis=1)
    covered = np.zeros(shape, int)
    for region in regions:
        for number, ring in enumerate(region):
            inside = Outline(np.vstack([ring, ring[:1]]), closed=True).contains_points(centers).reshape(shape)
            covered += inside if number == 0 else -inside.astype(int)
    return covered


def twice_area(ring):
    x, y = ring.T
    return (x * np.roll(y, -1) - np.roll(x, -1) * y).sum()


@given(MASKS)
def test_outlines_rasterize_back_to_the_same_mask(mask):
    assert np.array_equal(rasterize_back(trace_regions(mask), mask.shape), mask.astype(int))


@given(MASKS)
def test_there_is_one_region_per_four_connected_component(mask):
    assert len(trace_regions(mask)) == ndimage.label(mask)[1]


@given(MASKS)
def test_rings_are_simple_turn_at_every_point_and_run_the_right_way(mask):
    for region in trace_regions(mask):
        for number, ring in enumerate(region):
            assert len({tuple(point) for point in ring}) == len(ring)
            steps = np.roll(ring, -1, axis=0) - ring
            assert ((steps == 0).sum(1) == 1).all()
            assert (steps * np.roll(steps, 1, axis=0)).sum() == 0
            assert (twice_area(ring) > 0) == (number == 0)


@given(MASKS, st.integers(1, 40))
def test_bands_do_not_show(mask, pixels):
    whole = trace_regions(mask)
    former = contours._BAND_PIXELS
    contours._BAND_PIXELS = pixels
    try:
        banded = trace_rows(lambda start, stop: mask[start:stop], mask.shape)
    finally:
        contours._BAND_PIXELS = former
    assert len(whole) == len(banded)
    for one, other in zip(whole, banded, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_ring_around_an_island_has_a_hole_and_the_island_is_another_region():
    mask = np.zeros((7, 7), bool)
    mask[1:6, 1:6] = True
    mask[2:5, 2:5] = False
    mask[3, 3] = True
    ring, island = trace_regions(mask)
    assert [part.tolist() for part in ring] == [
        [[1, 1], [6, 1], [6, 6], [1, 6]],
        [[2, 2], [2, 5], [5, 5], [5, 2]],
    ]
    assert [part.tolist() for part in island] == [[[3, 3], [4, 3], [4, 4], [3, 4]]]


def test_pixels_that_touch_at_a_corner_are_apart_and_an_outline_never_touches_itself():
    assert len(trace_regions(np.array([[1, 0], [0, 1]], bool))) == 2
    # Closed around its middle but for a diagonal gap: one region, the middle is a hole that touches the outline.
    mask = np.array([[1, 1, 1], [1, 0, 1], [1, 1, 0]], bool)
    (region,) = trace_regions(mask)
    assert len(region) == 2


def test_an_empty_mask_has_no_region():
    assert trace_regions(np.zeros((3, 4), bool)) == []
    assert trace_regions(np.zeros((0, 4), bool)) == []


def test_a_coarser_mask_is_set_where_half_of_its_pixels_are():
    mask = np.array([[1, 1, 0, 0, 1], [0, 0, 0, 1, 1], [1, 0, 0, 0, 0]], bool)
    rows, shape = coarser(lambda start, stop: mask[start:stop], mask.shape, 2)
    assert shape == (2, 3)
    assert rows(0, 2).tolist() == [[True, False, True], [False, False, False]]
    assert rows(1, 2).tolist() == [[False, False, False]]


def test_too_ragged_a_mask_is_given_up_early():
    mask = np.indices((20, 20)).sum(0) % 2 == 0
    with pytest.raises(TooManyCorners):
        trace_rows(lambda start, stop: mask[start:stop], mask.shape, most_corners=100)
