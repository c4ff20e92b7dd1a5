"""Tiles decoded without OpenSlide have OpenSlide's pixels, whatever the flavor of the TIFF."""

from __future__ import annotations

import io
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import openslide
import pytest
import simplejpeg
import tifffile
from PIL import Image
from pyramids import block_means, tissue_like, write_pyramid

from medkd.data.jpeg_tiff import PHOTOMETRIC_RGB, JpegLevel, write_jpeg_tiff
from medkd.wsi import tiff_tiles
from medkd.wsi.slides import Slide

APERIO = "AppMag = 20|MPP = 0.5"
FLAVORS = {
    "plain": {},
    "rgb": {"photometric": "rgb"},
    "shared tables": {"shared_tables": True},
    "half sampled": {"subsampling": (2, 1)},
    "fully sampled": {"subsampling": (1, 1)},
    "bigtiff": {"big": True},
    "odd downsamples": {"downsamples": (1, 3, 7)},
    "one level": {"downsamples": (1,)},
    "small tiles": {"tile": 112},
    "larger than the slide": {"tile": 2048, "downsamples": (1, 2)},
    "aperio": {"aperio": APERIO},
    "aperio rgb": {"aperio": APERIO, "photometric": "rgb", "shared_tables": True},
}


@pytest.fixture(scope="module")
def image():
    return tissue_like(811, 577)


@pytest.mark.parametrize("flavor", FLAVORS.values(), ids=FLAVORS)
def test_pixels_are_openslides(tmp_path, image, flavor):
    path = write_pyramid(tmp_path / "slide.tiff", image, **flavor)
    rng = np.random.default_rng(0)
    with Slide(path) as slide, openslide.OpenSlide(str(path)) as peer:
        assert slide.reader == "tiff"
        assert slide.level_downsamples == peer.level_downsamples
        for level, (width, height) in enumerate(peer.level_dimensions):
            whole = np.asarray(peer.read_region((0, 0), level, (width, height)).convert("RGB"))
            assert np.array_equal(slide.read_level(0, 0, (width, height), level), whole)
            for _ in range(8):  # from any level-0 pixel, that is often between two pixels of the level
                x, y = int(rng.integers(0, 700)), int(rng.integers(0, 500))
                downsample = peer.level_downsamples[level]
                size = (min(int(rng.integers(1, 300)), int(width - x / downsample) - 1),
                        min(int(rng.integers(1, 300)), int(height - y / downsample) - 1))  # fmt: skip
                if min(size) < 1:
                    continue
                theirs = np.asarray(peer.read_region((x, y), level, size).convert("RGB")).astype(int)
                assert np.abs(slide.read_level(x, y, size, level) - theirs).max() <= 2


def test_the_tiff_says_what_the_color_is_and_not_the_jpeg(tmp_path, image):
    """An RGB stream marked as JFIF, which by itself would mean YCbCr."""
    stream = io.BytesIO()
    Image.fromarray(image[:256, :256]).save(stream, "JPEG", quality=95, keep_rgb=True)
    jfif = b"\xff\xe0\x00\x10JFIF\x00\x01\x01\x00\x00\x01\x00\x01\x00\x00"
    marked = stream.getvalue()[:2] + jfif + stream.getvalue()[2:]
    with (tmp_path / "a.tiff").open("wb") as file:
        write_jpeg_tiff(file, [JpegLevel(256, 256, [marked], photometric=PHOTOMETRIC_RGB, subsampling=(1, 1))])
    with Slide(tmp_path / "a.tiff") as slide, openslide.OpenSlide(str(tmp_path / "a.tiff")) as peer:
        theirs = np.asarray(peer.read_region((0, 0), 0, (256, 256)).convert("RGB"))
        assert slide.reader == "tiff"
        assert np.array_equal(slide.read_level(0, 0, (256, 256), 0), theirs)
        assert np.abs(theirs.astype(int) - image[:256, :256]).mean() < 4


def test_tiles_that_are_not_jpeg_are_read_through_openslide(tmp_path, image):
    with tifffile.TiffWriter(tmp_path / "raw.tiff") as writer:
        for factor in (1, 2):
            writer.write(block_means(image, factor), tile=(128, 128), photometric="rgb", subfiletype=int(factor > 1))
    with Slide(tmp_path / "raw.tiff", mpp=0.5) as slide:
        assert slide.reader == "openslide"
        assert np.array_equal(slide.read(0, 0, slide.dimensions, mpp=0.5), image)


