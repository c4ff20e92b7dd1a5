"""metadata.json of a bundle: how it is made, what it must hold, and the licence that goes with it.

The schema is written from the fields that MONAI's ``meta_schema_20240725`` asks for, and is somewhat stricter; it lies
in every bundle as ``eval/schema.json``, where ``verify_metadata`` takes it instead of downloading one.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import monai
import numpy as np
import torch

from medkd.errors import ConfigError

SCHEMA_URL = "https://project-monai.github.io/schema/meta_schema_20240725.json"

_TEXT = {"type": "string", "minLength": 1}
_NUMBER_OR_RULE = {"oneOf": [{"type": "integer", "minimum": 1}, {"type": "string", "pattern": r"^[\d\s*+\-()pn]+$"}]}
_TENSOR = {
    "type": "object",
    "required": ["type", "format", "num_channels", "spatial_shape", "dtype", "value_range"],
    "properties": {
        "type": {"enum": ["image", "series", "tuples", "probabilities"]},
        "format": _TEXT,
        "modality": _TEXT,
        "num_channels": {"type": "integer", "minimum": 1},
        "spatial_shape": {"type": "array", "items": _NUMBER_OR_RULE},
        "dtype": _TEXT,
        "value_range": {"type": "array", "items": {"type": "number"}},
        "is_patch_data": {"type": "boolean"},
        "channel_def": {"type": "object", "additionalProperties": {"type": "string"}},
    },
}
_VALUES = {
    "type": "object",
    "additionalProperties": {"oneOf": [{"type": ["number", "string", "boolean"]}, _TENSOR]},
}
_DATA_FORMAT = {
    "type": "object",
    "required": ["inputs", "outputs"],
    "properties": {"inputs": _VALUES, "outputs": _VALUES, "post_processed_outputs": _VALUES},
    "additionalProperties": False,
}
_VERSION = {"type": "string", "pattern": r"^\d+(\.\d+)*([.+a-z-].*)?$"}
SCHEMA: dict[str, Any] = {
    "$schema": "https://json-schema.org/draft/2019-09/schema",
    "title": "Metadata of a MONAI bundle",
    "type": "object",
    "required": [
        "schema",
        "version",
        "monai_version",
        "pytorch_version",
        "numpy_version",
        "required_packages_version",
        "task",
        "description",
        "authors",
        "copyright",
        "network_data_format",
    ],
    "properties": {
        "schema": _TEXT,
        "name": _TEXT,
        "version": {"type": "string", "pattern": r"^\d\.\d\.\d$"},
        "changelog": {"type": "object", "additionalProperties": {"type": "string"}},
        "monai_version": _VERSION,
        "pytorch_version": _VERSION,
        "numpy_version": _VERSION,
        "required_packages_version": {"type": "object", "additionalProperties": {"type": "string"}},
        "supported_apps": {"type": "object"},
        "task": _TEXT,
        "description": _TEXT,
        "authors": _TEXT,
        "copyright": _TEXT,
        "data_source": {"type": "string"},
        "data_type": {"type": "string"},
        "image_classes": {"type": "string"},
        "label_classes": {"type": "string"},
        "pred_classes": {"type": "string"},
        "intended_use": {"type": "string"},
        "eval_metrics": {"type": "object"},
        "references": {"type": "array", "items": {"type": "string"}},
        "network_data_format": _DATA_FORMAT,
    },
    "patternProperties": {"^[_a-zA-Z0-9]+_data_format$": _DATA_FORMAT},
}


def segmentation_metadata(
    *,
    name: str,
    task: str,
    description: str,
    labels: Mapping[str, str],
    spatial_shape: Sequence[int | str],
    in_channels: int = 1,
    modality: str = "MR",
    data_source: str = "",
    version: str = "0.1.0",
    **further: Any,
) -> dict[str, Any]:
    """The metadata of a segmentation bundle, with the versions installed here.

    Args:
        name: display name.
        task: what the network predicts, in a few words.
        description: in a sentence or two.
        labels: integer label (as a string) → name, background included.
        spatial_shape: what ``verify_net_in_out`` feeds the network: sizes in voxels, or rules such as ``"16*n"``.
        in_channels: channels of the input.
        modality: of the input, ``"MR"`` or ``"CT"``.
        data_source: where the training data came from.
        version: three single digits, as the model zoo sorts versions as text.
        **further: more entries, ``eval_metrics`` and ``references`` for example; they replace the defaults.
    """
    image = {
        "type": "image",
        "format": "hounsfield" if modality == "CT" else "magnitude",
        "modality": modality,
        "num_channels": in_channels,
        "spatial_shape": list(spatial_shape),
        "dtype": "float32",
        "value_range": [],
        "is_patch_data": False,
        "channel_def": {str(channel): "image" for channel in range(in_channels)},
    }
    pred = {
        "type": "image",
        "format": "segmentation",
        "num_channels": len(labels),
        "spatial_shape": list(spatial_shape),
        "dtype": "float32",
        "value_range": [],
        "is_patch_data": False,
        "channel_def": dict(labels),
    }
    return {
        "schema": SCHEMA_URL,
        "version": version,
        "changelog": {version: "first version"},
        "monai_version": monai.__version__.split("+")[0],
        "pytorch_version": torch.__version__.split("+")[0],
        "numpy_version": np.__version__,
        "required_packages_version": {
            package: importlib.metadata.version(package) for package in ("nibabel", "pytorch-ignite")
        },
        "supported_apps": {},
        "name": name,
        "task": task,
        "description": description,
        "authors": "The medkd authors",
        "copyright": "Copyright (c) the medkd authors",
        "data_source": data_source,
        "data_type": "nifti",
        "image_classes": f"{in_channels} channel{'s' if in_channels > 1 else ''}, {modality}",
        "label_classes": "; ".join(f"{label}: {title}" for label, title in labels.items()),
        "pred_classes": f"{len(labels)} channels, one per class",
        "eval_metrics": {},
        "intended_use": "Research only; not for clinical decisions.",
        "references": [],
        "network_data_format": {"inputs": {"image": image}, "outputs": {"pred": pred}},
        **further,
    }


def check_metadata(metadata: Mapping[str, Any], where: str | Path) -> None:
    """Check metadata against the schema.

    Raises:
        ConfigError: naming the first entry that does not fit.
    """
    validator = jsonschema.Draft201909Validator(SCHEMA)
    error = jsonschema.exceptions.best_match(validator.iter_errors(dict(metadata)))
    if error is not None:
        entry = "::".join(str(part) for part in error.absolute_path) or "the file"
        raise ConfigError(where, f"{entry}: {error.message[:200]}", "correct the metadata")


def channel_names(metadata: Mapping[str, Any]) -> dict[int, str]:
    """Label value → name, from ``channel_def`` of the output; empty where the metadata names none."""
    output = metadata.get("network_data_format", {}).get("outputs", {}).get("pred", {})
    names = output.get("channel_def", {}) if isinstance(output, Mapping) else {}
    if not isinstance(names, Mapping) or not all(str(key).isdecimal() for key in names):
        return {}
    return {int(key): str(names[key]) for key in sorted(names, key=int)}


def translates(metadata: Mapping[str, Any]) -> bool:
    """Whether a bundle's network makes images of images, by what its metadata says of the output."""
    output = metadata.get("network_data_format", {}).get("outputs", {}).get("pred", {})
    if not isinstance(output, Mapping):
        return False
    return output.get("type") == "image" and output.get("format") in ("hounsfield", "magnitude")


def classifies(metadata: Mapping[str, Any]) -> bool:
    """Whether a bundle's network gives class probabilities of whole images, by what its metadata says of the output."""
    output = metadata.get("network_data_format", {}).get("outputs", {}).get("pred", {})
    return isinstance(output, Mapping) and (output.get("type"), output.get("format")) == ("probabilities", "classes")


@cache
def license_text() -> str:
    """The text of the licence medkd and its bundles are under, Apache-2.0.

    Raises:
        ConfigError: If the installation lacks it.
    """
    checkout = Path(__file__).resolve().parents[2]
    if (checkout / "pyproject.toml").is_file() and (checkout / "LICENSE").is_file():
        return (checkout / "LICENSE").read_text(encoding="utf-8")
    for name in ("licenses/LICENSE", "LICENSE"):
        text = importlib.metadata.distribution("medkd").read_text(name)
        if text:
            return text
    raise ConfigError("medkd", "was installed without its LICENSE", "install it again")
