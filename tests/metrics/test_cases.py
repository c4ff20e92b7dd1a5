from __future__ import annotations

import csv
import json
import math

import numpy as np
import pytest

from medkd.errors import InputError
from medkd.metrics import dice, read_per_case, score_case, summarize, surface_scores, write_evaluation
from medkd.metrics.cases import CaseScore

LABELS = {0: "background", 1: "ventricle", 2: "myocardium"}
SPACING = (2.0, 1.0, 1.0)


def ball_pair(case, patient="", *, shift=1, drop=(), absent=(), spacing_mm=SPACING):
    """Scores of two boxes; classes in ``drop`` are missed, those in ``absent`` are in neither map."""
    reference = np.zeros((6, 12, 12), np.uint8)
    reference[1:4, 2:7, 2:7] = 1
    reference[2:5, 8:11, 3:9] = 2
    pred = np.roll(reference, shift, axis=2)
    for label in absent:
        pred[pred == label] = reference[reference == label] = 0
    for label in drop:
        pred[pred == label] = 0
    return score_case(pred, reference, case=case, patient=patient or case, labels=LABELS, spacing_mm=spacing_mm)


def hand_made(case, hd95, *, patient="", class_index=1, empty=False):
    missed = math.isinf(hd95)
    return CaseScore(
        case=case,
        patient=patient or case,
        class_index=class_index,
        class_name=LABELS[class_index],
        dice=math.nan if empty else 0.0 if missed else 0.9,
        hd95=math.nan if empty else hd95,
        surface_dice=math.nan if empty else 0.0 if missed else 0.8,
        assd=math.nan if empty else hd95 / 2,
        volume_ml_pred=0.0 if missed or empty else 1.0,
        volume_ml_ref=0.0 if empty else 1.0,
        unit="mm",
        image_diagonal=100.0,
        voxels_pred=0 if missed or empty else 10,
        voxels_ref=0 if empty else 10,
        tolerance=1.0,
    )


def same(scores, others):
    """Equality in which NaN equals NaN."""
    return [repr(score) for score in scores] == [repr(score) for score in others]


def test_score_case_holds_what_the_metric_functions_return():
    generator = np.random.default_rng(0)
    pred, reference = generator.integers(0, 3, size=(2, 5, 6, 7))
    scores = score_case(pred, reference, case="c", patient="p", labels=LABELS, spacing_mm=SPACING, tolerance_mm=0.5)
    surfaces = surface_scores(pred, reference, spacing_mm=SPACING, classes=[1, 2], tolerance_mm=0.5)
    overlaps = dice(pred, reference, classes=[1, 2])
    assert [(score.class_index, score.class_name) for score in scores] == [(1, "ventricle"), (2, "myocardium")]
    for score in scores:
        expected = surfaces[score.class_index]
        assert (score.hd95, score.assd, score.surface_dice) == (expected.hd95, expected.assd, expected.surface_dice)
        assert score.dice == overlaps[score.class_index]
        assert score.volume_ml_ref == pytest.approx(np.sum(reference == score.class_index) * 2.0 / 1000)
        assert score.volume_ml_pred == pytest.approx(np.sum(pred == score.class_index) * 2.0 / 1000)
        assert score.image_diagonal == pytest.approx(math.sqrt(10**2 + 6**2 + 7**2))
        assert (score.unit, score.case, score.patient, score.tolerance) == ("mm", "c", "p", 0.5)


def test_without_spacing_scores_are_in_pixels_without_volume():
    blank = np.zeros((8, 6), int)
    pred, reference = blank.copy(), blank.copy()
    pred[1, 1] = reference[1, 4] = 1
    score = score_case(pred, reference, case="c", patient="p", labels={1: "a"}, spacing_mm=None)[0]
    assert (score.unit, score.hd95, score.image_diagonal) == ("px", 3.0, 10.0)
    assert (score.volume_ml_pred, score.volume_ml_ref, score.voxels_pred, score.voxels_ref) == (None, None, 1, 1)


def test_flat_images_with_spacing_have_distances_in_mm_but_no_volume():
    image = np.ones((4, 4), int)
    score = score_case(image, image, case="c", patient="p", labels={1: "a"}, spacing_mm=(0.5, 0.5))[0]
    assert (score.unit, score.volume_ml_pred) == ("mm", None)


def test_missed_false_positive_and_empty_are_told_apart():
    blank, filled = np.zeros((3, 3, 3), int), np.ones((3, 3, 3), int)

    def kinds(pred, reference):
        score = score_case(pred, reference, case="c", patient="p", labels={1: "a"}, spacing_mm=(1, 1, 1))[0]
        return score.missed, score.false_positive, score.empty, score.hd95_penalized, score.assd_penalized

    diagonal = math.sqrt(27)
    assert kinds(blank, filled) == (True, False, False, pytest.approx(diagonal), pytest.approx(diagonal))
    assert kinds(filled, blank) == (False, True, False, pytest.approx(diagonal), pytest.approx(diagonal))
    assert kinds(filled, filled) == (False, False, False, 0.0, 0.0)
    assert kinds(blank, blank)[:3] == (False, False, True)
    assert all(math.isnan(value) for value in kinds(blank, blank)[3:])


