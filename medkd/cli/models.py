"""evaluate, predict, compare, profile, export."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from medkd.cli.options import (
    DatasetDir,
    Device,
    Json,
    Model,
    Models,
    OutFolder,
    Overwrite,
    Quiet,
    Trust,
    Verbose,
)

if TYPE_CHECKING:
    from medkd.data.volumes import Volume
    from medkd.deploy.quantize import Int8Export
    from medkd.workflows.failures import Failure
    from medkd.workflows.image_compare import ImageComparison

Image = Annotated[
    Path | None, typer.Option(metavar="FILE", show_default=False, help="A real image; by default MNI152, built in.")
]


class Split(StrEnum):
    """Sections of a datalist that have labels."""

    training = "training"
    validation = "validation"
    test = "test"


class PredictionFormat(StrEnum):
    """What predict writes."""

    nifti = "nifti"
    dicom_seg = "dicom-seg"


class ExportFormat(StrEnum):
    """What export writes."""

    torchscript = "torchscript"
    onnx = "onnx"
    pt2 = "pt2"


def evaluate(
    models: Models,
    datalist: Annotated[Path, typer.Option(metavar="F", show_default=False, help="The datalist.")],
    out: OutFolder,
    split: Annotated[Split, typer.Option(help="Which cases.")] = Split.test,
    dataset_dir: DatasetDir = None,
    tolerance: Annotated[float, typer.Option(min=0, metavar="MM", help="Of the surface Dice.")] = 1.0,
    threshold: Annotated[
        float | None,
        typer.Option(min=0, max=1, metavar="P", show_default=False, help="Classifiers: positive from here on."),
    ] = None,
    specificity: Annotated[
        float | None,
        typer.Option(
            min=0, max=1, metavar="S", show_default=False, help="Classifiers: what a threshold aims at; 0.9 by default."
        ),
    ] = None,
    device: Device = "auto",
    trust: Trust = None,
    overwrite: Overwrite = False,
    json_output: Json = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """Score models on a datalist, case by case.

    Writes per_case.csv, summary.json with intervals over patients, and pictures of the worst cases. Several
    models are pooled: on --split validation each scores the fold it held out; elsewhere their mean probabilities are
    scored.

    A classifier of images is scored by AUC, balanced accuracy, calibration and confusion, with a report. Sensitivity
    and specificity are at --threshold, or at one chosen on the validation images; never at one chosen on the test.
    """
    from medkd.cli import output

    output.start_logging(verbose, quiet)
    from medkd.workflows.evaluate import evaluate as run

    result = run(
        models,
        datalist,
        out,
        split=split.value,
        dataset_dir=dataset_dir,
        device=device,
        trust=trust,
        overwrite=overwrite,
        tolerance_mm=tolerance,
        threshold=threshold,
        specificity=specificity,
    )
    if json_output:
        output.print_json({"summary": result.summary, "failures": result.failures, "out": out})
    elif result.scores and result.summary.get("task") == "classification":
        _print_classification(result.summary, out)
    elif result.scores:
        _print_summary(result.summary, out)
    _exit_on(result.failures)


def _print_summary(summary: dict[str, Any], out: Path) -> None:
    from medkd.cli import output

    unit = summary["unit"]
    rows = [*summary["classes"].items(), ("mean", summary["mean"])]
    output.print_table(
        ["class", ">Dice", "95 % interval", f">HD95, {unit}", ">penalized", ">n", ">empty", ">missed"],
        [
            [
                name,
                row["dice"]["mean"],
                _interval(row["dice"]["ci95"]),
                _decimal(row[f"hd95_{unit}"]["mean"]),
                _decimal(row[f"hd95_{unit}"]["penalized_mean"]),
                row["n_cases"],
                row["n_empty"],
                row["n_missed"],
            ]
            for name, row in rows
        ],
    )
    patients = f"{summary['n_cases']} cases of {summary['n_patients']} patients, {summary['n_failed']} failed"
    output.print_line()
    output.print_line(f"{patients}; {summary['pooled']}; details in {out}", style="dim")


def _print_classification(summary: dict[str, Any], out: Path) -> None:
    from medkd.cli import output
    from medkd.report.image_report import TITLES

    measures = summary["measures"]
    output.print_table(
        ["measure", ">estimate", "95 % interval"],
        [
            [TITLES[name], measures[name]["estimate"], _interval(measures[name]["ci95"])]
            for name in TITLES
            if name in measures
        ],
    )
    output.print_line()
    of = f" of {summary['n_patients']} patients" if summary["patients_known"] else ", patients unknown"
    output.print_line(
        f"{summary['n_cases']} images{of}, {summary['n_failed']} failed; {summary['pooled']}", style="dim"
    )
    point = summary["operating_point"]
    if point is not None:
        chosen = f"threshold {point['threshold']:.3f} ({point['source']}); " if point["threshold"] is not None else ""
        aimed = f"specificity {point['specificity']:g}; " if point["source"] != "given" else ""
        output.print_line(f"{chosen}{aimed}{point['note']}", style="dim")
    output.print_line(str(out / "report.html"))


def _interval(bounds: list[float | None]) -> str:
    return "–" if None in bounds else f"{bounds[0]:.3f} to {bounds[1]:.3f}"


def _decimal(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


def predict(
    model: Model,
    inputs: Annotated[
        list[Path], typer.Argument(metavar="INPUT", show_default=False, help="Image files, folders, DICOM folders.")
    ],
    out: OutFolder,
    output_format: Annotated[
        PredictionFormat, typer.Option("--format", help="dicom-seg needs DICOM input and medkd[dicom-seg].")
    ] = PredictionFormat.nifti,
    series: Annotated[
        str | None, typer.Option(metavar="UID", show_default=False, help="The DICOM series, where there are several.")
    ] = None,
    deidentify: Annotated[
        bool, typer.Option("--deidentify", help="Name outputs case-0001, …; no file name or id anywhere.")
    ] = False,
    device: Device = "auto",
    trust: Trust = None,
    overwrite: Overwrite = False,
    json_output: Json = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """Segment or translate volumes, or classify images.

    Writes <name>_seg.nii.gz for every input in its own geometry; a model that translates writes
    <name>_translated.nii.gz; one that classifies writes one predictions.csv (file, prob_<class>, label).

    A bad case never stops the others: it is one line here and a row in failures.csv, and the exit code is 1.
    """
    from medkd.cli import output

    output.start_logging(verbose, quiet)
    from medkd.workflows.predict import predict as run

    result = run(
        model,
        inputs,
        out,
        output_format=output_format.value,
        series=series,
        deidentify=deidentify,
        device=device,
        trust=trust,
        overwrite=overwrite,
    )
    if json_output:
        output.print_json(result)
    else:
        for path in result.written:
            output.print_line(str(path))
    _exit_on(result.failures)


def _exit_on(failures: list[Failure]) -> None:
    if failures:
        raise typer.Exit(1)


def compare(
    eval_a: Annotated[Path, typer.Argument(metavar="EVAL_A", show_default=False, help="An evaluation folder.")],
    eval_b: Annotated[Path, typer.Argument(metavar="EVAL_B", show_default=False, help="What it is compared with.")],
    out: Annotated[
        Path | None, typer.Option(metavar="HTML", show_default=False, help="Also write a page with plots.")
    ] = None,
    json_output: Json = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """Compare two evaluations in pairs.

    Mean differences A − B over the cases both scored, with bootstrap intervals and Wilcoxon tests over patients.
    """
    from medkd.cli import output

    output.start_logging(verbose, quiet)
    from medkd.workflows.compare import compare as run
    from medkd.workflows.image_compare import ImageComparison

    result = run(eval_a, eval_b, out)
    if json_output:
        output.print_json(result)
        return
    if isinstance(result, ImageComparison):
        _print_image_comparison(result, eval_a, eval_b)
        return
    output.print_table(
        ["measure", ">A", ">B", ">A − B", "95 % interval", ">Wilcoxon p", ">patients"],
        [
            [
                difference.title,
                difference.mean_a,
                difference.mean_b,
                output.signed(difference.result.mean_difference),
                f"{output.signed(difference.result.low)} to {output.signed(difference.result.high)}",
                difference.result.wilcoxon_p,
                difference.result.n_patients,
            ]
            for difference in result.differences
        ],
    )
    left_out = f", {result.only_in_one} in only one evaluation left out" if result.only_in_one else ""
    output.print_line()
    output.print_line(f"A is {eval_a}, B is {eval_b}: {result.cases} cases in both{left_out}", style="dim")
    output.print_line("A missed structure counts the image diagonal.", style="dim")
    if result.report is not None:
        output.print_line(str(result.report))


def _print_image_comparison(result: ImageComparison, eval_a: Path, eval_b: Path) -> None:
    from medkd.cli import output

    output.print_table(
        ["measure", ">A", ">B", ">A − B", "95 % interval", ">DeLong p"],
        [
            [
                found.title,
                found.a,
                found.b,
                output.signed(found.difference),
                f"{output.signed(found.low)} to {output.signed(found.high)}",
                found.p,
            ]
            for found in result.differences
        ],
    )
    left_out = f", {result.only_in_one} in only one evaluation left out" if result.only_in_one else ""
    output.print_line()
    output.print_line(f"A is {eval_a}, B is {eval_b}: {result.cases} images in both{left_out}", style="dim")
    if result.report is not None:
        output.print_line(str(result.report))


def profile(
    models: Models,
    image: Image = None,
    out: Annotated[
        Path | None, typer.Option(metavar="PNG", show_default=False, help="Also draw size against time.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, metavar="N", help="Timed repetitions; medians are shown.")] = 7,
    device: Device = "auto",
    trust: Trust = None,
    json_output: Json = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """Measure parameters, MACs, time and memory."""
    from medkd.cli import output

    output.start_logging(verbose, quiet)
    from medkd.workflows.cost import profile_models

    costs = profile_models(models, image=image, out=out, rounds=rounds, device=device, trust=trust)
    if json_output:
        output.print_json(costs)
        return
    output.print_table(
        ["model", ">parameters", ">MACs", "window", ">disk", ">ms/window", ">ms/volume", ">memory"],
        [
            [
                cost.name,
                output.count_text(cost.parameters),
                output.count_text(cost.macs),
                "×".join(str(side) for side in cost.window),
                output.bytes_text(cost.size_bytes),
                f"{cost.window_ms:.1f}",
                f"{cost.volume_ms:.0f}",
                output.bytes_text(cost.peak_memory_bytes),
            ]
            for cost in costs
        ],
    )
    output.print_line()
    output.print_line(f"on {costs[0].device}, threads: {costs[0].threads}; MACs are of one window", style="dim")
    if out is not None:
        output.print_line(str(out))


def export(
    model: Model,
    output_format: Annotated[ExportFormat, typer.Option("--format", show_default=False, help="What to write.")],
    out: Annotated[Path, typer.Option(metavar="F", show_default=False, help="The file to write.")],
    image: Image = None,
    int8: Annotated[bool, typer.Option("--int8", help="In 8-bit integers (onnx); needs --calibration.")] = False,
    calibration: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            show_default=False,
            help="Real data for --int8: a datalist, a folder of tiles or volumes, a slide, a volume.",
        ),
    ] = None,
    slide_mpp: Annotated[
        float | None, typer.Option(metavar="UM", show_default=False, help="µm per pixel of a slide to calibrate with.")
    ] = None,
    dataset_dir: DatasetDir = None,
    trust: Trust = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file.")] = False,
    json_output: Json = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """Export a network and prove that it stayed the same.

    The file is loaded again and compared with the network on windows of a real image before it gets its name.

    With --int8 the file is about as good, not the same: on data it was not calibrated with, AUC or Dice may fall by
    half a point. A datalist calibrates with its training section and compares on the labels of its validation section;
    other data have no labels, so that only agreement is known. A file that fails is not written.
    """
    from medkd.cli import output

    output.start_logging(verbose, quiet)
    from medkd.deploy.bundle import load_bundle
    from medkd.deploy.export import export_model
    from medkd.errors import ConfigError

    if out.exists() and not overwrite:
        raise ConfigError(out, "exists", "choose another name, or pass --overwrite")
    if int8:
        from medkd.deploy.quantize import export_int8

        if output_format is not ExportFormat.onnx or calibration is None or image is not None:
            raise ConfigError("--int8", "goes with --format onnx and --calibration, not --image", "add real data")
        quantized = export_int8(
            load_bundle(model, trust=trust), out, calibration, slide_mpp=slide_mpp, dataset_dir=dataset_dir
        )
        if json_output:
            output.print_json(quantized)
        else:
            output.print_facts(_int8_facts(quantized))
        return
    if calibration is not None or slide_mpp is not None or dataset_dir is not None:
        raise ConfigError("--calibration, --slide-mpp, --dataset-dir", "are for --int8", "add --int8, or leave it out")
    result = export_model(
        load_bundle(model, trust=trust), out, output_format=output_format.value, image=_read_image(image)
    )
    if json_output:
        output.print_json(result)
        return
    output.print_facts(
        [
            ("file", result.path),
            ("size", output.bytes_text(result.size_bytes)),
            ("largest difference", f"{result.largest_difference:.3g} (logits up to {result.largest_logit:.3g})"),
            ("same class", f"{100 * result.agreement:.4g} % of voxels"),
            (
                "compared on",
                f"{result.windows[0]} windows of {'×'.join(map(str, result.windows[1:]))} from {result.image.name}",
            ),
        ]
    )


def _int8_facts(result: Int8Export) -> list[tuple[str, Any]]:
    from medkd.cli import output

    gate = result.gate
    facts: list[tuple[str, Any]] = [
        ("file", result.path),
        ("size", f"{output.bytes_text(result.size_bytes)}, in float32 {output.bytes_text(result.float32_bytes)}"),
        ("calibrated on", result.calibrated_on),
        ("compared on", result.compared_on),
    ]
    if gate.drop is not None:
        facts += [(gate.metric or "", f"{gate.int8:.4f}, in float32 {gate.float32:.4f}")]
        facts += [("drop", f"{100 * gate.drop:+.2f} points (0.50 allowed)")]
    facts += [("same class", f"{100 * gate.agreement:.2f} %")]
    if gate.probability_difference is not None:
        facts += [("mean difference of a probability", f"{gate.probability_difference:.2g}")]
    if gate.drop is None:
        facts += [("accuracy", "not known: these data have no labels, only agreement was checked")]
    return facts


def _windows(shape: tuple[int, ...]) -> str:
    return f"{shape[0]} windows, {'×'.join(str(side) for side in shape[1:])},"


def _read_image(image: Path | None) -> Volume | None:
    from medkd.data.volumes import read_volume

    return None if image is None else read_volume(image)
