"""The door of a slide file: opens it, or says in one line why it cannot be read."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import IO

import openslide

from medkd.errors import InputError
from medkd.wsi.tiff_directories import (
    COPY_AGAIN,
    TIFF_VENDORS,
    TiffDirectory,
    cut_short,
    is_tiff,
    missing_part,
    read_directories,
    require_whole,
)

_SAMPLE_BYTES = 1 << 16
_SAMPLES = 10  # the head, the tail and eight places between
_DICOM_AT, _DICOM_MAGIC = 128, b"DICM"


def inspect(path: Path) -> list[TiffDirectory]:
    """Make sure that ``path`` is a whole slide file.

    Returns:
        What its directories say if it is a tiled TIFF, else nothing.

    Raises:
        InputError: if it is missing, may not be read, is a folder, is empty, is cut short, is text, is of a format
            that OpenSlide does not read, or holds no pixels; each with its own message.
    """
    head = _read_head(path)
    vendor = openslide.OpenSlide.detect_format(str(path))
    # Hamamatsu's .ndpi only looks like a TIFF: beyond 4 GB its positions mean something else.
    if is_tiff(head) and vendor != "hamamatsu" and (problem := missing_part(path)):
        raise cut_short(path, problem)
    if vendor is None:
        raise _unsupported(path, head)
    directories = read_directories(path) if vendor in TIFF_VENDORS else []
    require_whole(path, directories)
    return directories


def open_slide(path: Path) -> openslide.OpenSlide:
    """Open with OpenSlide a file that ``inspect`` has passed.

    Raises:
        InputError: if it is not there any more, or OpenSlide finds it damaged or without pixels.
    """
    head = _read_head(path)
    try:
        slide = openslide.OpenSlide(str(path))
    except openslide.OpenSlideError as error:
        raise _damaged(path, head, error) from None
    if not slide.level_count or not all(slide.dimensions):
        slide.close()
        raise InputError(path, "holds no pixels", "give a whole-slide image")
    return slide


def fingerprint(path: Path, description: str) -> str:
    """SHA-256, in hex, that tells one slide from another in milliseconds whatever their size, and not by their names.

    Covers the length of the file, 64 KiB of it at ten fixed places, and ``description``. Files that differ elsewhere
    only have the same fingerprint.

    Raises:
        InputError: if the file cannot be read.
    """
    digest = hashlib.sha256()
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        digest.update(f"{size} {description}".encode())
        last = max(0, size - _SAMPLE_BYTES)
        for index in range(_SAMPLES):
            digest.update(_read(path, file, _SAMPLE_BYTES, last * index // (_SAMPLES - 1)))
    return digest.hexdigest()


def open_file(path: Path) -> IO[bytes]:
    """Open for reading, unbuffered.

    Raises:
        InputError: if it is missing, a folder, forbidden or unreadable.
    """
    try:
        return path.open("rb", buffering=0)
    except OSError as error:
        raise unreadable(path, error) from None


def unreadable(path: Path, error: OSError) -> InputError:
    """What an error of the operating system means for the user."""
    if isinstance(error, FileNotFoundError):
        return InputError(path, "does not exist", "check the path")
    if isinstance(error, IsADirectoryError):
        remedy = "give the slide's file (of a DICOM slide, any one of its .dcm files)"
        return InputError(path, "is a folder", remedy)
    if isinstance(error, PermissionError):
        return InputError(path, "may not be read by this user", "ask for permission to read it")
    return InputError(path, f"cannot be read ({error.strerror})", "check the disk or network share")


def _read_head(path: Path) -> bytes:
    with open_file(path) as file:
        head = _read(path, file, 4096, 0)
    if not head:
        raise InputError(path, "is empty (0 bytes)", COPY_AGAIN)
    return head


def _read(path: Path, file: IO[bytes], count: int, offset: int) -> bytes:
    try:
        return os.pread(file.fileno(), count, offset)
    except OSError as error:
        raise unreadable(path, error) from None


def _damaged(path: Path, head: bytes, error: Exception) -> InputError:
    if head[_DICOM_AT : _DICOM_AT + 4] == _DICOM_MAGIC:  # messages about DICOM may quote tags
        return InputError(path, "is DICOM but not a slide that OpenSlide can read", "check it with a DICOM validator")
    return InputError(path, f"is damaged or incomplete: {error}", COPY_AGAIN)


def _unsupported(path: Path, head: bytes) -> InputError:
    if _is_text(head):
        return InputError(path, "is a text file, not a slide", "give the slide itself")
    if is_tiff(head):
        problem = "is a TIFF that OpenSlide does not read (not tiled, or an unknown compression)"
        return InputError(path, problem, "convert it to a tiled pyramidal TIFF")
    problem = "is of a format that OpenSlide does not read"
    return InputError(path, problem, "convert it to a tiled pyramidal TIFF or DICOM")


def _is_text(head: bytes) -> bool:
    if b"\0" in head:
        return False
    try:
        head[: len(head) - 3].decode("utf-8")  # the last character may be cut
    except UnicodeDecodeError:
        return False
    return True
