from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from medkd.data.check import check_datalist, require_trainable
from medkd.data.datalists import read_datalist, write_datalist
from medkd.data.splits import split_datalist
from medkd.data.tile_images import read_tile_image, read_tile_mask
from medkd.errors import InputError

PIXELS = np.random.default_rng(0).integers(256, size=(12, 9, 3), dtype=np.uint8)


def save(path, array, **options):
    Image.fromarray(array).save(path, **options)
    return path


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "tiff"])
def test_lossless_files_come_back_as_they_were(tmp_path, suffix):
    np.testing.assert_array_equal(read_tile_image(save(tmp_path / f"a.{suffix}", PIXELS)), PIXELS)


def test_gray_becomes_rgb_and_transparent_becomes_white(tmp_path):
    gray = read_tile_image(save(tmp_path / "gray.png", PIXELS[..., 0]))
    np.testing.assert_array_equal(gray, np.repeat(PIXELS[..., :1], 3, axis=2))
    alpha = np.zeros((12, 9, 1), np.uint8)
    alpha[:5] = 255
    found = read_tile_image(save(tmp_path / "a.png", np.concatenate([PIXELS, alpha], axis=2)))
    np.testing.assert_array_equal(found[:5], PIXELS[:5])
    assert (found[5:] == 255).all()


def test_unusable_files_have_messages_of_their_own(tmp_path):
    good = save(tmp_path / "good.jpg", np.random.default_rng(1).integers(256, size=(64, 64, 3), dtype=np.uint8))
    (tmp_path / "cut.jpg").write_bytes(good.read_bytes()[:700])
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "empty.png").touch()
    save(tmp_path / "deep.png", np.zeros((4, 4), np.uint16))
    for name, message in (
        ("none.png", "does not exist"), (".", "is a folder"), ("cut.jpg", "damaged"), ("text.png", "not an image"),
        ("empty.png", "not an image"), ("deep.png", "8 bits"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            read_tile_image(tmp_path / name)


def test_masks_are_integers_of_one_channel(tmp_path):
    labels = (PIXELS[..., 0] % 3).astype(np.uint8)
    np.testing.assert_array_equal(read_tile_mask(save(tmp_path / "m.png", labels)), labels)
    np.testing.assert_array_equal(read_tile_mask(save(tmp_path / "e.png", np.stack([labels] * 3, 2))), labels)
    np.testing.assert_array_equal(read_tile_mask(save(tmp_path / "b.png", labels > 0)), labels > 0)
    with pytest.raises(InputError, match="colored"):
        read_tile_mask(save(tmp_path / "c.png", PIXELS))
    blurred = read_tile_mask(save(tmp_path / "j.jpg", 255 * np.eye(32, dtype=np.uint8)), threshold=127)
    assert set(np.unique(blurred)) == {0, 1}


@pytest.fixture
def listed(tmp_path):
    source = np.random.default_rng(2)
    cases = []
    for number in range(8):
        save(tmp_path / f"t{number}.png", source.integers(256, size=(8, 8, 3), dtype=np.uint8))
        cases.append({"image": f"t{number}.png", "label": number % 2, "patient": f"p{number // 2}", "slide": "s"})
    content = {"name": "tiles", "labels": {"0": "normal", "1": "tumor"}, "training": cases}
    (tmp_path / "datalist.json").write_text(json.dumps(content))
    return tmp_path / "datalist.json"


def test_class_labels_stay_integers_and_class_zero_is_a_label(listed, tmp_path):
    datalist = read_datalist(listed)
    assert datalist.classifies
    assert [item["label"] for item in datalist.section("training")] == [0, 1] * 4
    folded = split_datalist(datalist, folds=2)
    held_out = folded.section("validation", fold=0)
    assert sorted(item["label"] for item in held_out) == [0, 0, 1, 1]
    write_datalist(folded, tmp_path / "again.json")
    assert read_datalist(tmp_path / "again.json").sha256 == folded.sha256
    require_trainable(datalist)


@pytest.mark.parametrize(("label", "message"), [(2, 'not in "labels"'), ("t1.png", "label map"), (True, "label")])
def test_label_that_is_no_class_is_refused(listed, label, message):
    content = json.loads(listed.read_text())
    content["training"][0]["label"] = label
    listed.write_text(json.dumps(content))
    with pytest.raises(InputError, match=message):
        read_datalist(listed)


def test_check_finds_damaged_and_repeated_tiles_and_masks_of_another_size(listed, tmp_path):
    (tmp_path / "t0.png").write_bytes(b"broken")
    (tmp_path / "t7.png").write_bytes((tmp_path / "t1.png").read_bytes())
    findings = check_datalist(read_datalist(listed))
    assert {finding.case for finding in findings if finding.severity == "error"} == {"t0", "t7"}
    save(tmp_path / "mask.png", np.zeros((5, 5), np.uint8))
    content = {"labels": {"0": "b", "1": "t"}, "training": [{"image": "t2.png", "label": "mask.png", "patient": "a"}]}
    listed.write_text(json.dumps(content))
    with pytest.raises(InputError, match="size"):
        require_trainable(read_datalist(listed))
