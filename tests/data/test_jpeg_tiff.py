"""Pyramids of ready-made JPEG tiles, as other libraries read them."""

from __future__ import annotations

import io

import numpy as np
import pytest
import tifffile
from PIL import Image

from medkd.data.jpeg_tiff import JpegLevel, write_jpeg_tiff


def jpeg(color):
    stream = io.BytesIO()
    Image.new("RGB", (32, 32), color).save(stream, "JPEG")
    return stream.getvalue()


@pytest.mark.parametrize("big", [False, True])
def test_tifffile_reads_back_every_tag_and_tile(big):
    tiles = [jpeg((0, 0, 50 * number)) for number in range(5)] + [b""]
    first = JpegLevel(
        70, 50, tiles, (32, 32), (0.25, 0.5), description="of three", icc_profile=b"profile", tables=b"tables"
    )
    file = io.BytesIO()
    write_jpeg_tiff(file, [first, JpegLevel(20, 20, [tiles[0]], (32, 32))], big=big)
    with tifffile.TiffFile(io.BytesIO(file.getvalue())) as tiff:
        assert tiff.is_bigtiff == big
        page, second = tiff.pages
        assert (page.imagewidth, page.imagelength, page.tilewidth, page.compression.name) == (70, 50, 32, "JPEG")
        assert (page.description, page.tags[34675].value, page.tags[347].value) == ("of three", b"profile", b"tables")
        resolution = [page.tags[name].value for name in ("XResolution", "YResolution")]
        assert [1e4 * parts / pixels for pixels, parts in resolution] == [0.25, 0.5]
        stored = [
            file.getvalue()[at : at + count] for at, count in zip(page.dataoffsets, page.databytecounts, strict=True)
        ]
        assert stored == tiles
        assert (page.dataoffsets[5], page.databytecounts[5]) == (0, 0)
        assert (page.tags[254].value, second.tags[254].value) == (0, 1)
        assert "XResolution" not in second.tags


def test_a_tile_that_comes_again_is_stored_once():
    tile, file = jpeg((9, 9, 9)), io.BytesIO()
    write_jpeg_tiff(file, [JpegLevel(3200, 3200, [tile] * 10_000, (32, 32))])
    assert len(file.getvalue()) < len(tile) + 10_000 * 8 + 1000
    with tifffile.TiffFile(io.BytesIO(file.getvalue())) as tiff:
        assert np.unique(tiff.pages[0].dataoffsets).size == 1


@pytest.mark.parametrize("count", [0, 3, 5])
def test_too_few_or_too_many_tiles_are_refused(count):
    with pytest.raises(ValueError, match=f"need 4 tiles, not {count}"):
        write_jpeg_tiff(io.BytesIO(), [JpegLevel(60, 60, [jpeg((0, 0, 0))] * count, (32, 32))])
