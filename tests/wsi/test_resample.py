"""The filter against a direct computation, and against gradients, whose values tell where a pixel lies."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.ndimage import map_coordinates

from medkd.wsi.resample import Resampling

places = st.floats(-40.0, 900.0)
scales = st.floats(0.2, 40.0)
sizes = st.integers(1, 40)


def gradient(left, top, width, height, slope):
    """Red rises by ``slope`` per pixel to the right, green downwards, from 0 at x, y = 0; values at pixel centers."""
    x, y = np.arange(left, left + width) + 0.5, np.arange(top, top + height) + 0.5
    plane = np.zeros((height, width, 3))
    plane[..., 0], plane[..., 1] = slope * x[None, :], slope * y[:, None]
    return plane


@given(x=places, y=places, x_scale=scales, y_scale=scales, width=sizes, height=sizes)
def test_a_pixel_holds_what_lies_at_its_center(x, y, x_scale, y_scale, width, height):
    resampling = Resampling((x, y), (x_scale, y_scale), (width, height))
    left, top, wide, high = resampling.box
    slope = 250 / (max(wide, high) + 1)
    base = np.array([left, top, 0]) * slope  # so that all values fit into 8 bits
    source = np.rint(gradient(left, top, wide, high, slope) - base).astype(np.uint8)
    result = resampling.pixels(source, (left, top)) + base
    assert result.shape == (height, width, 3)
    x_center, y_center = x + (np.arange(width) + 0.5) * x_scale, y + (np.arange(height) + 0.5) * y_scale
    assert np.abs(result[..., 0] - slope * x_center[None, :]).max() <= 1.6
    assert np.abs(result[..., 1] - slope * y_center[:, None]).max() <= 1.6


@pytest.mark.parametrize("factor", [1, 2, 3, 11, 16, 40])
def test_a_whole_reduction_from_a_pixel_border_is_the_block_mean(factor):
    source = np.random.default_rng(factor).integers(0, 256, (7 * factor, 5 * factor, 3), np.uint8)
    resampling = Resampling((3, -8), (factor, factor), (5, 7))
    assert resampling.box == (3, -8, 5 * factor, 7 * factor)
    means = source.reshape(7, factor, 5, factor, 3).mean((1, 3))
    assert np.abs(resampling.pixels(source, (3, -8)) - means).max() <= 0.5


@pytest.mark.parametrize(
    ("scale", "block", "box"), [(2.004, 2, 1), (1.996, 2, 1), (1.4, 1, 2), (2.4, 1, 3), (0.6, 1, 1)]
)
def test_the_filter_is_the_stated_one(scale, block, box):
    source = np.random.default_rng(0).integers(0, 256, (140, 140, 3), np.uint8)
    resampling = Resampling((5.3, 4.8), (scale, scale), (30, 31))
    left, top, width, height = resampling.box
    used = source[top : top + height, left : left + width]
    blocks = np.rint(used.reshape(height // block, block, width // block, block, 3).mean((1, 3)) + 1e-6)
    sums = np.pad(blocks.cumsum(0).cumsum(1), ((1, 0), (1, 0), (0, 0)))
    boxes = (sums[box:, box:] - sums[:-box, box:] - sums[box:, :-box] + sums[:-box, :-box]) / box**2
    x = (5.3 - left + (np.arange(30) + 0.5) * scale) / block - box / 2
    y = (4.8 - top + (np.arange(31) + 0.5) * scale) / block - box / 2
    grid = np.meshgrid(y, x, indexing="ij")
    expected = np.stack([map_coordinates(boxes[..., c], grid, order=1, mode="nearest") for c in range(3)], axis=-1)
    assert np.abs(resampling.pixels(used, (left, top)) - expected).max() <= 1.0


def test_a_source_that_begins_elsewhere_is_put_right():
    resampling = Resampling((10.0, 20.0), (1.0, 1.0), (30, 30))
    left, top, width, height = resampling.box
    straight = np.rint(gradient(left, top, width, height, 4.0) - 30).astype(np.uint8)
    late = np.rint(gradient(left, top, width, height, 4.0) - 30 + [1.6, 0, 0]).astype(np.uint8)
    moved = resampling.pixels(late, (left + 0.4, top)).astype(int)  # of a reader that could only begin 0.4 pixels later
    assert np.abs(moved[:, 1:-1] - resampling.pixels(straight, (left, top))[:, 1:-1]).max() <= 1


@given(x=st.floats(0, 30), scale=st.floats(0.3, 12.0), width=st.integers(1, 12))
def test_a_bad_pixel_spoils_exactly_what_it_touches(x, scale, width):
    resampling = Resampling((x, 0.0), (scale, scale), (width, 3))
    left, top, wide, high = resampling.box
    for column in {0, wide // 2, wide - 1}:
        good, source = np.ones((high, wide), bool), np.full((high, wide, 3), 100, np.uint8)
        good[:, column] = False
        source[:, column] = 255
        touched = (resampling.pixels(source, (left, top)) != 100).any(axis=2)
        assert not (touched & resampling.mask(good, (left, top))).any()
    assert resampling.mask(np.ones((high, wide), bool), (left, top)).all()
