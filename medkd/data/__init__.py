"""From files on disk to batches: datalists, volumes, streams and the embedded demo."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from medkd.data.datalists import Datalist, read_datalist
    from medkd.data.demo import demo_mri
    from medkd.data.demo_contrasts import demo_two_contrasts
    from medkd.data.slide_demo import demo_slide
    from medkd.data.streams import Stream, Streams

__all__ = ["Datalist", "Stream", "Streams", "demo_mri", "demo_slide", "demo_two_contrasts", "read_datalist"]

# Loaded when first used: streams need torch and MONAI, which a command that only writes a file should not wait for.
_HOMES = {
    "Datalist": "datalists",
    "Stream": "streams",
    "Streams": "streams",
    "demo_mri": "demo",
    "demo_slide": "slide_demo",
    "demo_two_contrasts": "demo_contrasts",
    "read_datalist": "datalists",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
