"""What commands print: results to stdout, everything else to stderr."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from medkd.cli.exits import visible

_WIDTH_OF_A_PIPE = 240  # wide enough that nothing is cut where no terminal sets the width


def start_logging(verbose: int = 0, quiet: bool = False) -> None:
    """Send log lines to stderr: ours from INFO on, those of libraries only with ``-v``."""
    own = logging.ERROR if quiet else logging.INFO if verbose == 0 else logging.DEBUG
    others = [logging.ERROR, logging.WARNING, logging.DEBUG][min(verbose, 2)]
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_VisibleFormatter("%(message)s" if verbose == 0 else "%(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    for former in [former for former in root.handlers if getattr(former, "is_medkd", False)]:
        root.removeHandler(former)
    handler.is_medkd = True  # type: ignore[attr-defined]
    root.addHandler(handler)
    root.setLevel(others)
    logging.getLogger("medkd").setLevel(own)
    if verbose == 0:
        warnings.simplefilter("ignore")


class _VisibleFormatter(logging.Formatter):
    """Messages may quote files, and files may hold terminal codes."""

    def format(self, record: logging.LogRecord) -> str:
        return visible(super().format(record))


def print_json(content: Any) -> None:
    """Print one JSON document; what is not finite is null."""
    sys.stdout.write(json.dumps(to_json(content), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def to_json(value: Any) -> Any:
    """Plain JSON values of dataclasses, paths, mappings and sequences."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_json(part) for key, part in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [to_json(part) for part in value]
    if isinstance(value, bool | int | str | None):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if hasattr(value, "item") and not isinstance(value, Path):
        return to_json(value.item())
    return str(value)


def print_table(columns: Sequence[str], rows: Iterable[Sequence[Any]], *, title: str = "") -> None:
    """Print a table; columns whose name starts with ``>`` are numbers and align to the right."""
    table = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        show_edge=False,
        title=title or None,
        title_justify="left",
        title_style="bold",
    )
    for column in columns:
        is_number = column.startswith(">")
        table.add_column(
            column.removeprefix(">"),
            justify="right" if is_number else "left",
            no_wrap=is_number,
            overflow="fold",
            header_style="bold",
        )
    for row in rows:
        table.add_row(*(cell if isinstance(cell, Text) else Text(cell_text(cell)) for cell in row))
    _print(table)


def print_facts(facts: Iterable[tuple[str, Any]], *, title: str = "", name_width: int | None = None) -> None:
    """Print names and values in two columns."""
    table = _table(title)
    table.add_column(style="dim", no_wrap=True, min_width=name_width)
    table.add_column(overflow="fold")
    for name, value in facts:
        table.add_row(Text(visible(str(name))), value if isinstance(value, Text) else Text(cell_text(value)))
    _print(table)


def _table(title: str) -> Table:
    return Table(
        box=None, show_header=False, pad_edge=False, title=title or None, title_justify="left", title_style="bold"
    )


def _print(table: Table) -> None:
    """Print a table without the blank lines and trailing blanks that rich pads it with."""
    target = console()
    with target.capture() as capture:
        target.print(table)
    lines = [line.rstrip() for line in capture.get().splitlines()]
    sys.stdout.write("\n".join(lines).strip("\n") + "\n")


def print_line(text: str = "", *, style: str = "") -> None:
    """Print one line as it is."""
    console().print(Text(visible(text), style=style), soft_wrap=True)


def cell_text(value: Any) -> str:
    """How a value is shown in a table."""
    if value is None:
        return "–"
    if isinstance(value, float):
        return "–" if math.isnan(value) else "∞" if math.isinf(value) else f"{value:.3f}"
    if isinstance(value, list | tuple):
        return visible(", ".join(str(part) for part in value))
    return visible(str(value))


def signed(value: float, decimals: int = 3) -> str:
    """A difference with its sign."""
    return "–" if not math.isfinite(value) else f"{value:+.{decimals}f}".replace("-", "−")


def count_text(value: int | float | None) -> str:
    """A large count with a unit: 124.4 M."""
    if value is None:
        return "–"
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.3g} {unit}"
    return f"{value:.0f}"


def bytes_text(value: int | float | None) -> str:
    """A size in kB, MB or GB (powers of 1000)."""
    if value is None:
        return "–"
    limit, unit = next((pair for pair in ((1e9, "GB"), (1e6, "MB")) if value >= pair[0]), (1e3, "kB"))
    return f"{value / limit:.3g} {unit}"


def console() -> Console:
    """The console of stdout as it is now; wide where it is not a terminal."""
    wide = None if sys.stdout.isatty() else _WIDTH_OF_A_PIPE
    return Console(file=sys.stdout, highlight=False, width=wide, emoji=False, markup=False)
