from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from medkd.metrics import bootstrap_ci, paired_test, relative_score, statistics


def crossed_scores(n_seeds, n_patients, *, seed_sd, patient_sd, noise_sd, rng_seed=0, repeats=1):
    """Scores with seed and patient effects: (values, patients, seeds), ``repeats`` slices per patient and seed."""
    generator = np.random.default_rng(rng_seed)
    seeds, patients, _ = (
        index.ravel() for index in np.meshgrid(range(n_seeds), range(n_patients), range(repeats), indexing="ij")
    )
    values = (
        seed_sd * generator.standard_normal(n_seeds)[seeds]
        + patient_sd * generator.standard_normal(n_patients)[patients]
        + noise_sd * generator.standard_normal(len(seeds))
    )
    return values, patients, seeds


def width(interval):
    return interval.high - interval.low


def test_estimate_is_the_mean_of_the_values_and_lies_in_the_interval():
    values, patients, seeds = crossed_scores(3, 12, seed_sd=1, patient_sd=1, noise_sd=1)
    interval = bootstrap_ci(values, patients=patients, seeds=seeds)
    assert interval.estimate == pytest.approx(values.mean())
    assert interval.low < interval.estimate < interval.high
    assert (interval.n, interval.n_patients, interval.n_seeds, interval.n_nan) == (36, 12, 3, 0)


def test_resampled_means_equal_pooling_the_drawn_values_one_by_one():
    generator = np.random.default_rng(0)
    table = [[list(generator.standard_normal(generator.integers(0, 4))) for _ in range(4)] for _ in range(3)]
    table[0][:2] = table[1][2:] = table[2][:2] = [[], []]  # so that some resamples take no value at all
    sums = np.array([[sum(cell) for cell in row] for row in table])
    counts = np.array([[float(len(cell)) for cell in row] for row in table])
    means = statistics._resampled_means(sums, counts, 50, np.random.default_rng(7))
    draw = np.random.default_rng(7)
    seed_draws, patient_draws = draw.integers(3, size=(50, 3)), draw.integers(4, size=(50, 4))
    expected = []
    for drawn_seeds, drawn_patients in zip(seed_draws, patient_draws, strict=True):
        pooled = [value for s, p in itertools.product(drawn_seeds, drawn_patients) for value in table[s][p]]
        if pooled:
            expected.append(sum(pooled) / len(pooled))
    assert 25 < len(expected) < 50
    assert means == pytest.approx(expected)


def test_interval_equals_all_27_resamples_of_three_patients():
    values = np.array([0.0, 1.0, 5.0])
    means = [np.mean(draw) for draw in itertools.product(values, repeat=3)]
    interval = bootstrap_ci(values, confidence=0.6, resamples=200_000)
    assert (interval.low, interval.high) == pytest.approx(np.quantile(means, [0.2, 0.8]), abs=1e-12)


@pytest.mark.parametrize("n_patients", [15, 50])
def test_interval_over_patients_covers_the_truth_about_as_often_as_it_says(n_patients):
    generator = np.random.default_rng(1)
    covered = 0
    for trial in range(300):
        interval = bootstrap_ci(generator.exponential(size=n_patients), resamples=1000, seed=trial)
        covered += interval.low <= 1.0 <= interval.high
    assert 0.86 < covered / 300 < 0.98


def test_interval_over_seeds_and_patients_covers_the_truth_about_as_often_as_it_says():
    covered = 0
    for trial in range(300):
        scores = crossed_scores(8, 30, seed_sd=1.0, patient_sd=2.0, noise_sd=1.0, rng_seed=trial)
        interval = bootstrap_ci(scores[0], patients=scores[1], seeds=scores[2], resamples=500)
        covered += interval.low <= 0.0 <= interval.high
    assert 0.86 < covered / 300 < 0.99


def test_slices_of_a_patient_stay_together():
    values, patients, _ = crossed_scores(1, 10, seed_sd=0, patient_sd=1, noise_sd=0.01, repeats=20)
    by_patient = width(bootstrap_ci(values, patients=patients))
    by_slice = width(bootstrap_ci(values))
    one_per_patient = width(bootstrap_ci(values[::20]))
    assert by_patient > 3 * by_slice
    assert by_patient == pytest.approx(one_per_patient, rel=0.1)


def test_seed_effects_widen_the_interval_only_when_seeds_are_given():
    values, patients, seeds = crossed_scores(5, 40, seed_sd=3, patient_sd=0.5, noise_sd=0.1)
    assert width(bootstrap_ci(values, patients=patients, seeds=seeds)) > 3 * width(
        bootstrap_ci(values, patients=patients)
    )


