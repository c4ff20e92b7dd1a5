"""Regions drawn on a slide are read, painted and written as they were drawn, or refused by name."""

from __future__ import annotations

import json
import logging

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.path import Path as Outline

from medkd.errors import InputError
from medkd.wsi.annotations import (
    Annotation,
    contains,
    polygon_area,
    rasterize,
    read_annotations,
    write_annotations,
)
from medkd.wsi.contours import trace_regions

SQUARE = [[0, 0], [10, 0], [10, 10], [0, 10], [0, 0]]
HOLE = [[2, 2], [4, 2], [4, 4], [2, 4], [2, 2]]


def feature(geometry, name="Tumor"):
    properties = {"objectType": "annotation"} | ({"classification": {"name": name}} if name else {})
    return {"type": "Feature", "geometry": geometry, "properties": properties}


def polygon(*rings):
    return {"type": "Polygon", "coordinates": list(rings)}


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def region(*rings, name="Tumor"):
    return Annotation(name, (tuple(np.asarray(ring, float) for ring in rings),))


def star(seed, center, radius, points):
    """A simple polygon that winds around its center once."""
    rng = np.random.default_rng(seed)
    angles = np.sort(rng.uniform(0, 2 * np.pi, points))
    radii = radius * rng.uniform(0.3, 1, points)
    return np.stack([center[0] + radii * np.cos(angles), center[1] + radii * np.sin(angles)], axis=1)


class TestReading:
    def test_a_polygon_with_a_hole_keeps_it(self, tmp_path):
        path = write(
            tmp_path / "a.geojson", {"type": "FeatureCollection", "features": [feature(polygon(SQUARE, HOLE))]}
        )
        (found,) = read_annotations(path)
        assert found.name == "Tumor"
        assert [len(ring) for ring in found.polygons[0]] == [4, 4], "closing points are not kept"
        assert found.area == 100 - 4

    def test_parts_of_a_multipolygon_and_of_a_collection_belong_to_one_region(self, tmp_path):
        shifted = (np.asarray(SQUARE) + 20).tolist()
        multi = {"type": "MultiPolygon", "coordinates": [[SQUARE, HOLE], [shifted]]}
        collection = {"type": "GeometryCollection", "geometries": [polygon(SQUARE, HOLE), polygon(shifted)]}
        for geometry in (multi, collection):
            (found,) = read_annotations(write(tmp_path / "a.geojson", [feature(geometry)]))
            assert len(found.polygons) == 2
            assert found.area == 196

    def test_the_offset_of_the_bounds_is_added(self, tmp_path):
        path = write(tmp_path / "a.geojson", feature(polygon(SQUARE)))
        (found,) = read_annotations(path, offset=(100, 7))
        assert found.polygons[0][0].min(0).tolist() == [100, 7]

    @pytest.mark.parametrize(
        ("properties", "name"),
        [
            ({"classification": {"name": "Tumor", "color": [1, 2, 3]}}, "Tumor"),
            ({"classification": "Tumor"}, "Tumor"),
            ({"name": "Tumor"}, "Tumor"),
            ({"classification": {"name": " Tumor: edge "}, "name": "x"}, "Tumor: edge"),
            ({}, ""),
            (None, ""),
        ],
    )
    def test_the_class_is_found_where_qupath_writes_it(self, tmp_path, properties, name):
        content = {"type": "Feature", "geometry": polygon(SQUARE), "properties": properties}
        assert read_annotations(write(tmp_path / "a.geojson", content))[0].name == name

    def test_points_and_lines_are_left_out_with_a_message(self, tmp_path, caplog):
        point = feature({"type": "Point", "coordinates": [1, 2]})
        line = feature({"type": "LineString", "coordinates": [[1, 2], [3, 4]]})
        path = write(tmp_path / "a.geojson", [point, feature(polygon(SQUARE)), line])
        with caplog.at_level(logging.INFO):
            assert len(read_annotations(path)) == 1
        assert "2 of its features" in caplog.text

    def test_a_ring_that_is_not_closed_is_closed(self, tmp_path):
        path = write(tmp_path / "a.geojson", feature(polygon(SQUARE[:-1])))
        assert read_annotations(path)[0].area == 100

    @pytest.mark.parametrize(
        "geometry",
        [
            None,
            {"type": "Circle", "coordinates": [0, 0]},
            {"type": "Polygon"},
            polygon(),
            polygon([]),
            polygon([[0, 0], [1, 1], [0, 0]]),
            polygon([[0, 0], [1, "a"], [1, 1], [0, 0]]),
            polygon([[0, 0], [1, True], [1, 1], [0, 0]]),
            polygon([[0, 0], [1], [1, 1], [0, 0]]),
            polygon([[0, 0], [1e999, 0], [1, 1], [0, 0]]),
            polygon([[0, 0], [10**400, 0], [1, 1], [0, 0]]),
            polygon([[0, 0], [float("nan"), 0], [1, 1], [0, 0]]),
            {"type": "MultiPolygon", "coordinates": [SQUARE]},
            {"type": "GeometryCollection", "geometries": []},
        ],
    )
    def test_a_malformed_feature_is_refused_by_file_and_number(self, tmp_path, geometry):
        path = write(tmp_path / "bad.geojson", [feature(polygon(SQUARE)), feature(geometry)])
        with pytest.raises(InputError, match=r"bad\.geojson: feature 2"):
            read_annotations(path)

    @pytest.mark.parametrize("content", ["", "{", "[1", '{"a": 1}', "7", '{"features": 3}', "[NaN]", "[" * 100_000])
    def test_what_is_no_geojson_is_refused_by_name(self, tmp_path, content):
        with pytest.raises(InputError, match=r"bad\.geojson"):
            read_annotations(write(tmp_path / "bad.geojson", content))

    @pytest.mark.parametrize("entry", [3, {"type": "Polygon"}, feature(polygon(SQUARE)) | {"properties": [1]}])
    def test_what_is_no_feature_is_refused(self, tmp_path, entry):
        with pytest.raises(InputError, match="feature 1"):
            read_annotations(write(tmp_path / "bad.geojson", [entry]))

    def test_missing_file_and_folder_are_told_apart(self, tmp_path):
        with pytest.raises(InputError, match="does not exist"):
            read_annotations(tmp_path / "none.geojson")
        with pytest.raises(InputError, match="is a folder"):
            read_annotations(tmp_path)


