"""ROC, DeLong, calibration and bootstrap of classifiers against hand counts, brute force and what exists already."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from medkd.errors import InputError
from medkd.metrics.calibration import measure_calibration
from medkd.metrics.classification import Classified, delong_difference, delong_interval, roc_curve
from medkd.metrics.image_scores import (
    ImageScore,
    OperatingPoint,
    is_image_evaluation,
    read_image_evaluation,
    summarize_images,
    write_image_evaluation,
)
from medkd.metrics.roc import auc_interval


def binary(n: int = 60, seed: int = 0, patients: int | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    source = np.random.default_rng(seed)
    labels = source.integers(2, size=n)
    p = np.round(1 / (1 + np.exp(-source.normal(1.2 * labels - 0.6, 1))), 2)  # rounded: ties
    people = source.integers(patients, size=n) if patients else np.arange(n)
    return np.stack([1 - p, p], axis=1), labels, people


def test_roc_curve_has_the_points_of_a_hand_count() -> None:
    curve = roc_curve([0.1, 0.4, 0.4, 0.8], [0, 0, 1, 1])
    assert curve.thresholds.tolist() == [math.inf, 0.8, 0.4, 0.1]
    assert curve.sensitivity.tolist() == [0, 0.5, 1, 1]
    assert curve.specificity.tolist() == [1, 1, 0.5, 0]
    assert curve.at_specificity(1.0) == (0.5, 0.8)
    assert curve.at_specificity(0.9) == (0.5, 0.8)  # nothing between two thresholds is interpolated
    assert curve.at_specificity(0.5) == (1.0, 0.4)


def test_threshold_that_no_score_reaches_is_infinite() -> None:
    assert roc_curve([0.9, 0.2], [0, 1]).at_specificity(0.9) == (0.0, math.inf)
    with pytest.raises(ValueError, match="positives and negatives"):
        roc_curve([0.9, 0.2], [1, 1])


@given(
    st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=4, max_size=25), st.sampled_from([0.5, 0.8, 0.9, 1])
)
@settings(max_examples=60)
def test_sensitivity_of_the_roc_is_the_best_of_all_thresholds(
    pairs: list[tuple[int, bool]], specificity: float
) -> None:
    scores, labels = np.array([pair[0] for pair in pairs]) / 5, np.array([pair[1] for pair in pairs])
    if labels.all() or not labels.any():
        return
    best = max(
        float((scores[labels] >= t).mean())
        for t in [*scores, 2.0]
        if (scores[~labels] < t).mean() >= specificity - 1e-12
    )
    assert roc_curve(scores, labels).at_specificity(specificity)[0] == pytest.approx(best)
    table = Classified(np.stack([1 - scores, scores], 1), labels, specificity=specificity)
    assert table.measures()["sensitivity_of_roc"][0] == pytest.approx(best)


def brute_delong(scores: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """Area and variance by comparing every pair, as the paper's equations stand."""
    up, down = scores[labels == 1], scores[labels == 0]
    wins = (up[:, None] > down[None]) + 0.5 * (up[:, None] == down[None])
    above, below = wins.mean(1), wins.mean(0)
    return float(wins.mean()), float(above.var(ddof=1) / len(up) + below.var(ddof=1) / len(down))


def test_delong_interval_equals_the_papers_equations_pair_by_pair() -> None:
    probabilities, labels, _ = binary()
    area, variance = brute_delong(probabilities[:, 1], labels)
    found = delong_interval(probabilities[:, 1], labels)
    assert found.estimate == pytest.approx(area) == pytest.approx(roc_auc_score(labels, probabilities[:, 1]))
    assert (found.high - found.low) / 2 == pytest.approx(1.959964 * math.sqrt(variance), rel=1e-6)


def test_delong_difference_of_a_classifier_and_itself_is_nothing() -> None:
    probabilities, labels, _ = binary()
    same = delong_difference(probabilities[:, 1], 3 * probabilities[:, 1], labels)
    assert (same.difference, same.low, same.high, same.p) == (0, 0, 0, 1)
    other = delong_difference(probabilities[:, 1], np.random.default_rng(1).random(len(labels)), labels)
    back = delong_difference(np.random.default_rng(1).random(len(labels)), probabilities[:, 1], labels)
    assert other.difference == pytest.approx(-back.difference)
    assert other.p == pytest.approx(back.p)
    assert other.low < other.difference < other.high


def test_perfect_separation_has_no_delong_interval() -> None:
    found = delong_interval([0.1, 0.2, 0.8, 0.9], [0, 0, 1, 1])
    assert found.estimate == 1
    assert math.isnan(found.low)
    assert math.isnan(found.high)


