"""Tissue is found where it is and nowhere else: not on blank glass, not in ink, not in fat."""

from __future__ import annotations

import json

import cv2
import numpy as np
import pytest
from array_slide import GLASS, ArraySlide, glass, stain
from hypothesis import given, settings
from hypothesis import strategies as st

from medkd.data.slide_demo import demo_slide
from medkd.errors import ConfigError, InputError
from medkd.wsi.annotations import rasterize, read_annotations, write_annotations
from medkd.wsi.grid import TileGrid
from medkd.wsi.slides import Slide
from medkd.wsi.tissue import _areas, find_tissue, read_tissue

MPP = 2.0  # coarse slides are quick ones; what is found depends on µm only


def slide_of(pixels, **options):
    return ArraySlide(pixels, **({"mpp": MPP} | options))


def scene(size=600, *, seed=0):
    """Glass with an island of tissue in the middle, and where it is."""
    y, x = np.mgrid[:size, :size]
    angle = np.arctan2(y - size / 2, x - size / 2)
    inside = np.hypot(y - size / 2, x - size / 2) < size * (0.3 + 0.05 * np.sin(5 * angle))
    return np.where(inside[..., None], stain(size, size, seed=seed), glass(size, size, seed=seed)), inside


def at(tissue, where):
    """The mask at level 0."""
    height, width = where.shape
    return cv2.resize(tissue.mask.astype(np.uint8), (width, height), interpolation=cv2.INTER_NEAREST) > 0


def dice(one, other):
    return 2 * (one & other).sum() / (one.sum() + other.sum())


@pytest.mark.parametrize("color", [GLASS, (255, 255, 255), (230, 230, 228), (240, 232, 215), (210, 210, 210)])
def test_a_blank_slide_has_no_tissue(color):
    slide = slide_of(glass(500, 700, color=color))
    assert not find_tissue(slide).mask.any()
    assert len(TileGrid.build(slide, size=64, mpp=MPP)) == 0


def test_a_slide_without_any_noise_has_no_tissue():
    for value in (0, 128, 255):
        assert not find_tissue(slide_of(np.full((300, 300, 3), value))).mask.any()


def test_a_slide_full_of_tissue_is_tissue_to_the_edge():
    assert find_tissue(slide_of(stain(500, 700))).mask.all()


def test_pale_tissue_alone_on_the_slide_is_tissue():
    strength = np.random.default_rng(0).uniform(0.1, 0.3, (50, 50, 1))  # it is never as even as glass
    pale = 255 - (255 - stain(500, 500)) * np.kron(strength, np.ones((10, 10, 1)))
    assert find_tissue(slide_of(pale)).mask.mean() > 0.95


@pytest.mark.parametrize("tint", [(1, 1, 1), (1, 0.98, 0.93), (0.9, 0.9, 0.9)])
def test_an_island_is_found_under_any_light(tint):
    pixels, inside = scene()
    tissue = find_tissue(slide_of(pixels * np.asarray(tint)))
    assert dice(at(tissue, inside), inside) > 0.97
    assert tissue.area_mm2 == pytest.approx(inside.sum() * MPP**2 / 1e6, rel=0.04)


@pytest.mark.parametrize("levels", [(1.0, 2.0, 4.0), (1.0, 4.003, 16.02), (1.0,), (1.0, 32.0)])
def test_what_is_found_depends_on_microns_not_on_the_pyramid(levels):
    pixels, inside = scene()
    tissue = find_tissue(slide_of(pixels, levels=levels))
    assert dice(at(tissue, inside), inside) > 0.97
    assert tissue.mpp == pytest.approx(tissue.downsample * MPP)
    assert 8 / 1.5 <= tissue.mpp <= 8 * 1.5


def test_pieces_and_holes_are_judged_by_their_area_in_square_microns():
    pixels = glass(400, 800)
    pixels[50:150, 50:150] = stain(100, 100)  # 40 000 µm²
    pixels[50:350, 400:700] = stain(300, 300)
    pixels[150:190, 500:540] = glass(40, 40)  # a hole of 6 400 µm²
    for mpp in (MPP, MPP / 2):
        area = (mpp / MPP) ** 2
        slide = slide_of(pixels, mpp=mpp)
        for smallest, kept in ((20_000 * area, True), (60_000 * area, False)):
            assert find_tissue(slide, mpp=4 * mpp, min_area_um2=smallest).mask[25, 25] == kept
        for largest, filled in ((10_000 * area, True), (3_000 * area, False)):
            assert find_tissue(slide, mpp=4 * mpp, max_hole_um2=largest).mask[42, 130] == filled


