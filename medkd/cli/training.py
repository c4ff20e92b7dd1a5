"""quickstart, methods, train, report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from medkd.cli.options import Device, Json, Overwrite, Quiet, Seed, Trust, Verbose

RunDir = Annotated[Path | None, typer.Option(metavar="DIR", show_default=False, help="Default: runs/<bundle>-<time>.")]


def quickstart(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for everything it writes.")] = Path("quickstart"),
    device: Device = "auto",
    seed: Seed = 0,
    json_output: Json = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """Run the main job on real MRI, in a few minutes.

    Needs no data and no GPU: under 5 minutes on 2 CPU cores, on virtual patients made from the MNI152 MRI.

    Trains a teacher, then a small student with ACT-Net from few labels beside a supervised student of the same size,
    evaluates both on held-out data, and writes a run folder, a bundle, predictions and report.html.
    """
    from medkd.cli import output
    from medkd.workflows.quickstart import quickstart as run

    output.start_logging(verbose, quiet)
    result = run(out, device=device, seed=seed)
    if json_output:
        output.print_json(result)
        return
    columns = list(result["rows"][0])
    output.print_table(
        [column if column == "arm" else f">{column}" for column in columns],
        [[_quickstart_cell(column, row[column]) for column in columns] for row in result["rows"]],
    )
    output.print_line(f"The student is {result['ratio']}× smaller than its teacher; {result['seconds']} s in all.")
    output.print_line()
    output.print_facts([("report", result["report"]), ("bundle", result["bundle"])])
    output.print_line()
    output.print_line("What to do next", style="bold")
    for line in result["next"]:
        output.print_line(f"  {line}")


def _quickstart_cell(column: str, value: Any) -> Any:
    from medkd.cli import output

    return output.count_text(value) if column == "parameters" else value


def methods(
    name: Annotated[str | None, typer.Argument(metavar="NAME", show_default=False, help="One method.")] = None,
    json_output: Json = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """List the methods: paper, task, streams."""
    from medkd.cli import output

    output.start_logging(verbose, quiet)
    from medkd.workflows.methods import find_method, list_methods

    cards = list_methods() if name is None else find_method(name)
    if json_output:
        output.print_json(cards)
    elif name is None:
        output.print_table(
            ["method", "paper", "task", "streams"],
            [[card.name, card.paper, card.task, _streams(card)] for card in cards],
        )
        output.print_line()
        output.print_line("`medkd methods NAME` says more about one.", style="dim")
    else:
        for card in cards:
            output.print_facts(
                [
                    ("paper", card.paper),
                    ("does", card.summary),
                    ("task", card.task),
                    ("streams", _streams(card)),
                    ("trains", card.roles),
                    ("needs, frozen", card.frozen or "nothing"),
                    ("bundles", card.bundles or "none"),
                    ("page", card.page),
                    *[("" if position else "differs", f"– {text}") for position, text in enumerate(card.differs)],
                ],
                title=card.class_name,
            )


def _streams(card: Any) -> str:
    return ", ".join([*card.streams, *(f"[{stream}]" for stream in card.optional_streams)])


def train(
    config_or_bundle: Annotated[
        Path,
        typer.Argument(
            metavar="CONFIG_OR_BUNDLE", show_default=False, help="A bundle's folder or name, or a train.json."
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", show_default=False, help="As train::trainer::max_epochs=5."),
    ] = None,
    overlay: Annotated[
        list[Path] | None,
        typer.Option(metavar="NAME|FILE", show_default=False, help="Another configs/*.json of the bundle, on top."),
    ] = None,
    run_dir: RunDir = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where the run in --run-dir stopped.")] = False,
    overwrite: Overwrite = False,
    fold: Annotated[
        int | None, typer.Option(min=0, metavar="K", show_default=False, help="The fold to hold out.")
    ] = None,
    devices: Annotated[int, typer.Option(min=1, metavar="N", help="Training processes.")] = 1,
    device: Device = "auto",
    seed: Annotated[
        int | None, typer.Option(min=0, metavar="S", show_default=False, help="In place of the bundle's own.")
    ] = None,
    trust: Trust = None,
    json_output: Json = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """Train a bundle into a run folder.

    The run folder holds checkpoints, metrics, a report and the deployable bundle. A run that was stopped goes on with
    --resume.
    """
    from medkd.cli import output
    from medkd.cli.overrides import parse_overrides

    output.start_logging(verbose, quiet)
    values = parse_overrides(overrides or [])
    from medkd.workflows.train import train as run

    folder = run(
        config_or_bundle,
        values,
        overlays=overlay or [],
        run_dir=run_dir,
        resume=resume,
        overwrite=overwrite,
        fold=fold,
        devices=devices,
        device=device,
        seed=seed,
        trust=trust,
    )
    if json_output:
        output.print_json({"run_dir": folder})
    else:
        output.print_line(str(folder))


def report(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", show_default=False, help="A run folder.")],
    json_output: Json = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """Rebuild report.html from a run folder."""
    from medkd.cli import output

    output.start_logging(verbose, quiet)
    from medkd.report import write_report

    path = write_report(run_dir)
    if json_output:
        output.print_json({"report": path})
    else:
        output.print_line(str(path))