def test_a_jpeg_that_simplejpeg_cannot_decode_leaves_the_level_to_openslide(tmp_path, image, monkeypatch):
    path = write_pyramid(tmp_path / "a.tiff", image)
    with Slide(path) as slide:
        expected = slide.thumbnail(600)

    def unable(*arguments, **options):
        raise ValueError("Could not determine subsampling level of JPEG image")

    monkeypatch.setattr(simplejpeg, "decode_jpeg", unable)
    with Slide(path) as slide:
        assert slide.reader == "openslide"
        assert np.array_equal(slide.thumbnail(600), expected)
        assert slide.bad_tiles == []


def test_tiles_that_an_aperio_scanner_lost_are_filled_as_openslide_does(tmp_path, image):
    path = write_pyramid(
        tmp_path / "a.svs", image, aperio=APERIO, stored=lambda level, column, row: level != 1 or column
    )
    with Slide(path) as slide, openslide.OpenSlide(str(path)) as peer:
        theirs = np.asarray(peer.read_region((0, 0), 1, peer.level_dimensions[1]).convert("RGB"))
        assert np.abs(slide.read_level(0, 0, peer.level_dimensions[1], 1).astype(int) - theirs).max() <= 2
        assert slide.read_region(0, 0, (200, 200), mpp=1.0).valid is None


def stream_of(path, index=0):
    with tifffile.TiffFile(path) as tiff:
        page = tiff.pages[0]
        return path.read_bytes()[page.dataoffsets[index] : page.dataoffsets[index] + page.databytecounts[index]]


def test_a_jpeg_without_its_end_marker_is_good(tmp_path, image):
    whole = write_pyramid(tmp_path / "a.tiff", image[:256, :256], downsamples=(1,))
    stream = stream_of(whole)
    assert stream.endswith(b"\xff\xd9")
    with (tmp_path / "b.tiff").open("wb") as file:
        write_jpeg_tiff(file, [JpegLevel(256, 256, [stream[:-2]])])
    with Slide(whole) as good, Slide(tmp_path / "b.tiff") as open_ended:
        assert open_ended.reader == "tiff"
        assert np.array_equal(open_ended.read_level(0, 0, (256, 256), 0), good.read_level(0, 0, (256, 256), 0))
        assert open_ended.bad_tiles == []


def test_a_tile_that_claims_another_size_is_bad_before_it_is_decoded(tmp_path, image, monkeypatch):
    first = stream_of(write_pyramid(tmp_path / "a.tiff", image[:256, :256], downsamples=(1,)))
    at = first.index(b"\xff\xc0") + 5
    bomb = first[:at] + (65500).to_bytes(2, "big") * 2 + first[at + 4 :]
    with (tmp_path / "b.tiff").open("wb") as file:
        write_jpeg_tiff(file, [JpegLevel(512, 256, [first, bomb])])
    with Slide(tmp_path / "b.tiff", mpp=0.5) as slide:
        decoded = []
        monkeypatch.setattr(simplejpeg, "decode_jpeg", lambda stream: decoded.append(stream) or np.zeros((256, 256, 3)))
        region = slide.read_region(256, 0, (256, 256), mpp=0.5)
        assert not region.valid.any()
        assert [(tile.x, tile.y) for tile in slide.bad_tiles] == [(256, 0)]
        assert decoded == []


def test_the_cache_saves_decoding_and_stays_small(tmp_path, image, monkeypatch):
    path = write_pyramid(tmp_path / "a.tiff", image, tile=64, downsamples=(1,))
    monkeypatch.setattr(tiff_tiles, "CACHE_BYTES", 20 * 64 * 64 * 3)
    decode, decoded = simplejpeg.decode_jpeg, []
    monkeypatch.setattr(simplejpeg, "decode_jpeg", lambda stream: decoded.append(1) or decode(stream))
    with Slide(path) as slide:
        decoded.clear()
        for _ in range(3):
            slide.read_level(0, 0, (256, 256), 0)  # 16 tiles
        assert len(decoded) == 16
        whole = slide.read_level(0, 0, slide.dimensions, 0)
        (cache,) = slide._tiff._caches.values()
        assert 0 < sum(tile.nbytes for tile in cache._tiles.values()) <= 20 * 64 * 64 * 3
        with ThreadPoolExecutor(4) as threads:  # more tiles than fit: threads throw out one another's
            reads = list(threads.map(lambda x: slide.read_level(x, 10, (300, 500), 0), range(0, 500, 25)))
    for x, pixels in zip(range(0, 500, 25), reads, strict=True):
        assert np.array_equal(pixels, whole[10:510, x : x + 300])


def test_what_a_caller_does_to_its_pixels_stays_its_own(tmp_path, image):
    with Slide(write_pyramid(tmp_path / "a.tiff", image)) as slide:
        for size in ((256, 256), (100, 50), (300, 300)):
            first = slide.read_level(0, 0, size, 0)
            kept = first.copy()
            first[:] = 0
            assert np.array_equal(slide.read_level(0, 0, size, 0), kept)
