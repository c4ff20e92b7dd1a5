"""Pictures of a translator: the image, its translation, and what comes back of it."""

from __future__ import annotations

import io
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure

from medkd.errors import InputError
from medkd.report.overlays import BACKDROP, FAINT, INK, STYLE

TRANSLATIONS_FILE = "translations.npz"
DIRECTIONS = ("to_target", "to_source")
MAX_SAMPLES = 4
PANEL_INCHES = 1.9
DPI = 110


@dataclass(frozen=True)
class Sample:
    """One slice: ``images`` (3, H, W) in [-1, 1] as displayed: the slice, its translation, the translation back."""

    case: str
    images: npt.NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Translated:
    """The slices of one direction, from the domain ``source`` to the domain ``target``."""

    source: str
    target: str
    samples: list[Sample]


def read_translations(path: Path) -> list[Translated]:
    """Read what training kept of both directions; an absent file gives none.

    Raises:
        InputError: the file is damaged or holds something else.
    """
    if not path.is_file():
        return []
    try:
        with np.load(path, allow_pickle=False) as content:
            domains = [str(name) for name in content["domains"]]
            found = []
            for direction, (source, target) in zip(DIRECTIONS, (domains, domains[::-1]), strict=True):
                cases = [str(case) for case in content[f"cases_{direction}"]]
                samples = [
                    Sample(case, np.asarray(content[f"{direction}_{number}"], dtype=np.float32))
                    for number, case in enumerate(cases[:MAX_SAMPLES])
                ]
                if any(sample.images.ndim != 3 or len(sample.images) != 3 for sample in samples):
                    raise ValueError("a sample is not three pictures")
                found.append(Translated(source, target, samples))
    except (OSError, ValueError, KeyError, BadZipFile) as error:
        raise InputError(
            path, f"cannot be read ({error})", "train again, or remove it to leave the pictures out"
        ) from None
    return [translated for translated in found if translated.samples]


def translation_gallery(translations: Sequence[Translated]) -> list[dict[str, str]]:
    """The pictures as a page holds them: caption, alternative text and data URI."""
    return [
        {
            "title": f"{translated.source} to {translated.target}",
            "caption": "Top to bottom: " + ", ".join(sample.case for sample in translated.samples),
            "alt": f"{translated.source} slices, their translations to {translated.target}, and the way back",
            "data": "data:image/png;base64," + b64encode(draw_translations(translated)).decode("ascii"),
        }
        for translated in translations
    ]


def draw_translations(translated: Translated) -> bytes:
    """A row for each sample: image, translation, translation back, all from black at -1 to white at 1.

    Returns: a PNG file's bytes, equal for equal input.
    """
    titles = (translated.source, f"translated to {translated.target}", f"back to {translated.source}")
    ratios = [sample.images.shape[1] / sample.images.shape[2] for sample in translated.samples]
    gap, top = 0.05, 0.3
    width = 3 * PANEL_INCHES + 4 * gap
    height = top + sum(PANEL_INCHES * ratio + gap for ratio in ratios)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(width, height), dpi=DPI, facecolor=BACKDROP)
        upper = height - top
        for sample, ratio in zip(translated.samples, ratios, strict=True):
            upper -= PANEL_INCHES * ratio
            for column, image in enumerate(sample.images):
                left = gap + column * (PANEL_INCHES + gap)
                box = (left / width, upper / height, PANEL_INCHES / width, PANEL_INCHES * ratio / height)
                axes = figure.add_axes(box)
                axes.imshow(np.nan_to_num(image), cmap="gray", vmin=-1, vmax=1, interpolation="nearest", aspect="auto")
                axes.set_axis_off()
            upper -= gap
        for column, title in enumerate(titles):
            left = gap + column * (PANEL_INCHES + gap)
            color = INK if column == 1 else FAINT
            figure.text(left / width, 1 - 0.08 / height, title, color=color, fontsize=9.5, va="top", weight="bold")
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", facecolor=BACKDROP, metadata={"Software": None})
    return buffer.getvalue()
