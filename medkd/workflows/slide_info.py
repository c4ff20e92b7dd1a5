"""``medkd slide info``: what a slide's file says of the slide."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image

from medkd.data.atomic import atomic_write
from medkd.errors import ConfigError
from medkd.wsi.slides import Slide

THUMBNAIL_PX = 1024


def slide_info(
    slide: str | Path, *, slide_mpp: float | None = None, thumbnail: str | Path | None = None
) -> dict[str, Any]:
    """What a slide's file says of it, and on request a small picture; never names, dates, label or macro image.

    Args:
        slide: the file.
        slide_mpp: µm per level-0 pixel, in place of what the file says.
        thumbnail: a PNG to write.

    Raises:
        InputError: the slide cannot be read.
        ConfigError: ``thumbnail`` cannot be written.
    """
    with Slide(slide, mpp=slide_mpp) as opened:
        facts = opened.facts()
        if thumbnail is not None:
            path = Path(thumbnail)
            if path.suffix.lower() != ".png" or not path.parent.is_dir():
                raise ConfigError("--thumbnail", f"{path} cannot be written", "name a .png file in an existing folder")
            with atomic_write(path, "wb") as file:
                Image.fromarray(opened.thumbnail(THUMBNAIL_PX)).save(file, format="PNG")
    return facts
