"""Slides for tests: small tiled pyramids of known pixels, whole or damaged on purpose."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import cv2
import numpy as np
import openslide
import simplejpeg
import tifffile
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import JPEGBaseline8Bit, VLWholeSlideMicroscopyImageStorage, generate_uid

from medkd.data.jpeg_tiff import PHOTOMETRIC_RGB, PHOTOMETRIC_YCBCR, JpegLevel, write_jpeg_tiff


def tissue_like(width: int, height: int, seed: int = 0) -> np.ndarray:
    """(height, width, 3) uint8: smooth pink and purple blobs with fine texture, no two places alike."""
    rng = np.random.default_rng(seed)
    coarse = cv2.resize(
        rng.random((height // 24 + 3, width // 24 + 3, 3)), (width, height), interpolation=cv2.INTER_CUBIC
    )
    image = np.array([150, 60, 120]) + coarse * np.array([100, 160, 120]) + rng.normal(0, 6, (height, width, 1))
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


def write_pyramid(
    path: Path,
    image: np.ndarray,
    *,
    downsamples: Sequence[int] = (1, 2, 4),
    tile: int = 256,
    mpp: float | tuple[float, float] | None = 0.5,
    photometric: str = "ycbcr",
    subsampling: tuple[int, int] = (2, 2),
    quality: int = 90,
    shared_tables: bool = False,
    aperio: str | None = None,
    icc_profile: bytes = b"",
    big: bool = False,
    stored: Callable[[int, int, int], bool] = lambda level, column, row: True,
) -> Path:
    """A tiled JPEG TIFF of ``image`` and its block means.

    Args:
        path: to write.
        image: (height, width, 3) uint8 of level 0.
        downsamples: of the levels; sizes are rounded down, as scanners do.
        tile: side in pixels.
        mpp: of level 0, for the TIFF resolution tags; a pair for unequal x and y; None leaves them out.
        photometric: "ycbcr" or "rgb", what the JPEG streams hold.
        subsampling: of color, (2, 2), (2, 1) or (1, 1).
        quality: of the JPEG.
        shared_tables: keep JPEG tables in the TIFF and out of the tiles, as Aperio does.
        aperio: makes an .svs with these properties in its description, such as "AppMag = 20|MPP = 0.5".
        icc_profile: of the colors.
        big: write BigTIFF.
        stored: whether the tile at (level, column, row) is stored at all.
    """
    description = (
        "" if aperio is None else f"Aperio Image Library v11.2.1 \r\n{image.shape[1]}x{image.shape[0]}|{aperio}"
    )
    levels = []
    for number, factor in enumerate(downsamples):
        pixels = block_means(image, factor)
        streams = [
            _jpeg(part, photometric, subsampling, quality) if stored(number, column, row) else b""
            for row, column, part in _tiles(pixels, tile)
        ]
        tables = b""
        if shared_tables:
            split = [_split_tables(stream) for stream in streams if stream]
            tables = split[0][0]
            assert all(other == tables for other, _ in split)
            bodies = iter(body for _, body in split)
            streams = [next(bodies) if stream else b"" for stream in streams]
        x_mpp, y_mpp = mpp if isinstance(mpp, tuple) else (mpp, mpp)
        levels.append(
            JpegLevel(
                pixels.shape[1],
                pixels.shape[0],
                streams,
                (tile, tile),
                None if x_mpp is None or y_mpp is None or aperio is not None else (x_mpp * factor, y_mpp * factor),
                PHOTOMETRIC_RGB if photometric == "rgb" else PHOTOMETRIC_YCBCR,
                subsampling,
                tables,
                description,
                icc_profile,
            )
        )
    with path.open("wb") as file:
        write_jpeg_tiff(file, levels, big=big)
    return path


def write_dicom(folder: Path, image: np.ndarray, *, downsamples: Sequence[int] = (1, 2), mpp: float = 0.5) -> Path:
    """A DICOM slide, one file per level, of a patient called DOE^JANE; returns the file of level 0."""
    for number, factor in enumerate(downsamples):
        pixels = block_means(image, factor)
        frames = [_jpeg(part, "ycbcr", (2, 1), 90) for _, _, part in _tiles(pixels, 256)]
        instance = Dataset()
        instance.file_meta = FileMetaDataset()
        instance.file_meta.TransferSyntaxUID = JPEGBaseline8Bit
        instance.file_meta.MediaStorageSOPClassUID = VLWholeSlideMicroscopyImageStorage
        instance.file_meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=["level", str(number)])
        instance.SOPClassUID = VLWholeSlideMicroscopyImageStorage
        instance.SOPInstanceUID = instance.file_meta.MediaStorageSOPInstanceUID
        for keyword in ("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID"):
            setattr(instance, keyword, generate_uid(entropy_srcs=[keyword]))
        instance.PatientName, instance.PatientBirthDate, instance.StudyDate = "DOE^JANE", "19700101", "20200202"
        instance.Modality, instance.InstanceNumber = "SM", number + 1
        instance.ImageType = ["ORIGINAL", "PRIMARY", "VOLUME", "NONE" if factor == 1 else "RESAMPLED"]
        instance.SamplesPerPixel, instance.PhotometricInterpretation, instance.PlanarConfiguration = (
            3,
            "YBR_FULL_422",
            0,
        )
        instance.BitsAllocated, instance.BitsStored, instance.HighBit, instance.PixelRepresentation = 8, 8, 7, 0
        instance.Rows = instance.Columns = 256
        instance.TotalPixelMatrixRows, instance.TotalPixelMatrixColumns = pixels.shape[:2]
        instance.DimensionOrganizationType, instance.TotalPixelMatrixFocalPlanes = "TILED_FULL", 1
        instance.NumberOfOpticalPaths, instance.NumberOfFrames = 1, len(frames)
        measures, functional, optical = Dataset(), Dataset(), Dataset()
        measures.PixelSpacing, measures.SliceThickness = [mpp * factor / 1000] * 2, 0.001
        functional.PixelMeasuresSequence = [measures]
        optical.OpticalPathIdentifier, optical.ObjectiveLensPower = "1", "20"
        instance.SharedFunctionalGroupsSequence, instance.OpticalPathSequence = [functional], [optical]
        instance.PixelData = encapsulate(frames, has_bot=True)
        instance["PixelData"].is_undefined_length = True
        instance.save_as(folder / f"level{number}.dcm", enforce_file_format=True)
    return folder / "level0.dcm"


def block_means(image: np.ndarray, factor: int) -> np.ndarray:
    """Means over factor × factor blocks, the last incomplete ones dropped; uint8."""
    height, width = image.shape[0] // factor * factor, image.shape[1] // factor * factor
    blocks = image[:height, :width].astype(np.float64).reshape(height // factor, factor, width // factor, factor, 3)
    return np.rint(blocks.mean((1, 3))).astype(np.uint8)


def difference(a: np.ndarray, b: np.ndarray) -> int:
    """Largest difference in grey levels."""
    return int(np.abs(np.asarray(a, np.int16) - np.asarray(b, np.int16)).max())


def openslide_pixels(path: Path) -> np.ndarray:
    """(height, width, 3) of level 0, as OpenSlide reads them."""
    with openslide.OpenSlide(str(path)) as slide:
        return np.asarray(slide.read_region((0, 0), 0, slide.dimensions).convert("RGB"))


def damage_tile(path: Path, how: str, *, level: int = 0, column: int = 0, row: int = 0) -> tuple[int, int]:
    """Spoil one tile in place: "zeros", "garbage", "cut" (its second half zeroed) or "empty" (length 0).

    Returns:
        x, y of its corner in pixels of the level.
    """
    with tifffile.TiffFile(path) as tiff:
        page = tiff.pages[level]
        columns = -(-page.imagewidth // page.tilewidth)
        index = row * columns + column
        offset, count = page.dataoffsets[index], page.databytecounts[index]
        tag = page.tags["TileByteCounts"]
        entry = tag.valueoffset + index * (tag.valuebytecount // tag.count)
        corner = column * page.tilewidth, row * page.tilelength
    with path.open("r+b") as file:
        if how == "empty":
            file.seek(entry)
            file.write(b"\0\0\0\0")
            return corner
        spoiled = {
            "zeros": lambda: b"\0" * count,
            "garbage": lambda: np.random.default_rng(0).bytes(count),
            "cut": lambda: b"\0" * (count - count // 2),
        }[how]()
        file.seek(offset + count - len(spoiled))
        file.write(spoiled)
    return corner


def _tiles(image: np.ndarray, tile: int) -> Iterator[tuple[int, int, np.ndarray]]:
    padded = np.pad(image, ((0, -image.shape[0] % tile), (0, -image.shape[1] % tile), (0, 0)), mode="edge")
    for row in range(padded.shape[0] // tile):
        for column in range(padded.shape[1] // tile):
            part = padded[row * tile : (row + 1) * tile, column * tile : (column + 1) * tile]
            yield row, column, np.ascontiguousarray(part)


def _jpeg(pixels: np.ndarray, photometric: str, subsampling: tuple[int, int], quality: int) -> bytes:
    if photometric == "rgb":
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, "JPEG", quality=quality, keep_rgb=True)
        return stream.getvalue()
    name = {(2, 2): "420", (2, 1): "422", (1, 1): "444"}[subsampling]
    return simplejpeg.encode_jpeg(pixels, quality=quality, colorspace="RGB", colorsubsampling=name)


def _split_tables(stream: bytes) -> tuple[bytes, bytes]:
    """The quantization and Huffman tables of a JPEG as a stream of their own, and the stream without them."""
    tables, rest, position = [], [], 2
    while stream[position + 1] != 0xDA:
        end = position + 2 + int.from_bytes(stream[position + 2 : position + 4], "big")
        (tables if stream[position + 1] in (0xDB, 0xC4) else rest).append(stream[position:end])
        position = end
    return b"\xff\xd8" + b"".join(tables) + b"\xff\xd9", b"\xff\xd8" + b"".join(rest) + stream[position:]
