from __future__ import annotations

import io

import numpy as np
import pytest
from matplotlib.image import imread

from medkd.report import overlay, overlay_volume, picture_name, representative_cases
from medkd.report.overlays import BACKDROP, CLASS_COLORS, Slice, _crop, _cut, _ras_spacing, _telling_slices, _to_ras

LABELS = {0: "background", 1: "left", 2: "right"}


def pixels(png: bytes) -> np.ndarray:
    return (imread(io.BytesIO(png))[..., :3] * 255).round().astype(int)


def count_color(png: bytes, color: str) -> int:
    wanted = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
    return int((np.abs(pixels(png) - wanted).max(axis=-1) <= 2).sum())


def ball(shape: tuple[int, ...], center: tuple[float, ...], radius: float) -> np.ndarray:
    grid = np.indices(shape)
    return sum((g - c) ** 2 for g, c in zip(grid, center, strict=True)) <= radius**2


def test_prediction_and_reference_are_drawn_in_the_class_color():
    mask = ball((40, 40), (20, 20), 8).astype(int)
    image = np.zeros((40, 40))
    both = overlay(image, mask, mask, labels=LABELS)
    without_prediction = overlay(image, 0 * mask, mask, labels=LABELS)
    assert both.startswith(b"\x89PNG\r\n\x1a\n")
    assert count_color(both, CLASS_COLORS[0]) > count_color(without_prediction, CLASS_COLORS[0])
    assert count_color(both, CLASS_COLORS[1]) > 20  # the legend names both classes


def test_equal_input_gives_equal_bytes():
    mask = ball((30, 30), (15, 15), 5).astype(int)
    assert overlay(mask, mask, mask, labels=LABELS) == overlay(mask, mask, mask, labels=LABELS)


@pytest.mark.parametrize("spacing", [(1.0, 1.0), (1.0, 4.0), (4.0, 1.0)])
def test_aspect_follows_the_spacing(spacing):
    blank = np.zeros((40, 40), dtype=int)
    picture = pixels(overlay(np.ones((40, 40)), blank, None, labels={1: "x"}, spacing_mm=spacing))
    backdrop = [int(BACKDROP[i : i + 2], 16) for i in (1, 3, 5)]
    panel = picture[:, : picture.shape[1] // 2]
    dark = (panel == 0).all(axis=-1)  # a flat image is drawn black, darker than the backdrop
    rows, columns = np.nonzero(dark)
    assert (panel != backdrop).any()
    assert np.ptp(rows) / np.ptp(columns) == pytest.approx(spacing[0] / spacing[1], rel=0.05)


@pytest.mark.parametrize("value", [np.nan, np.inf, 7.0])
def test_odd_images_and_empty_labels_are_drawn(value):
    image, blank = np.full((20, 20), value), np.zeros((20, 20), dtype=int)
    image[3, 3] = 1.0
    assert overlay(image, blank, blank, labels=LABELS)
    assert overlay(image, blank + 1, None, labels=LABELS, title="$x_1$ <b>")


def test_shapes_that_differ_are_refused():
    with pytest.raises(ValueError, match="one shape"):
        overlay(np.zeros((4, 4)), np.zeros((4, 5), int), None, labels=LABELS)
    with pytest.raises(ValueError, match="one shape"):
        overlay_volume(np.zeros((4, 4, 4)), np.zeros((4, 4, 5), int), None, labels=LABELS)
    with pytest.raises(ValueError, match="without a direction"):
        overlay_volume(*[np.zeros((4, 4, 4), int)] * 3, labels=LABELS, affine=np.diag([1, 1, 0, 1]))


def test_slices_are_the_largest_structure_and_the_largest_disagreement():
    reference = np.zeros((10, 10, 8), dtype=int)
    reference[2:8, 2:8, 2] = 1
    reference[4:8, 2:8, 5] = 1
    prediction = reference.copy()
    prediction[..., 5] = 0
    assert [index for index, _ in _telling_slices(prediction, reference, 2)] == [2, 5]
    assert [index for index, _ in _telling_slices(reference, reference, 2)] == [2]
    assert "both empty" in _telling_slices(0 * reference, 0 * reference, 2)[0][1]
    assert "reference is empty" in _telling_slices(reference, 0 * reference, 2)[0][1]


@pytest.mark.parametrize("codes", ["RAS", "LPS", "PSR", "AIL"])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_any_storage_order_is_shown_in_the_radiological_convention(codes, axis):
    import nibabel as nib

    ras = np.arange(3 * 4 * 5).reshape(3, 4, 5)
    ras_affine = np.diag([1.0, 2.0, 3.0, 1.0])
    stored = nib.Nifti1Image(ras, ras_affine, dtype=np.int64).as_reoriented(
        nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(codes))
    )
    orientation = nib.orientations.io_orientation(stored.affine)
    spacing = _ras_spacing(stored.affine, orientation)
    assert spacing == (1.0, 2.0, 3.0)
    volume = _to_ras(np.asarray(stored.dataobj), orientation)
    plane = _cut([volume, volume, None], axis, 1, spacing, "", True)
    expected = {0: ras[1, ::-1, ::-1].T, 1: ras[::-1, 1, ::-1].T, 2: ras[::-1, ::-1, 1].T}[axis]
    np.testing.assert_array_equal(plane.image, expected)
    assert plane.spacing == {0: (3.0, 2.0), 1: (3.0, 1.0), 2: (2.0, 1.0)}[axis]
    assert (plane.left, plane.top) == {0: ("A", "S"), 1: ("R", "S"), 2: ("R", "A")}[axis]


