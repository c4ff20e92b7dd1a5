from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from monai.bundle import ConfigParser

from medkd.deploy.bundle import load_bundle
from medkd.deploy.slide_bundle import slide_task
from medkd.deploy.wsinfer_zoo import check_wsinfer_config, export_wsinfer, normalized_tiles, wsinfer_config
from medkd.errors import ConfigError
from medkd.wsi.prediction import TileTask

SLIDE = {
    "task": "classification", "size": 64, "mpp": 0.5, "mean": [0.7, 0.55, 0.7], "std": [0.2, 0.25, 0.2],
    "classes": ["normal", "tumor"],
}  # fmt: skip
NETWORK = {
    "_target_": "monai.networks.nets.DenseNet", "spatial_dims": 2, "in_channels": 3, "out_channels": 2,
    "init_features": 4, "growth_rate": 2, "block_config": [1, 1], "bn_size": 1,
}  # fmt: skip
# The rules of the WSInfer model zoo, said once more so that the two can be compared.
ZOO: dict[str, Any] = {
    "type": "object",
    "required": [
        "spec_version", "architecture", "num_classes", "patch_size_pixels", "spacing_um_px", "class_names", "transform",
    ],
    "properties": {
        "spec_version": {"enum": ["1.0"]},
        "architecture": {"type": "string"},
        "num_classes": {"type": "integer", "minimum": 1},
        "patch_size_pixels": {"type": "integer", "minimum": 1},
        "spacing_um_px": {"type": "number", "minimum": 0},
        "class_names": {"type": "array", "items": {"type": "string"}, "uniqueItems": True},
        "transform": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["name"],
                "additionalProperties": False,
                "properties": {"name": {"enum": ["Resize", "ToTensor", "Normalize"]}, "arguments": {"type": "object"}},
            },
        },
    },
}  # fmt: skip


def slide_bundle(folder: Path, slide: Any = SLIDE, **network: Any) -> Path:
    torch.manual_seed(0)
    definition = {**NETWORK, **network}
    module = ConfigParser({"network_def": definition}).get_parsed_content("network_def")
    for name in ("configs", "models"):
        (folder / name).mkdir(parents=True)
    inference = {
        "network_def": definition,
        "preprocessing": {"_target_": "Compose", "transforms": []},
        "inferer": {"_target_": "SimpleInferer"},
    }
    (folder / "configs" / "inference.json").write_text(json.dumps(inference))
    (folder / "configs" / "metadata.json").write_text(json.dumps({"version": "0.1.0", "slide": slide}))
    torch.save(module.state_dict(), folder / "models" / "model.pt")
    return folder


def test_a_bundle_says_what_it_expects_of_a_slide(tmp_path):
    task = slide_task(load_bundle(slide_bundle(tmp_path / "tissue_classification")))
    assert task == TileTask(
        task="classification", size=64, mpp=0.5, mean=(0.7, 0.55, 0.7), std=(0.2, 0.25, 0.2),
        classes=("normal", "tumor"), overlap=0, activation="softmax",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mpp": None}, "mpp"),
        ({"mpp": 0}, "mpp.*0.0"),
        ({"size": 64.5}, "size.*whole"),
        ({"size": True}, "size.*whole"),
        ({"std": [0.2, 0.2]}, "std.*three"),
        ({"mean": [0.2, "x", 0.2]}, "mean.*number"),
        ({"classes": "tumor"}, "classes.*list"),
        ({"task": "detection"}, "task"),
        ({"over_lap": 3}, "over_lap.*did you mean 'overlap'"),
        ({"nonsense": 3}, "nonsense.*known ones"),
    ],
)
def test_an_entry_that_cannot_be_right_is_refused_by_name(tmp_path, changes, message):
    bundle = load_bundle(slide_bundle(tmp_path / "bundle", {**SLIDE, **changes}))
    with pytest.raises(ConfigError, match=message) as raised:
        slide_task(bundle)
    assert str(raised.value).count("metadata.json") == 1


@pytest.mark.parametrize("entry", [None, [], {"task": "classification"}])
def test_a_bundle_that_is_not_for_slides_is_refused(tmp_path, entry):
    with pytest.raises(ConfigError, match=r"metadata\.json.*(not for slides|is missing)"):
        slide_task(load_bundle(slide_bundle(tmp_path / "bundle", entry)))


def test_an_export_is_what_wsinfer_and_qupath_read(tmp_path):
    folder = slide_bundle(tmp_path / "tissue_classification")
    done = export_wsinfer(folder, tmp_path / "zoo")
    assert sorted(file.name for file in (tmp_path / "zoo").iterdir()) == ["config.json", "torchscript_model.pt"]
    config = json.loads(done.config.read_text())
    jsonschema.validate(config, ZOO)
    assert (config["num_classes"], config["class_names"]) == (2, ["normal", "tumor"])
    assert (config["patch_size_pixels"], config["spacing_um_px"]) == (64, 0.5)
    assert [step["name"] for step in config["transform"]] == ["Resize", "ToTensor", "Normalize"]
    assert config["transform"][2]["arguments"] == {"mean": SLIDE["mean"], "std": SLIDE["std"]}
    bundle = load_bundle(folder)
    tiles = normalized_tiles(slide_task(bundle))
    program = torch.jit.load(str(done.weights))
    with torch.no_grad():
        assert torch.allclose(program(tiles), bundle.network(tiles), atol=1e-5)
        assert program(tiles[:1]).shape == (1, 2)
    assert done.largest_difference <= 1e-5
    assert done.tiles == 4


@pytest.mark.parametrize(
    ("changes", "network", "message"),
    [
        ({"task": "segmentation"}, {}, "tile classifiers only"),
        ({"activation": "sigmoid"}, {}, "softmax"),
        ({"classes": ["a", "b", "c"]}, {}, "gives .4, 2."),
    ],
)
def test_what_wsinfer_cannot_run_is_refused_and_nothing_written(tmp_path, changes, network, message):
    folder = slide_bundle(tmp_path / "bundle", {**SLIDE, **changes}, **network)
    with pytest.raises(ConfigError, match=message):
        export_wsinfer(folder, tmp_path / "zoo")
    assert not (tmp_path / "zoo").exists()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("spec_version", "2.0"), ("num_classes", 3), ("num_classes", "2"), ("patch_size_pixels", 0),
        ("patch_size_pixels", 96.5), ("class_names", ["a", "a"]), ("transform", [{"name": "Crop"}]),
        ("transform", [{"name": "Resize", "size": 3}]), ("architecture", None), ("spacing_um_px", None),
    ],
)  # fmt: skip
def test_the_check_refuses_what_the_published_schema_refuses(key, value):
    task = TileTask("classification", 64, 0.5, (0.5,) * 3, (0.2,) * 3, ("normal", "tumor"))
    config = wsinfer_config(task, architecture="DenseNet", name="small")
    check_wsinfer_config(config)
    jsonschema.validate(config, ZOO)
    with pytest.raises(ConfigError, match=key):
        check_wsinfer_config({**config, key: value})
    with pytest.raises(ConfigError, match=f"{key} is missing"):
        check_wsinfer_config({name: kept for name, kept in config.items() if name != key})
