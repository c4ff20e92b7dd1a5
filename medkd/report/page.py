"""One self-contained HTML page: rendering it, writing it, and what every page says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

import medkd

LIMITS = (
    "Research software, not a medical device. Nothing here shows that a model is safe or useful in a patient's care; "
    "the numbers hold for the data named above and may not carry over to other scanners, sites or diseases.",
)


def render(template: str, context: Mapping[str, Any]) -> str:
    """A page from a template; every name that comes from a file is escaped."""
    environment = Environment(
        loader=PackageLoader("medkd.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(template).render(version=medkd.__version__, **context)


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    from medkd.data.atomic import atomic_write  # here, since medkd.data imports MONAI, which takes seconds

    with atomic_write(path, "w") as file:
        file.write(text)


def marked(plots: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The plots with their SVG declared as markup: matplotlib has escaped the text in it."""
    return [{**plot, "svg": Markup(plot["svg"])} for plot in plots]


def distinct_names(first: Path, second: Path) -> tuple[str, str]:
    """The folders' names, with their parents where the names are the same."""
    a, b = first.resolve(), second.resolve()
    if a.name != b.name:
        return a.name, b.name
    if a.parent.name != b.parent.name:
        return f"{a.parent.name}/{a.name}", f"{b.parent.name}/{b.name}"
    return f"A {a.name}", f"B {b.name}"