def test_crop_keeps_every_labeled_pixel_and_one_window_for_all_slices():
    first, second = ball((100, 80), (95, 5), 4).astype(int), ball((100, 80), (75, 15), 6).astype(int)
    cropped = _crop([Slice(mask, mask, 0 * mask, (1.0, 2.0)) for mask in (first, second)])
    assert [plane.prediction.sum() for plane in cropped] == [first.sum(), second.sum()]
    assert len({plane.image.shape for plane in cropped}) == 1
    assert cropped[0].image.shape[0] < 100


def test_volume_is_drawn_with_and_without_affine():
    reference = ball((20, 24, 12), (10, 12, 6), 5).astype(int)
    prediction = np.roll(reference, 2, axis=2)
    image = np.random.default_rng(0).normal(size=reference.shape)
    one = overlay_volume(image, reference, reference, labels=LABELS)
    two = overlay_volume(image, prediction, reference, labels=LABELS, affine=np.diag([1.0, 1.0, 3.0, 1.0]))
    assert pixels(two).shape[1] > 1.5 * pixels(one).shape[1]
    assert overlay_volume(image[..., 6], prediction[..., 6], None, labels=LABELS)


def test_many_classes_name_only_what_is_visible():
    labels = {value: f"class {value}" for value in range(40)}
    mask = np.zeros((30, 30), dtype=int)
    mask[5:20, 5:20] = 17
    assert pixels(overlay(mask, mask, mask, labels=labels)).shape[0] < 500


def test_representative_cases_go_by_mean_dice(scores):
    found = scores(missed=("case_02",), empty=("case_05",), patients=7)
    dice = {}
    for score in found:
        dice.setdefault(score.case, []).append(score.dice)
    means = {case: np.nanmean(values) for case, values in dice.items()}
    picked = representative_cases(found)
    assert picked["worst"] == min(means, key=means.get) == "case_02"
    assert picked["best"] == max(means, key=means.get)
    assert len(set(picked.values())) == 3
    assert representative_cases(found[:2]) == {"worst": "case_00"}
    assert representative_cases([]) == {}


def test_picture_names_are_plain_files():
    assert picture_name("worst", "a/../b c") == "worst_a_.._b_c.png"
