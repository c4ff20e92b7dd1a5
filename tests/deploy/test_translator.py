"""Inference configuration and metadata of translators."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from medkd.deploy.inference_config import inference_config
from medkd.deploy.metadata import check_metadata, segmentation_metadata, translates
from medkd.deploy.translator import translation_metadata
from medkd.errors import ConfigError

RECIPE = json.loads(
    (Path(__file__).parents[2] / "bundles" / "cyclegan_mr_ct_translation" / "configs" / "train.json").read_text()
)


def postprocessing(config) -> list[str]:
    return [step["_target_"].rsplit(".", 1)[-1] for step in config["postprocessing"]["transforms"]]


def test_only_a_known_unit_is_restored():
    config = inference_config(RECIPE)
    assert postprocessing(config) == ["Invertd", "ScaleIntensityRanged", "SaveImaged"]
    assert config["hu_window"] == RECIPE["hu_window"]
    assert postprocessing(inference_config({**RECIPE, "output_range": None})) == ["Invertd", "SaveImaged"]


def test_what_the_parts_refer_to_comes_along_and_nothing_else():
    config = inference_config({**RECIPE, "network_def": "@autoencoder", "output_range": None})
    assert "autoencoder" in config
    assert "generator_width" in config
    assert not {"generator", "critic_width", "cyclegan", "cases", "target_scaling", "hu_window"} & set(config)
    assert "reader" not in config["preprocessing"]["transforms"][0]


@pytest.mark.parametrize("name", ["network_def", "loading", "source_scaling", "padding", "inferer", "output_range"])
def test_a_missing_part_is_named(name):
    with pytest.raises(ConfigError, match=f"^{name}: is not defined"):
        inference_config({key: value for key, value in RECIPE.items() if key != name})


def test_random_or_private_transforms_are_refused():
    random = [*RECIPE["loading"], {"_target_": "monai.transforms.RandFlipd", "keys": "image"}]
    with pytest.raises(ConfigError, match="is random"):
        inference_config({**RECIPE, "loading": random})
    with pytest.raises(ConfigError, match="which only medkd has"):
        inference_config({**RECIPE, "source_scaling": {"_target_": "medkd.data.augment.PlainCompose"}})


def test_metadata_fits_the_schema_and_tells_translators_from_segmenters():
    for in_hounsfield, unit in ((True, "hounsfield"), (False, "magnitude")):
        metadata = translation_metadata(
            source="MR", target="CT", in_hounsfield=in_hounsfield, name="n", task="t", description="d"
        )
        check_metadata(metadata, "metadata.json")
        assert metadata["network_data_format"]["outputs"]["pred"]["format"] == unit
        assert translates(metadata)
    labels = {"0": "background", "1": "tumor"}
    assert not translates(
        segmentation_metadata(name="n", task="t", description="d", labels=labels, spatial_shape=[32, 32])
    )
    assert not translates({})
