from __future__ import annotations

import csv
import json
import re

import cv2
import numpy as np
import openslide
import pytest
import tifffile
import torch
from made_slides import FunctionSlide, blobs, make_grid
from PIL import Image
from torch import nn

from medkd.wsi import export, export_geojson
from medkd.wsi.annotations import rasterize, read_annotations
from medkd.wsi.export import write_prediction
from medkd.wsi.export_geojson import class_colors, write_geojson
from medkd.wsi.export_ome_tiff import encode
from medkd.wsi.predict import predict_slide

BOUNDS = (50, 30, 400, 280)
CLASSES = ("normal", "tumor")
COMMON = {"classes": CLASSES, "mean": (0.5,) * 3, "std": (0.5,) * 3, "amp": False, "threads": 0}


class Segments(nn.Module):
    """Class 1 where red is dark, class 2 where it is dark and green is bright."""

    def __init__(self, classes=2):
        super().__init__()
        self.classes = classes

    def forward(self, x):
        dark = x[:, :1] < 0
        other = x[:, 1:2] > -0.52
        logits = [~dark, dark & ~other if self.classes == 3 else dark, dark & other]
        return torch.cat(logits[: self.classes], dim=1).float() * 6 - 3


class Classifies(nn.Module):
    def forward(self, x):
        red = x[:, 0].mean((1, 2))
        return torch.stack([red, -red], dim=1) * 3


@pytest.fixture
def slide():
    return FunctionSlide(480, 330, blobs, bounds=BOUNDS)


@pytest.fixture
def segmentation(slide):
    grid = make_grid(slide, overlap=8, keep=lambda x, y: not (x > 300 and y > 200))
    prediction = predict_slide(Segments(), slide, grid, **COMMON, task="segmentation", heatmap_mpp=1.0)
    yield prediction
    prediction.close()


@pytest.fixture
def classification(slide):
    slide._holes = [(60, 40, 5, 5)]
    grid = make_grid(slide, size=16, keep=lambda x, y: not (x > 300 and y > 200))
    return predict_slide(Classifies(), slide, grid, **COMMON)


def features(path):
    return json.loads(path.read_text())["features"]


def dice(a, b):
    return 2 * (a & b).sum() / (a.sum() + b.sum())