class TestPainting:
    @settings(max_examples=40)
    @given(st.integers(0, 10_000), st.integers(3, 30))
    def test_points_are_inside_as_matplotlib_finds_them(self, seed, points):
        ring = star(seed, (20, 25), 18, points)
        where = np.random.default_rng(seed).uniform(0, 45, (300, 2))
        expected = Outline(np.concatenate([ring, ring[:1]]), closed=True).contains_points(where)
        assert np.array_equal(contains((ring,), where), expected)

    @settings(max_examples=40)
    @given(st.integers(0, 10_000), st.floats(0.4, 7), st.tuples(st.floats(-5, 5), st.floats(-5, 5)))
    def test_a_pixel_is_painted_when_its_center_is_inside(self, seed, downsample, origin):
        rings = star(seed, (30, 30), 25, 12), star(seed + 1, (30, 30), 7, 5)
        height, width = 40, 33
        painted = rasterize([region(*rings)], (height, width), downsample, origin=origin)
        x, y = np.meshgrid((np.arange(width) + 0.5) * downsample, (np.arange(height) + 0.5) * downsample)
        centers = np.stack([x, y], axis=-1).reshape(-1, 2) + origin
        assert np.array_equal(painted.reshape(-1) > 0, contains(rings, centers))

    @settings(max_examples=40)
    @given(st.integers(0, 10_000), st.floats(0.02, 0.98), st.floats(0.3, 40))
    def test_traced_masks_are_painted_back_exactly(self, seed, density, downsample):
        mask = np.random.default_rng(seed).random((19, 23)) < density
        regions = [region(*(ring * downsample for ring in rings)) for rings in trace_regions(mask)]
        assert np.array_equal(rasterize(regions, mask.shape, downsample) > 0, mask)
        assert sum(found.area for found in regions) == pytest.approx(mask.sum() * downsample**2)

    def test_holes_stay_empty(self):
        painted = rasterize([region(SQUARE, HOLE)], (12, 12), 1)
        assert painted[2:4, 2:4].sum() == 0
        assert painted.sum() == 96

    def test_the_smaller_region_is_seen_whatever_the_order(self):
        large, small = region(SQUARE, name="a"), region(HOLE, name="b")
        for order in ([large, small], [small, large]):
            painted = rasterize(order, (10, 10), 1, classes=["a", "b"])
            assert (painted == 2).sum() == 4
            assert (painted == 1).sum() == 96

    def test_regions_of_other_classes_are_left_out(self):
        assert not rasterize([region(SQUARE)], (10, 10), 1, classes=["Stroma"]).any()

    def test_regions_beyond_the_map_are_cut_off(self):
        painted = rasterize([region(np.asarray(SQUARE) - 5), region(np.asarray(SQUARE) + 100)], (8, 8), 1)
        assert painted.sum() == 25

    def test_far_from_the_origin_area_keeps_its_digits(self):
        assert polygon_area((np.asarray(SQUARE[:-1], float) + 1e9,)) == 100


def test_written_regions_are_read_back(tmp_path):
    regions = [region(SQUARE[:-1], HOLE[:-1]), Annotation("", (region(SQUARE[:-1]).polygons[0],) * 2)]
    write_annotations(tmp_path / "a.geojson", regions, offset=(3, 4))
    content = json.loads((tmp_path / "a.geojson").read_text())
    assert content["features"][0]["geometry"]["coordinates"][0][0] == [-3, -4]
    assert content["features"][0]["properties"]["objectType"] == "annotation"
    assert len({entry["id"] for entry in content["features"]}) == 2
    again = read_annotations(tmp_path / "a.geojson", offset=(3, 4))
    assert [found.name for found in again] == ["Tumor", ""]
    for found, expected in zip(again, regions, strict=True):
        for one, other in zip(found.polygons, expected.polygons, strict=True):
            assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def test_no_regions_make_a_valid_empty_file(tmp_path):
    write_annotations(tmp_path / "a.geojson", [])
    assert read_annotations(tmp_path / "a.geojson") == []
