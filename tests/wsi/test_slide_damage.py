"""Slides that are damaged, incomplete or no slides at all."""

from __future__ import annotations

import logging
import os
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image
from pyramids import damage_tile, difference, openslide_pixels, tissue_like, write_pyramid

from medkd.errors import InputError
from medkd.wsi.slides import Slide

APERIO = "AppMag = 40|MPP = 0.25"
both_readers = pytest.mark.parametrize("fast", [True, False], ids=["tiff", "openslide"])


@pytest.fixture(scope="module")
def image():
    return tissue_like(1111, 777)


@pytest.fixture(scope="module")
def pyramid(tmp_path_factory, image):
    return write_pyramid(tmp_path_factory.mktemp("slides") / "pyramid.tiff", image)


@both_readers
@pytest.mark.parametrize("how", ["zeros", "garbage", "cut", "empty"])
@pytest.mark.parametrize("aperio", [None, APERIO], ids=["plain", "aperio"])
def test_a_bad_tile_is_masked_listed_and_alone(tmp_path, image, pyramid, how, aperio, fast):
    path = write_pyramid(tmp_path / "bad.tiff", image, aperio=aperio)
    whole = openslide_pixels(path)
    damage_tile(path, how, column=1, row=1)
    with Slide(path, fast=fast) as slide:
        clean = slide.read_region(0, 0, (250, 250), mpp=slide.mpp)
        region = slide.read_region(100, 100, (600, 600), mpp=slide.mpp)
        again = slide.read_region(100, 100, (600, 600), mpp=slide.mpp)
        after = slide.read_region(600, 300, (200, 200), mpp=slide.mpp)
        coarser = slide.read_region(0, 0, (300, 300), mpp=slide.mpp * 1.5)
        listed = [(tile.level, tile.x, tile.y, tile.width, tile.height) for tile in slide.bad_tiles]
    expected = np.ones((777, 1111), bool)
    expected[256:512, 256:512] = False
    masked = np.where(expected[..., None], whole, 255)
    assert clean.valid is None
    assert difference(clean.pixels, whole[:250, :250]) <= 2
    assert np.array_equal(region.valid, expected[100:700, 100:700])
    assert difference(region.pixels, masked[100:700, 100:700]) <= 2
    assert np.array_equal(again.valid, region.valid)
    assert np.array_equal(again.pixels, region.pixels)
    assert after.valid is None
    assert difference(after.pixels, whole[300:500, 600:800]) <= 2
    assert not coarser.valid[200, 200]
    assert coarser.valid[:165, :].all()
    if how != "empty" or fast:  # OpenSlide takes a tile of length 0 for one that was never scanned
        assert listed == [(0, 256, 256, 256, 256)]


@both_readers
def test_tiles_that_were_never_stored_are_holes(tmp_path, image, fast):
    path = write_pyramid(tmp_path / "sparse.tiff", image, stored=lambda level, column, row: (column + row) % 2 == 0)
    with Slide(path, fast=fast) as slide:
        region = slide.read_region(0, 0, slide.dimensions, mpp=slide.mpp)
        assert slide.bad_tiles == []
    rows, columns = np.mgrid[:777, :1111] // 256
    assert np.array_equal(region.valid, (rows + columns) % 2 == 0)
    assert (region.pixels[~region.valid] == 255).all()


def test_one_bad_tile_is_worth_one_warning(tmp_path, image, caplog):
    path = write_pyramid(tmp_path / "bad.tiff", image)
    for column in range(3):
        damage_tile(path, "zeros", column=column)
    with Slide(path) as slide:
        slide.thumbnail(1111)
        slide.thumbnail(1111)
        assert len(slide.bad_tiles) == 3
    assert len([record for record in caplog.records if record.levelno >= logging.WARNING]) == 1