@pytest.mark.parametrize("ink", [(40, 70, 170), (25, 60, 200), (30, 140, 70), (210, 30, 45), (35, 35, 40)], ids=str)
def test_ink_is_no_tissue(ink):
    pixels, inside = scene()
    drawn = np.zeros(inside.shape, np.uint8)
    cv2.line(drawn, (20, 30), (560, 70), 1, 24)  # over glass
    cv2.line(drawn, (250, 100), (330, 560), 1, 24)  # over tissue
    pixels = cv2.GaussianBlur(np.where(drawn[..., None] > 0, ink, pixels).astype(np.uint8), (0, 0), 1.2)
    slide = slide_of(pixels)
    tissue = find_tissue(slide)
    found = at(tissue, inside)
    assert found[drawn > 0].mean() < 0.02
    assert dice(found, inside & (drawn == 0)) > 0.93, "the tissue beside it stays"
    assert tissue.pen is not None
    assert at(find_tissue(slide, exclude_pen=False), inside)[drawn > 0].mean() > 0.5


def test_a_slide_with_ink_alone_is_empty():
    pixels = glass(500, 500)
    cv2.circle(pixels, (250, 250), 180, (40, 70, 170), 20)
    assert not find_tissue(slide_of(pixels)).mask.any()


def test_tissue_stains_are_not_taken_for_ink():
    for color in ((200, 60, 90), (110, 70, 150), (150, 100, 50), (120, 130, 180), (70, 45, 100), (120, 70, 40)):
        pixels = np.clip(np.asarray(color) + np.random.default_rng(0).normal(0, 8, (300, 300, 1)), 0, 255)
        assert find_tissue(slide_of(pixels)).mask.all(), color


def test_fat_is_left_out_and_kept_on_request():
    pixels, _ = scene()
    size = len(pixels)
    y, x = np.mgrid[:size, :size]
    walls = (x % 40 < 3) | (y % 40 < 3)  # cells of 80 µm with walls of 6 µm
    fat = (x > 380) & (np.abs(y - 300) < 150)
    pixels = np.where(fat[..., None], np.where(walls[..., None], (236, 200, 220), glass(size, size)), pixels)
    slide = slide_of(pixels)
    inner = (x > 420) & (x < 560) & (np.abs(y - 300) < 120)
    assert at(find_tissue(slide), fat)[inner].mean() < 0.05
    assert at(find_tissue(slide, exclude_fat=False), fat)[inner].mean() > 0.95


def test_areas_never_scanned_are_no_tissue():
    pixels, inside = scene()
    pixels[:, :80] = 0
    found = at(find_tissue(slide_of(pixels)), inside)
    assert not found[:, :72].any()
    assert dice(found, inside) > 0.97


def test_what_cannot_be_decoded_is_no_tissue():
    slide = slide_of(stain(400, 400), invalid=(100, 100, 120, 120))
    found = at(find_tissue(slide), np.zeros((400, 400), bool))
    assert not found[112:208, 112:208].any()
    assert found[:96].all()


@pytest.mark.parametrize("options", [{"mpp": 0}, {"mpp": float("nan")}, {"min_area_um2": -1}, {"max_hole_um2": -1}])
def test_parameters_that_are_no_sizes_are_refused(options):
    with pytest.raises(ConfigError):
        find_tissue(slide_of(glass(50, 50)), **options)


def test_tiny_slides_do_no_harm():
    for height, width in ((1, 1), (1, 300), (5, 3)):
        find_tissue(slide_of(stain(height, width), mpp=0.5))
        find_tissue(slide_of(stain(height, width), mpp=8.0), exclude_fat=False)


@settings(max_examples=50)
@given(st.integers(0, 10_000), st.floats(0.05, 0.95), st.integers(1, 4))
def test_areas_of_pieces_and_holes_are_numbers_of_pixels(seed, density, grain):
    coarse = np.random.default_rng(seed).random((24, 31)) < density
    image = np.kron(coarse, np.ones((grain, grain))).astype(np.uint8)
    pieces, holes = _areas(image)
    _, _, stats, _ = cv2.connectedComponentsWithStats(image, connectivity=8)
    assert sorted(piece.area for piece in pieces.values()) == sorted(stats[1:, cv2.CC_STAT_AREA].tolist())
    for hole in holes:  # with the pieces in it
        filled = cv2.drawContours(np.zeros_like(image), [hole.contour], 0, 1, cv2.FILLED)
        border = cv2.drawContours(np.zeros_like(image), [hole.contour], 0, 1, 1)
        assert hole.area == (filled & ~border).sum()


