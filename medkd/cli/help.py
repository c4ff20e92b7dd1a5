"""Help pages in plain lines: commands in groups before the options, no boxes, no types."""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand, TyperGroup

START, DATA, TRAIN, USE = HEADINGS = ("Start", "Data", "Train and evaluate", "Use and share")


class CalmGroup(TyperGroup):
    """A group whose help lists its commands under the headings they were registered with."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the commands, then the options."""
        headings: dict[str, list[tuple[str, str]]] = {heading: [] for heading in HEADINGS}
        for name in self.list_commands(ctx):
            command = self.get_command(ctx, name)
            if command is None or command.hidden:
                continue
            heading = getattr(command, "rich_help_panel", None)
            heading = heading if isinstance(heading, str) else "Commands"
            headings.setdefault(heading, []).append((name, command.get_short_help_str(limit=formatter.width)))
        _write_sections(formatter, {**headings, "Options": _records(self, ctx, "option")})


class CalmCommand(TyperCommand):
    """A command whose help names its arguments and options without their types."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the arguments, then the options."""
        _write_sections(
            formatter, {"Arguments": _records(self, ctx, "argument"), "Options": _records(self, ctx, "option")}
        )


def _records(command: Any, ctx: Any, kind: str) -> list[tuple[str, str]]:
    """(Name, help) of every parameter of a kind."""
    found = []
    for parameter in command.get_params(ctx):
        record = parameter.get_help_record(ctx)
        if record is None or parameter.param_type_name != kind:
            continue
        name, text = record
        if kind == "argument":  # the usage line shows which arguments are required
            name, text = name.split(" <")[0], text.replace("[required]", "").rstrip()
        found.append((name, text))
    return found


def _write_sections(formatter: Any, sections: dict[str, list[tuple[str, str]]]) -> None:
    """Write sections whose second columns line up."""
    width = max((len(name) for rows in sections.values() for name, _ in rows), default=0)
    for heading, rows in sections.items():
        if rows:
            with formatter.section(heading):
                formatter.write_dl([(name.ljust(width), text) for name, text in rows], col_max=width + 2)
