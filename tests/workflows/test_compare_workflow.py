from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from medkd.errors import InputError
from medkd.metrics import paired_test, score_case, write_evaluation
from medkd.workflows.compare import compare


def scores(seed: int, erased: int, cases: int = 8):
    """Scores of squares of which ``erased`` rows are missing."""
    rng = np.random.default_rng(seed)
    found = []
    for case in range(cases):
        reference = np.zeros((12, 16, 16), dtype=np.uint8)
        reference[2:10, 3:13, 3:13] = 1
        prediction = reference.copy()
        prediction[2 : 2 + erased + int(rng.integers(0, 2))] = 0
        found += score_case(
            prediction, reference, case=f"c{case}", patient=f"p{case // 2}", labels={1: "a"}, spacing_mm=(2, 1, 1)
        )
    return found


@pytest.fixture
def evaluations(tmp_path):
    write_evaluation(tmp_path / "a", scores(0, erased=1))
    write_evaluation(tmp_path / "b", scores(1, erased=3))
    return tmp_path / "a", tmp_path / "b"


def test_differences_are_those_of_the_paired_test(evaluations):
    result = compare(*evaluations)
    first, second = scores(0, 1), scores(1, 3)
    expected = paired_test([s.dice for s in first], [s.dice for s in second], patients=[s.patient for s in first])
    dice = result.differences[0]
    assert dice.measure == "dice"
    assert dice.result == expected
    assert dice.result.mean_difference > 0
    assert dice.mean_a - dice.mean_b == pytest.approx(dice.result.mean_difference)
    assert [difference.measure for difference in result.differences] == ["dice", "hd95_mm", "surface_dice", "assd_mm"]


def test_missed_structure_counts_the_image_diagonal(tmp_path):
    write_evaluation(tmp_path / "a", scores(0, erased=8))
    write_evaluation(tmp_path / "b", scores(0, erased=1))
    hd95 = compare(tmp_path / "a", tmp_path / "b").differences[1]
    assert hd95.mean_a == pytest.approx(np.linalg.norm([24, 16, 16]))
    assert np.isfinite(hd95.result.mean_difference)


def test_cases_in_only_one_evaluation_are_counted_and_left_out(tmp_path):
    write_evaluation(tmp_path / "a", scores(0, 1, cases=8))
    write_evaluation(tmp_path / "b", scores(1, 1, cases=5))
    result = compare(tmp_path / "a", tmp_path / "b")
    assert (result.cases, result.only_in_one) == (5, 3)


def test_page_is_written_when_asked_for(evaluations, tmp_path):
    result = compare(*evaluations, tmp_path / "pages" / "compare.html")
    assert result.report == tmp_path / "pages" / "compare.html"
    assert "<html" in result.report.read_text()


def test_evaluations_without_a_common_case_are_refused(tmp_path):
    write_evaluation(tmp_path / "a", scores(0, 1))
    write_evaluation(tmp_path / "b", [replace(score, case=f"x{score.case}") for score in scores(0, 1)])
    with pytest.raises(InputError, match="no case in common"):
        compare(tmp_path / "a", tmp_path / "b")


def test_folder_that_is_no_evaluation_is_refused(evaluations, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"per_case\.csv"):
        compare(evaluations[0], tmp_path / "empty")
