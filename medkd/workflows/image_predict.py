"""``medkd predict`` with a classifier: photographs and tiles to one table of class probabilities."""

from __future__ import annotations

import csv
import logging
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from medkd.data.atomic import atomic_write
from medkd.data.tile_images import TILE_SUFFIXES, is_tile_image
from medkd.deploy.bundle import LoadedBundle
from medkd.deploy.predict_images import classify_images, require_classifier
from medkd.errors import ConfigError, InputError, MedkdError
from medkd.metrics.image_scores import PROBABILITY
from medkd.workflows.failures import (
    Failure,
    is_out_of_memory,
    names_nothing,
    note,
    one_line,
    prepare_out,
    write_failures,
)

logger = logging.getLogger(__name__)

PREDICTIONS_FILE = "predictions.csv"
_WITHHELD = "cannot be used; predict on it without --deidentify to see why"


@dataclass(frozen=True)
class ImageSource:
    """One image to classify: where it lies, and what the table calls it."""

    path: Path
    name: str


def predict_images(
    bundle: LoadedBundle,
    inputs: Sequence[str | Path],
    out: Path,
    *,
    deidentify: bool = False,
    overwrite: bool = False,
) -> tuple[list[Path], list[Failure]]:
    """Write ``predictions.csv`` (file, prob_<class> for every class, label) and, if images failed, failures.csv.

    Args:
        bundle: a loaded bundle that classifies.
        inputs: image files, and folders that are searched with their sub-folders.
        out: output folder; must be absent or empty unless ``overwrite``.
        deidentify: name the images case-0001, …; no file name anywhere.
        overwrite: allow a folder that is not empty.

    Returns:
        the table, none where no image could be classified, and the failures.

    Raises:
        ConfigError, InputError: bundle, inputs or folder cannot be used; nothing was written.
    """
    names = require_classifier(bundle)
    sources = find_images(inputs, deidentify=deidentify)
    prepare_out(out, overwrite=overwrite)
    start = time.perf_counter()
    rows: list[list[str]] = []
    failures: list[Failure] = []
    results = classify_images(bundle, [source.path for source in sources])
    for source, result in zip(sources, results, strict=True):
        if isinstance(result, Exception):
            note(failures, _failure(source, result, deidentify=deidentify))
            continue
        rows.append([source.name, *(f"{value:.6f}" for value in result), names[int(result.argmax())]])
    written: list[Path] = []
    path = out / PREDICTIONS_FILE
    if rows:
        with atomic_write(path) as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["file", *(PROBABILITY + names[index] for index in sorted(names)), "label"])
            writer.writerows(rows)
        written = [path]
    else:
        path.unlink(missing_ok=True)  # that of an earlier run would pass for this one's
    write_failures(out, failures)
    logger.info("%d images in %.1f s", len(rows), time.perf_counter() - start)
    return written, failures


def find_images(inputs: Sequence[str | Path], *, deidentify: bool = False) -> list[ImageSource]:
    """The images behind the inputs of ``predict``, each once, named as the user named them.

    Raises:
        InputError: an input that does not exist, or a folder without an image.
    """
    found: dict[Path, str] = {}
    for given in inputs:
        path = Path(given)
        if not path.exists():
            raise InputError(given, "does not exist", "check the path")
        files = list(_images(path)) if path.is_dir() else [path]
        if not files:
            raise InputError(given, "holds no image", f"name a folder with {', '.join(TILE_SUFFIXES)} files")
        for file in files:
            found.setdefault(Path(os.path.abspath(file)), str(file))
    return [
        ImageSource(path, f"case-{number:04d}" if deidentify else name)
        for number, (path, name) in enumerate(found.items(), start=1)
    ]


def refuse_volume_options(path: Path, output_format: str, series: str | None) -> None:
    """Refuse options of ``predict`` that mean nothing for a classifier.

    Raises:
        ConfigError: naming the option.
    """
    for option, given in (("--format", output_format != "nifti"), ("--series", series is not None)):
        if given:
            raise ConfigError(option, f"{path} classifies images into a CSV file", "leave it out")


def _images(folder: Path) -> Iterator[Path]:
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(parent, name) for name in sorted(names) if is_tile_image(name) and not name.startswith("."))


def _failure(source: ImageSource, error: Exception, *, deidentify: bool) -> Failure:
    if not isinstance(error, MedkdError) and not is_out_of_memory(error):
        logger.debug("%s failed", source.name, exc_info=error if not deidentify else None)
    if not deidentify:
        return Failure(source.name, str(source.path), one_line(error))
    text = f"{error.problem}; {error.remedy}" if isinstance(error, MedkdError) else type(error).__name__
    return Failure(source.name, "", " ".join(text.split()) if names_nothing(text, source.path) else _WITHHELD)
