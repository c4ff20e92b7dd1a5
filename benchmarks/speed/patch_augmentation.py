"""How fast patches and their masks are flipped, turned, rotated, scaled and sheared, beside MONAI and albumentations.

Run ``OMP_NUM_THREADS=1 python benchmarks/speed/patch_augmentation.py``: 256 px patches (8-bit RGB, one mask), process
CPU time, interleaved rounds, medians; prints one JSON line.

- ``medkd``: ``Albumented([FusedAffine(…)])``, one warp, with seeding and from tensors to tensors, channel first.
- ``fused_alone``: ``FusedAffine`` in a plain albumentations pipeline, on arrays with channels last as all of those.
- ``albumentations_steps``: two flips, a quarter turn, rotation, scale and shear, each by the transform named so.
- ``albumentations_affine``: ``D4``, then one ``Affine``: the best that albumentations offers.
- ``monai_steps``, ``monai_affine``: the same two in MONAI dictionaries.

Proof: with the numbers drawn by ``FusedAffine``, flip or turn and then affine by albumentations, and by MONAI, give
the same image and mask, apart from interpolation, where the patch is not continued beyond its border.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
import torch
from monai.transforms import (
    Affine,
    Compose,
    Flip,
    RandAffined,
    RandFlipd,
    RandRotate90d,
    RandRotated,
    RandZoomd,
    Rotate90,
)
from skimage.data import immunohistochemistry

from medkd.data.patch_augment import SYMMETRIES, Albumented, FusedAffine

import albumentations  # isort: skip  # after medkd, which keeps it from asking the network for updates
from albumentations.augmentations.geometric.functional import d4  # isort: skip

GOALS = {"monai_steps": 5.0, "monai_affine": 5.0, "albumentations_steps": 1.5, "albumentations_affine": 1.5}
SIDE, DEGREES, SCALE, SHEAR = 256, 30, (0.8, 1.25), 10
MODES = ["bilinear", "nearest"]
AS_MONAI = {  # the flips and turns by albumentations' names
    "e": [],
    "r90": [Rotate90(1)],
    "r180": [Rotate90(2)],
    "r270": [Rotate90(3)],
    "v": [Flip(0)],
    "h": [Flip(1)],
    "t": [Rotate90(1), Flip(0)],
    "hvt": [Rotate90(1), Flip(1)],
}
Item = dict[str, Any]


def albumentations_arms() -> dict[str, albumentations.Compose]:
    border = {"border_mode": cv2.BORDER_REFLECT_101, "p": 1}
    ranges = {"rotate": (-DEGREES, DEGREES), "scale": SCALE, "shear": (-SHEAR, SHEAR)}
    steps = [
        albumentations.HorizontalFlip(p=0.5),
        albumentations.VerticalFlip(p=0.5),
        albumentations.RandomRotate90(p=1),
        albumentations.Rotate((-DEGREES, DEGREES), **border),
        albumentations.Affine(scale=SCALE, **border),
        albumentations.Affine(shear=(-SHEAR, SHEAR), **border),
    ]
    return {
        "fused_alone": albumentations.Compose([FusedAffine(**ranges, **border)]),
        "albumentations_steps": albumentations.Compose(steps),
        "albumentations_affine": albumentations.Compose(
            [albumentations.D4(p=1), albumentations.Affine(**ranges, **border)]
        ),
    }


def monai_arms() -> dict[str, Compose]:
    keys = ["image", "mask"]
    angle, shear = np.radians(DEGREES), np.tan(np.radians(SHEAR))
    sampling = {"mode": MODES, "padding_mode": "reflection"}
    turns = [RandFlipd(keys, 0.5, 0), RandFlipd(keys, 0.5, 1), RandRotate90d(keys, 0.75)]
    zoom = {"mode": ["bilinear", "nearest"], "padding_mode": "reflect"}
    steps = [
        RandRotated(keys, angle, prob=1, **sampling),
        RandZoomd(keys, 1, *SCALE, **zoom),
        RandAffined(keys, prob=1, shear_range=[shear, shear], **sampling),
    ]
    scale = [(SCALE[0] - 1, SCALE[1] - 1)] * 2
    affine = RandAffined(keys, prob=1, rotate_range=angle, shear_range=[shear, shear], scale_range=scale, **sampling)
    return {
        "monai_steps": Compose([*turns, *steps]),
        "monai_affine": Compose([*turns, affine]),
    }


def differences(image: np.ndarray, mask: np.ndarray) -> dict[str, float]:
    """Of flip or turn and affine one after the other from one warp: gray levels, and share of other mask pixels."""
    fused = FusedAffine(rotate=(-DEGREES, DEGREES), scale=SCALE, shear=(-SHEAR, SHEAR), p=1)
    affine = albumentations.Affine(p=1)
    middle = (SIDE - 1) / 2
    worst = {f"{peer}_{what}": 0.0 for peer in ("albumentations", "monai") for what in ("image", "mask")}
    for seed in range(16):
        fused.set_random_state(np.random.default_rng(seed), random.Random(seed))
        drawn = fused.get_params_dependent_on_data({"shape": image.shape}, {})
        linear = drawn["matrix"][:2, :2] @ np.linalg.inv(np.array(SYMMETRIES[drawn["symmetry"]], float))
        matrix = np.eye(3)
        matrix[:2, :2], matrix[:2, 2] = linear, middle - linear @ (middle, middle)
        second = drawn | {"matrix": matrix}
        inside = cv2.erode(fused.apply(np.full((SIDE, SIDE), 255, np.uint8), **drawn), np.ones((5, 5))) == 255
        ours = fused.apply(image, **drawn), fused.apply_to_mask(mask, **drawn)
        back = np.eye(3)
        back[:2, :2] = np.linalg.inv(linear)[::-1, ::-1]  # rows before columns, from result to source
        theirs = {"albumentations": [], "monai": []}
        for array, apply, mode in zip((image, mask), (affine.apply, affine.apply_to_mask), MODES, strict=True):
            theirs["albumentations"].append(apply(d4(array, drawn["symmetry"]), **second))
            tensor = torch.from_numpy(array.reshape(SIDE, SIDE, -1)).movedim(-1, 0).float()
            for turn in AS_MONAI[drawn["symmetry"]]:
                tensor = turn(tensor)
            warped = Affine(affine=back, mode=mode, padding_mode="zeros", image_only=True)(tensor)
            theirs["monai"].append(warped.movedim(0, -1).numpy().reshape(array.shape))
        for peer, (peer_image, peer_mask) in theirs.items():
            gray = np.abs(ours[0].astype(float) - peer_image)[inside].max()
            other = float((ours[1] != peer_mask)[inside].mean())
            worst[f"{peer}_image"] = max(worst[f"{peer}_image"], round(float(gray), 2))
            worst[f"{peer}_mask"] = max(worst[f"{peer}_mask"], round(other, 5))
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60)
    rounds = parser.parse_args().rounds
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    image = np.ascontiguousarray(immunohistochemistry()[:SIDE, :SIDE])
    mask = (cv2.GaussianBlur(image[..., 0], (0, 0), 4) < 150).astype(np.uint8)
    channel_first = {
        "image": torch.from_numpy(np.moveaxis(image, -1, 0).copy()),
        "mask": torch.from_numpy(mask[None].copy()),
    }
    adapter = Albumented(albumentations_arms()["fused_alone"], "image", "mask").set_random_state(seed=0)
    arms: dict[str, Callable[[], Any]] = {"medkd": lambda: adapter(channel_first)}
    for name, pipeline in albumentations_arms().items():
        arms[name] = lambda pipeline=pipeline: pipeline(image=image, mask=mask)
    for name, transforms in monai_arms().items():
        arms[name] = lambda transforms=transforms: transforms(channel_first)
    times: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(rounds + 3):
        for name, arm in arms.items():
            start = time.process_time()
            arm()
            if number >= 3:
                times[name].append(time.process_time() - start)
    median = {name: statistics.median(values) for name, values in times.items()}
    ratio = {name: round(median[name] / median["medkd"], 2) for name in arms if name != "medkd"}
    smooth = cv2.GaussianBlur(image, (0, 0), 2)
    result = {
        "benchmark": "patch_augmentation",
        "rounds": rounds,
        "ms": {name: round(1e3 * seconds, 2) for name, seconds in median.items()},
        "ratio": ratio,
        "ratio_without_adapter": {
            name: round(median[name] / median["fused_alone"], 2) for name in arms if name.startswith("albumentations")
        },
        "goals_met": {name: ratio[name] >= goal for name, goal in GOALS.items()},
        "largest_differences": differences(smooth, mask),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
