"""data list, show, fetch, prepare, make, check, split."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, cast

import typer

from medkd.cli.help import CalmCommand, CalmGroup
from medkd.cli.options import DatasetDir, Json, Quiet, Seed, Verbose

if TYPE_CHECKING:
    from medkd.data.datalists import Datalist

app = typer.Typer(
    name="data",
    cls=CalmGroup,
    help="Find, list, check and split datasets.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Name = Annotated[str, typer.Argument(metavar="NAME", show_default=False, help="As `data list` shows it.")]
Root = Annotated[Path, typer.Option(metavar="DIR", show_default=False, help="The dataset's folder.")]
OutFile = Annotated[Path, typer.Option("--out", metavar="F", show_default=False, help="The datalist to write.")]
Datalists = Annotated[Path, typer.Argument(metavar="DATALIST", show_default=False, help="A datalist.")]
Labeled = Annotated[
    str | None,
    typer.Option(
        metavar="N|N%", show_default=False, help="Training patients that keep their labels; others: unlabeled."
    ),
]
Share = Annotated[float, typer.Option(min=0, max=0.9, metavar="SHARE", help="Of the labeled patients.")]
Replace = Annotated[bool, typer.Option("--overwrite", help="Replace the file.")]


class SplitChoice(StrEnum):
    """Which split of a public dataset."""

    official = "official"
    published = "published"
    random = "random"


@app.command("list", cls=CalmCommand)
def list_cards(json_output: Json = False, verbose: Verbose = 0, quiet: Quiet = False) -> None:
    """List the public datasets medkd knows."""
    from medkd.cli import output

    output.start_logging(verbose, quiet)
    from medkd.data.cards import list_cards as find

    cards = find()
    if json_output:
        output.print_json([card.model_dump(mode="json") for card in cards])
        return
    output.print_table(
        ["dataset", "modality", "task", "access", "licence"],
        [[card.name, card.modality, card.task, card.access, _short(card.licence)] for card in cards],
    )
    output.print_line()
    output.print_line("`medkd data show NAME` says how to get one.", style="dim")


def _short(text: str, limit: int = 48) -> str:
    first = text.split(";")[0].split(". ")[0]
    return first if len(first) <= limit else first[: limit - 1].rstrip() + "…"


@app.command("show", cls=CalmCommand)
def show_card(name: Name, json_output: Json = False, verbose: Verbose = 0, quiet: Quiet = False) -> None:
    """Show what a dataset holds and how to get it."""
    from medkd.cli import output

    output.start_logging(verbose, quiet)
    from medkd.data.cards import load_card

    card = load_card(name)
    if json_output:
        output.print_json(card.model_dump(mode="json"))
        return
    verified = "" if card.licence_verified else " (not verified by us)"
    facts = [
        ("modality", card.modality),
        ("task", card.task),
        ("labels", ", ".join(f"{value}: {label}" for value, label in card.labels.items()) or "–"),
        *[(f"scale {modality}", window) for modality, window in card.intensities.items()],
        ("holds", ", ".join(f"{count} {what}" for what, count in card.counts.items()) or "–"),
        ("licence", card.licence + verified),
        ("home page", card.home_page),
        ("how to get", card.how_to_get),
        ("download", f"medkd data fetch {card.name} --root DIR" if card.download_allowed else "by hand"),
        ("prepare", _preparation(card.layout, card.name, tested=card.layout_tested)),
        ("cite", card.citation),
        *[("" if position else "note", f"– {text}") for position, text in enumerate(card.notes)],
    ]
    output.print_facts(facts, title=card.title)


def _preparation(layout: str | None, name: str, *, tested: bool) -> str:
    if layout is None:
        return "with `medkd data make`"
    return f"medkd data prepare {name} --root DIR --out F" + ("" if tested else " (layout not tested)")


@app.command(cls=CalmCommand)
def fetch(name: Name, root: Root, json_output: Json = False, verbose: Verbose = 0, quiet: Quiet = False) -> None:
    """Download a dataset, where its licence allows it.

    The only command that uses the network. Checksums are verified; an interrupted download goes on.
    """
    from medkd.cli import output

    output.start_logging(verbose, quiet)
    from medkd.data.cards import load_card
    from medkd.data.fetch import fetch_dataset

    files = fetch_dataset(load_card(name), root)
    if json_output:
        output.print_json({"files": files})
    else:
        for file in files:
            output.print_line(str(file))


@app.command(cls=CalmCommand)
def prepare(
    name: Name,
    root: Root,
    out: OutFile,
    labeled: Labeled = None,
    split: Annotated[SplitChoice | None, typer.Option(show_default=False, help="By default the best there is.")] = None,
    seed: Seed = 0,
    modality: Annotated[
        str | None, typer.Option(metavar="NAME[,NAME]", show_default=False, help="Only these; by default all.")
    ] = None,
    unpaired: Annotated[
        str | None,
        typer.Option(metavar="NAME", show_default=False, help="One modality per patient; this one for all tests."),
    ] = None,
    referable: Annotated[
        bool, typer.Option("--referable", help="IDRiD: two classes, referable from grade 2 (moderate) on.")
    ] = False,
    overwrite: Replace = False,
    json_output: Json = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """Check a dataset's files and write its datalist.

    The files are compared with the dataset's card; the split is by patient.
    """
    from medkd.cli import output

    output.start_logging(verbose, quiet)
    from medkd.workflows.data import require_free_file

    require_free_file(out, overwrite=overwrite)
    from medkd.data.cards import load_card
    from medkd.data.prepare import prepare_dataset

    choice = cast('Literal["official", "published", "random"] | None', split and split.value)
    datalist = prepare_dataset(
        load_card(name),
        root,
        labeled=_count_or_share(labeled),
        seed=seed,
        split=choice,
        modality=modality,
        unpaired=unpaired,
        referable_only=referable,
    )
    _finish(datalist, out, as_json=json_output)


def _count_or_share(text: str | None) -> int | float | None:
    """``40`` or ``10%``."""
    from medkd.errors import ConfigError

    if text is None:
        return None
    number = text.strip().removesuffix("%").strip()
    try:
        value = float(number) / 100 if text.strip().endswith("%") else int(number)
    except ValueError:
        raise ConfigError("--labeled", f"{text!r} is not a number", "use a count as 40, or a share as 10%") from None
    if value <= 0 or (isinstance(value, float) and value >= 1):
        raise ConfigError("--labeled", f"{text} keeps none or all", "use 1 or more, or a share below 100%")
    return value


@app.command(cls=CalmCommand)
def make(
    root: Annotated[Path, typer.Argument(metavar="ROOT", show_default=False, help="A folder of images.")],
    out: OutFile,
    patient: Annotated[
        str | None, typer.Option(metavar="REGEX", show_default=False, help="Finds the patient in a path; one group.")
    ] = None,
    images: Annotated[
        str | None, typer.Option(metavar="GLOB", show_default=False, help="Not needed for an nnU-Net folder.")
    ] = None,
    labels: Annotated[
        str | None, typer.Option(metavar="GLOB", show_default=False, help="Label maps, matched to images.")
    ] = None,
    class_: Annotated[
        str | None,
        typer.Option("--class", metavar="REGEX", show_default=False, help="Finds the class of an image in its path."),
    ] = None,
    classes: Annotated[
        str | None,
        typer.Option(metavar="NAME,NAME", show_default=False, help="Their order; of two, the second is positive."),
    ] = None,
    domain: Annotated[
        str | None, typer.Option(metavar="REGEX", show_default=False, help="Finds scanner or site in a path.")
    ] = None,
    frames: Annotated[str, typer.Option(metavar="all|N", help="Frames taken of an unlabeled 4-D file.")] = "all",
    channel: Annotated[
        int | None, typer.Option(min=0, metavar="N", show_default=False, help="Of a multi-channel nnU-Net dataset.")
    ] = None,
    validation: Share = 0.0,
    test: Share = 0.0,
    modality: Annotated[str, typer.Option(metavar="NAME", show_default=False, help="As MR or CT.")] = "",
    seed: Seed = 0,
    overwrite: Replace = False,
    json_output: Json = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """Write a datalist from any folder.

    nnU-Net folders are understood as they are. Images without a label become unlabeled; frames of 4-D files become
    cases. Photographs and tiles can have a class, from --class; without --patient each then counts as its own patient.
    """
    from medkd.cli import output

    output.start_logging(verbose, quiet)
    from medkd.workflows.data import require_free_file

    require_free_file(out, overwrite=overwrite)
    count = _frames(frames)
    from medkd.data.make import make_datalist

    datalist = make_datalist(
        root,
        patient=patient,
        images=images,
        labels=labels,
        class_=class_,
        classes=[name.strip() for name in classes.split(",")] if classes is not None else None,
        domain=domain,
        frames=count,
        channel=channel,
        validation=validation,
        test=test,
        modality=modality,
        seed=seed,
    )
    _finish(datalist, out, as_json=json_output)


def _frames(text: str) -> Literal["all"] | int:
    from medkd.errors import ConfigError

    if text == "all":
        return "all"
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError("--frames", f"{text!r} is not a number of frames", "use all, or 1 or more")
    return int(text)


@app.command(cls=CalmCommand)
def check(
    datalist: Datalists,
    dataset_dir: DatasetDir = None,
    fix: Annotated[
        Path | None,
        typer.Option(metavar="F", show_default=False, help="Write a datalist without the cases that have errors."),
    ] = None,
    json_output: Json = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """Look at every file of a datalist.

    Geometry, orientation, labels, NaN, duplicates (near ones too, of photographs and tiles) and patient leakage. Exit
    code 1 when something was found.
    """
    from medkd.cli import output

    output.start_logging(verbose, quiet)
    from rich.text import Text

    from medkd.data.check import check_datalist
    from medkd.data.datalists import read_datalist, write_datalist
    from medkd.workflows.data import require_free_file, without_errors

    if fix is not None:
        require_free_file(fix)
    listed = read_datalist(datalist, dataset_dir, check_files=False)
    findings = check_datalist(listed)
    removed: list[str] = []
    if fix is not None:
        kept, removed = without_errors(listed, findings)
        write_datalist(kept, fix)
    if json_output:
        output.print_json({"findings": findings, "removed": removed})
    else:
        styles = {"error": "bold red", "warning": "yellow"}
        if findings:
            output.print_table(
                ["", "case", "file", "problem", "what to do"],
                [
                    [Text(f.severity, style=styles[f.severity]), f.case or "–", Path(f.file).name, f.problem, f.remedy]
                    for f in findings
                ],
            )
        errors = sum(finding.severity == "error" for finding in findings)
        output.print_line(f"{errors} errors, {len(findings) - errors} warnings in {_counts(listed)}")
        if fix is not None:
            output.print_line(f"{fix}: without {len(removed)} cases ({', '.join(removed) or 'none'})")
    if findings:
        raise typer.Exit(1)


@app.command(cls=CalmCommand)
def split(
    datalist: Datalists,
    out: OutFile,
    folds: Annotated[int | None, typer.Option(min=2, metavar="K", show_default=False, help="Number of folds.")] = None,
    labeled: Labeled = None,
    validation: Share = 0.0,
    test: Share = 0.0,
    stratify_by: Annotated[
        str | None, typer.Option(metavar="FIELD", show_default=False, help="By default the domain, if there is one.")
    ] = None,
    seed: Seed = 0,
    dataset_dir: DatasetDir = None,
    overwrite: Replace = False,
    json_output: Json = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """Split a datalist by patient, stratified."""
    from medkd.cli import output

    output.start_logging(verbose, quiet)
    from medkd.workflows.data import require_free_file

    require_free_file(out, overwrite=overwrite)
    from medkd.data.datalists import read_datalist
    from medkd.data.splits import split_datalist

    listed = read_datalist(datalist, dataset_dir)
    divided = split_datalist(
        listed,
        folds=folds,
        labeled=_count_or_share(labeled),
        validation=validation,
        test=test,
        seed=seed,
        stratify_by=stratify_by,
    )
    _finish(divided, out, as_json=json_output)


def _finish(datalist: Datalist, out: Path, *, as_json: bool) -> None:
    from medkd.cli import output
    from medkd.data.datalists import write_datalist
    from medkd.workflows.data import case_counts

    write_datalist(datalist, out)
    if as_json:
        counts = {section: cases for section, (cases, _) in case_counts(datalist).items()}
        output.print_json({"datalist": out, "cases": counts, "sha256": datalist.sha256})
    else:
        output.print_line(f"{out}: {_counts(datalist)}")


def _counts(datalist: Datalist) -> str:
    from medkd.workflows.data import case_counts

    counts = case_counts(datalist)
    parts = [f"{cases} {section} ({patients} patients)" for section, (cases, patients) in counts.items()]
    return ", ".join(parts) or "no case"
