"""Options and arguments that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
Verbose = Annotated[int, typer.Option("--verbose", "-v", count=True, show_default=False, help="Say more; -vv: all.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print errors and results only.")]
Device = Annotated[str, typer.Option(metavar="NAME", help="auto, cpu, cuda or cuda:N.")]
Seed = Annotated[int, typer.Option(min=0, metavar="S", help="Of every random choice.")]
Trust = Annotated[
    str | None,
    typer.Option(metavar="SHA256", show_default=False, help="The bundle's hash, from `medkd bundle check`."),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Write into a folder that is not empty.")]
DatasetDir = Annotated[
    Path | None,
    typer.Option(metavar="DIR", show_default=False, help="Where the datalist's paths start, if not at its folder."),
]
Model = Annotated[Path, typer.Argument(metavar="MODEL", show_default=False, help="A bundle folder, or a run folder.")]
Models = Annotated[
    list[Path], typer.Argument(metavar="MODEL", show_default=False, help="Bundle folders, or run folders.")
]
OutFolder = Annotated[Path, typer.Option("--out", metavar="DIR", show_default=False, help="Folder for the results.")]