@pytest.mark.parametrize("aperio", [None, APERIO], ids=["plain", "aperio"])
def test_a_truncated_file_is_refused_wherever_it_ends(tmp_path, image, aperio):
    whole = write_pyramid(tmp_path / "whole.tiff", image[:300, :600], aperio=aperio).read_bytes()
    cut = tmp_path / "cut.tiff"
    for length in {*range(8, len(whole), len(whole) // 40), *range(len(whole) - 60, len(whole), 7), len(whole) - 1}:
        cut.write_bytes(whole[:length])
        with pytest.raises(InputError, match="is truncated"):
            Slide(cut)


@both_readers
def test_tiles_beyond_the_end_are_a_truncation(tmp_path, image, fast):
    path = write_pyramid(tmp_path / "a.tiff", image[:256, :512], downsamples=(1,))
    first = int.from_bytes(path.read_bytes()[4:8], "little")
    with path.open("r+b") as file:  # the directory moves to the front of the missing part: tiles lie behind it
        file.seek(path.read_bytes().index(b"\x44\x01\x04\x00", first) + 8)
        table = int.from_bytes(file.read(4), "little")
        file.seek(table + 4)
        file.write((10**6).to_bytes(4, "little"))
    with pytest.raises(InputError, match="1 of its 2 tiles and strips lie beyond its end"):
        Slide(path, fast=fast)


def refused(path):
    with pytest.raises(InputError) as caught:
        Slide(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    return caught.value.problem


def test_every_kind_of_unusable_file_has_its_own_message(tmp_path, monkeypatch):
    (tmp_path / "empty.svs").touch()
    (tmp_path / "text.svs").write_text("slide,mpp\na.svs,0.25\n" * 30)
    Image.new("RGB", (64, 64)).save(tmp_path / "photo.jpg")
    Image.new("RGB", (64, 64)).save(tmp_path / "strips.tiff")
    (tmp_path / "noise.svs").write_bytes(np.random.default_rng(0).bytes(5000))
    hollow = write_pyramid(tmp_path / "hollow.tiff", np.zeros((300, 300, 3), np.uint8), stored=lambda *_: False)
    problems = [refused(tmp_path / name) for name in
                ("missing.svs", ".", "empty.svs", "text.svs", "photo.jpg", "strips.tiff", hollow.name)]  # fmt: skip
    expected = ["does not exist", "is a folder", "is empty", "is a text file", "OpenSlide does not read", "is a TIFF",
                "holds no pixels"]  # fmt: skip
    for problem, part in zip(problems, expected, strict=True):
        assert part in problem
    assert len(set(problems)) == len(problems)
    assert "OpenSlide does not read" in refused(tmp_path / "noise.svs")

    def forbidden(self, *arguments, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(tmp_path), "open", forbidden)
    assert "may not be read by this user" in refused(hollow)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_refused(pyramid, tmp_path):
    locked = shutil.copy(pyramid, tmp_path / "locked.tiff")
    os.chmod(locked, 0)
    assert "may not be read" in refused(locked)


def test_a_slide_that_vanishes_is_an_input_error(pyramid, tmp_path):
    path = shutil.copy(pyramid, tmp_path / "vanishing.tiff")
    with Slide(path) as slide, Slide(path, fast=False) as slow:
        slide.close()
        slow.close()
        path.unlink()
        for gone in (slide, slow):
            with pytest.raises(InputError, match="does not exist"):
                gone.read(0, 0, (5, 5), mpp=0.5)
        with pytest.raises(InputError, match="does not exist"):
            _ = slide.fingerprint


def test_every_flipped_byte_of_the_directories_is_survived(tmp_path, image):
    """No crash and no foreign exception, whatever a directory says."""
    path = write_pyramid(tmp_path / "a.tiff", image[:256, :256], downsamples=(1,))
    whole = bytearray(path.read_bytes())
    begin = int.from_bytes(whole[4:8], "little")
    flips = np.random.default_rng(0).integers(begin - 64, len(whole), 60)
    for position, value in zip(flips, np.random.default_rng(1).integers(1, 256, 60), strict=True):
        spoiled = bytearray(whole)
        spoiled[position] ^= value
        path.write_bytes(spoiled)
        try:
            with Slide(path, mpp=0.5) as slide:
                slide.read_region(0, 0, (64, 64), mpp=0.5)
        except InputError:
            pass


def test_threads_agree_on_bad_tiles(tmp_path, image):
    path = write_pyramid(tmp_path / "bad.tiff", image, downsamples=(1,))
    damage_tile(path, "zeros", column=2, row=1)
    for fast in (True, False):
        with Slide(path, fast=fast) as slide, ThreadPoolExecutor(4) as threads:
            regions = list(threads.map(lambda x: slide.read_region(x, 200, (150, 150), mpp=0.5), range(0, 900, 20)))
            assert [(tile.x, tile.y) for tile in slide.bad_tiles] == [(512, 256)]
        for x, region in zip(range(0, 900, 20), regions, strict=True):
            assert (region.valid is None) == (x + 150 <= 512 or x >= 768), x
