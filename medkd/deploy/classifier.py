"""Inference configuration and metadata of bundles that classify images.

What a training configuration of a classifier has to define at its top level::

    "task":          "classification",
    "labels":        {"0": "normal", "1": "tumor"},
    "network_def":   {"_target_": "monai.networks.nets.ResNet", …},       # the network that ships, alone
    "loading":       [{"_target_": "monai.transforms.LoadImaged", "keys": "image", …}],
    "normalization": [{"_target_": "monai.transforms.ScaleIntensityRanged", "keys": "image", …}, …],
    "inferer":       {"_target_": "monai.inferers.SimpleInferer"},
    "slide":         {"task": "classification", "size": 96, "mpp": 0.5, …}   # optional: how slides are tiled for it

Training augments between loading and normalization; inference loads and normalizes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

from medkd.deploy.inference_config import IMAGE, PRED, referenced_ids, require_monai
from medkd.deploy.metadata import segmentation_metadata
from medkd.errors import ConfigError

_PARTS = ("network_def", "loading", "normalization", "inferer")


def classifier_config(train_config: Mapping[str, Any]) -> dict[str, Any]:
    """Derive a MONAI inference configuration that writes the class probabilities of image files to a CSV.

    Args:
        train_config: a training configuration, unevaluated; see the module's docstring for what it must define.

    Returns:
        The content of ``configs/inference.json``; it runs where medkd is not installed.

    Raises:
        ConfigError: naming the id that is missing or that inference cannot use.
    """
    for name in (*_PARTS, "labels"):
        if name not in train_config:
            raise ConfigError(name, "is not defined at the top level of the training configuration", "define it there")
    for name in _PARTS:
        require_monai(train_config[name], name)
    steps = [*train_config["loading"], *train_config["normalization"]]
    for step in steps:
        if step.get("keys") not in (IMAGE, [IMAGE]):
            raise ConfigError("preprocessing", f"{step.get('_target_')} works on {step.get('keys')}", 'use "image"')
    parts = {name: deepcopy(train_config[name]) for name in _PARTS}
    return {
        "imports": ["$import glob"],
        "bundle_root": ".",
        "device": "$torch.device('cuda:0' if torch.cuda.is_available() else 'cpu')",
        "dataset_dir": "/workspace/data",
        "output_dir": "$@bundle_root + '/eval'",
        "datalist": "$sorted(glob.glob(@dataset_dir + '/*.png') + glob.glob(@dataset_dir + '/*.jp*g'))",
        "batch_size": 32,
        **{key: deepcopy(train_config[key]) for key in referenced_ids(train_config, (*_PARTS, "slide"))},
        **({"slide": deepcopy(train_config["slide"])} if "slide" in train_config else {}),
        "network_def": parts["network_def"],
        "network": "$@network_def.to(@device)",
        "loading": {"_target_": "monai.transforms.Compose", "transforms": parts["loading"]},
        "normalization": {"_target_": "monai.transforms.Compose", "transforms": parts["normalization"]},
        "preprocessing": {"_target_": "monai.transforms.Compose", "transforms": ["@loading", "@normalization"]},
        "dataset": {
            "_target_": "monai.data.Dataset",
            "data": "$[{'image': image, 'file': {'filename_or_obj': image}} for image in @datalist]",
            "transform": "@preprocessing",
        },
        "dataloader": {
            "_target_": "monai.data.DataLoader",
            "dataset": "@dataset",
            "batch_size": "@batch_size",
            "num_workers": 0,
        },
        "inferer": parts["inferer"],
        "postprocessing": {
            "_target_": "monai.transforms.Compose",
            "transforms": [{"_target_": "monai.transforms.Activationsd", "keys": PRED, "softmax": True}],
        },
        "checkpointloader": {
            "_target_": "monai.handlers.CheckpointLoader",
            "load_path": "$@bundle_root + '/models/model.pt'",
            "load_dict": {"model": "@network"},
            "map_location": "@device",
        },
        "handlers": [
            "@checkpointloader",
            {"_target_": "monai.handlers.StatsHandler", "iteration_log": False},
            {
                "_target_": "monai.handlers.ClassificationSaver",
                "output_dir": "@output_dir",
                "filename": "predictions.csv",
                "batch_transform": "$monai.handlers.from_engine('file')",
                "output_transform": "$monai.handlers.from_engine('pred')",
            },
        ],
        "evaluator": {
            "_target_": "monai.engines.SupervisedEvaluator",
            "device": "@device",
            "val_data_loader": "@dataloader",
            "network": "@network",
            "inferer": "@inferer",
            "postprocessing": "@postprocessing",
            "val_handlers": "@handlers",
        },
        "run": ["$@evaluator.run()"],
    }


def classification_metadata(
    *,
    labels: Mapping[str, str],
    side: int | Sequence[int | str],
    in_channels: int = 3,
    modality: str = "histology",
    **further: Any,
) -> dict[str, Any]:
    """The metadata of a classification bundle, with the versions installed here.

    Args:
        labels: class index (as a string) → name.
        side: of the square images the network was trained on, in pixels; or their (height, width), or rules such as
            ``"32*n"`` where it takes several. `medkd predict` refuses images of another size than these numbers.
        in_channels: channels of the input.
        modality: of the input.
        **further: as for :func:`~medkd.deploy.metadata.segmentation_metadata`, ``name``, ``task`` and ``description``
            among them; they replace the defaults.
    """
    metadata = segmentation_metadata(
        labels=labels, spatial_shape=[side, side] if isinstance(side, int) else list(side),
        in_channels=in_channels, modality=modality,
        **{"data_type": "png, jpeg, tiff or whole-slide image", **further},
    )  # fmt: skip
    tensors = metadata["network_data_format"]
    tensors["inputs"][IMAGE] |= {"format": "RGB", "is_patch_data": True, "value_range": []}
    if in_channels == 3:
        tensors["inputs"][IMAGE]["channel_def"] = {"0": "red", "1": "green", "2": "blue"}
    tensors["outputs"][PRED] |= {
        "type": "probabilities",
        "format": "classes",
        "spatial_shape": [],
        "is_patch_data": True,
    }
    metadata["required_packages_version"].pop("nibabel", None)
    metadata["image_classes"] = f"{in_channels} channels, {modality}"
    return metadata
