"""What a classifier's training needs of its images beyond what a datalist's check knows."""

from __future__ import annotations

from typing import Any

import torch
from monai.bundle import ConfigParser
from PIL import Image

from medkd.data.datalists import Datalist
from medkd.data.tile_images import is_tile_image, read_tile_image
from medkd.errors import ConfigError, InputError


def require_one_size(parser: ConfigParser, datalist: Datalist) -> None:
    """Refuse images that the configuration's normalization leaves in several sizes: they make no batch.

    Args:
        parser: a training configuration.
        datalist: its images, readable.

    Raises:
        ConfigError: naming two images and the sizes they come out in.
        InputError: naming an image that the normalization fails on.
    """
    if "normalization" not in parser:
        return
    first_of_size: dict[tuple[int, int], str] = {}
    for section in ("training", "unlabeled", "validation"):
        for case in datalist.cases(section):
            path = str(datalist.resolve(case.image))
            if is_tile_image(path):
                with Image.open(path) as image:
                    first_of_size.setdefault(image.size, path)
    if len(first_of_size) < 2:
        return
    steps = parser.get_parsed_content("normalization")
    found: dict[tuple[int, ...], str] = {}
    for path in first_of_size.values():
        found.setdefault(_size_after(steps, path), path)
    if len(found) > 1:
        (one, first), (two, second), *_ = found.items()
        problem = f"leaves {first} at {_text(one)} px and {second} at {_text(two)} px, which make no batch"
        raise ConfigError("normalization", problem, "add a step that resizes (monai.transforms.Resized)")


def _size_after(steps: Any, path: str) -> tuple[int, ...]:
    item: Any = {"image": torch.from_numpy(read_tile_image(path)).permute(2, 0, 1)}
    try:
        for step in steps:
            item = step(item)
    except Exception as error:
        cause = error.__cause__ or error
        lines = str(cause).splitlines() or [type(cause).__name__]
        raise InputError(path, f"the normalization fails on it ({lines[0]})", "correct one of the two") from error
    return tuple(item["image"].shape[1:])


def _text(shape: tuple[int, ...]) -> str:
    return " x ".join(str(side) for side in reversed(shape))
