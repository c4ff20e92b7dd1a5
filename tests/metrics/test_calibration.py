from __future__ import annotations

import math

import numpy as np
import pytest

from medkd.metrics import measure_calibration, pool_calibration


def random_case(seed, classes=3, shape=(4, 5, 6), dtype=np.float64):
    generator = np.random.default_rng(seed)
    logits = generator.standard_normal((classes, *shape)) * 2
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=0)
    return probabilities.astype(dtype), generator.integers(0, classes, size=shape)


def by_loops(probabilities, reference, bins):
    """Expected calibration error, its maximum over bins and Brier score, one voxel at a time."""
    members = [[] for _ in range(bins)]
    brier = 0.0
    for index in np.ndindex(reference.shape):
        p = [float(channel[index]) for channel in probabilities]
        best = max(p)
        for i in range(bins):
            if best > i / bins and best <= (i + 1) / bins:
                members[i].append((best, float(p.index(best) == reference[index])))
        brier += sum((value - (c == reference[index])) ** 2 for c, value in enumerate(p))
    gaps = [
        (len(group), abs(sum(c for c, _ in group) / len(group) - sum(a for _, a in group) / len(group)))
        for group in members
        if group
    ]
    n = reference.size
    return sum(size * gap for size, gap in gaps) / n, max(gap for _, gap in gaps), brier / n


@pytest.mark.parametrize(("bins", "dtype"), [(1, np.float64), (10, np.float64), (15, np.float32)])
def test_errors_and_brier_equal_a_loop_over_voxels(bins, dtype):
    for seed in range(5):
        probabilities, reference = random_case(seed, dtype=dtype)
        result = measure_calibration(probabilities, reference, bins=bins)
        got = result.expected_calibration_error, result.maximum_calibration_error, result.brier_score
        assert got == pytest.approx(by_loops(probabilities, reference, bins), abs=1e-6)
        assert result.n == reference.size


def test_three_images_by_hand():
    probabilities = np.array([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7]])
    result = measure_calibration(probabilities, np.array([0, 1, 1]), bins=2, class_axis=1)
    # All three confidences lie in (0.5, 1]: mean 0.8, accuracy 2/3.
    assert result.expected_calibration_error == pytest.approx(0.8 - 2 / 3)
    assert result.brier_score == pytest.approx((0.02 + 1.28 + 0.18) / 3)
    low, high = result.table()
    assert low == {"low": 0.0, "high": 0.5, "count": 0, "confidence": None, "accuracy": None}
    assert (high["count"], high["confidence"], high["accuracy"]) == (3, pytest.approx(0.8), pytest.approx(2 / 3))


def test_certain_and_right_is_perfect_certain_and_wrong_is_worst():
    certain = np.array([[1.0, 1.0], [0.0, 0.0]])
    right, wrong = measure_calibration(certain, np.array([0, 0])), measure_calibration(certain, np.array([1, 1]))
    assert (right.expected_calibration_error, right.brier_score) == (0.0, 0.0)
    assert (wrong.expected_calibration_error, wrong.maximum_calibration_error, wrong.brier_score) == (1.0, 1.0, 2.0)


def test_labels_drawn_from_the_probabilities_are_calibrated():
    generator = np.random.default_rng(0)
    foreground = generator.uniform(size=40_000)
    labels = (generator.uniform(size=40_000) < foreground).astype(int)
    result = measure_calibration(np.stack([1 - foreground, foreground]), labels)
    assert result.expected_calibration_error < 0.01
    assert result.brier_score == pytest.approx(1 / 3, abs=0.01)  # 2 E[p (1 - p)]


def test_confidence_on_a_bin_edge_belongs_to_the_lower_bin():
    result = measure_calibration(np.array([[0.5], [0.5]]), np.array([0]), bins=2)
    assert result.count.tolist() == [1, 0]


def test_class_axis_only_says_where_the_classes_are():
    probabilities, reference = random_case(1)
    first = measure_calibration(probabilities, reference)
    last = measure_calibration(np.moveaxis(probabilities, 0, -1), reference, class_axis=-1)
    batch = measure_calibration(probabilities[None], reference[None], class_axis=1)
    assert first.table() == last.table() == batch.table()


def test_pooled_cases_equal_one_case_of_all_samples():
    cases = [random_case(seed, shape=(7, 9 + seed)) for seed in range(3)]
    pooled = pool_calibration([measure_calibration(*case) for case in cases])
    joint = measure_calibration(
        np.concatenate([p.reshape(3, -1) for p, _ in cases], axis=1), np.concatenate([r.ravel() for _, r in cases])
    )
    assert pooled.n == joint.n
    assert pooled.expected_calibration_error == pytest.approx(joint.expected_calibration_error)
    assert pooled.brier_score == pytest.approx(joint.brier_score)


def test_where_restricts_to_the_region():
    probabilities, reference = random_case(2)
    region = np.zeros(reference.shape, bool)
    region[1:3, 2:, :4] = True
    inside = measure_calibration(probabilities, reference, where=region)
    cropped = measure_calibration(probabilities[:, 1:3, 2:, :4], reference[1:3, 2:, :4])
    assert inside.n == region.sum()
    assert inside.expected_calibration_error == pytest.approx(cropped.expected_calibration_error)


def test_no_samples_give_nan_not_zero():
    probabilities, reference = random_case(0)
    nothing = measure_calibration(probabilities, reference, where=np.zeros(reference.shape, bool))
    assert nothing.n == 0
    assert math.isnan(nothing.expected_calibration_error)
    assert math.isnan(nothing.maximum_calibration_error)
    assert math.isnan(nothing.brier_score)


def test_unusable_arguments_are_refused_in_clear_words():
    probabilities, reference = random_case(0)
    for arguments, keywords, message in [
        ((probabilities * 5 - 1, reference), {}, "apply the softmax"),
        ((probabilities * np.nan, reference), {}, "apply the softmax"),
        ((np.array([[-0.2], [1.2]]), np.array([1])), {}, "apply the softmax"),
        ((probabilities.argmax(axis=0), reference), {}, "floating point"),
        ((probabilities, reference.astype(float)), {}, "integer classes"),
        ((probabilities, reference[1:]), {}, "in the shape"),
        ((probabilities, reference + 1), {}, "classes 1..3"),
        ((probabilities, reference - 1), {}, "classes -1..1"),
        ((probabilities, reference), {"bins": 0}, "bins must"),
        ((probabilities, reference), {"class_axis": 4}, "no axis 4"),
        ((probabilities, reference), {"where": reference}, "where must be boolean"),
        ((probabilities, reference), {"where": np.ones((4, 5), bool)}, "where must be boolean"),
    ]:
        with pytest.raises(ValueError, match=message):
            measure_calibration(*arguments, **keywords)
    with pytest.raises(ValueError, match="same number of bins"):
        pool_calibration([])
    with pytest.raises(ValueError, match="same number of bins"):
        pool_calibration([measure_calibration(probabilities, reference, bins=bins) for bins in (5, 6)])