def test_summary_by_hand():
    summary = summarize([hand_made("a", 2.0), hand_made("b", 4.0), hand_made("c", math.inf)])
    row = summary["classes"]["ventricle"]
    assert (row["class_index"], row["n_cases"], row["n_missed"], row["n_empty"], row["n_false_positive"]) == (
        1,
        3,
        1,
        0,
        0,
    )
    assert row["dice"]["mean"] == pytest.approx(0.6)
    assert row["dice"]["sd"] == pytest.approx(np.std([0.9, 0.9, 0.0], ddof=1))
    assert row["dice"]["median"] == 0.9
    distance = row["hd95_mm"]
    assert (distance["mean"], distance["n"], distance["n_infinite"], distance["n_undefined"]) == (3.0, 2, 1, 0)
    assert distance["penalized_mean"] == pytest.approx((2 + 4 + 100) / 3)
    assert distance["n_penalized"] == 3
    assert distance["ci95"] == [2.0, 4.0]
    assert distance["penalized_ci95"][1] > 60
    assert row["assd_mm"]["penalized_mean"] == pytest.approx((1 + 2 + 100) / 3)
    assert (summary["n_cases"], summary["n_patients"], summary["unit"], summary["tolerance"]) == (3, 3, "mm", 1.0)


def test_missing_a_structure_never_improves_the_penalized_mean():
    found = [hand_made(name, 40.0) for name in "abc"]
    missed = [*found[:2], hand_made("c", math.inf)]
    both = [summarize(scores)["classes"]["ventricle"]["hd95_mm"] for scores in (found, missed)]
    assert both[0]["mean"] == both[1]["mean"]
    assert both[1]["penalized_mean"] > both[0]["penalized_mean"]


def test_mean_over_classes_is_per_case_and_says_what_it_left_out():
    scores = [
        hand_made("a", 2.0),
        hand_made("a", 6.0, class_index=2),
        hand_made("b", 3.0),
        hand_made("b", 0.0, class_index=2, empty=True),
        hand_made("c", 1.0),
        hand_made("c", math.inf, class_index=2),
        hand_made("d", 0.0, empty=True),
        hand_made("d", 0.0, class_index=2, empty=True),
    ]
    row = summarize(scores)["mean"]
    assert row["dice"]["mean"] == pytest.approx((0.9 + 0.9 + 0.45) / 3)
    assert (row["dice"]["n"], row["dice"]["n_undefined"]) == (3, 1)
    assert (row["n_cases"], row["n_empty"], row["n_excluded"], row["n_missed"]) == (4, 3, 3, 1)
    distance = row["hd95_mm"]
    assert (distance["mean"], distance["n"], distance["n_infinite"], distance["n_undefined"]) == (3.5, 2, 1, 1)
    assert distance["penalized_mean"] == pytest.approx((4 + 3 + (1 + 100) / 2) / 3)


def test_interval_is_over_patients_not_cases():
    generator = np.random.default_rng(0)
    distances = np.repeat(generator.uniform(1, 9, size=6), 8)
    clustered = [hand_made(f"case{i:02}", d, patient=f"patient{i // 8}") for i, d in enumerate(distances)]
    independent = [hand_made(f"case{i:02}", d) for i, d in enumerate(distances)]
    wide, narrow = (
        np.diff(summarize(scores)["classes"]["ventricle"]["hd95_mm"]["ci95"])[0] for scores in (clustered, independent)
    )
    assert wide > 2 * narrow


def test_summary_does_not_depend_on_the_order_of_scores():
    scores = [score for i in range(5) for score in ball_pair(f"case{i}", shift=i)]
    assert summarize(scores) == summarize(scores[::-1])


def test_evaluation_folder_round_trips_exactly_and_is_the_same_when_written_again(tmp_path):
    scores = [
        *ball_pair("a", "p1"),
        *ball_pair("b", "p1", shift=2, drop=[1]),
        *ball_pair('c, "odd"', "p2", absent=[2]),
    ]
    write_evaluation(tmp_path / "new" / "folder", scores, model="student")
    write_evaluation(tmp_path / "again", scores[::-1], model="student")
    first, second = tmp_path / "new" / "folder", tmp_path / "again"
    assert sorted(path.name for path in first.iterdir()) == ["per_case.csv", "summary.json"]
    for name in ("per_case.csv", "summary.json"):
        assert (first / name).read_bytes() == (second / name).read_bytes()
    assert same(read_per_case(first), scores)
    assert same(read_per_case(first / "per_case.csv"), scores)


