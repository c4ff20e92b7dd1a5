"""Photographs and tiles of slides: PNG, JPEG, TIFF and BMP files as RGB pixels, checked at one door."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from medkd.errors import InputError

TILE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff")

Pixels = npt.NDArray[np.uint8]
_WHITE = 255
_EIGHT_BIT = {"1", "CMYK", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "YCbCr"}


def is_tile_image(path: str | Path) -> bool:
    """Whether a file is named like an image that :func:`read_tile_image` reads."""
    return Path(path).suffix.lower() in TILE_SUFFIXES


def read_tile_image(path: str | Path) -> Pixels:
    """Read an image as (H, W, 3) RGB, uint8; what is transparent lies on white.

    Raises:
        InputError: missing, not readable, damaged or cut short, or of more than 8 bits per channel.
    """
    image = _open(Path(path))
    if "A" in image.mode or "a" in image.mode or "transparency" in image.info:
        image = image.convert("RGBA")
        ground = Image.new("RGBA", image.size, (_WHITE, _WHITE, _WHITE, _WHITE))
        image = Image.alpha_composite(ground, image)
    return np.array(image.convert("RGB"), dtype=np.uint8)


def read_tile_mask(path: str | Path, *, threshold: int | None = None) -> npt.NDArray[np.integer]:
    """Read a mask as (H, W) integers.

    Args:
        path: an image of one channel, palette indices included, or of equal channels.
        threshold: for a mask kept as JPEG, whose values are blurred: 1 above it, 0 elsewhere.

    Raises:
        InputError: as :func:`read_tile_image`, or channels that differ.
    """
    image = _open(Path(path), any_depth=True)
    values = np.array(image)
    if values.dtype == bool:
        values = values.astype(np.uint8)
    if not np.issubdtype(values.dtype, np.integer):
        raise InputError(path, f"holds {values.dtype} values, not integer labels", "save the mask as an 8-bit PNG")
    if values.ndim == 3:
        colors = values[..., :3]
        if threshold is not None:
            values = colors.max(axis=-1)
        elif (colors == colors[..., :1]).all():
            values = colors[..., 0]
        else:
            raise InputError(path, "is a colored picture, not a mask", "save the label values in one channel")
    return (values > threshold).astype(np.uint8) if threshold is not None else values


def _open(path: Path, *, any_depth: bool = False) -> Image.Image:
    if not path.exists():
        raise InputError(path, "does not exist", "check the path")
    if path.is_dir():
        raise InputError(path, "is a folder, not an image", "name the files in it")
    try:
        with Image.open(path) as image:
            image.load()
    except UnidentifiedImageError:
        raise InputError(path, "is not an image", "give PNG, JPEG, TIFF or BMP files") from None
    except Image.DecompressionBombError:
        raise InputError(path, "has far more pixels than a tile", "cut it with `medkd slide tile`") from None
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise InputError(path, f"cannot be read ({error})", "it is damaged or cut short: copy it again") from None
    if image.mode not in _EIGHT_BIT and not any_depth:
        raise InputError(path, f"is a {image.mode} image, not one of 8 bits per channel", "convert it to 8-bit RGB")
    return image
