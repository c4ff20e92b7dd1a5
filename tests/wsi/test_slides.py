"""What a Slide says about its file, and its pixels at any resolution, through both readers."""

from __future__ import annotations

import io
import json
import logging
import pickle
import shutil
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from multiprocessing import get_context

import cv2
import numpy as np
import pytest
import tifffile
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageCms
from pyramids import (
    block_means,
    damage_tile,
    difference,
    openslide_pixels,
    tissue_like,
    write_dicom,
    write_pyramid,
)

import medkd.wsi
from medkd.data.jpeg_tiff import JpegLevel, write_jpeg_tiff
from medkd.errors import InputError
from medkd.wsi import slides
from medkd.wsi.slides import Slide

APERIO = "AppMag = 40|MPP = 0.25|User = DOE^JANE|Date = 01/01/70|Time = 09:59:15"
both_readers = pytest.mark.parametrize("fast", [True, False], ids=["tiff", "openslide"])


@pytest.fixture(scope="module")
def image():
    return tissue_like(1111, 777)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("slides")


@pytest.fixture(scope="module")
def pyramid(folder, image):
    return write_pyramid(folder / "pyramid.tiff", image)


@pytest.fixture(scope="module")
def one_level(folder, image):
    return write_pyramid(folder / "one_level.tiff", image, downsamples=(1,), mpp=0.25)


@lru_cache(maxsize=1)
def on_white(path):
    canvas = np.full((1900, 2200, 3), 255, np.uint8)
    canvas[500:1277, 500:1611] = openslide_pixels(path)
    return canvas


@lru_cache(maxsize=1)
def opened(path):
    return Slide(path)


# Resolution and levels


@both_readers
def test_twice_the_resolution_is_the_block_mean(one_level, fast):
    with Slide(one_level, fast=fast) as slide:
        assert slide.reader == ("tiff" if fast else "openslide")
        result = slide.read(10, 20, (300, 200), mpp=0.5)
    assert difference(result, block_means(openslide_pixels(one_level)[20:420, 10:610], 2)) <= 1


@given(x=st.integers(-300, 1200), y=st.integers(-300, 900), width=st.integers(1, 400), height=st.integers(1, 400))
def test_native_pixels_are_openslides_and_background_outside(pyramid, x, y, width, height):
    region = opened(pyramid).read_region(x, y, (width, height), mpp=0.5)
    expected = on_white(pyramid)[500 + y : 500 + y + height, 500 + x : 500 + x + width]
    assert region.valid is None
    assert difference(region.pixels, expected) <= 2


