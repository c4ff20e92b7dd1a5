"""slide info, tile, predict, evaluate, view."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from medkd.cli.help import CalmCommand, CalmGroup
from medkd.cli.options import Device, Json, Model, OutFolder, Overwrite, Quiet, Trust, Verbose

if TYPE_CHECKING:
    from medkd.workflows.slide_batch import SlideBatch

app = typer.Typer(
    name="slide",
    cls=CalmGroup,
    help="Tile, predict, evaluate and view whole slides.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

OneSlide = Annotated[Path, typer.Argument(metavar="SLIDE", show_default=False, help="A whole-slide image.")]
Slides = Annotated[list[Path] | None, typer.Argument(metavar="SLIDE", show_default=False, help="Whole-slide images.")]
SlidesTable = Annotated[
    Path | None,
    typer.Option("--slides", metavar="CSV", show_default=False, help="A table: slide, mpp and patient if wanted."),
]
SlideMpp = Annotated[
    float | None,
    typer.Option(metavar="UM", show_default=False, help="µm per pixel of the slides, instead of what they say."),
]
Tissue = Annotated[
    Path | None,
    typer.Option(metavar="F", show_default=False, help="Your tissue mask, or a folder with one per slide."),
]
MinTissue = Annotated[
    float, typer.Option(min=0, max=1, metavar="SHARE", help="Smallest share of tissue of a tile; 0: all tiles.")
]
Workers = Annotated[
    int | None,
    typer.Option(min=0, metavar="N", show_default=False, help="Worker processes; by default one per core. 0: none."),
]
Memory = Annotated[
    float | None,
    typer.Option(min=0.1, metavar="GB", show_default=False, help="The most memory a worker process may use."),
]
Cluster = Annotated[
    str | None,
    typer.Option(metavar="ADDRESS", show_default=False, help="A running dask cluster, as tcp://host:8786."),
]
Shard = Annotated[
    str | None, typer.Option(metavar="I/N", show_default=False, help="Only this share of the slides, from 1/N to N/N.")
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on in --out; what is done and unchanged is kept.")]
Deidentify = Annotated[bool, typer.Option("--deidentify", help="Name outputs slide-0001, …; no file name anywhere.")]


class Rule(StrEnum):
    """What gives a tile its class."""

    CENTER = "center"
    FRACTION = "fraction"


@app.command("info", cls=CalmCommand)
def info(
    slide: OneSlide,
    slide_mpp: SlideMpp = None,
    thumbnail: Annotated[
        Path | None, typer.Option(metavar="PNG", show_default=False, help="Also write a small picture.")
    ] = None,
    json_output: Json = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """Show what a slide says of itself.

    Vendor, size, levels, µm per pixel and where that comes from. Never names, dates, labels or barcodes.
    """
    from medkd.cli import output

    output.start_logging(verbose, quiet)
    from medkd.workflows.slide_info import slide_info

    facts = slide_info(slide, slide_mpp=slide_mpp, thumbnail=thumbnail)
    if json_output:
        output.print_json({**facts, "thumbnail": thumbnail})
        return
    output.print_facts(_facts(facts), title=facts["name"])
    output.print_line()
    output.print_table(
        [">level", ">width", ">height", ">downsample", ">µm per pixel"],
        [
            [
                number,
                level["width"],
                level["height"],
                f"{level['downsample']:g}",
                None if facts["mpp"] is None else f"{facts['mpp'] * level['downsample']:.4g}",
            ]
            for number, level in enumerate(facts["levels"])
        ],
    )
    if thumbnail is not None:
        output.print_line()
        output.print_line(str(thumbnail))


def _facts(facts: dict[str, Any]) -> list[tuple[str, Any]]:
    mpp = facts["mpp"]
    bounds = facts["bounds"]
    whole = bounds == [0, 0, facts["width"], facts["height"]]
    return [
        ("vendor", facts["vendor"]),
        ("size", f"{facts['width']} × {facts['height']} px"),
        ("µm per pixel", f"{mpp:.4g} ({facts['mpp_source']})" if mpp else f"unknown: the file {facts['mpp_problem']}"),
        ("objective", f"{facts['objective_power']:g}×" if facts["objective_power"] else None),
        ("ICC profile", "yes" if facts["icc_profile"] else "no"),
        ("not empty", "everywhere" if whole else f"{bounds[2]} × {bounds[3]} px at {bounds[0]}, {bounds[1]}"),
        ("read with", "our own reader of JPEG tiles" if facts["reader"] == "tiff" else "OpenSlide"),
    ]


@app.command("tile", cls=CalmCommand)
def tile(
    slides: Slides = None,
    *,
    out: OutFolder,
    size: Annotated[int, typer.Option(min=1, metavar="PX", show_default=False, help="Side of a tile.")],
    mpp: Annotated[float, typer.Option(metavar="UM", show_default=False, help="µm per pixel of the tiles.")],
    overlap: Annotated[int, typer.Option(min=0, metavar="PX", help="Shared by neighboring tiles.")] = 0,
    min_tissue: MinTissue = 0.5,
    save_images: Annotated[bool, typer.Option("--save-images", help="Write every tile as PNG.")] = False,
    annotations: Annotated[
        Path | None,
        typer.Option(metavar="F", show_default=False, help="GeoJSON of the slide, or a folder with one per slide."),
    ] = None,
    rule: Annotated[Rule, typer.Option(help="What gives a tile its class.")] = Rule.CENTER,
    masks: Annotated[bool, typer.Option("--masks", help="Label pixels, not tiles, in the datalist.")] = False,
    tissue: Tissue = None,
    keep_pen: Annotated[bool, typer.Option("--keep-pen", help="Pen marks may count as tissue.")] = False,
    keep_fat: Annotated[bool, typer.Option("--keep-fat", help="Fat counts as tissue.")] = False,
    slides_table: SlidesTable = None,
    slide_mpp: SlideMpp = None,
    workers: Workers = None,
    memory: Memory = None,
    cluster: Cluster = None,
    shard: Shard = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    deidentify: Deidentify = False,
    json_output: Json = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """Find tissue on slides and lay tiles over it.

    Writes the tile grid as HDF5 (CLAM and TRIDENT read it), the tissue as GeoJSON and an overview picture. With
    --annotations also labels, and with --save-images too a datalist to train with.
    """
    from medkd.cli import output

    output.start_logging(verbose, quiet)
    from medkd.cli.slide_progress import watching
    from medkd.workflows.slide_list import parse_shard
    from medkd.workflows.slides import tile_slides

    with watching(quiet=quiet) as view:
        batch = tile_slides(
            slides or [],
            out,
            size=size,
            mpp=mpp,
            slides_csv=slides_table,
            slide_mpp=slide_mpp,
            overlap=overlap,
            min_tissue=min_tissue,
            tissue=tissue,
            exclude_pen=not keep_pen,
            exclude_fat=not keep_fat,
            save_images=save_images,
            annotations=annotations,
            rule=rule.value,
            masks=masks,
            workers=workers,
            memory_limit=_bytes(memory),
            cluster=cluster,
            shard=None if shard is None else parse_shard(shard),
            resume=resume,
            overwrite=overwrite,
            deidentify=deidentify,
            view=view,
        )
    _finish(batch, as_json=json_output)


@app.command("predict", cls=CalmCommand)
def predict(
    model: Model,
    slides: Slides = None,
    *,
    out: OutFolder,
    slides_table: SlidesTable = None,
    slide_mpp: SlideMpp = None,
    mpp: Annotated[
        float | None, typer.Option(metavar="UM", show_default=False, help="Target µm per pixel, not the model's.")
    ] = None,
    overlap: Annotated[
        int | None, typer.Option(min=0, metavar="PX", show_default=False, help="Of tiles, instead of the model's.")
    ] = None,
    min_tissue: MinTissue = 0.5,
    tissue: Tissue = None,
    threshold: Annotated[
        float, typer.Option(min=0, max=1, metavar="P", help="Smallest probability inside an outline.")
    ] = 0.5,
    batch_size: Annotated[int, typer.Option(min=1, metavar="B", help="Tiles per step.")] = 32,
    resume: Resume = False,
    overwrite: Overwrite = False,
    workers: Workers = None,
    memory: Memory = None,
    cluster: Cluster = None,
    shard: Shard = None,
    devices: Annotated[
        int | None, typer.Option(min=1, metavar="N", show_default=False, help="GPUs, one slide on each.")
    ] = None,
    device: Device = "auto",
    trust: Trust = None,
    deidentify: Deidentify = False,
    json_output: Json = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """Run a model over whole slides.

    Writes <slide>.csv, .geojson (opens in QuPath), _heatmap.png, _heatmap.ome.tiff and .json for every slide.

    A bad slide never stops the others: it is one line here and a row in failures.csv, and the exit code is 1.
    summary.csv tells of all. Stopped by a signal, it goes on with --resume.
    """
    from medkd.cli import output

    output.start_logging(verbose, quiet)
    from medkd.cli.slide_progress import watching
    from medkd.workflows.slide_list import parse_shard
    from medkd.workflows.slides import predict_slides

    with watching(quiet=quiet) as view:
        batch = predict_slides(
            model,
            slides or [],
            out,
            slides_csv=slides_table,
            slide_mpp=slide_mpp,
            mpp=mpp,
            overlap=overlap,
            min_tissue=min_tissue,
            tissue=tissue,
            threshold=threshold,
            batch_size=batch_size,
            workers=workers,
            memory_limit=_bytes(memory),
            cluster=cluster,
            shard=None if shard is None else parse_shard(shard),
            devices=devices,
            device=device,
            trust=trust,
            resume=resume,
            overwrite=overwrite,
            deidentify=deidentify,
            view=view,
        )
    _finish(batch, as_json=json_output)


def _bytes(gigabytes: float | None) -> int | None:
    return None if gigabytes is None else int(gigabytes * 1e9)


def _finish(batch: SlideBatch, *, as_json: bool) -> None:
    """Print what became of a batch, and leave with its exit code."""
    from medkd.cli import output
    from medkd.cli.exits import print_error

    counts: dict[str, int] = {}
    for record in batch.records:
        counts[record.status] = counts.get(record.status, 0) + 1
    if as_json:
        slides = [
            {
                "slide": record.name,
                "status": record.status,
                "reason": record.reason,
                "tiles": record.tiles,
                "failed_tiles": record.failed_tiles,
                "mpp": record.mpp,
                "seconds": record.seconds,
                "worker_deaths": record.deaths,
                "reused": record.reused,
                "files": [batch.out / file for file in record.files],
            }
            for record in batch.records
        ]
        output.print_json({"slides": slides, "failures": batch.failures, "total": batch.total, "out": batch.out})
    elif batch.records:
        reused = sum(record.reused for record in batch.records)
        output.print_table(["status", ">slides"], list(counts.items()))
        output.print_line()
        before = f", {reused} of them done before" if reused else ""
        output.print_line(f"{len(batch.records)} of {batch.total} slides{before}; see {batch.out / 'summary.csv'}")
    done = f"after {len(batch.records)} of {batch.total} slides"
    if batch.blocked:
        print_error(f"{batch.out}: {batch.blocked} {done}; make room there, then pass --resume", batch.exit_code)
    elif batch.paused is not None and batch.exit_code > 1:
        print_error(f"{batch.out}: stopped {done}; pass --resume to go on", batch.exit_code)
    if batch.exit_code:
        raise typer.Exit(batch.exit_code)


@app.command("evaluate", cls=CalmCommand)
def evaluate(
    predictions: Annotated[
        Path, typer.Argument(metavar="PRED_DIR", show_default=False, help="What `slide predict` wrote.")
    ],
    annotations: Annotated[
        Path, typer.Option(metavar="DIR", show_default=False, help="A <slide>.geojson for every slide.")
    ],
    out: OutFolder,
    patients: Annotated[
        Path | None,
        typer.Option(metavar="CSV", show_default=False, help="A table: slide, patient and label if wanted."),
    ] = None,
    normal: Annotated[
        list[str] | None,
        typer.Option(metavar="SLIDE", show_default=False, help="A slide with nothing to find; may be repeated."),
    ] = None,
    positive: Annotated[
        str | None, typer.Option(metavar="CLASS", show_default=False, help="What is looked for; by default the last.")
    ] = None,
    rule: Annotated[Rule, typer.Option(help="What gives a tile its class.")] = Rule.CENTER,
    overwrite: Overwrite = False,
    json_output: Json = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """Score slide predictions against annotations.

    Tile and slide AUC and FROC with intervals over patients, in summary.csv and summary.json.
    """
    from medkd.cli import output

    output.start_logging(verbose, quiet)
    from medkd.workflows.slide_evaluate import evaluate_slides

    result = evaluate_slides(
        predictions,
        annotations,
        out,
        patients=patients,
        normal=normal or (),
        positive=positive,
        rule=rule.value,
        overwrite=overwrite,
    )
    if json_output:
        output.print_json({"summary": result.summary, "failures": result.failures, "out": out})
    elif result.summary:
        _print_scores(out)
    if result.failures:
        raise typer.Exit(1)


def _print_scores(out: Path) -> None:
    """Print the rows of summary.csv."""
    import csv

    from medkd.cli import output

    with (out / "summary.csv").open(encoding="utf-8", newline="") as file:
        columns, *rows = csv.reader(file)
    output.print_table(columns, rows)
    output.print_line()
    output.print_line(f"details in {out}", style="dim")


@app.command("view", cls=CalmCommand)
def view(
    slide: OneSlide,
    overlay: Annotated[
        Path | None, typer.Option(metavar="DIR", show_default=False, help="What `slide predict` wrote.")
    ] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, metavar="P", help="Where to listen; 0: any free one.")] = 8650,
    slide_mpp: SlideMpp = None,
    browser: Annotated[bool, typer.Option("--browser", help="Open the page at once.")] = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """Look at a slide and its heatmap in a browser.

    Only this computer can open the page. Ctrl-C ends it.
    """
    from medkd.cli import output

    output.start_logging(verbose, quiet)
    from medkd.workflows.slide_view import view_slide

    view_slide(slide, overlay, port, mpp=slide_mpp, open_browser=browser, announce=_announce)


def _announce(address: str) -> None:
    import sys

    from medkd.cli import output

    output.print_line(address)
    sys.stdout.flush()
