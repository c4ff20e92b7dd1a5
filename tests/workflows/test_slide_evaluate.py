from __future__ import annotations

import csv
import json
import math

import numpy as np
import pytest

from medkd.errors import InputError
from medkd.workflows.slide_evaluate import evaluate_slides
from medkd.wsi.annotations import Annotation, write_annotations

SIDE = 192.0  # level-0 pixels of a tile of 96 px at 0.5 µm on a slide of 0.25 µm
WIDTH, HEIGHT = 40, 30  # tiles
BOUNDS = (400, 200, 7000, 5000)


def square(left, top, size):
    return (np.array([[left, top], [left + size, top], [left + size, top + size], [left, top + size]], float),)


LESIONS = [Annotation("Tumor", (square(960, 960, 1920),)), Annotation("tumor", (square(5000, 3000, 1500),))]


def write_slide(folder, name, regions=(), *, noise=0.0, seed=0, tiles=True, nan=(), classes=("normal", "tumor")):
    """A prediction that is 0.9 within the regions and 0.1 outside, up to noise."""
    source = np.random.default_rng(seed)
    x, y = (axis.ravel() for axis in np.meshgrid(np.arange(WIDTH) * 192, np.arange(HEIGHT) * 192))
    inside = np.zeros(len(x), bool)
    for region in regions:
        (low, high) = region.polygons[0][0].min(0), region.polygons[0][0].max(0)
        inside |= (x + 96 >= low[0]) & (x + 96 <= high[0]) & (y + 96 >= low[1]) & (y + 96 <= high[1])
    values = np.clip(np.where(inside, 0.9, 0.1) + noise * source.normal(size=len(x)), 0, 1)
    values[list(nan)] = math.nan
    count = len(x) if tiles else 0
    (folder / f"{name}.json").write_text(json.dumps({
        "name": name, "status": "done" if tiles else "empty-tissue", "fingerprint": "f" * 64, "classes": list(classes),
        "dimensions": [WIDTH * 192 + 50, HEIGHT * 192 + 50], "bounds": list(BOUNDS), "slide_mpp": 0.25, "mpp": 0.5,
        "tile": {"size": 96, "overlap": 0, "size_level0": SIDE}, "counts": {"tiles": count},
    }))  # fmt: skip
    with (folder / f"{name}.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["x", "y", "width", "height", *(f"prob_{title}" for title in classes)])
        for row in zip(x[:count], y[:count], values[:count], strict=True):
            table.writerow([row[0], row[1], 192, 192, f"{1 - row[2]:.6f}", f"{row[2]:.6f}"])


@pytest.fixture
def cohort(tmp_path):
    """Three slides with lesions, three without, of four patients; regions drawn in QuPath's coordinates."""
    predictions, annotations = tmp_path / "predictions", tmp_path / "annotations"
    predictions.mkdir()
    annotations.mkdir()
    rows = []
    for number in range(6):
        name = f"slide_{number}"
        regions = LESIONS[: 1 + number % 2] if number < 3 else []
        write_slide(predictions, name, regions, noise=0.15, seed=number)
        if regions:
            write_annotations(annotations / f"{name}.geojson", regions, offset=BOUNDS[:2])
        rows.append(f"{name}.svs,p{number % 4},{'tumor' if regions else 'Normal'}")
    (tmp_path / "patients.csv").write_text("slide,patient,label\n" + "\n".join(rows) + "\n")
    return tmp_path


def evaluate(cohort, **options):
    options.setdefault("patients", cohort / "patients.csv")
    return evaluate_slides(cohort / "predictions", cohort / "annotations", cohort / "out", **options)


def test_tiles_slides_and_lesions_are_scored_with_intervals_over_patients(cohort):
    made = evaluate(cohort)
    assert made.failures == []
    metrics = made.summary["metrics"]
    assert metrics["tile_auc"]["estimate"] > 0.99
    assert metrics["tile_auc"]["n"] == 6 * WIDTH * HEIGHT
    assert metrics["tile_auc"]["n_patients"] == 4
    assert metrics["slide_auc"]["n"] == 6
    assert metrics["tile_auc"]["low"] <= metrics["tile_auc"]["estimate"] <= metrics["tile_auc"]["high"]
    assert made.summary["n_lesions"] == 4
    assert metrics["sensitivity_at_8_fp"]["estimate"] == 1.0
    with (cohort / "out" / "summary.csv").open(newline="") as file:
        rows = {row["metric"]: row for row in csv.DictReader(file)}
    assert set(rows) == set(metrics)
    assert float(rows["froc_score"]["estimate"]) == pytest.approx(metrics["froc_score"]["estimate"], abs=1e-4)
    assert json.loads((cohort / "out" / "summary.json").read_text()) == made.summary
    with (cohort / "out" / "per_slide.csv").open(newline="") as file:
        slides = list(csv.DictReader(file))
    assert [row["lesions"] for row in slides] == ["1", "2", "1", "0", "0", "0"]
    assert [row["lesions_detected"] for row in slides][:3] == ["1", "2", "1"]
    assert not (cohort / "out" / "failures.csv").exists()


def test_perfect_predictions_score_one_and_the_offset_of_the_bounds_matters(cohort):
    for number in range(6):
        write_slide(cohort / "predictions", f"slide_{number}", LESIONS[: 1 + number % 2] if number < 3 else [])
    right = evaluate(cohort).summary["metrics"]
    assert right["tile_auc"]["estimate"] == right["slide_auc"]["estimate"] == right["froc_score"]["estimate"] == 1.0
    for number in range(3):  # as if the drawing's origin were that of the slide file
        write_annotations(cohort / "annotations" / f"slide_{number}.geojson", LESIONS[: 1 + number % 2])
    wrong = evaluate(cohort, overwrite=True).summary["metrics"]
    assert wrong["tile_auc"]["estimate"] < 0.95


def test_slide_without_annotation_must_be_declared_normal(cohort):
    with pytest.raises(InputError, match="not declared normal"):
        evaluate(cohort, patients=None)
    assert not (cohort / "out").exists()
    named = evaluate(cohort, patients=None, normal=["slide_3", "slide_4", "slide_5"])
    assert named.summary["n_tumor_slides"] == 3
    assert named.summary["n_patients"] == 6
    assert not named.summary["patients_known"]


def test_empty_annotation_file_says_normal_but_another_class_does_not(cohort):
    write_annotations(cohort / "annotations" / "slide_3.geojson", [])
    table = (cohort / "patients.csv").read_text()
    (cohort / "patients.csv").write_text(table.replace("slide_3.svs,p3,Normal", "slide_3.svs,p3,"))
    assert evaluate(cohort).failures == []
    write_annotations(cohort / "annotations" / "slide_3.geojson", [Annotation("Necrosis", (square(0, 0, 900),))])
    (failure,) = evaluate(cohort, overwrite=True).failures
    assert "no region of class tumor, only Necrosis" in failure.error
    assert (cohort / "out" / "failures.csv").exists()


def test_contradiction_is_a_failure_of_that_slide_alone(cohort):
    table = (cohort / "patients.csv").read_text()
    (cohort / "patients.csv").write_text(table.replace("slide_0.svs,p0,tumor", "slide_0.svs,p0,normal"))
    made = evaluate(cohort)
    assert [failure.case for failure in made.failures] == ["slide_0"]
    assert "declared normal" in made.failures[0].error
    assert made.summary["n_slides"] == 5
    assert made.summary["n_failed"] == 1


def test_missing_never_helps(cohort):
    """A tumor slide in which no tissue was found is a miss; one that was not predicted is reported."""
    whole = evaluate(cohort).summary["metrics"]
    write_slide(cohort / "predictions", "slide_0", tiles=False)
    made = evaluate(cohort, overwrite=True)
    assert made.summary["n_slides_without_tiles"] == 1
    assert made.summary["n_lesions"] == 4
    assert made.summary["metrics"]["froc_score"]["estimate"] < whole["froc_score"]["estimate"]
    assert made.summary["metrics"]["slide_auc"]["estimate"] < whole["slide_auc"]["estimate"]
    for suffix in ("json", "csv"):
        (cohort / "predictions" / f"slide_1.{suffix}").unlink()
    (failure,) = evaluate(cohort, overwrite=True).failures
    assert failure.case == "slide_1"
    assert "no prediction" in failure.error


def test_failed_tiles_are_left_out_and_counted(cohort):
    write_slide(cohort / "predictions", "slide_0", LESIONS[:1], nan=range(10))
    summary = evaluate(cohort).summary
    assert summary["n_failed_tiles"] == 10
    assert summary["metrics"]["tile_auc"]["n"] == 6 * WIDTH * HEIGHT - 10


def test_fraction_rule_leaves_ambiguous_tiles_out(cohort):
    regions = [Annotation("tumor", (square(960 + 50, 960, 1920),))]
    write_annotations(cohort / "annotations" / "slide_0.geojson", regions, offset=BOUNDS[:2])
    summary = evaluate(cohort, rule="fraction", min_fraction=0.9).summary
    assert summary["n_ambiguous_tiles"] > 5
    assert summary["metrics"]["tile_auc"]["n"] == summary["n_tiles"] - summary["n_ambiguous_tiles"]


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("predictions/slide_2.json", "{", "cannot be read"),
        ("predictions/slide_2.json", '{"classes": ["tumor"]}', "not complete"),
        ("predictions/slide_2.csv", "x,y,prob_tumor\n1,2,0.5\n", "1 tiles, its summary says"),
        ("predictions/slide_2.csv", "x,y\n1,2\n", "no column prob_tumor"),
        ("predictions/slide_2.csv", "x,y,prob_tumor\n1.5,2,0.5\n", "not complete"),
        ("annotations/slide_2.geojson", "{", "slide_2.geojson"),
    ],
)
def test_damaged_slide_fails_alone(cohort, file, content, message):
    (cohort / file).write_text(content)
    made = evaluate(cohort)
    (failure,) = made.failures
    assert failure.case == "slide_2"
    assert message in failure.error
    assert made.summary["n_slides"] == 5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name,patient\na,b\n", "no column 'slide'"),
        ("slide,patient\nslide_0,\n", "lacks a slide or a patient"),
        ("slide,patient\nslide_0,a\nslide_0,b\n", "two patients"),
        ("slide,patient,label\nslide_3,a,normal\nslide_4,a,normal\nslide_5,a,normal\n", "no patient in the table"),
    ],
)
def test_unusable_tables_are_refused_before_anything_is_written(cohort, text, message):
    (cohort / "patients.csv").write_text(text)
    with pytest.raises(InputError, match=message):
        evaluate(cohort)
    assert not (cohort / "out").exists()


def test_folders_that_hold_nothing_are_refused(cohort, tmp_path):
    with pytest.raises(InputError, match="not a folder"):
        evaluate_slides(tmp_path / "none", cohort / "annotations", tmp_path / "o")
    with pytest.raises(InputError, match="no slide prediction"):
        evaluate_slides(cohort / "annotations", cohort / "annotations", tmp_path / "o")


def test_class_looked_for_can_be_chosen(cohort):
    summary = evaluate(cohort, positive="TUMOR", patients=None, normal=["slide_3", "slide_4", "slide_5"])
    assert summary.failures  # the predictions have no column of that spelling
    assert summary.summary == {}
