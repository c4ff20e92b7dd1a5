from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from monai.metrics import compute_froc_curve_data, compute_froc_score
from skimage.measure import regionprops

from medkd.metrics.froc import (
    FALSE_POSITIVES_PER_SLIDE,
    SlideDetections,
    find_detections,
    find_lesions,
    froc_curve,
    froc_intervals,
    match_detections,
)

MPP = 8.0


def slide(lesions, false, name="s", patient=None):
    return SlideDetections(name, patient or name, np.array(lesions, float), np.array(false, float))


def disk(shape, center, radius):
    y, x = np.indices(shape)
    return (y - center[0]) ** 2 + (x - center[1]) ** 2 <= radius**2


probability = st.integers(1, 20).map(lambda value: value / 20)
slides_of = st.lists(
    st.tuples(st.lists(st.one_of(probability, st.just(math.nan)), max_size=3), st.lists(probability, max_size=6)),
    min_size=1,
    max_size=6,
)


@given(slides_of)
def test_curve_and_score_are_those_of_the_challenge(content):
    slides = [slide(lesions, false, str(number)) for number, (lesions, false) in enumerate(content)]
    hits = np.concatenate([one.lesions for one in slides])
    if not np.isnan(hits).any():
        hits = np.append(hits, math.nan)  # the challenge's script leaves a point out where nothing is missed
        slides[0] = slide([*slides[0].lesions, math.nan], slides[0].false_positives, "0")
    # As in its script, a missed lesion is a true positive of probability 0, which no threshold reaches.
    fps, sensitivity = compute_froc_curve_data(
        np.concatenate([one.false_positives for one in slides]), np.nan_to_num(hits, nan=0.0), len(hits), len(slides)
    )
    found = froc_curve(slides)
    np.testing.assert_allclose(found.false_positives_per_slide, fps[::-1])
    np.testing.assert_allclose(found.sensitivity, sensitivity[::-1])
    assert found.score == pytest.approx(compute_froc_score(fps, sensitivity))
    assert tuple(found.sensitivities) == FALSE_POSITIVES_PER_SLIDE


def test_sensitivities_read_off_by_hand():
    # Thresholds 0.9, 0.8, 0.7, 0.6 on two slides with two lesions: hit, false, hit, false.
    found = froc_curve([slide([0.9, 0.7], [0.8], "a"), slide([], [0.6], "b")])
    np.testing.assert_allclose(found.false_positives_per_slide, [0, 0, 0.5, 0.5, 1.0])
    np.testing.assert_allclose(found.sensitivity, [0, 0.5, 0.5, 1.0, 1.0])
    assert found.sensitivities == {0.25: 0.5, 0.5: 1.0, 1.0: 1.0, 2.0: 1.0, 4.0: 1.0, 8.0: 1.0}


def test_nothing_detected_is_worth_nothing_and_no_lesion_is_no_number():
    assert froc_curve([slide([math.nan], [])]).score == 0
    assert math.isnan(froc_curve([slide([], [0.5])]).score)
    with pytest.raises(ValueError, match="no slide"):
        froc_curve([])


def test_false_positives_on_normal_slides_count():
    tumor = slide([0.5], [], "t")
    clean = froc_curve([tumor, slide([], [], "n")]).score
    assert froc_curve([tumor, slide([], [0.9] * 20, "n")]).score < clean == 1.0


def test_interval_resamples_patients_with_all_their_slides():
    source = np.random.default_rng(0)
    slides = [slide(source.random(3), source.random(4), f"s{n}", f"p{n // 2}") for n in range(12)]
    score, each = froc_intervals(slides, resamples=500)
    by_hand = []
    for _ in range(500):
        drawn = source.integers(6, size=6)
        by_hand.append(froc_curve([one for number in drawn for one in slides[2 * number : 2 * number + 2]]).score)
    assert (score.low, score.high) == pytest.approx(np.quantile(by_hand, [0.025, 0.975]), abs=0.04)
    assert score.estimate == froc_curve(slides).score
    assert score.n_patients == 6
    assert set(each) == set(FALSE_POSITIVES_PER_SLIDE)
    assert all(interval.low <= interval.estimate <= interval.high for interval in each.values())


def test_one_patient_has_no_interval():
    score, _ = froc_intervals([slide([0.5, 0.4], [0.45], "a", "p"), slide([0.5], [], "b", "p")])
    assert score.estimate > 0
    assert math.isnan(score.low)


def test_near_parts_are_one_lesion_and_small_ones_need_not_be_found():
    mask = disk((200, 200), (50, 50), 25) | disk((200, 200), (50, 106), 25)  # a gap of 5 px, 40 µm
    mask |= disk((200, 200), (150, 50), 3)  # grown by 37.5 µm still under 275 µm
    mask |= disk((200, 200), (150, 140), 25) & ~disk((200, 200), (150, 140), 8)  # a ring, whose hole counts
    lesions = find_lesions(mask, MPP)
    assert lesions.count == 3
    assert len(lesions.isolated) == 1
    assert lesions.labels[150, 140] > 0
    assert lesions.labels[150, 50] in lesions.isolated
    assert find_lesions(np.zeros((5, 5), bool), MPP).count == 0


def test_longest_axis_is_that_of_scikit_image():
    mask = np.zeros((120, 120), bool)
    mask[20:90, 50:60] = True
    (props,) = regionprops(find_lesions(mask, MPP).labels)
    for limit, isolated in ((props.axis_major_length * MPP * 1.001, 1), (props.axis_major_length * MPP * 0.999, 0)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("medkd.metrics.froc.ISOLATED_UM", limit)
            assert len(find_lesions(mask, MPP).isolated) == isolated


def test_best_hit_counts_once_and_isolated_cells_are_neither():
    mask = disk((200, 200), (50, 50), 25) | disk((200, 200), (150, 50), 3) | disk((200, 200), (150, 140), 25)
    lesions = find_lesions(mask, MPP)
    points = [[50, 50], [55, 50], [50, 150], [100, 100], [5000, 5000], [-10, 4]]
    matched = match_detections(
        "s", "p", np.array(points) * 32.0, [0.6, 0.8, 0.9, 0.7, 0.3, 0.2], lesions, downsample=32.0
    )
    assert matched.lesions[0] == 0.8
    assert math.isnan(matched.lesions[1])
    assert sorted(matched.false_positives) == [0.2, 0.3, 0.7]


def test_detections_are_the_peaks_with_room_around_them():
    y, x = np.mgrid[0:10, 0:10]
    centers = np.stack([x.ravel(), y.ravel()], 1) * 100
    values = np.exp(-((centers - [200, 200]) ** 2).sum(1) / 2e4) + 0.8 * np.exp(
        -((centers - [700, 600]) ** 2).sum(1) / 2e4
    )
    points, found = find_detections(centers, values, radius=150)
    np.testing.assert_array_equal(points[:2], [[200, 200], [700, 600]])
    assert (np.diff(found) <= 0).all()
    distances = np.linalg.norm(points[:, None] - points[None], axis=-1)
    assert distances[~np.eye(len(points), dtype=bool)].min() > 150


def test_failed_tiles_are_no_detection():
    points, found = find_detections([[0, 0], [10, 0]], [math.nan, 0.5], radius=1)
    assert (points.tolist(), found.tolist()) == ([[10, 0]], [0.5])
    assert len(find_detections([[0, 0]], [math.nan], radius=1)[0]) == 0
