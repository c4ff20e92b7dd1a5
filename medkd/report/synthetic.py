"""Pictures of generated images: the last sheet of samples, and the ranked contact sheet of the pool."""

from __future__ import annotations

from base64 import b64encode
from pathlib import Path

from medkd.errors import InputError

SHEETS_FOLDER, CONTACT_SHEET = "samples", Path("pool", "contact_sheet.png")
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def find_sheets(run_dir: Path) -> list[Path]:
    """The sheet of the last epoch and the contact sheet, where a run has them."""
    found = sorted((run_dir / SHEETS_FOLDER).glob("epoch-*.png"))[-1:]
    contact = run_dir / CONTACT_SHEET
    return [*found, *([contact] if contact.is_file() else [])]


def synthetic_gallery(sheets: list[Path]) -> list[dict[str, str]]:
    """The pictures as a page holds them: title, caption, alternative text and data URI.

    Raises:
        InputError: a file is not a PNG.
    """
    shown = []
    for path in sheets:
        content = path.read_bytes()
        if not content.startswith(_PNG_SIGNATURE):
            raise InputError(path, "is not a PNG", "train again, or remove it to leave the picture out")
        is_pool = path.name == CONTACT_SHEET.name
        title = "The pool, ranked" if is_pool else f"Samples, {path.stem.replace('-', ' ')}"
        caption = (
            "Three rows for each class, at even steps of the ranking by distance from the real images, nearest first; "
            "framed in green: kept."
            if is_pool
            else "For each class a row of real images, then a row of generated ones."
        )
        data = "data:image/png;base64," + b64encode(content).decode("ascii")
        shown.append({"title": title, "caption": caption, "alt": f"{title}: {caption}", "data": data})
    return shown
