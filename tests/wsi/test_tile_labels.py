"""Tiles get the class of the region they lie in, and no class where that is not clear."""

from __future__ import annotations

import numpy as np
import pytest
from test_annotations import region
from test_grid import Outline, whole

from medkd.errors import ConfigError
from medkd.wsi.annotations import rasterize
from medkd.wsi.grid import area_fractions
from medkd.wsi.tile_labels import label_tiles

CLASSES = ["normal", "tumor"]


def box(left, top, right, bottom, name="tumor"):
    return region([[left, top], [right, top], [right, bottom], [left, bottom]], name=name)


@pytest.fixture
def grid():
    return whole(Outline(256, 128), size=64)  # 4 x 2 tiles of 64 px


def test_the_center_decides(grid):
    labels = label_tiles(grid, [box(0, 0, 100, 64)], classes=CLASSES, outside="normal")
    assert labels.tolist() == [1, 1, 0, 0, 0, 0, 0, 0], "the second tile's center is at 96"


def test_tiles_outside_have_no_class_unless_one_is_named(grid):
    assert label_tiles(grid, [box(0, 0, 64, 64)], classes=CLASSES).tolist() == [1] + [-1] * 7


def test_a_hole_is_outside(grid):
    ring = [[0, 0], [256, 0], [256, 128], [0, 128]]
    hole = [[70, 70], [120, 70], [120, 120], [70, 120]]
    labels = label_tiles(grid, [region(ring, hole, name="tumor")], classes=CLASSES, outside="normal")
    assert labels.tolist() == [1, 1, 1, 1, 1, 0, 1, 1]


def test_the_smaller_region_counts(grid):
    nested = [box(10, 10, 60, 60, "normal"), box(0, 0, 256, 128)]
    assert label_tiles(grid, nested, classes=CLASSES).tolist() == [0] + [1] * 7


def test_other_classes_are_ignored(grid):
    assert (label_tiles(grid, [box(0, 0, 256, 128, "artifact")], classes=CLASSES) == -1).all()


def test_the_fraction_decides_and_too_little_is_ambiguous(grid):
    regions = [box(0, 0, 64 + 40, 64)]  # all of the first tile, 62 % of the second
    for share, expected in ((0.5, [1, 1, 0, 0]), (0.7, [1, -1, 0, 0])):
        labels = label_tiles(grid, regions, classes=CLASSES, rule="fraction", min_fraction=share, outside="normal")
        assert labels.tolist() == expected + [0] * 4


def test_fractions_equal_those_of_a_fine_map(grid):
    rng = np.random.default_rng(0)
    regions = [region(rng.uniform((0, 0), (256, 128), (3, 2)), name=CLASSES[index % 2]) for index in range(4)]
    fine = rasterize(regions, (1280, 2560), 0.1, classes=CLASSES)
    shares = np.stack([area_fractions(fine == 1 + k, 0.1, np.arange(4) * 64, np.arange(2) * 64, 64) for k in range(2)])
    for limit in (0.1, 0.3, 0.6):
        labels = label_tiles(grid, regions, classes=CLASSES, rule="fraction", min_fraction=limit)
        clear = np.abs(shares.max(0) - limit) > 0.03
        assert np.array_equal((labels >= 0)[clear], (shares.max(0) >= limit)[clear])
        decided = clear & (labels >= 0) & (np.abs(shares[0] - shares[1]) > 0.03)
        assert np.array_equal(labels[decided], shares.argmax(0)[decided])


def test_grids_without_tiles_and_slides_without_regions(grid):
    empty = whole(Outline(10, 10), border="drop")
    for rule in ("center", "fraction"):
        assert len(label_tiles(empty, [box(0, 0, 5, 5)], classes=CLASSES, rule=rule)) == 0
        assert (label_tiles(grid, [], classes=CLASSES, rule=rule, outside="normal") == 0).all()


def test_options_that_make_no_sense_are_refused(grid):
    with pytest.raises(ConfigError, match="none of the classes"):
        label_tiles(grid, [], classes=CLASSES, outside="benign")
    with pytest.raises(ConfigError, match="share"):
        label_tiles(grid, [], classes=CLASSES, rule="fraction", min_fraction=0)
