"""bundle list, copy, check."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from medkd.cli.exits import visible
from medkd.cli.help import CalmCommand, CalmGroup
from medkd.cli.options import Json, Quiet, Trust, Verbose

if TYPE_CHECKING:
    from medkd.deploy.trust import Code

app = typer.Typer(
    name="bundle", cls=CalmGroup, help="List, copy and check MONAI bundles.", no_args_is_help=True,
    rich_markup_mode=None,
)  # fmt: skip


@app.command("list", cls=CalmCommand)
def list_bundles(json_output: Json = False, verbose: Verbose = 0, quiet: Quiet = False) -> None:
    """List the bundles medkd ships."""
    from medkd.cli import output

    output.start_logging(verbose, quiet)
    from medkd.workflows.bundles import list_bundles as find

    bundles = find()
    if json_output:
        output.print_json(bundles)
        return
    output.print_table(
        ["bundle", "task", "version"], [[bundle.name, bundle.task, bundle.version] for bundle in bundles]
    )
    output.print_line()
    output.print_line("`medkd bundle copy NAME DIR` gives you your own to edit.", style="dim")


@app.command("copy", cls=CalmCommand)
def copy_bundle(
    name: Annotated[str, typer.Argument(metavar="NAME", show_default=False, help="As `bundle list` shows it.")],
    out: Annotated[Path, typer.Argument(metavar="DIR", show_default=False, help="The folder to write.")],
    json_output: Json = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """Copy a shipped bundle, to edit or train it."""
    from medkd.cli import output

    output.start_logging(verbose, quiet)
    from medkd.workflows.bundles import copy_bundle as copy

    path = copy(name, out)
    if json_output:
        output.print_json({"bundle": path})
    else:
        output.print_line(str(path))


@app.command("check", cls=CalmCommand)
def check_bundle(
    folder: Annotated[Path, typer.Argument(metavar="DIR", show_default=False, help="A bundle folder.")],
    trust: Trust = None,
    json_output: Json = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """Verify a bundle offline, and list every piece of code it would run."""
    from medkd.cli import output

    output.start_logging(verbose, quiet)
    from rich.text import Text

    from medkd.workflows.bundles import check_bundle as check

    report = check(folder, trust=trust)
    if json_output:
        output.print_json(report)
    else:
        styles = {"ok": "green", "note": "dim", "finding": "bold red"}
        output.print_table(
            ["check", "", "found"],
            [[check.name, Text(check.state, style=styles[check.state]), check.message] for check in report.checks],
        )
        beyond = [code for code in report.code if code.problem]
        _print_code(beyond if quiet else report.code)
        output.print_line()
        output.print_line(f"{len(report.code)} pieces of code, {len(beyond)} beyond the allow-list")
        output.print_line(f"sha256 of all files: {report.sha256 or 'none, since it holds links'}")
    if report.findings:
        raise typer.Exit(1)


def _print_code(code: list[Code]) -> None:
    """Print code by file, what needs trust in red with the reason."""
    from rich.text import Text

    from medkd.cli import output

    files: dict[str, list[tuple[str, Text]]] = {}
    for piece in code:
        file, _, item = piece.where.partition(" ")
        text = Text(visible(piece.text), style="bold red" if piece.problem else "")
        if piece.problem:
            text.append(f"\n→ {visible(piece.problem)}", style="red")
        files.setdefault(file, []).append((item or piece.kind, text))
    for file, rows in files.items():
        output.print_line()
        output.print_facts(rows, title=visible(file))
