from __future__ import annotations

import os
import random
import subprocess
import sys

import albumentations
import cv2
import numpy as np
import pytest
import torch
from albumentations.augmentations.geometric.functional import d4
from monai.data import Dataset, MetaTensor
from monai.transforms import Compose

from medkd.data.augment import PlainCompose
from medkd.data.patch_augment import SYMMETRIES, Albumented, FusedAffine
from medkd.data.streams import Stream
from medkd.errors import ConfigError

RANDOM = [
    albumentations.D4(p=1.0),
    albumentations.Affine(rotate=(-30, 30), scale=(0.8, 1.2), p=0.5),
    albumentations.RandomBrightnessContrast(p=0.5),
    albumentations.GaussNoise(p=0.5),
]


def patch(index=0, size=32):
    """A picture whose first channel is its own mask times ten."""
    mask = np.zeros((1, size, size), np.int64)
    mask[0, : size // 2, : size // 3] = 1 + index % 5
    mask[0, -5:, -3:] = 7
    image = np.concatenate([10 * mask, 5 * mask, 255 - 20 * mask]).astype(np.uint8)
    return {"image": torch.from_numpy(image), "mask": torch.from_numpy(mask), "case": f"c{index}"}


def test_masks_move_with_their_images_and_keep_their_values():
    augment = Albumented([albumentations.D4(p=1.0), albumentations.Transpose(p=0.5)], "image", "mask")
    augment.set_random_state(seed=0)
    seen = set()
    for _ in range(24):
        item = augment(patch())
        assert torch.equal(item["image"][0].long(), 10 * item["mask"][0])
        assert item["mask"].dtype == torch.int64
        assert item["mask"].shape == (1, 32, 32)
        seen.add(item["mask"].numpy().tobytes())
    assert len(seen) == 8


def test_warped_mask_holds_no_new_value():
    augment = Albumented(RANDOM, "image", "mask").set_random_state(seed=1)
    for _ in range(10):
        assert set(augment(patch())["mask"].unique().tolist()) <= {0, 1, 7}


def test_transforms_decide_independently_of_each_other():
    decisions = []
    for name in ("first", "second"):

        class Note(albumentations.ImageOnlyTransform):
            own = name

            def apply(self, img, **params):
                decisions[-1].add(self.own)
                return img

        globals()[name] = Note
    augment = Albumented([first(p=0.5), second(p=0.5)]).set_random_state(seed=0)  # noqa: F821
    for _ in range(60):
        decisions.append(set())
        augment({"image": patch()["image"]})
    # With one seed given to every transform the two would always agree.
    assert {frozenset(made) for made in decisions} == {
        frozenset(), frozenset({"first"}), frozenset({"second"}), frozenset({"first", "second"}),
    }  # fmt: skip


def test_item_depends_on_the_seed_alone():
    augment = Albumented(RANDOM, "image", "mask")
    first = [augment.set_random_state(seed=seed)(patch())["image"] for seed in (1, 2, 1)]
    np.random.seed(5)
    torch.manual_seed(9)
    again = augment.set_random_state(seed=1)(patch())["image"]
    assert torch.equal(first[0], first[2])
    assert torch.equal(first[0], again)
    assert not torch.equal(first[0], first[1])


@pytest.mark.parametrize("compose", [Compose, PlainCompose])
def test_stream_gives_the_same_patches_with_any_number_of_workers(compose):
    def batches(workers, position=0):
        dataset = Dataset([patch(index) for index in range(6)], compose([Albumented(RANDOM, "image", "mask")]))
        source = Stream(dataset, 4, num_workers=workers).batches(position, seed=3)
        return [next(source) for _ in range(3)]

    alone, helped, later = batches(0), batches(2), batches(0, position=2)
    for one, other in zip(alone, helped, strict=True):
        assert torch.equal(one["image"], other["image"])
        assert torch.equal(one["mask"], other["mask"])
    assert torch.equal(alone[2]["image"], later[0]["image"])


def test_several_images_and_kinds_of_arrays():
    given = patch()
    item = {
        "image": given["image"].numpy(),
        "scaled": MetaTensor(given["image"].float() / 255),
        "mask": given["mask"][0].numpy().astype(np.uint8),
        "label": 1,
    }
    made = Albumented([albumentations.D4(p=1)], ["image", "scaled"], "mask").set_random_state(seed=3)(item)
    assert isinstance(made["image"], np.ndarray)
    assert type(made["scaled"]) is torch.Tensor
    assert made["scaled"].dtype == torch.float32
    assert made["mask"].shape == (32, 32)
    assert made["label"] == 1
    np.testing.assert_allclose(made["scaled"].numpy() * 255, made["image"], atol=1e-3)
    np.testing.assert_array_equal(made["image"][0], 10 * made["mask"])
    np.testing.assert_array_equal(item["image"], given["image"].numpy())


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 6])
def test_channels_keep_their_order(channels):
    image = np.random.default_rng(0).integers(0, 256, (channels, 12, 12), dtype=np.uint8)
    made = Albumented([albumentations.HorizontalFlip(p=1)])({"image": image})["image"]
    np.testing.assert_array_equal(made, image[..., ::-1])


