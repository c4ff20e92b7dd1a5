from __future__ import annotations

import math
from pathlib import Path

import pytest

from medkd.metrics.cases import summarize
from medkd.report import cohort, tables
from medkd.report.run_folder import Arm, Evaluation


def evaluated(scores) -> Evaluation:
    return Evaluation(Path("e"), scores, [], [])


@pytest.mark.parametrize("class_name", [None, "left", "right"])
@pytest.mark.parametrize("measure", cohort.MEASURES, ids=lambda m: m.key)
def test_statistics_equal_the_evaluations_summary(scores, measure, class_name):
    found = scores(missed=("case_01",), empty=("case_03",))
    evaluations = [evaluated(found)]
    ours = cohort.statistics(cohort.case_values(evaluations, measure, class_name=class_name))
    summary = summarize(found)
    row = summary["mean"] if class_name is None else summary["classes"][class_name]
    theirs = row[f"{measure.key}_mm" if measure.is_distance else measure.key]
    assert [ours.mean, ours.sd, ours.median] == pytest.approx([theirs["mean"], theirs["sd"], theirs["median"]])
    assert [ours.low, ours.high] == pytest.approx(theirs["ci95"])
    assert (ours.n, ours.n_infinite) == (theirs["n"], theirs["n_infinite"])
    if measure.is_distance:
        penalized = cohort.case_values(evaluations, measure, class_name=class_name, is_penalized=True)
        assert cohort.statistics(penalized).mean == pytest.approx(theirs["penalized_mean"])


def test_counts_tell_missed_from_empty(scores):
    counts = cohort.counts([evaluated(scores(missed=("case_01",), empty=("case_03", "case_04")))])
    assert (counts.patients, counts.structures, counts.missed, counts.empty) == (6, 12, 1, 2)


def test_missing_a_structure_never_helps_in_a_paired_difference(scores):
    with_miss, without = evaluated(scores(missed=("case_01",))), evaluated(scores())
    result = cohort.paired(cohort.shared_values([with_miss], [without], cohort.HD95))
    assert result.mean_difference > 0
    assert tables.reading(result, higher_is_better=False) != "better"


def test_pairs_are_matched_by_case_and_seed(scores):
    subject = [evaluated(scores(quality=0.9)), evaluated(scores(quality=0.8))]
    baseline = [evaluated(scores(quality=0.7, patients=4)), evaluated(scores(quality=0.7))]
    shared = cohort.shared_values(subject, baseline, cohort.DICE)
    assert len(shared) == 4 + 6
    assert all((a.seed, a.case) == (b.seed, b.case) for a, b in shared)
    result = cohort.paired(shared)
    assert result.n_seeds == 2
    assert result.mean_difference == pytest.approx((4 * 0.2 + 6 * 0.1) / 10)
    assert set(cohort.patient_pairs(shared)) == {f"patient_{n}" for n in range(6)}


def test_arms_without_wishes_are_compared_with_the_first(scores):
    arms = [Arm(name, name, evaluations=[evaluated(scores())]) for name in "abc"]
    assert [(s.name, b.name) for s, b in tables.compared_arms(arms)] == [("b", "a"), ("c", "a")]
    wishes = [*arms[:2], Arm("c", "c", compare_with=("b",), evaluations=[evaluated(scores())])]
    assert [(s.name, b.name) for s, b in tables.compared_arms(wishes)] == [("c", "b")]
    assert tables.compared_arms([Arm("a", "a")]) == []


def test_arm_that_always_misses_has_infinite_hd95(scores):
    everything = tuple(f"case_{n:02d}" for n in range(6))
    values = cohort.case_values([evaluated(scores(missed=everything))], cohort.HD95, class_name="right")
    assert all(math.isinf(value.value) for value in values)
    assert tables.estimate(cohort.statistics(values), 1)["value"] == "∞"


def test_rows_with_one_title_are_grouped():
    assert [row["span"] for row in tables.grouped([{"title": t} for t in "aabccc"])] == [2, 0, 1, 3, 0, 0]
    assert tables.grouped([]) == []