def test_the_coarsest_level_that_is_fine_enough_is_read(tmp_path):
    colors = {1: (200, 40, 40), 2: (40, 200, 40), 8: (40, 40, 200)}  # of each level, by its downsample

    def level(factor, color):
        stream = io.BytesIO()
        Image.new("RGB", (256, 256), color).save(stream, "JPEG", quality=95)
        side = 2048 // factor
        return JpegLevel(side, side, [stream.getvalue()] * (-(-side // 256)) ** 2, mpp=(0.25 * factor, 0.25 * factor))

    with (tmp_path / "colored.tiff").open("wb") as file:
        write_jpeg_tiff(file, [level(factor, color) for factor, color in colors.items()])
    with Slide(tmp_path / "colored.tiff") as slide:
        for mpp, factor in [(0.1, 1), (0.25, 1), (0.49, 1), (0.499, 2), (0.5, 2), (1.9, 2), (2.0, 8), (9.0, 8)]:
            assert difference(slide.read(10, 10, (3, 3), mpp=mpp), colors[factor]) <= 4, mpp


@pytest.mark.parametrize("downsamples", [(1,), (1, 2, 4), (1, 3, 7)])
@both_readers
def test_all_levels_show_the_same_place(tmp_path, downsamples, fast):
    """A level of odd size ends a little early; its pixels are still where they belong."""
    rising = np.zeros((777, 1111, 3), np.uint8)
    rising[..., 0] = (np.arange(1111) / 5)[None, :].round()
    rising[..., 1] = (np.arange(777) / 5)[:, None].round()
    path = write_pyramid(tmp_path / "rising.tiff", rising, downsamples=downsamples, subsampling=(1, 1), quality=98)
    with Slide(path, fast=fast) as slide:
        for scale in (1.0, 1.7, 2.0, 3.1, 4.6, 7.3):
            size = (int(1000 / scale), int(700 / scale))
            result = slide.read(20.4, 11.7, size, mpp=0.5 * scale).astype(float)
            x, y = (start + (np.arange(count) + 0.5) * scale for start, count in zip((20.4, 11.7), size, strict=True))
            assert abs((result[..., 0] - (x - 0.5)[None, :] / 5).mean()) < 0.35, scale
            assert abs((result[..., 1] - (y - 0.5)[:, None] / 5).mean()) < 0.35, scale


def test_reading_in_blocks_changes_nothing(pyramid, monkeypatch):
    with Slide(pyramid) as slide:
        whole = slide.read(-30.5, 12.25, (400, 300), mpp=1.3)
        monkeypatch.setattr(slides, "_BLOCK", 100)
        assert difference(slide.read(-30.5, 12.25, (400, 300), mpp=1.3), whole) <= 1


def test_the_thumbnail_is_the_whole_slide(one_level, image):
    with Slide(one_level) as slide:
        thumbnail = slide.thumbnail(100)
        assert thumbnail.shape == (70, 100, 3)
        assert slide.thumbnail(5000).shape == image.shape
        assert abs(thumbnail.mean() - image.mean()) < 1


@pytest.mark.parametrize("arguments", [
    {"x": float("nan")}, {"y": float("inf")}, {"size": (0, 5)}, {"mpp": 0.0}, {"mpp": float("nan")}, {"mpp": 1e6},
])  # fmt: skip
def test_impossible_requests_are_refused(pyramid, arguments):
    wanted = {"x": 0, "y": 0, "size": (5, 5), "mpp": 0.5} | arguments
    with Slide(pyramid) as slide, pytest.raises(ValueError, match=next(iter(arguments))):
        slide.read(wanted["x"], wanted["y"], wanted["size"], mpp=wanted["mpp"])


# Resolution: where it comes from


def mpp_of(path, **arguments):
    with Slide(path, **arguments) as slide:
        return slide.mpp, slide.mpp_source


def test_mpp_comes_from_vendor_then_resolution_tags_then_the_user(tmp_path, image, pyramid, caplog):
    small = image[:300, :300]
    assert mpp_of(write_pyramid(tmp_path / "a.svs", small, aperio=APERIO)) == (0.25, "vendor")
    assert mpp_of(pyramid) == (0.5, "TIFF resolution")
    nothing = write_pyramid(tmp_path / "b.tiff", small, mpp=None)
    assert mpp_of(nothing, mpp=0.3) == (0.3, "user")
    assert not caplog.records
    assert mpp_of(pyramid, mpp=0.5) == (0.5, "user")
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        assert mpp_of(pyramid, mpp=0.25) == (0.25, "user")
    assert "the file says 0.5" in caplog.text
    assert len(caplog.records) == 1


def test_resolution_tags_in_inches_count_too(tmp_path, image):
    path = tmp_path / "inch.tiff"
    with tifffile.TiffWriter(path) as writer:
        writer.write(image, tile=(128, 128), photometric="rgb", resolution=(50800, 50800), resolutionunit="INCH")
    assert mpp_of(path) == (0.5, "TIFF resolution")


@pytest.mark.parametrize(("stated", "problem"), [
    ({"mpp": None}, "says nowhere"),
    ({"mpp": (0.5, 0.55)}, "not square"),
    ({"mpp": 352.8}, "outside 0.05 to 20"),
    ({"mpp": 0.001}, "outside 0.05 to 20"),
    ({"aperio": "MPP = 0"}, "outside 0.05 to 20"),
    ({"aperio": "MPP = nan"}, "not a number"),
    ({"aperio": "MPP = unknown"}, "not a number"),
    ({"aperio": "AppMag = 20"}, "says nowhere"),
])  # fmt: skip
def test_a_resolution_that_cannot_be_true_is_refused_when_used_but_not_when_shown(tmp_path, image, stated, problem):
    path = write_pyramid(tmp_path / "odd.tiff", image[:256, :256], downsamples=(1,), **stated)
    with Slide(path) as slide:
        with pytest.raises(InputError, match=problem) as caught:
            slide.read(0, 0, (5, 5), mpp=0.5)
        assert "--slide-mpp" in str(caught.value)
        assert slide.facts()["mpp"] is None
        assert problem in slide.facts()["mpp_problem"]
        assert slide.thumbnail(50).shape == (50, 50, 3)
    assert mpp_of(path, mpp=0.4) == (0.4, "user")


@pytest.mark.parametrize("mpp", [0, -1, float("nan"), 1000])
def test_a_user_mpp_that_cannot_be_true_is_refused(pyramid, mpp):
    with pytest.raises(InputError, match="--slide-mpp cannot be true"):
        Slide(pyramid, mpp=mpp)


# Sharing


def places(count):
    rng = np.random.default_rng(7)
    return [(float(x), float(y), mpp) for x, y, mpp in
            zip(rng.uniform(-50, 1000, count), rng.uniform(-50, 700, count), rng.choice([0.5, 0.7, 1.0], count),
                strict=True)]  # fmt: skip


def read_place(slide, place):
    return slide.read(place[0], place[1], (97, 61), mpp=place[2])


def read_in_process(arguments):
    slide, place = arguments
    return read_place(slide, place)


@both_readers
def test_threads_and_processes_read_identical_pixels(pyramid, fast):
    wanted = places(24)
    with Slide(pyramid, fast=fast) as slide:
        alone = [read_place(slide, place) for place in wanted]
        slide.close()
        with ThreadPoolExecutor(4) as threads:
            together = list(threads.map(lambda place: read_place(slide, place), wanted))
        with get_context("fork").Pool(2) as processes:
            apart = processes.map(read_in_process, [(slide, place) for place in wanted])
    for one, two, three in zip(alone, together, apart, strict=True):
        assert np.array_equal(one, two)
        assert np.array_equal(one, three)


def read_inherited(place):
    return read_place(_inherited, place)


@both_readers
def test_a_slide_used_before_a_fork_serves_both_sides(pyramid, fast):
    global _inherited
    wanted = places(8)
    with Slide(pyramid, fast=fast) as _inherited:
        alone = [read_place(_inherited, place) for place in wanted]
        with get_context("fork").Pool(2) as processes:
            apart = processes.map(read_inherited, wanted)
        assert all(np.array_equal(one, two) for one, two in zip(alone, apart, strict=True))
        assert all(np.array_equal(one, read_place(_inherited, place)) for one, place in zip(alone, wanted, strict=True))


def opencv_threads(_):
    return cv2.getNumThreads()


def test_a_forked_process_does_not_count_on_threads_it_does_not_have():
    before = cv2.getNumThreads()
    cv2.setNumThreads(2)
    with get_context("fork").Pool(1) as processes:
        assert processes.map_async(opencv_threads, [None]).get(timeout=20) == [1]
    assert cv2.getNumThreads() == 2
    cv2.setNumThreads(before)


def test_a_slide_can_be_pickled(pyramid, monkeypatch, tmp_path):
    monkeypatch.chdir(pyramid.parent)
    with Slide(pyramid.name, mpp=0.4) as slide:
        packed = pickle.dumps(slide)
        pixels = slide.read(5, 5, (40, 40), mpp=0.9)
        fingerprint = slide.fingerprint
    monkeypatch.chdir(tmp_path)
    with pickle.loads(packed) as other:
        assert (other.mpp, other.mpp_source, other.fingerprint) == (0.4, "user", fingerprint)
        assert np.array_equal(other.read(5, 5, (40, 40), mpp=0.9), pixels)


def test_the_fingerprint_is_of_the_content(pyramid, one_level, tmp_path):
    copy = shutil.copy(pyramid, tmp_path / "renamed.tiff")
    changed = shutil.copy(pyramid, tmp_path / "changed.tiff")
    damage_tile(changed, "zeros")
    prints = []
    for path in (pyramid, copy, changed, one_level):
        with Slide(path) as slide:
            prints.append(slide.fingerprint)
    assert prints[0] == prints[1]
    assert len(set(prints)) == 3
    with Slide(pyramid, fast=False, mpp=0.9) as slide:
        assert slide.fingerprint == prints[0]


SPARSE = """
    import resource, sys
    from medkd.wsi.slides import Slide
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with Slide(sys.argv[1]) as slide:
        assert slide.dimensions == (100_000, 100_000), slide.dimensions
        region = slide.read_region(51_200, 51_200, (256, 256), mpp=0.25)
        assert region.valid is None and region.pixels.std() > 5
        assert not slide.read_region(1_000, 90_000, (512, 512), mpp=0.25).valid.any()
        assert slide.read(0, 0, (1500, 1500), mpp=16.6).shape == (1500, 1500, 3)
        assert slide.bad_tiles == []
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def test_a_huge_sparse_slide_needs_little_memory(tmp_path, image):
    stream = io.BytesIO()
    Image.fromarray(image[:256, :256]).save(stream, "JPEG", quality=80)

    def level(factor):
        side = 100_000 // factor
        across = -(-side // 256)
        tiles = (stream.getvalue() if row == column else b"" for row in range(across) for column in range(across))
        return JpegLevel(side, side, tiles, mpp=(0.25 * factor, 0.25 * factor))

    with (tmp_path / "huge.tiff").open("wb") as file:
        write_jpeg_tiff(file, [level(1), level(8), level(64)], big=True)
    code = textwrap.dedent(SPARSE)
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "huge.tiff")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 400  # MiB


# Color


def swapped_profile():
    """A profile of a camera whose red is what sRGB calls blue."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    red, blue = profile.index(b"rXYZ", 128), profile.index(b"bXYZ", 128)
    profile[red : red + 4], profile[blue : blue + 4] = b"bXYZ", b"rXYZ"
    return bytes(profile)


def test_colors_are_converted_on_request_only(tmp_path):
    flat = np.full((256, 256, 3), (200, 120, 40), np.uint8)
    path = write_pyramid(tmp_path / "a.tiff", flat, downsamples=(1,), icc_profile=swapped_profile(), quality=98)
    with Slide(path) as plain, Slide(path, icc=True) as converted, ThreadPoolExecutor(4) as threads:
        assert plain.facts()["icc_profile"] is True
        assert difference(plain.read(0, 0, (9, 9), mpp=0.5), (200, 120, 40)) <= 4
        for pixels in threads.map(lambda _: converted.read(0, 0, (9, 9), mpp=0.5), range(8)):
            assert difference(pixels, (40, 120, 200)) <= 6


def test_an_unusable_profile_is_an_error_on_request_only(tmp_path, image):
    path = write_pyramid(tmp_path / "a.tiff", image[:256, :256], icc_profile=b"not a profile" * 20)
    with Slide(path) as slide:
        assert slide.icc_profile is not None
    with pytest.raises(InputError, match="unusable ICC profile"):
        Slide(path, icc=True)


# What is told, and real slides


def test_facts_are_json_without_people_dates_or_comments(tmp_path, image):
    path = write_pyramid(tmp_path / "a.svs", image[:300, :300], aperio=APERIO)
    with Slide(path) as slide:
        text = json.dumps(slide.facts()) + repr(slide)
        assert slide.objective_power == 40
    for secret in ("DOE", "JANE", "01/01/70", "09:59", "Aperio Image Library"):
        assert secret not in text


@pytest.mark.parametrize("kind", ["facts", "pixels"])
def test_dicom_slides_are_read_through_openslide(tmp_path, image, kind):
    with Slide(write_dicom(tmp_path, image)) as slide:
        if kind == "facts":
            assert (slide.vendor, slide.reader, slide.mpp, slide.mpp_source) == ("dicom", "openslide", 0.5, "vendor")
            assert slide.level_dimensions == ((1111, 777), (555, 388))
            assert "DOE" not in json.dumps(slide.facts())
        else:
            pixels = slide.read(0, 0, slide.dimensions, mpp=0.5)
            assert np.abs(pixels.astype(int) - image).mean() < 4


def test_the_real_aperio_slide_reads_as_openslide_does(real_data):
    path = real_data / "slides" / "cmu_small_region.svs"
    reference = openslide_pixels(path)
    with Slide(path) as slide:
        assert (slide.vendor, slide.reader, slide.mpp, slide.mpp_source) == ("aperio", "tiff", 0.499, "vendor")
        assert (slide.dimensions, slide.objective_power) == ((2220, 2967), 20)
        assert "b414003d" not in json.dumps(slide.facts())  # the user named in its description
        for x, y in [(0, 0), (1000, 1500), (1720, 2467), (333, 777)]:  # corners too
            assert difference(slide.read_level(x, y, (500, 500), 0), reference[y : y + 500, x : x + 500]) <= 2
        halved = slide.read(100, 60, (400, 300), mpp=2 * slide.mpp)
        assert difference(halved, block_means(reference[60:660, 100:900], 2)) <= 2
        assert slide.bad_tiles == []


def test_the_package_gives_its_names_when_asked():
    assert medkd.wsi.Slide is Slide
    with pytest.raises(AttributeError, match="no attribute 'Slides'"):
        _ = medkd.wsi.Slides
