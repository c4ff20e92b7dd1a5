"""FID, KID and SSIM: closed forms, loops, MONAI's values, what their intervals cover."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from monai.metrics import SSIMMetric
from monai.metrics.fid import get_fid_score
from scipy import linalg

from medkd.metrics import density_and_coverage, fid, kid, ssim


def gaussian(n: int, d: int, *, seed: int, shift: float = 0.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) + shift


def test_fid_equals_its_definition_with_matrix_roots():
    a, b = gaussian(50, 4, seed=0), gaussian(60, 4, seed=1, shift=1.0)
    root = linalg.sqrtm(np.cov(a.T) @ np.cov(b.T)).real
    expected = np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * root)
    assert fid(a, b) == pytest.approx(expected, rel=1e-10)
    assert fid(torch.as_tensor(a).requires_grad_(), torch.as_tensor(b)) == pytest.approx(expected, rel=1e-10)
    monais = get_fid_score(torch.as_tensor(a), torch.as_tensor(b)).item()
    assert fid(a, b) == pytest.approx(monais, rel=1e-8)


def test_fid_of_one_dimensional_samples_is_the_difference_of_means_and_deviations():
    a, b = np.array([[0.0], [2.0], [4.0]]), np.array([[1.0], [2.0]])
    expected = (2.0 - 1.5) ** 2 + (2.0 - math.sqrt(0.5)) ** 2
    assert fid(a, b) == pytest.approx(expected, rel=1e-12)


def test_fid_is_zero_of_equal_samples_symmetric_and_the_squared_shift_of_shifted_ones():
    a, b = gaussian(30, 5, seed=0), gaussian(40, 5, seed=1)
    assert fid(a, a) == pytest.approx(0.0, abs=1e-9)
    assert fid(a, b) == pytest.approx(fid(b, a), rel=1e-10)
    assert fid(a, a + 3.0) == pytest.approx(5 * 9.0, rel=1e-10)


def test_fid_is_exact_with_fewer_images_than_features():
    a, b = gaussian(6, 3, seed=0), gaussian(5, 3, seed=1)
    wide_a, wide_b = (np.concatenate([sample, np.zeros((len(sample), 20))], axis=1) for sample in (a, b))
    rotation = np.linalg.qr(np.random.default_rng(2).normal(size=(23, 23)))[0]
    assert fid(wide_a @ rotation, wide_b @ rotation) == pytest.approx(fid(a, b), rel=1e-9)


def kid_by_loops(a: np.ndarray, b: np.ndarray) -> float:
    def kernel(x, y):
        return (float(np.dot(x, y)) / len(x) + 1) ** 3

    def within(sample):
        n = len(sample)
        return sum(kernel(sample[i], sample[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))

    between = sum(kernel(x, y) for x in a for y in b) / (len(a) * len(b))
    return within(a) + within(b) - 2 * between


def test_kid_equals_loops_for_samples_of_different_size():
    a, b = gaussian(9, 4, seed=0), gaussian(7, 4, seed=1, shift=0.5)
    estimate = kid(a, b, resamples=10)
    assert estimate.value == pytest.approx(kid_by_loops(a, b), rel=1e-10)
    assert (estimate.n_a, estimate.n_b) == (9, 7)
    assert kid(torch.as_tensor(a), b, resamples=10) == estimate


def test_kid_is_unbiased_and_its_interval_covers_zero_for_equal_distributions():
    rng = np.random.default_rng(0)
    estimates = [kid(rng.normal(size=(40, 3)), rng.normal(size=(40, 3)), resamples=200, seed=i) for i in range(60)]
    values = np.array([estimate.value for estimate in estimates])
    assert abs(values.mean()) < 3 * values.std() / math.sqrt(len(values))
    assert values.min() < 0 < values.max()
    covered = np.mean([estimate.low <= 0 <= estimate.high for estimate in estimates])
    assert covered >= 0.85


def test_kid_tells_distributions_apart():
    rng = np.random.default_rng(0)
    estimate = kid(rng.normal(size=(60, 4)), rng.normal(size=(60, 4)) + 1.0, resamples=200)
    assert estimate.low > 0.5
    assert estimate.low < estimate.value < estimate.high
    assert estimate.sd > 0


def test_the_interval_of_kid_matches_the_spread_of_repeated_samples():
    rng = np.random.default_rng(1)
    estimates = [kid(rng.normal(size=(50, 3)), rng.normal(size=(50, 3)) + 0.7, resamples=200) for _ in range(40)]
    spread = np.std([estimate.value for estimate in estimates], ddof=1)
    assert np.mean([estimate.sd for estimate in estimates]) == pytest.approx(spread, rel=0.35)


def test_slices_of_a_patient_are_resampled_together_and_widen_the_interval():
    rng = np.random.default_rng(0)
    patients = np.repeat(np.arange(8), 10)
    a, b = (rng.normal(size=(8, 3))[patients] + 0.1 * rng.normal(size=(80, 3)) for _ in range(2))
    naive, grouped = kid(a, b, resamples=300), kid(a, b, patients_a=patients, patients_b=patients, resamples=300)
    assert grouped.value == naive.value
    assert grouped.high - grouped.low > 1.5 * (naive.high - naive.low)


def test_resamples_of_one_image_alone_are_left_out():
    a, b = gaussian(2, 3, seed=0), gaussian(3, 3, seed=1)
    estimate = kid(a, b, resamples=200)
    assert math.isfinite(estimate.low)
    assert estimate.value == pytest.approx(kid_by_loops(a, b))
    scarce = [kid(a, b, resamples=2, seed=seed) for seed in range(20)]
    assert all(estimate.value == one.value for one in scarce)
    assert any(math.isnan(one.sd) for one in scarce)


def test_ssim_equals_monai_pair_by_pair():
    a, b = torch.rand(3, 1, 16, 18), torch.rand(3, 1, 16, 18)
    expected = [SSIMMetric(2, data_range=1.0)(a[i : i + 1], b[i : i + 1]).item() for i in range(3)]
    assert ssim(a, b, data_range=1.0).tolist() == pytest.approx(expected, abs=1e-6)
    assert ssim(a.numpy(), b.numpy(), data_range=1.0).tolist() == pytest.approx(expected, abs=1e-6)
    volume = torch.rand(2, 1, 12, 12, 12)
    assert ssim(volume, volume, data_range=1.0).tolist() == pytest.approx([1.0, 1.0])


def test_ssim_of_constant_images_is_the_luminance_term():
    a, b = torch.full((1, 1, 11, 11), 0.2), torch.full((1, 1, 11, 11), 0.8)
    c1 = (0.01 * 2.0) ** 2
    expected = (2 * 0.2 * 0.8 + c1) / (0.2**2 + 0.8**2 + c1)
    assert ssim(a, b, data_range=2.0)[0] == pytest.approx(expected, abs=1e-4)


def test_bad_input_is_named():
    good = gaussian(6, 3, seed=0)
    with pytest.raises(ValueError, match=r"\(6, 3\) and \(6, 2\)"):
        fid(good, good[:, :2])
    with pytest.raises(ValueError, match=r"\(1, 3\)"):
        kid(good[:1], good)
    broken = good.copy()
    broken[2, 1] = np.nan
    with pytest.raises(ValueError, match="features_b: 1 of 6 images"):
        fid(good, broken)
    with pytest.raises(ValueError, match=r"patients_a \(5,\).*\(6,\)"):
        kid(good, good, patients_a=np.arange(5))
    with pytest.raises(ValueError, match="patients_b names 1 patient"):
        kid(good, good, patients_b=np.zeros(6))
    with pytest.raises(ValueError, match="confidence"):
        kid(good, good, confidence=1.0)
    images = torch.rand(1, 1, 16, 16)
    with pytest.raises(ValueError, match=r"\(1, 1, 16, 16\) and \(1, 1, 16, 12\)"):
        ssim(images, images[..., :12], data_range=1.0)
    with pytest.raises(ValueError, match="sides of 11"):
        ssim(images[..., :10], images[..., :10], data_range=1.0)
    with pytest.raises(ValueError, match="data_range"):
        ssim(images, images, data_range=0.0)
    with pytest.raises(ValueError, match="NaN"):
        ssim(images, images * math.nan, data_range=1.0)


def density_by_loops(real: np.ndarray, made: np.ndarray, k: int) -> tuple[float, float]:
    radii = [sorted(np.linalg.norm(a - b) for b in real)[k] for a in real]
    inside = [[np.linalg.norm(a - b) < radius for b in made] for a, radius in zip(real, radii, strict=True)]
    return sum(map(sum, inside)) / (k * len(made)), sum(map(any, inside)) / len(real)


def test_density_and_coverage_equal_loops():
    real, made = gaussian(20, 3, seed=0), gaussian(15, 3, seed=1)
    for k in (1, 5):
        assert density_and_coverage(real, made, neighbors=k) == pytest.approx(density_by_loops(real, made, k))
    assert density_and_coverage(torch.as_tensor(real), made) == density_and_coverage(real, made)


def test_density_is_about_one_for_equal_distributions_and_coverage_sees_what_was_left_out():
    rng = np.random.default_rng(0)
    real, made = rng.normal(size=(400, 4)), rng.normal(size=(400, 4))
    density, coverage = density_and_coverage(real, made)
    assert density == pytest.approx(1.0, abs=0.1)
    assert coverage > 0.9
    assert density_and_coverage(real, made + 100) == (0.0, 0.0)
    half = np.concatenate([real[:200] - 50, real[200:] + 50])
    assert density_and_coverage(half, made + 50)[1] <= 0.5


@pytest.mark.parametrize("neighbors", [0, 6])
def test_a_number_of_neighbors_out_of_range_is_refused(neighbors):
    with pytest.raises(ValueError, match="neighbors"):
        density_and_coverage(gaussian(6, 3, seed=0), gaussian(6, 3, seed=1), neighbors=neighbors)