def test_seeds_without_patients_resample_seeds_alone():
    values, patients, seeds = crossed_scores(6, 10, seed_sd=1, patient_sd=5, noise_sd=0)
    per_seed = values.reshape(6, 10).mean(axis=1)
    expected = bootstrap_ci(per_seed, resamples=20_000)
    got = bootstrap_ci(values, seeds=seeds, resamples=20_000)
    assert (got.low, got.high) == pytest.approx((expected.low, expected.high), abs=0.03 * width(expected))
    assert len(patients) == got.n == 60


def test_constant_scores_have_no_width():
    interval = bootstrap_ci(np.full(8, 0.75), patients=list("aabbccdd"))
    assert (interval.estimate, interval.low, interval.high, interval.n_patients) == (0.75, 0.75, 0.75, 4)


def test_one_patient_has_a_mean_but_no_interval():
    interval = bootstrap_ci([0.1, 0.5], patients=["a", "a"])
    assert interval.estimate == pytest.approx(0.3)
    assert math.isnan(interval.low)
    assert math.isnan(interval.high)


def test_nan_is_left_out_and_counted():
    interval = bootstrap_ci([0.1, math.nan, 0.5, math.nan], patients=["a", "b", "c", "c"])
    same = bootstrap_ci([0.1, 0.5], patients=["a", "c"])
    assert (interval.estimate, interval.low, interval.high) == (same.estimate, same.low, same.high)
    assert (interval.n, interval.n_nan, interval.n_patients) == (2, 2, 2)


@pytest.mark.parametrize("values", [[], [math.nan, math.nan]])
def test_nothing_to_average_is_nan_with_counts(values):
    interval = bootstrap_ci(values)
    assert (interval.n, interval.n_nan, interval.n_patients) == (0, len(values), 0)
    assert all(math.isnan(value) for value in (interval.estimate, interval.low, interval.high))


def test_result_depends_on_the_seed_only_and_not_on_the_order_of_rows():
    values, patients, seeds = crossed_scores(3, 9, seed_sd=1, patient_sd=1, noise_sd=1)
    order = np.random.default_rng(5).permutation(len(values))
    first = bootstrap_ci(values, patients=patients, seeds=seeds)
    again = bootstrap_ci(values, patients=patients, seeds=seeds)
    shuffled = bootstrap_ci(values[order], patients=patients[order], seeds=seeds[order])
    assert first == again
    assert (shuffled.low, shuffled.high) == pytest.approx((first.low, first.high), rel=1e-12)
    assert bootstrap_ci(values, patients=patients, seeds=seeds, seed=1) != first


def test_blocks_bound_memory_without_changing_the_distribution(monkeypatch):
    values, patients, seeds = crossed_scores(3, 9, seed_sd=1, patient_sd=1, noise_sd=1)
    whole = bootstrap_ci(values, patients=patients, seeds=seeds, resamples=20_000)
    monkeypatch.setattr(statistics, "_BLOCK_WEIGHTS", 1000)
    blocks = bootstrap_ci(values, patients=patients, seeds=seeds, resamples=20_000)
    assert (blocks.low, blocks.high) == pytest.approx((whole.low, whole.high), abs=0.03 * width(whole))


def test_seeds_that_share_no_patient_still_give_an_interval():
    interval = bootstrap_ci([0.1, 0.2, 0.6, 0.8], patients=["a", "b", "c", "d"], seeds=[0, 0, 1, 1])
    assert interval.low < interval.estimate < interval.high


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"values": [1.0, math.inf]}, "1 infinite of 2"),
        ({"values": [1.0, -math.inf]}, "1 infinite of 2"),
        ({"values": [[1.0, 2.0]]}, "one-dimensional"),
        ({"values": [1.0, 2.0], "patients": ["a"]}, "one label per value"),
        ({"values": [1.0, 2.0], "seeds": [1, 2, 3]}, "one label per value"),
        ({"values": [1.0, 2.0], "confidence": 95}, "between 0 and 1"),
        ({"values": [1.0, 2.0], "resamples": 0}, "at least 1"),
    ],
)
def test_unusable_values_and_labels_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        bootstrap_ci(**arguments)