class TestMasksOfUsers:
    def test_found_tissue_can_be_written_changed_and_given_back(self, tmp_path):
        pixels, _ = scene()
        slide = slide_of(pixels, bounds=(40, 24, 500, 520))
        tissue = find_tissue(slide)
        write_annotations(tmp_path / "t.geojson", tissue.annotations(), offset=slide.bounds[:2])
        again = read_tissue(tmp_path / "t.geojson", slide)
        assert np.array_equal(again.mask, tissue.mask)
        assert (again.mpp, again.downsample) == (tissue.mpp, tissue.downsample)

    def test_ignored_regions_are_cut_out(self, tmp_path):
        ring = [[0, 0], [400, 0], [400, 400], [0, 400], [0, 0]]
        hole = [[100, 100], [200, 100], [200, 200], [100, 200], [100, 100]]
        features = [
            {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [points]}, "properties": {"name": name}}
            for points, name in ((hole, "Ignore*"), (ring, "Tissue"))
        ]
        (tmp_path / "t.geojson").write_text(json.dumps(features))
        tissue = read_tissue(tmp_path / "t.geojson", slide_of(glass(400, 400)))
        assert tissue.area_mm2 == pytest.approx((400**2 - 100**2) * MPP**2 / 1e6)

    @pytest.mark.parametrize("suffix", [".png", ".tif", ".jpg"])
    def test_an_image_of_any_size_is_taken(self, tmp_path, suffix):
        pixels, inside = scene()
        drawn = cv2.resize(inside.astype(np.uint8) * 255, (150, 150), interpolation=cv2.INTER_AREA)
        cv2.imwrite(str(tmp_path / f"mask{suffix}"), drawn)
        tissue = read_tissue(tmp_path / f"mask{suffix}", slide_of(pixels))
        assert dice(at(tissue, inside), inside) > 0.97
        assert (tissue.downsample, tissue.mpp) == (4, 4 * MPP)

    def test_masks_of_zeros_and_ones_and_empty_ones_are_understood(self, tmp_path):
        slide = slide_of(glass(400, 400))
        for value, area in ((1, 400**2), (0, 0)):
            cv2.imwrite(str(tmp_path / "m.png"), np.full((100, 100), value, np.uint8))
            assert read_tissue(tmp_path / "m.png", slide).mask.sum() * 16 == area

    def test_images_that_do_not_fit_are_refused_with_both_sizes(self, tmp_path):
        cv2.imwrite(str(tmp_path / "m.png"), np.zeros((100, 300), np.uint8))
        with pytest.raises(InputError, match=r"300 x 100.*400 x 400"):
            read_tissue(tmp_path / "m.png", slide_of(glass(400, 400)))

    @pytest.mark.parametrize("content", [b"", b"no image"])
    def test_broken_images_are_refused(self, tmp_path, content):
        (tmp_path / "m.png").write_bytes(content)
        with pytest.raises(InputError, match=r"m\.png"):
            read_tissue(tmp_path / "m.png", slide_of(glass(40, 40)))
        with pytest.raises(InputError, match="does not exist"):
            read_tissue(tmp_path / "none.png", slide_of(glass(40, 40)))


@pytest.mark.parametrize("seed", [0, 1])
def test_the_islands_of_the_demo_slide_are_found_with_their_pale_stroma(tmp_path, seed):
    with Slide(demo_slide(tmp_path, tiles=8, seed=seed)) as slide:
        tissue = find_tissue(slide)
        drawn = read_annotations(tmp_path / "demo_slide_tissue.geojson")
        truth = rasterize(drawn, tissue.mask.shape, tissue.downsample) > 0
        assert dice(tissue.mask, truth) > 0.95


def test_the_tissue_of_a_real_slide_is_found(real_data):
    with Slide(real_data / "slides" / "cmu_small_region.svs") as slide:
        tissue = find_tissue(slide)
        assert 0.55 < tissue.area_mm2 < 0.68, "checked by eye"
        assert tissue.mask[100, 85]
        assert not tissue.mask[:, :10].any()
        assert tissue.pen is not None
        assert tissue.pen.sum() == 0