def test_measures_agree_with_the_functions_that_exist() -> None:
    probabilities, labels, people = binary(patients=20)
    table = Classified(probabilities, labels, patients=people, threshold=0.6)
    found = {name: float(value[0]) for name, value in table.measures().items()}
    calibration = measure_calibration(probabilities, labels, class_axis=1)
    assert found["ece"] == pytest.approx(calibration.expected_calibration_error)
    assert found["brier"] == pytest.approx(calibration.brier_score)
    assert found["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(labels, probabilities.argmax(1)))
    assert found["sensitivity"] == pytest.approx((probabilities[labels == 1, 1] >= 0.6).mean())
    assert found["specificity"] == pytest.approx((probabilities[labels == 0, 1] < 0.6).mean())
    assert table.confusion().sum() == 60
    assert np.trace(table.confusion()) == (table.predicted == labels).sum()
    interval, known = (
        table.intervals(resamples=300)["auc"],
        auc_interval(probabilities[:, 1], labels, patients=people, resamples=300),
    )
    assert (interval.estimate, interval.low, interval.high) == pytest.approx((known.estimate, known.low, known.high))


def test_weights_count_images_as_often_as_copies_would() -> None:
    probabilities, labels, _ = binary(20)
    weights = np.random.default_rng(3).integers(0, 3, size=20)
    table = Classified(probabilities, labels, threshold=0.5)
    weighted = table.measures(weights[None])
    copies = Classified(probabilities.repeat(weights, 0), labels.repeat(weights), threshold=0.5).measures()
    for name in copies:
        assert weighted[name][0] == pytest.approx(copies[name][0]), name


def test_several_classes_are_scored_one_against_the_rest() -> None:
    source = np.random.default_rng(0)
    labels = np.arange(40) % 4
    probabilities = source.dirichlet(np.ones(5), 40)  # the fifth class never occurs
    found = Classified(probabilities, labels).measures()
    areas = [roc_auc_score(labels == k, probabilities[:, k]) for k in range(4)]
    assert found["auc"][0] == pytest.approx(np.mean(areas))
    assert found["auc:2"][0] == pytest.approx(areas[2])
    assert "auc:4" not in found
    assert "sensitivity_of_roc" not in found


def test_one_class_or_one_patient_leaves_undefined_what_is_undefined() -> None:
    probabilities, labels, _ = binary(8)
    single = Classified(probabilities, np.ones(8, int)).intervals(resamples=50)
    assert math.isnan(single["auc"].estimate)
    assert math.isnan(single["sensitivity_of_roc"].estimate)
    alone = Classified(probabilities, labels, patients=np.zeros(8)).intervals(resamples=50)
    assert math.isnan(alone["brier"].low)
    assert not math.isnan(alone["brier"].estimate)


@pytest.mark.parametrize("change", ["logits", "class", "patients", "threshold", "empty"])
def test_what_is_no_classification_is_refused(change: str) -> None:
    probabilities, labels, people = binary(6)
    three = np.full((6, 3), 1 / 3)
    with pytest.raises(ValueError, match=r"probabilities|classes|patients|threshold|no image"):
        {
            "logits": lambda: Classified(probabilities * 5, labels),
            "class": lambda: Classified(probabilities, labels + 1),
            "patients": lambda: Classified(probabilities, labels, patients=people[:3]),
            "threshold": lambda: Classified(three, labels, threshold=0.5),
            "empty": lambda: Classified(np.empty((0, 2)), np.empty(0, int)),
        }[change]()


def scores(n: int = 24, seed: int = 0) -> list[ImageScore]:
    probabilities, labels, _ = binary(n, seed)
    return [
        ImageScore(f"c{i:02}", f"p{i}", int(label), (float(row[0]), float(row[1])))
        for i, (row, label) in enumerate(zip(probabilities, labels, strict=True))
    ]


def test_summary_does_not_depend_on_the_order_and_survives_the_disk(tmp_path) -> None:
    classes = {0: "normal", 1: "tumor"}
    found = summarize_images(scores(), classes)
    assert found == summarize_images(scores()[::-1], classes)
    assert found["measures"]["auc"]["ci95_delong"][0] is not None
    assert found["operating_point"]["threshold"] is None
    assert "sensitivity" not in found["measures"]
    assert "property of the ROC curve" in found["operating_point"]["note"]
    write_image_evaluation(tmp_path, scores()[::-1], found)
    again, summary = read_image_evaluation(tmp_path)
    assert again == scores()
    assert summary == found
    assert is_image_evaluation(tmp_path)
    table = tmp_path / "per_case.csv"
    table.write_text(table.read_text().replace("c03,p3", "c03"))
    with pytest.raises(InputError, match="line 5 is damaged"):
        read_image_evaluation(tmp_path)


def test_threshold_is_reported_with_where_it_came_from() -> None:
    point = OperatingPoint(0.4, "validation", 0.9, n_chosen_on=30)
    found = summarize_images(scores(), {0: "a", 1: "b"}, point=point, patients_known=False)
    assert {"sensitivity", "specificity"} <= found["measures"].keys()
    assert found["operating_point"]["source"] == "validation"
    assert found["operating_point"]["n_chosen_on"] == 30
    assert found["n_patients"] is None
    assert "images" in found["resampled"]
    shared = [
        ImageScore(s.case, "one" if i < 2 else s.patient, s.label, s.probabilities) for i, s in enumerate(scores())
    ]
    assert "ci95_delong" not in summarize_images(shared, {0: "a", 1: "b"})["measures"]["auc"]