def test_paired_test_equals_scipy_on_patient_differences():
    generator = np.random.default_rng(3)
    a = generator.normal(0.80, 0.05, size=11)
    b = a - generator.normal(0.02, 0.02, size=11)
    result = paired_test(a, b)
    exact = stats.permutation_test(
        (a, b), lambda x, y: np.mean(x - y), permutation_type="samples", n_resamples=np.inf, vectorized=False
    )
    assert result.mean_difference == pytest.approx((a - b).mean())
    assert result.wilcoxon_p == pytest.approx(stats.wilcoxon(a, b).pvalue)
    assert result.permutation_p == pytest.approx(exact.pvalue)
    interval = bootstrap_ci(a - b)
    assert (result.low, result.high, result.n) == (interval.low, interval.high, 11)


def test_random_sign_patterns_approach_the_exact_test():
    generator = np.random.default_rng(4)
    a, b = generator.normal(0.3, 1, size=14), np.zeros(14)
    exact = paired_test(a, b, resamples=2**14)
    random = paired_test(a, b, resamples=2**14 - 1)
    assert random.permutation_p == pytest.approx(exact.permutation_p, abs=0.02)
    assert random.permutation_p != exact.permutation_p


def test_random_sign_patterns_count_the_observed_one():
    result = paired_test(np.linspace(1, 2, 40), np.zeros(40), resamples=99)
    assert result.permutation_p == pytest.approx(1 / 100)


def test_paired_test_takes_patients_not_slices_or_seeds_as_evidence():
    values, patients, seeds = crossed_scores(5, 6, seed_sd=0, patient_sd=1, noise_sd=0.01, repeats=10)
    result = paired_test(values, np.zeros_like(values), patients=patients, seeds=seeds)
    patient_means = [values[patients == patient].mean() for patient in range(6)]
    assert result.wilcoxon_p == pytest.approx(stats.wilcoxon(patient_means).pvalue)
    assert result.permutation_p >= 2 / 2**6
    assert (result.n, result.n_patients, result.n_seeds) == (300, 6, 5)


def test_seeds_are_the_unit_when_only_seeds_are_given():
    a = np.array([0.81, 0.82, 0.85, 0.80, 0.83])
    result = paired_test(a, a - [0.01, 0.02, 0.03, 0.015, 0.012], seeds=range(5))
    assert result.permutation_p == pytest.approx(2 / 2**5)
    assert result.wilcoxon_p == pytest.approx(2 / 2**5)


def test_swapping_the_arms_swaps_the_sign():
    values, patients, seeds = crossed_scores(3, 8, seed_sd=1, patient_sd=1, noise_sd=1)
    other = np.roll(values, 5)
    forward = paired_test(values, other, patients=patients, seeds=seeds)
    backward = paired_test(other, values, patients=patients, seeds=seeds)
    assert (forward.low, forward.high) == pytest.approx((-backward.high, -backward.low))
    assert forward.mean_difference == pytest.approx(-backward.mean_difference)
    assert (forward.wilcoxon_p, forward.permutation_p) == pytest.approx((backward.wilcoxon_p, backward.permutation_p))


def test_equal_arms_give_no_evidence():
    result = paired_test([0.5, 0.6, 0.7], [0.5, 0.6, 0.7])
    assert (result.mean_difference, result.low, result.high) == (0.0, 0.0, 0.0)
    assert (result.wilcoxon_p, result.permutation_p) == (1.0, 1.0)


def test_pairs_with_nan_are_left_out_and_counted():
    result = paired_test([0.5, math.nan, 0.7, 0.9], [0.4, 0.5, math.nan, 0.6])
    assert (result.n, result.n_nan, result.n_patients) == (2, 2, 2)
    assert result.mean_difference == pytest.approx(0.2)
    nothing = paired_test([math.nan], [0.5])
    assert nothing.n == 0
    assert math.isnan(nothing.permutation_p)
    assert math.isnan(nothing.wilcoxon_p)


def test_paired_test_refuses_infinite_scores_and_other_lengths():
    with pytest.raises(ValueError, match="b has 1 infinite"):
        paired_test([1.0, 2.0], [1.0, math.inf])
    with pytest.raises(ValueError, match="same cases"):
        paired_test([1.0, 2.0], [1.0])


def test_relative_score_is_in_percent_of_the_reference():
    assert relative_score(0.83, 0.85) == pytest.approx(97.647, abs=1e-3)
    assert relative_score(0.0, 0.5) == 0.0
    for student, reference in ((0.5, 0.0), (math.nan, 0.5), (0.5, math.inf), (-0.1, 0.5)):
        with pytest.raises(ValueError, match="finite scores"):
            relative_score(student, reference)