class TestFusedAffine:
    image = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)

    @staticmethod
    def drawn(transform, shape, seed):
        transform.set_random_state(np.random.default_rng(seed), random.Random(seed))
        return transform.get_params_dependent_on_data({"shape": shape}, {})

    def test_without_rotation_and_scale_it_is_exactly_a_flip_or_turn(self):
        fused = FusedAffine(p=1)
        seen = set()
        for seed in range(60):
            params = self.drawn(fused, self.image.shape, seed)
            np.testing.assert_array_equal(fused.apply(self.image, **params), d4(self.image, params["symmetry"]))
            seen.add(params["symmetry"])
        assert seen == set(SYMMETRIES)

    def test_one_warp_is_the_turn_followed_by_the_warp(self):
        picture = cv2.GaussianBlur(self.image, (0, 0), 3)
        ranges = {"rotate": (-30, 30), "scale": (0.8, 1.25), "shear": (-8, 8), "translate_percent": (-0.1, 0.1)}
        fused, affine = (kind(**ranges, p=1) for kind in (FusedAffine, albumentations.Affine))
        for seed in range(12):
            params = self.drawn(fused, picture.shape, seed)
            one = fused.apply(picture, **params)
            (a, b), (c, d) = SYMMETRIES[params["symmetry"]]
            middle = 19.5
            turn = np.array([[a, b, middle - (a + b) * middle], [c, d, middle - (c + d) * middle], [0, 0, 1]])
            matrix = params["matrix"] @ np.linalg.inv(turn)
            two = affine.apply(d4(picture, params["symmetry"]), **(params | {"matrix": matrix}))
            assert np.abs(one.astype(int) - two).max() <= 4  # OpenCV places samples on 1/32 of a pixel

    def test_oblong_patches_keep_their_shape(self):
        fused = FusedAffine(p=1)
        seen = {self.drawn(fused, (20, 30, 3), seed)["symmetry"] for seed in range(40)}
        assert seen == {"e", "r180", "v", "h"}
        oblong = self.image[:20, :30]
        for seed in range(8):
            params = self.drawn(fused, oblong.shape, seed)
            np.testing.assert_array_equal(fused.apply(oblong, **params), d4(oblong, params["symmetry"]))

    def test_masks_move_along_and_the_seed_decides(self):
        augment = Albumented([FusedAffine(rotate=(-30, 30), scale=(0.8, 1.2), p=1)], "image", "mask")
        first, other, again = (augment.set_random_state(seed=seed)(patch()) for seed in (1, 2, 1))
        assert torch.equal(first["image"], again["image"])
        assert torch.equal(first["mask"], again["mask"])
        assert not torch.equal(first["image"], other["image"])
        assert set(first["mask"].unique().tolist()) <= {0, 1, 7}
        inside = first["mask"][0] > 0
        assert abs(first["image"][0][inside].float() - 10 * first["mask"][0][inside]).median() <= 1

    def test_boxes_and_points_are_refused(self):
        with pytest.raises(NotImplementedError, match="images and masks"):
            FusedAffine(p=1)(image=self.image, keypoints=np.zeros((1, 5), np.float32))


def test_one_channel_stays_one_channel_and_sizes_may_change():
    item = {"image": torch.zeros(1, 20, 30, dtype=torch.uint8)}
    assert Albumented(albumentations.Compose([albumentations.CenterCrop(10, 12)]))(item)["image"].shape == (1, 10, 12)
    assert Albumented(albumentations.D4(p=1))(item)["image"].shape[0] == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": torch.zeros(3, 4, 4, dtype=torch.int64)}, "is torch.int64|is int64"),
        ({"image": torch.zeros(4, 4, dtype=torch.uint8)}, r"not \(C, H, W\)"),
        ({"image": "tile.png"}, "not an array"),
        ({"mask": torch.full((1, 32, 32), 0.5)}, "not integers"),
        ({"mask": torch.full((1, 32, 32), 70_000)}, "at most 16 bits"),
        ({"mask": torch.zeros(1, 30, 32, dtype=torch.int64)}, "differ in size"),
        ({"mask": torch.zeros(2, 32, 32, dtype=torch.int64)}, "the mask"),
    ],
)
def test_what_it_cannot_augment_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        Albumented(RANDOM, "image", "mask")({**patch(), **change})


def test_missing_key_is_named_or_skipped():
    item = {"image": patch()["image"]}
    with pytest.raises(KeyError, match="mask"):
        Albumented(RANDOM, "image", "mask")(item)
    made = Albumented(RANDOM, ["image", "other"], "mask", allow_missing_keys=True)(item)
    assert set(made) == {"image"}
    assert Albumented(RANDOM, "image", allow_missing_keys=True)({"case": "a"}) == {"case": "a"}


def test_foreign_transforms_and_double_keys_are_refused():
    with pytest.raises(ConfigError, match="not of albumentations"):
        Albumented([lambda image: image])
    with pytest.raises(ConfigError, match="image and mask"):
        Albumented(RANDOM, "image", "image")


def test_importing_asks_nothing_of_the_network():
    code = (
        "import socket\n"
        "def refuse(*a, **k): raise SystemExit('asked the network')\n"
        "socket.socket.connect = refuse; socket.getaddrinfo = refuse\n"
        "import medkd.data.patch_augment"
    )
    environment = {key: value for key, value in os.environ.items() if key != "NO_ALBUMENTATIONS_UPDATE"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
