"""Whole slides: reading them at any resolution, tiling them, and running networks over them."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from medkd.wsi.grid import TileGrid
    from medkd.wsi.predict import predict_slide
    from medkd.wsi.slides import Slide

__all__ = ["Slide", "TileGrid", "predict_slide"]

# Loaded when first used: prediction needs torch, which reading a slide does not.
_HOMES = {"Slide": "slides", "TileGrid": "grid", "predict_slide": "predict"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
