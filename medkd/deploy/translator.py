"""Inference configuration and metadata of bundles that translate volumes, slice by slice.

What a training configuration of a translator has to define at its top level::

    "task":           "translation",
    "source_domain":  "MR",
    "target_domain":  "CT",
    "network_def":    {"_target_": "medkd.nets.translators.ResNetGenerator", …},   # source to target, alone
    "loading":        [{"_target_": "monai.transforms.LoadImaged", "keys": "image", …}, …],   # of both domains
    "source_scaling": {"_target_": "monai.transforms.ScaleIntensityRangePercentilesd", …},    # to [-1, 1]
    "padding":        {"_target_": "monai.transforms.DivisiblePadd", "keys": "image", …},
    "inferer":        {"_target_": "monai.inferers.SliceInferer", …},
    "output_range":   [-160, 240]    # what -1 and 1 mean in the target's unit; null leaves [-1, 1]

A part may also be a reference to another id.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from medkd.deploy.inference_config import IMAGE, PRED, for_image, inference_skeleton, referenced_ids, require_monai
from medkd.deploy.metadata import segmentation_metadata
from medkd.errors import ConfigError

_PARTS = ("network_def", "loading", "source_scaling", "padding", "inferer")


def translator_config(train_config: Mapping[str, Any]) -> dict[str, Any]:
    """Derive a MONAI inference configuration that writes ``<name>_translated.nii.gz`` on the input's grid.

    Args:
        train_config: a training configuration, unevaluated; see the module's docstring for what it must define.

    Returns:
        The content of ``configs/inference.json``; where the network is medkd's, it needs medkd.

    Raises:
        ConfigError: naming the id that is missing or that inference cannot use.
    """
    for name in (*_PARTS, "output_range"):
        if name not in train_config:
            raise ConfigError(name, "is not defined at the top level of the training configuration", "define it there")
    loading = [for_image(step, f"loading::{place}") for place, step in enumerate(train_config["loading"])]
    for name in ("source_scaling", "padding", "inferer"):
        require_monai(train_config[name], name)
    scales_back = train_config["output_range"] is not None
    copied = referenced_ids(train_config, (*_PARTS, *(("output_range",) if scales_back else ())))
    to_unit = {
        "_target_": "monai.transforms.ScaleIntensityRanged",
        "keys": PRED,
        "a_min": -1.0,
        "a_max": 1.0,
        "b_min": "$@output_range[0]",
        "b_max": "$@output_range[1]",
        "clip": True,
    }
    config = {
        **{key: deepcopy(train_config[key]) for key in copied},
        **{key: deepcopy(train_config[key]) for key in ("network_def", "source_scaling", "padding")},
        **({"output_range": deepcopy(train_config["output_range"])} if scales_back else {}),
    }
    return inference_skeleton(
        config,
        preprocessing=[step for step in loading if step is not None] + ["@source_scaling", "@padding"],
        inferer=train_config["inferer"],
        postprocessing=[
            {
                "_target_": "monai.transforms.Invertd",
                "keys": PRED,
                "transform": "@preprocessing",
                "orig_keys": IMAGE,
                "nearest_interp": False,
                "to_tensor": True,
            },
            *([to_unit] if scales_back else []),
            {
                "_target_": "monai.transforms.SaveImaged",
                "keys": PRED,
                "output_dir": "@output_dir",
                "output_postfix": "translated",
                "output_dtype": "$np.float32",
                "resample": False,
                "separate_folder": False,
            },
        ],
    )


def translation_metadata(
    *, source: str, target: str, in_hounsfield: bool, side: int = 32, channels: int = 1, **further: Any
) -> dict[str, Any]:
    """The metadata of a translation bundle, with the versions installed here.

    Args:
        source: modality of the input.
        target: modality of the output.
        in_hounsfield: whether the output files are in Hounsfield units.
        side: in-plane sides of the network's input are multiples of this, in pixels.
        channels: of input and output.
        **further: as for :func:`~medkd.deploy.metadata.segmentation_metadata`, ``name``, ``task`` and ``description``
            among them; they replace the defaults.
    """
    metadata = segmentation_metadata(
        labels={str(channel): target for channel in range(channels)},
        spatial_shape=[f"{side}*n", f"{side}*n"],
        in_channels=channels,
        modality=source,
        **{
            "label_classes": "none",
            "pred_classes": f"{channels} channel{'s' if channels > 1 else ''}, {target}",
            **further,
        },
    )
    tensors = metadata["network_data_format"]
    tensors["inputs"][IMAGE] |= {"value_range": [-1, 1], "is_patch_data": False}
    tensors["outputs"][PRED] |= {
        "format": "hounsfield" if in_hounsfield else "magnitude",
        "modality": target,
        "value_range": [-1, 1],
    }
    return metadata