def test_csv_has_the_public_columns_first_and_writes_inf_and_nan(tmp_path):
    write_evaluation(tmp_path, [*ball_pair("a", drop=[1], absent=[2])])
    with (tmp_path / "per_case.csv").open() as file:
        rows = list(csv.DictReader(file))
    public = ["case", "patient", "class", "dice", "hd95_mm", "surface_dice", "assd_mm", "volume_ml_pred"]
    assert list(rows[0])[:9] == [*public, "volume_ml_ref"]
    assert (rows[0]["dice"], rows[0]["hd95_mm"], rows[0]["surface_dice"]) == ("0.0", "inf", "0.0")
    assert (rows[1]["dice"], rows[1]["hd95_mm"], rows[1]["assd_mm"]) == ("nan", "nan", "nan")


def test_pixel_scores_are_named_pixels_everywhere(tmp_path):
    scores = ball_pair("a", spacing_mm=None)
    write_evaluation(tmp_path, scores)
    header = (tmp_path / "per_case.csv").read_text().splitlines()[0].split(",")
    assert header[:9] == [
        "case",
        "patient",
        "class",
        "dice",
        "hd95_px",
        "surface_dice",
        "assd_px",
        "voxels_pred",
        "voxels_ref",
    ]
    assert not [column for column in header if "mm" in column or "ml" in column]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["unit"] == "px"
    assert "hd95_px" in summary["mean"]
    assert same(read_per_case(tmp_path), scores)


def test_summary_json_is_strict_json_with_null_for_what_is_not_finite(tmp_path):
    write_evaluation(tmp_path, ball_pair("only", drop=[1], absent=[2]), model={"parameters": 12})

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    summary = json.loads((tmp_path / "summary.json").read_text(), parse_constant=refuse)
    assert summary["classes"]["ventricle"]["hd95_mm"]["mean"] is None
    assert summary["classes"]["ventricle"]["hd95_mm"]["ci95"] == [None, None]
    assert summary["classes"]["myocardium"]["dice"]["mean"] is None
    assert summary["model"] == {"parameters": 12}
    assert summary == {**summarize(read_per_case(tmp_path)), "model": {"parameters": 12}}


def test_scores_that_cannot_be_summarized_are_refused_and_nothing_is_written(tmp_path):
    millimeters, pixels = ball_pair("a"), ball_pair("b", spacing_mm=None)
    for scores, extra, message in [
        ([], {}, "no case"),
        ([*millimeters, *millimeters], {}, "case a has class ventricle twice"),
        ([*millimeters, *pixels], {}, "mix the units"),
        (millimeters, {"n_cases": 3}, "already has n_cases"),
        (millimeters, {"loss": math.nan}, "not JSON compliant"),
    ]:
        with pytest.raises(ValueError, match=message):
            write_evaluation(tmp_path / "out", scores, **extra)
    assert not (tmp_path / "out").exists()


def test_score_case_refuses_what_it_cannot_name_or_measure():
    image = np.ones((3, 3, 3), int)
    keywords = {"case": "c", "patient": "p", "spacing_mm": SPACING}
    with pytest.raises(ValueError, match="same name"):
        score_case(image, image, labels={1: "a", 2: "a"}, **keywords)
    with pytest.raises(ValueError, match="classes is empty"):
        score_case(image, image, labels={0: "background"}, **keywords)
    with pytest.raises(ValueError, match="one number per axis"):
        score_case(image, image, labels={1: "a"}, **{**keywords, "spacing_mm": (1.0, 1.0)})
    with pytest.raises(ValueError, match="same shape"):
        score_case(image, image[1:], labels={1: "a"}, **keywords)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text.replace("hd95_mm", "hd"), "no column hd95_mm"),
        (lambda text: "", "no column case"),
        (lambda text: text[:-30], "line 3 is damaged"),
        (lambda text: text.replace("0.8", "zero.8"), "is damaged"),
        (lambda text: text.replace("\n", ",1\n").replace(",1\n", "\n", 1), "line 2 is damaged"),
    ],
)
def test_damaged_table_is_one_line_naming_file_and_place(tmp_path, damage, message):
    write_evaluation(tmp_path, ball_pair("a"))
    path = tmp_path / "per_case.csv"
    path.write_text(damage(path.read_text()))
    with pytest.raises(InputError, match=message) as caught:
        read_per_case(tmp_path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_absent_or_unreadable_table_is_named(tmp_path):
    with pytest.raises(InputError, match=r"per_case\.csv: cannot be read"):
        read_per_case(tmp_path)
    (tmp_path / "per_case.csv").write_bytes(b"\xff\xfe\x00garbage")
    with pytest.raises(InputError, match="cannot be read"):
        read_per_case(tmp_path)
