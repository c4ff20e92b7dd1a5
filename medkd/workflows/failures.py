"""Cases that failed while the others went on."""

from __future__ import annotations

import csv
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from medkd.data.atomic import atomic_write
from medkd.errors import ConfigError, MedkdError

logger = logging.getLogger(__name__)

FAILURES_FILE = "failures.csv"


@dataclass(frozen=True)
class Failure:
    """One case that failed.

    Attributes:
        case: its name.
        file: what it was read from; empty when outputs are de-identified.
        error: what happened, in one line.
    """

    case: str
    file: str
    error: str


def write_failures(folder: Path, failures: Sequence[Failure]) -> None:
    """Write failures.csv, or remove an old one when nothing failed."""
    path = folder / FAILURES_FILE
    if not failures:
        path.unlink(missing_ok=True)
        return
    with atomic_write(path) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["case", "file", "error"])
        writer.writerows([failure.case, failure.file, failure.error] for failure in failures)


def one_line(error: BaseException) -> str:
    """What a user should read about an error."""
    if isinstance(error, MedkdError):
        return str(error)
    if is_out_of_memory(error):
        return "does not fit into memory; use a smaller inferer roi_size or sw_batch_size, or another --device"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}" + (f": {error.filename}" if error.filename else "")
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the machine or the device ran out of memory."""
    # torch's own error by its name: commands over slides and tables need not import torch for it.
    named = type(error).__name__ == "OutOfMemoryError"
    return named or isinstance(error, MemoryError) or "not enough memory" in str(error)


def names_nothing(text: str, path: Path) -> bool:
    """Whether a message holds no part of a path and nothing like a UID or a date."""
    parts = {part for piece in path.parts for part in (piece, piece.split(".")[0]) if len(part) > 2}
    return not any(part.lower() in text.lower() for part in parts) and not re.search(r"\d+(\.\d+){3,}|\d{6,}|/", text)


def prepare_out(out: Path, *, overwrite: bool = False) -> None:
    """Make an output folder that is absent, empty, or may be written over.

    Raises:
        ConfigError: If it holds files and ``overwrite`` is False, or cannot be made.
    """
    if out.exists() and not out.is_dir():
        raise ConfigError(out, "is a file", "choose a folder")
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise ConfigError(out, "is not empty", "choose another folder, or pass --overwrite")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(out, f"cannot be made ({error.strerror})", "choose another folder") from None


def note(failures: list[Failure], failure: Failure) -> None:
    """Keep a failure and tell the user at once."""
    failures.append(failure)
    logger.error("%s: %s", failure.case, failure.error)
