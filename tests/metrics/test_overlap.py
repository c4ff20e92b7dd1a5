from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from medkd.metrics import dice
from medkd.metrics.overlap import overlap

LABELS = hnp.arrays(
    dtype=st.sampled_from([np.uint8, np.int16, np.int64]),
    shape=st.one_of(hnp.array_shapes(min_dims=2, max_dims=2, max_side=6), hnp.array_shapes(min_dims=3, max_dims=3)),
    elements=st.integers(0, 3),
)


def dice_by_sets(pred, reference, label):
    a = {tuple(p) for p in np.argwhere(pred == label)}
    b = {tuple(p) for p in np.argwhere(reference == label)}
    return 2 * len(a & b) / (len(a) + len(b)) if a or b else math.nan


@settings(max_examples=150, deadline=None)
@given(LABELS, st.integers(0, 2**32 - 1))
def test_dice_equals_counting_coordinates_in_sets(pred, seed):
    reference = np.random.default_rng(seed).integers(0, 4, size=pred.shape)
    scores = dice(pred, reference, classes=range(5))
    for label in range(5):
        assert scores[label] == pytest.approx(dice_by_sets(pred, reference, label), abs=1e-12, nan_ok=True)


def test_dice_equals_monai_where_the_reference_has_the_class():
    from monai.metrics import compute_dice
    from monai.networks.utils import one_hot

    generator = np.random.default_rng(0)
    for _ in range(20):
        pred, reference = generator.integers(0, 4, size=(2, 5, 6, 7))
        hot = [one_hot(torch.from_numpy(labels)[None, None], 4) for labels in (pred, reference)]
        peer = compute_dice(*hot, include_background=True)[0]
        assert list(dice(pred, reference, classes=range(4)).values()) == pytest.approx(peer.tolist(), abs=1e-6)


def test_dice_by_hand():
    pred = np.array([[1, 1, 0], [2, 0, 0]])
    reference = np.array([[1, 0, 0], [0, 0, 3]])
    assert dice(pred, reference, classes=[1, 2, 3]) == {1: pytest.approx(2 / 3), 2: 0.0, 3: 0.0}


def test_class_in_neither_map_is_nan_and_in_one_map_is_zero():
    pred, reference = np.zeros((3, 4), int), np.zeros((3, 4), int)
    reference[0, 0] = 1
    scores = dice(pred, reference, classes=[1, 2])
    assert scores[1] == 0.0
    assert math.isnan(scores[2])
    assert dice(reference, pred, classes=[1])[1] == 0.0


@pytest.mark.parametrize(("label", "byte"), [(300, 44), (256, 0), (-1, 255)])
def test_labels_beyond_a_byte_or_below_zero_do_not_wrap(label, byte):
    pred = np.array([[label, byte, byte], [label, byte, byte]])
    reference = np.array([[label, byte, label], [byte, byte, byte]])
    counts = overlap(pred, reference, classes=[label, byte])
    assert [(c.intersection, c.pred, c.reference) for c in counts.values()] == [(1, 2, 2), (3, 4, 4)]


def test_boolean_masks_and_tensors_are_label_maps_too():
    mask = np.array([[True, False], [True, True]])
    assert dice(mask, torch.from_numpy(mask.astype(np.int64)), classes=[1]) == {1: 1.0}


@pytest.mark.parametrize(
    ("pred", "reference", "classes", "message"),
    [
        (np.zeros((2, 3), int), np.zeros((3, 2), int), [1], "same shape"),
        (np.zeros((2, 3)), np.zeros((2, 3), int), [1], "pred must be an integer label map"),
        (np.zeros((2, 3), int), np.zeros((2, 3), np.float32), [1], "reference must be an integer label map"),
        (np.zeros(3, int), np.zeros(3, int), [1], r"\(Z, Y, X\) or \(Y, X\)"),
        (np.zeros((1, 1, 2, 2), int), np.zeros((1, 1, 2, 2), int), [1], r"\(Z, Y, X\) or \(Y, X\)"),
        (np.zeros((0, 3), int), np.zeros((0, 3), int), [1], "at least one voxel"),
        (np.zeros((2, 3), int), np.zeros((2, 3), int), [], "classes is empty"),
        (np.zeros((2, 3), int), np.zeros((2, 3), int), [1.5], "must be integers"),
    ],
)
def test_unusable_arguments_are_refused_in_clear_words(pred, reference, classes, message):
    with pytest.raises(ValueError, match=message):
        dice(pred, reference, classes=classes)
