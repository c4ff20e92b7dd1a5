from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from medkd.metrics.roc import auc_difference, auc_interval, roc_auc


@settings(max_examples=40)
@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=2, max_size=40))
def test_estimate_is_scikit_learns_auc_with_ties(pairs):
    scores, labels = (np.array(column) for column in zip(*pairs, strict=True))
    found = auc_interval(scores, labels, resamples=2)
    if labels.all() or not labels.any():
        assert math.isnan(found.estimate)
        assert math.isnan(roc_auc(scores, labels))
    else:
        assert found.estimate == pytest.approx(roc_auc_score(labels, scores))
        assert roc_auc(scores, labels) == pytest.approx(found.estimate)


def test_interval_is_that_of_resampling_patients_by_hand():
    source = np.random.default_rng(3)
    patients = np.repeat(np.arange(12), 5)
    labels = source.integers(2, size=60)
    scores = labels + source.normal(size=60) + source.normal(size=12)[patients]
    by_hand = []
    for _ in range(1000):
        drawn = source.integers(12, size=12)
        rows = np.concatenate([np.flatnonzero(patients == patient) for patient in drawn])
        up, down = (scores[rows][labels[rows] == label] for label in (1, 0))
        by_hand.append((up[:, None] > down).mean())
    found = auc_interval(scores, labels, patients=patients)
    assert (found.low, found.high) == pytest.approx(np.quantile(by_hand, [0.025, 0.975]), abs=0.02)
    assert (found.n, found.n_patients) == (60, 12)


def test_tiles_of_one_patient_widen_the_interval():
    source = np.random.default_rng(0)
    patients = np.repeat(np.arange(10), 20)
    labels = patients % 2
    scores = labels + 0.3 * source.normal(size=200) + source.normal(size=10)[patients]
    together = auc_interval(scores, labels, patients=patients)
    apart = auc_interval(scores, labels)
    assert together.estimate == apart.estimate
    assert together.high - together.low > 1.2 * (apart.high - apart.low)


def test_scores_of_two_models_are_not_compared_with_each_other():
    labels = np.array([0, 1, 0, 1])
    scores = np.array([0.8, 0.9, 0.1, 0.2])  # each model orders its own pair, on scales of their own
    assert auc_interval(scores, labels).estimate == 0.75
    assert auc_interval(scores, labels, strata=["a", "a", "b", "b"]).estimate == 1.0


def test_difference_of_an_arm_with_itself_is_exactly_zero():
    source = np.random.default_rng(1)
    scores, labels = source.normal(size=50), source.integers(2, size=50)
    found = auc_difference(scores, scores, labels)
    assert (found.estimate, found.low, found.high) == (0, 0, 0)


def test_difference_is_that_of_the_two_aucs_and_pairing_narrows_it():
    source = np.random.default_rng(2)
    labels = np.tile([0, 1], 60)
    shared = source.normal(size=120)
    a, b = labels + shared + 0.3 * source.normal(size=120), 0.9 * labels + shared + 0.3 * source.normal(size=120)
    found, first = auc_difference(a, b, labels), auc_interval(a, labels)
    assert found.estimate == pytest.approx(roc_auc(a, labels) - roc_auc(b, labels))
    assert found.high - found.low < first.high - first.low


def test_missing_scores_are_left_out_and_counted():
    found = auc_interval([0.1, math.nan, 0.9], [0, 0, 1])
    assert (found.estimate, found.n, found.n_nan) == (1.0, 2, 1)
    with pytest.raises(ValueError, match="1 of 3 scores are NaN"):
        roc_auc([0.1, math.nan, 0.9], [0, 0, 1])


def test_one_patient_or_no_score_has_no_interval():
    one = auc_interval([0.1, 0.9], [0, 1], patients=["p", "p"])
    assert one.estimate == 1.0
    assert math.isnan(one.low)
    assert math.isnan(auc_interval([], []).estimate)


def test_result_does_not_depend_on_the_order():
    source = np.random.default_rng(5)
    scores, labels, patients = source.normal(size=30), source.integers(2, size=30), source.integers(6, size=30)
    order = source.permutation(30)
    assert auc_interval(scores, labels, patients=patients) == auc_interval(
        scores[order], labels[order], patients=patients[order]
    )


@pytest.mark.parametrize(
    ("scores", "labels", "further"),
    [
        ([1.0], [0, 1], {}),
        ([1.0, 2.0], [0, 2], {}),
        ([[1.0]], [[0]], {}),
        ([1.0, 2.0], [0, 1], {"patients": ["a"]}),
        ([1.0, 2.0], [0, 1], {"strata": ["a"]}),
        ([1.0, 2.0], [0, 1], {"confidence": 1.0}),
        ([1.0, 2.0], [0, 1], {"resamples": 0}),
    ],
)
def test_what_makes_no_sense_is_refused(scores, labels, further):
    with pytest.raises(ValueError, match="must"):
        auc_interval(scores, labels, **further)
