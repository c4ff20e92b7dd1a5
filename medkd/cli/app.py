"""The commands of ``medkd`` and what its help says about them."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from medkd.cli import bundle, data, install, models, slides, training
from medkd.cli.help import DATA, START, TRAIN, USE, CalmCommand, CalmGroup

_ABOUT = """Small, label-cheap, portable networks for medical images.

New here? `medkd quickstart` runs the main job on real MRI in a few minutes.
"""


def _show_version(wanted: bool) -> None:
    if wanted:
        from medkd import __version__

        typer.echo(f"medkd {__version__}")
        raise typer.Exit


def _about(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Options of ``medkd`` itself."""


def command() -> Any:
    """The whole command line, ready to be called."""
    app = typer.Typer(
        name="medkd",
        help=_ABOUT,
        cls=CalmGroup,
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["--help", "-h"]},
    )
    app.callback()(_about)
    for panel, functions in (
        (START, (training.quickstart, training.methods, install.doctor)),
        (TRAIN, (training.train, models.evaluate, models.compare, training.report)),
        (USE, (models.predict, models.export, models.profile)),
    ):
        for function in functions:
            app.command(cls=CalmCommand, rich_help_panel=panel, **_settings(function))(function)
    app.add_typer(data.app, rich_help_panel=DATA)
    app.add_typer(slides.app, rich_help_panel=USE)
    app.add_typer(bundle.app, rich_help_panel=USE)
    return typer.main.get_command(app)


def _settings(function: Any) -> dict[str, Any]:
    # train takes KEY=VALUE words, among which a mistaken --key is explained rather than just refused.
    return {"context_settings": {"ignore_unknown_options": True}} if function is training.train else {}