def test_the_table_has_a_row_per_tile_and_nan_where_a_tile_failed(classification, slide, tmp_path):
    write_prediction(classification, slide, tmp_path)
    with open(tmp_path / "painted.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["x", "y", "width", "height", "prob_normal", "prob_tumor"]
    assert [(int(row["x"]), int(row["y"])) for row in rows] == [tuple(c) for c in classification.grid.coords.tolist()]
    assert {(row["width"], row["height"]) for row in rows} == {("16", "16")}
    found = np.array([[float(row["prob_normal"]), float(row["prob_tumor"])] for row in rows])
    assert np.isnan(found).any(1).sum() == len(classification.failed) > 0
    assert np.nanmax(np.abs(found - classification.probabilities)) < 1e-6


def test_outlines_rasterize_back_to_the_segmentation(segmentation, tmp_path):
    file = tmp_path / "out.geojson"
    counts = write_geojson(segmentation, file)
    class_map = segmentation.class_map
    height, width = class_map.shape
    source = np.zeros((330, 480), bool)
    left, top = int(class_map.x), int(class_map.y)
    source[top : top + height, left : left + width] = class_map.rows(0, height) == 1
    annotations = read_annotations(file, offset=BOUNDS[:2])
    found = rasterize(annotations, source.shape, 1.0) > 0
    assert dice(found, source) >= 0.99
    assert counts["annotation"] == len(annotations) > 5
    assert counts["tile"] == 0
    assert any(len(feature["geometry"]["coordinates"]) > 1 for feature in features(file))  # holes


def test_a_ragged_segmentation_is_outlined_more_coarsely_and_says_so(segmentation, tmp_path, monkeypatch, caplog):
    file = tmp_path / "out.geojson"
    class_map = segmentation.class_map
    height, width = class_map.shape
    left, top = int(class_map.x), int(class_map.y)
    source = np.zeros((330, 480), bool)
    source[top : top + height, left : left + width] = class_map.rows(0, height) == 1
    monkeypatch.setattr(export_geojson, "_MOST_CORNERS", 3000)
    write_geojson(segmentation, file)
    assert "tumor is too ragged: outlined at 2 × 2 pixels" in caplog.text
    found = rasterize(read_annotations(file, offset=BOUNDS[:2]), source.shape, 1.0) > 0
    assert 0.8 < dice(found, source) < 1


def test_coordinates_count_from_the_corner_that_qupath_shows(segmentation, classification, tmp_path):
    for prediction in (segmentation, classification):
        file = tmp_path / "out.geojson"
        write_geojson(prediction, file)
        points = np.array([p for f in features(file) for ring in f["geometry"]["coordinates"] for p in ring])
        assert points.min() >= 0
        assert points[:, 0].max() <= 480 - BOUNDS[0]
        tiles = [f for f in features(file) if f["properties"]["objectType"] == "tile"]
        for feature in tiles[:3]:
            x, y = feature["geometry"]["coordinates"][0][0]
            assert [x + BOUNDS[0], y + BOUNDS[1]] in prediction.grid.coords.tolist()


def test_features_are_what_qupath_reads(classification, tmp_path):
    file = tmp_path / "out.geojson"
    counts = write_geojson(classification, file)
    assert json.loads(file.read_text())["type"] == "FeatureCollection"
    found = features(file)
    assert counts == {
        kind: sum(f["properties"]["objectType"] == kind for f in found) for kind in ("annotation", "tile")
    }
    assert counts["tile"] == classification.predicted.sum()
    assert counts["annotation"] > 0
    assert len({feature["id"] for feature in found}) == len(found)
    for feature in found:
        assert re.fullmatch(r"[0-9a-f]{8}-[0-9a-f]{4}-5[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}", feature["id"])
        assert feature["geometry"]["type"] == "Polygon"
        assert all(ring[0] == ring[-1] and len(ring) >= 4 for ring in feature["geometry"]["coordinates"])
        kind = feature["properties"]["classification"]
        assert kind["name"] in CLASSES
        assert len(kind["color"]) == 3
        assert all(isinstance(value, int | float) for value in feature["properties"]["measurements"].values())
    tile = next(feature for feature in found if feature["properties"]["objectType"] == "tile")
    assert set(tile["properties"]["measurements"]) == {"prob_normal", "prob_tumor"}


def test_tile_outlines_enclose_the_tiles_of_their_class(classification, tmp_path):
    file = tmp_path / "out.geojson"
    write_geojson(classification, file, threshold=0.6)
    source = np.zeros((330, 480), bool)
    for (x, y), values in zip(classification.grid.coords, classification.probabilities, strict=True):
        source[y : y + 16, x : x + 16] = values[1] >= 0.6
    outlines = [f for f in features(file) if f["properties"]["objectType"] == "annotation"]
    only = tmp_path / "outlines.geojson"
    only.write_text(json.dumps({"type": "FeatureCollection", "features": outlines}))
    found = rasterize(read_annotations(only, offset=BOUNDS[:2]), source.shape, 1.0) > 0
    assert dice(found, source) >= 0.99
    area = sum(outline["properties"]["measurements"]["Area µm^2"] for outline in outlines)
    assert area == pytest.approx(source.sum() * 0.25)


def test_several_classes_have_outlines_and_colors_of_their_own(slide, tmp_path):
    options = {**COMMON, "classes": ("background", "tumor", "stroma"), "task": "segmentation"}
    prediction = predict_slide(Segments(3), slide, make_grid(slide), **options)
    write_prediction(prediction, slide, tmp_path)
    found = features(tmp_path / "painted.geojson")
    names = {f["properties"]["classification"]["name"]: f["properties"]["classification"]["color"] for f in found}
    assert set(names) == {"tumor", "stroma"}
    assert names["tumor"] != names["stroma"]
    assert len({tuple(color) for color in class_colors([str(i) for i in range(12)])}) == 12
    assert json.loads((tmp_path / "painted.json").read_text())["overlay"]["class"] == "any class but background"
    prediction.close()


def test_the_ome_tiff_opens_at_the_slides_scale(slide, tmp_path):
    big = FunctionSlide(900, 700, blobs, bounds=(20, 10, 880, 690))
    prediction = predict_slide(Segments(), big, make_grid(big), **COMMON, task="segmentation", heatmap_mpp=0.5)
    write_prediction(prediction, big, tmp_path)
    file = tmp_path / "painted_heatmap.ome.tiff"
    with tifffile.TiffFile(file) as tiff:
        assert tiff.is_ome
        series = tiff.series[0]
        assert series.axes == "CYX"
        assert [level.shape for level in series.levels] == [(2, 690, 880), (2, 345, 440), (2, 173, 220)]
        assert tiff.pages[0].compression.name == "ADOBE_DEFLATE"
        assert tiff.pages[0].tile == (256, 256)
        values = series.asarray()
        smaller = series.levels[1].asarray()
        xml = tiff.ome_metadata
    assert np.array_equal(values, encode(prediction.heatmap.values)[:, :690, :880])
    assert abs(smaller.astype(float).mean() - values.astype(float).mean()) < 2
    assert re.search(r'PhysicalSizeX="0.5[0"]', xml)
    assert 'Name="tumor"' in xml
    with openslide.OpenSlide(file) as opened:
        assert opened.dimensions == (880, 690)
        assert float(opened.properties["openslide.mpp-x"]) == pytest.approx(0.5)
    prediction.close()


def test_grey_levels_tell_no_prediction_from_probability_zero():
    assert encode(np.array([np.nan, 0.0, 0.5, 1.0], np.float32)).tolist() == [0, 1, 128, 255]


def test_pictures_show_the_heatmap_and_leave_the_rest_transparent(classification, slide, tmp_path):
    write_prediction(classification, slide, tmp_path)
    summary = json.loads((tmp_path / "painted.json").read_text())
    overlay = cv2.imread(str(tmp_path / summary["overlay"]["file"]), cv2.IMREAD_UNCHANGED)
    heatmap = classification.heatmap
    assert overlay.shape == (*heatmap.values.shape[1:], 4)
    assert np.array_equal(overlay[..., 3] == 0, np.isnan(heatmap.values[0]))
    assert (overlay[..., 3] == 0).any()
    hot, cold = np.nanargmax(heatmap.values[1]), np.nanargmin(heatmap.values[1])
    blue_green_red = overlay[..., :3].reshape(-1, 3).astype(int)
    assert blue_green_red[hot, 2] > blue_green_red[hot, 0]
    assert blue_green_red[cold, 0] > blue_green_red[cold, 2]
    assert overlay.reshape(-1, 4)[hot, 3] > overlay.reshape(-1, 4)[cold, 3] >= 64
    legend = summary["overlay"].pop("legend")
    assert len(legend) == 6
    assert all(re.fullmatch("#[0-9a-f]{6}", color) for color in legend)
    assert summary["overlay"] | {"file": ""} == {
        "file": "", "x": 50.0, "y": 30.0, "width": 25 * 16, "height": 18 * 16, "class": "tumor",
    }  # fmt: skip
    picture = np.asarray(Image.open(tmp_path / "painted_heatmap.png").convert("RGB"))
    assert min(picture.shape[:2]) > 300
    assert picture.std() > 10


def test_the_summary_counts_and_comes_last(classification, slide, tmp_path, monkeypatch):
    files = write_prediction(classification, slide, tmp_path, details={"model": "small"})
    assert [file.name for file in files] == [
        "painted.csv", "painted.geojson", "painted_heatmap.png", "painted_overlay.png",
        "painted_heatmap.ome.tiff", "painted.json",
    ]  # fmt: skip
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(file.name for file in files)
    summary = json.loads(files[-1].read_text())
    counts = summary["counts"]
    assert counts["tiles"] == len(classification.grid) == counts["predicted"] + counts["failed"]
    assert sum(counts["by_class"].values()) == counts["predicted"]
    assert summary["failed_tiles"] == [{"x": x, "y": y, "reason": why} for x, y, why in classification.failed]
    tumor = np.sort(classification.probabilities[classification.predicted, 1])[::-1]
    assert summary["scores"]["tumor"]["mean"] == pytest.approx(tumor.mean(), abs=1e-6)
    assert summary["scores"]["tumor"]["top_k"] == pytest.approx(tumor[:10].mean(), abs=1e-6)
    assert summary["status"] == "done"
    assert summary["model"] == "small"
    assert summary["versions"]["torch"]

    monkeypatch.setattr(export, "write_ome_tiff", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_prediction(classification, slide, tmp_path)
    assert not files[-1].exists()  # what it described is no longer all there
    assert not list(tmp_path.glob(".*"))


def test_the_same_prediction_is_the_same_files(classification, slide, tmp_path):
    one = write_prediction(classification, slide, tmp_path / "one")
    other = write_prediction(classification, slide, tmp_path / "other")
    for a, b in zip(one, other, strict=True):
        assert a.read_bytes() == b.read_bytes(), a.name


def test_another_name_leaves_no_trace_of_the_slides_own(classification, slide, tmp_path):
    for file in write_prediction(classification, slide, tmp_path, name="slide-0001"):
        assert file.name.startswith("slide-0001")
        assert b"painted" not in file.read_bytes()


def test_without_tissue_there_is_an_empty_result_that_says_so(slide, tmp_path):
    (tmp_path / "painted_overlay.png").write_bytes(b"of a former run")
    grid = make_grid(slide, keep=lambda x, y: False)
    prediction = predict_slide(Classifies(), slide, grid, **COMMON)
    files = write_prediction(prediction, slide, tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(file.name for file in files)
    summary = json.loads(files[-1].read_text())
    assert summary["status"] == "empty-tissue"
    assert summary["overlay"] is summary["heatmap"] is None
    assert summary["scores"]["tumor"] == {"mean": None, "top_k": None, "k": 0}
    assert features(tmp_path / "painted.geojson") == []
    assert (tmp_path / "painted.csv").read_text() == "x,y,width,height,prob_normal,prob_tumor\n"


def test_a_slide_whose_tiles_all_failed_is_written(slide, tmp_path):
    slide._holes = [(0, 0, 480, 330)]
    prediction = predict_slide(Classifies(), slide, make_grid(slide), **COMMON)
    summary = json.loads(write_prediction(prediction, slide, tmp_path)[-1].read_text())
    assert summary["counts"]["predicted"] == 0
    assert summary["heatmap"] is None
