"""The field of view of fundus photographs: found, centered, scaled, and what is not one refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.data import MetaTensor

from medkd.data.fundus import CropFundusd, FundusCircle, crop_fundus, find_fundus
from medkd.errors import ConfigError, InputError


def photograph(
    height: int = 120, width: int = 160, *, x: float = 80, y: float = 60, diameter: float = 90, level: float = 150.0
) -> np.ndarray:
    """A reddish disc, brighter to the right, on black with a little noise."""
    rows, columns = np.mgrid[:height, :width]
    inside = np.hypot(rows - y, columns - x) <= diameter / 2
    noise = np.random.default_rng(0).integers(0, 5, (height, width, 3))
    color = level * np.array([1.0, 0.5, 0.2]) * (0.7 + 0.3 * columns / width)[..., None]
    return np.where(inside[..., None], color, noise).astype(np.uint8)


@settings(max_examples=25, deadline=None)
@given(
    x=st.floats(60, 100), y=st.floats(50, 70), diameter=st.floats(60, 95), level=st.floats(40, 255),
)  # fmt: skip
def test_the_circle_is_found_whatever_its_place_and_brightness(x, y, diameter, level):
    found = find_fundus(photograph(x=x, y=y, diameter=diameter, level=level))
    assert (found.x, found.y) == pytest.approx((x, y), abs=2)
    assert found.diameter_px == pytest.approx(diameter, abs=2)


def test_a_field_cut_off_at_top_and_bottom_keeps_its_diameter():
    found = find_fundus(photograph(height=90, y=45, diameter=120))
    assert found.diameter_px == pytest.approx(120, abs=2)
    assert (found.x, found.y) == pytest.approx((80, 45), abs=2)


def test_writing_in_the_corner_neither_moves_the_circle_nor_stays():
    image = photograph(diameter=80)
    image[2:10, 2:30] = 255
    assert find_fundus(image).diameter_px == pytest.approx(80, abs=2)
    assert crop_fundus(image, 64)[:6, :6].max() == 0


def test_every_field_comes_out_at_the_same_diameter():
    for diameter, side in ((60, 48), (95, 48), (60, 128)):
        image = crop_fundus(photograph(diameter=diameter), side)
        assert image.shape == (side, side, 3)
        assert image.dtype == np.uint8
        wide = np.flatnonzero(image[side // 2, :, 0] > 60)
        assert len(wide) >= 0.9 * side
        corner = image[: side // 8, : side // 8]
        assert corner.max() == 0


def test_shrinking_averages_instead_of_picking():
    checkered = (np.indices((100, 100)).sum(axis=0) % 2 * 200).astype(np.uint8)[..., None].repeat(3, axis=2)
    image = crop_fundus(checkered, 25, FundusCircle(49.5, 49.5, 100))
    assert abs(int(image[12, 12, 0]) - 100) <= 1


def test_an_image_without_dark_surround_is_taken_whole():
    found = find_fundus(np.full((60, 100, 3), 120, dtype=np.uint8))
    assert found == FundusCircle(49.5, 29.5, 100.0)


def test_the_transform_keeps_type_and_layout():
    rows = photograph()
    expected = np.moveaxis(crop_fundus(rows, 32), -1, 0)
    transform = CropFundusd("image", 32)
    channels = np.moveaxis(rows, -1, 0)
    for image in (channels, torch.from_numpy(channels.copy()), MetaTensor(channels.copy())):
        found = transform({"image": image, "label": 1})
        assert found["label"] == 1
        assert type(found["image"]) is (np.ndarray if isinstance(image, np.ndarray) else torch.Tensor)
        assert found["image"].dtype == image.dtype
        np.testing.assert_array_equal(np.asarray(found["image"]), expected)
    as_float = transform({"image": torch.from_numpy(channels.astype(np.float32))})["image"]
    assert as_float.dtype == torch.float32
    assert (as_float - torch.from_numpy(expected.astype(np.float32))).abs().max() <= 1


@pytest.mark.parametrize(
    "image", [np.zeros((3, 50, 50), np.uint8), np.pad(np.full((3, 4, 4), 200, np.uint8), 30)[26:29]]
)
def test_an_image_without_fundus_is_named(image):
    with pytest.raises(InputError, match=r"IDRiD_7\.jpg.*field of view") as refused:
        CropFundusd("image", 32)({"image": MetaTensor(image, meta={"filename_or_obj": "IDRiD_7.jpg"})})
    assert "\n" not in str(refused.value)


def test_refuses_a_diameter_of_nothing():
    with pytest.raises(ConfigError, match="diameter_px"):
        CropFundusd("image", 0)
