"""Small color pictures side by side in one PNG, each with a frame if wanted."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

Color = tuple[int, int, int]
GROUND: Color = (255, 255, 255)
_GAP = 2
_LEAST_SIDE = 64  # smaller pictures are enlarged by whole factors


def as_pixels(image: torch.Tensor) -> npt.NDArray[np.uint8]:
    """(N, 3, H, W) in [-1, 1] → (N, H, W, 3) uint8."""
    scaled = (image.detach().float().cpu() + 1.0) * 127.5
    return scaled.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()


def from_pixels(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 values 0 to 255 → float32 in [-1, 1]; the other way round."""
    return pixels.float() / 127.5 - 1.0


def picture_grid(
    rows: Sequence[npt.NDArray[np.uint8]], frames: Sequence[Sequence[Color]] | None = None, *, frame_px: int = 3
) -> bytes:
    """A PNG file's bytes, equal for equal input.

    Args:
        rows: each (n, H, W, 3), all pictures of one size; rows may differ in n.
        frames: a color for every picture of every row.
        frame_px: width of a frame.

    Raises:
        ValueError: If there is no picture or they differ in size.
    """
    sizes = {row.shape[1:3] for row in rows if len(row)}
    if len(sizes) != 1:
        raise ValueError(f"pictures must be of one size, got {sorted(sizes)}")
    ((height, width),) = sizes
    zoom = max(1, -(-_LEAST_SIDE // min(height, width)))
    margin = frame_px if frames is not None else 0
    cell = (height * zoom + 2 * margin + _GAP, width * zoom + 2 * margin + _GAP)
    columns = max(len(row) for row in rows)
    sheet = np.full((len(rows) * cell[0] + _GAP, columns * cell[1] + _GAP, 3), GROUND, np.uint8)
    for line, row in enumerate(rows):
        for column, picture in enumerate(row):
            top, left = line * cell[0] + _GAP, column * cell[1] + _GAP
            if frames is not None:
                sheet[top : top + cell[0] - _GAP, left : left + cell[1] - _GAP] = frames[line][column]
            enlarged = picture.repeat(zoom, axis=0).repeat(zoom, axis=1)
            top, left = top + margin, left + margin
            sheet[top : top + height * zoom, left : left + width * zoom] = enlarged
    buffer = io.BytesIO()
    Image.fromarray(sheet).save(buffer, format="PNG")
    return buffer.getvalue()
