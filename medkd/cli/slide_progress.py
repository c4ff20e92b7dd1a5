"""A view of a batch of slides, one bar for each at work; on a terminal only, elsewhere the log lines must do."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

from medkd.cli.exits import visible


class TerminalView:
    """Bars on stderr that come and go with the slides; finished slides are told of by the log lines above them."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.bars: dict[str, TaskID] = {}

    def started(self, name: str) -> None:
        """Show a slide."""
        self._remove(name)
        self.bars[name] = self.progress.add_task("", total=None, slide=Text(visible(name)))

    def progressed(self, name: str, done: int, total: int) -> None:
        """Move its bar."""
        if name in self.bars:
            self.progress.update(self.bars[name], completed=done, total=total)

    def died(self, name: str, deaths: int) -> None:
        """Take it away until another worker begins it."""
        self._remove(name)

    def ended(self, record: Any) -> None:
        """Take it away."""
        self._remove(record.name)

    def _remove(self, name: str) -> None:
        if name in self.bars:
            self.progress.remove_task(self.bars.pop(name))


class _SlideColumn(TextColumn):
    def __init__(self) -> None:
        super().__init__("")

    def render(self, task: Any) -> Text:
        """The slide's name."""
        name: Text = task.fields["slide"]
        return name


@contextmanager
def watching(*, quiet: bool = False) -> Iterator[TerminalView | None]:
    """Show bars while the block runs, and log lines above them; nothing where stderr is no terminal.

    Yields:
        The view to give to a batch.
    """
    if quiet or not sys.stderr.isatty():
        yield None
        return
    console = Console(file=sys.stderr, highlight=False, emoji=False, markup=False)
    columns = (_SlideColumn(), BarColumn(), MofNCompleteColumn(), TextColumn("tiles"), TimeElapsedColumn())
    handlers = [handler for handler in logging.getLogger().handlers if getattr(handler, "is_medkd", False)]
    with Progress(*columns, console=console, transient=True, refresh_per_second=4) as progress:
        for handler in handlers:
            handler.setStream(sys.stderr)  # type: ignore[attr-defined]  # rich's, which prints above the bars
        try:
            yield TerminalView(progress)
        finally:
            for handler in handlers:
                handler.setStream(console.file)  # type: ignore[attr-defined]
