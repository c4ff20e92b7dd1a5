"""The demo slide is what it says: real tissue inside exact outlines, readable by OpenSlide, the same every time."""

from __future__ import annotations

import json

import cv2
import numpy as np
import openslide
import pytest
import tifffile

from medkd.data import demo_slide
from medkd.errors import InputError
from medkd.wsi.slides import Slide


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return demo_slide(tmp_path_factory.mktemp("demo"), tiles=6)


def truth(path, shape, downsample):
    features = json.loads(path.with_name(f"{path.stem}_tissue.geojson").read_text())["features"]
    mask = np.zeros(shape, np.uint8)
    for feature in features:
        corners = np.array(feature["geometry"]["coordinates"][0]) / downsample
        cv2.fillPoly(mask, [np.rint(corners).astype(np.int32)], 1)
    return mask.astype(bool)


def test_openslide_and_our_reader_open_it(path):
    with openslide.OpenSlide(str(path)) as peer, Slide(path) as slide:
        assert peer.properties["openslide.mpp-x"] == "0.5"
        assert (slide.mpp, slide.mpp_source, slide.reader) == (0.5, "TIFF resolution", "tiff")
        assert slide.level_dimensions == ((1536, 1536), (768, 768))
        theirs = np.asarray(peer.read_region((300, 300), 0, (500, 400)).convert("RGB"))
        assert np.array_equal(slide.read_level(300, 300, (500, 400), 0), theirs)


def test_every_level_states_its_own_resolution(path):
    with tifffile.TiffFile(path) as tiff:
        resolutions = [page.tags["XResolution"].value for page in tiff.pages]
        assert [page.tags["ResolutionUnit"].value.name for page in tiff.pages] == ["CENTIMETER", "CENTIMETER"]
    assert [1e4 * parts / pixels for pixels, parts in resolutions] == [0.5, 1.0]


def test_outside_the_outlines_there_is_only_glass(path):
    with Slide(path) as slide:
        image = slide.read(0, 0, slide.dimensions, mpp=slide.mpp).astype(int)
    mask = truth(path, image.shape[:2], 1)
    assert 0.1 < mask.mean() < 0.4
    glass = ~cv2.dilate(mask.astype(np.uint8), np.ones((33, 33))).astype(bool)
    assert np.abs(image[glass] - 243).max() <= 14
    inside = cv2.erode(mask.astype(np.uint8), np.ones((33, 33))).astype(bool)
    assert image[inside].std() > 30  # tissue, and not a flat color
    assert (image[inside].max(axis=1) < 235).mean() > 0.7


def test_it_is_the_same_every_time_and_another_for_another_seed(path, tmp_path):
    again = demo_slide(tmp_path / "renamed.tiff", tiles=6)
    other = demo_slide(tmp_path / "other.tif", tiles=6, seed=1)
    assert again.read_bytes() == path.read_bytes()
    assert other.read_bytes() != path.read_bytes()
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "other.tif", "other_tissue.geojson", "renamed.tiff", "renamed_tissue.geojson",
    ]  # fmt: skip


def test_too_few_tiles_are_refused(tmp_path):
    with pytest.raises(InputError, match="tiles must be 4 or more"):
        demo_slide(tmp_path, tiles=3)
    assert not list(tmp_path.iterdir())
