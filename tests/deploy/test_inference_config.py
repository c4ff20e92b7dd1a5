from __future__ import annotations

import json
from copy import deepcopy

import pytest
from bundle_factory import TRAIN_CONFIG

from medkd.deploy.inference_config import inference_config
from medkd.errors import ConfigError


def changed(**changes):
    return {**deepcopy(TRAIN_CONFIG), **changes}


def steps(config, part="preprocessing"):
    return config[part]["transforms"]


def test_only_the_image_is_left():
    inference = inference_config(TRAIN_CONFIG)
    assert [step["keys"] for step in steps(inference)] == ["image"] * 6
    assert "label" not in json.dumps(steps(inference)).replace('"labels"', "")


def test_values_per_key_are_reduced_and_others_kept():
    spacing = steps(inference_config(TRAIN_CONFIG))[2]
    assert spacing["mode"] == "bilinear"
    config = changed(preprocessing=[{"_target_": "Resized", "keys": ["image", "label"], "spatial_size": [64, 64]}])
    assert steps(inference_config(config))[0]["spatial_size"] == [64, 64]


def test_nothing_of_medkd_is_left():
    assert "medkd" not in json.dumps(inference_config(TRAIN_CONFIG))


def test_referenced_values_come_along():
    assert inference_config(TRAIN_CONFIG)["spacing_mm"] == [1.5, 1.5, 2.0]


def test_further_postprocessing_follows_the_argmax():
    extra = {"_target_": "monai.transforms.KeepLargestConnectedComponentd", "keys": "pred"}
    names = [
        step["_target_"].rsplit(".", 1)[-1]
        for step in steps(inference_config(changed(postprocessing=[extra])), "postprocessing")
    ]
    assert names == ["Activationsd", "Invertd", "AsDiscreted", "KeepLargestConnectedComponentd", "SaveImaged"]


def test_training_config_is_not_changed():
    config = deepcopy(TRAIN_CONFIG)
    inference_config(config)
    assert config == TRAIN_CONFIG


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"preprocessing": [{"_target_": "RandFlipd", "keys": ["image", "label"]}]}, "random"),
        (
            {"preprocessing": [{"_target_": "CropForegroundd", "keys": ["image", "label"], "source_key": "label"}]},
            "depends on the label",
        ),
        ({"preprocessing": [{"_target_": "medkd.data.x.Y", "keys": "image"}]}, "only medkd has"),
        ({"preprocessing": [{"_target_": "Lambdad", "keys": "image", "func": "$medkd.losses.x"}]}, "uses medkd"),
        ({"preprocessing": "$@other"}, "not a list of transforms"),
        ({"preprocessing": [{"_target_": "Spacingd", "keys": ["image", "label"], "pixdim": "@gone"}]}, "@gone"),
        ({"postprocessing": [{"_target_": "AsDiscreted", "keys": "label"}]}, "works on label"),
    ],
)
def test_what_inference_cannot_use_is_named(changes, match):
    with pytest.raises(ConfigError, match=match):
        inference_config(changed(**changes))


@pytest.mark.parametrize("name", ["network_def", "preprocessing", "inferer", "labels"])
def test_missing_id_is_named(name):
    config = deepcopy(TRAIN_CONFIG)
    del config[name]
    with pytest.raises(ConfigError, match=name):
        inference_config(config)
