"""inference.json, derived from the configuration a network was trained with.

What a training configuration has to define at its top level::

    "labels":         {"0": "background", "1": "left ventricle"},
    "network_def":    {"_target_": "monai.networks.nets.DynUNet", …},        # the network that ships, alone
    "preprocessing":  [{"_target_": "monai.transforms.LoadImaged", "keys": ["image", "label"], …}, …],
    "inferer":        {"_target_": "monai.inferers.SlidingWindowInferer", …},
    "postprocessing": [{…, "keys": "pred"}]                 # optional: after the argmax, on labels

``preprocessing`` is what training, validation and inference share: nothing in it is random, and all of it is MONAI's
except the reader. Values that differ between image and label are lists in the order of ``keys``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

from medkd.errors import ConfigError

IMAGE, PRED = "image", "pred"
_PER_KEY = frozenset({"align_corners", "anti_aliasing", "dtype", "mode", "padding_mode", "scale_extent"})
_COPIED = ("network_def", "preprocessing", "inferer", "postprocessing")
_LABEL_PARAMETERS = ("fg_indices_key", "bg_indices_key", "label_key")


def inference_config(train_config: Mapping[str, Any]) -> dict[str, Any]:
    """Derive a MONAI inference configuration; with a network of MONAI's it runs where medkd is not installed.

    Probabilities, not labels, are brought back to the grid of the input, linearly; the argmax follows.

    Args:
        train_config: a training configuration, unevaluated; see the module's docstring for what it must define,
            :mod:`medkd.deploy.classifier` for one with ``"task": "classification"``, and
            :mod:`medkd.deploy.translator` for one with ``"task": "translation"``.

    Returns:
        The content of ``configs/inference.json``.

    Raises:
        ConfigError: naming the id that is missing or that inference cannot use.
    """
    if train_config.get("task") == "classification":
        from medkd.deploy.classifier import classifier_config

        return classifier_config(train_config)
    if train_config.get("task") == "translation":
        from medkd.deploy.translator import translator_config

        return translator_config(train_config)
    for name in ("network_def", "preprocessing", "inferer", "labels"):
        if name not in train_config:
            raise ConfigError(name, "is not defined at the top level of the training configuration", "define it there")
    preprocessing = [
        transform
        for position, step in enumerate(_transforms(train_config["preprocessing"], "preprocessing"))
        if (transform := for_image(step, f"preprocessing::{position}")) is not None
    ]
    extra = [deepcopy(dict(step)) for step in _transforms(train_config.get("postprocessing", []), "postprocessing")]
    for position, step in enumerate(extra):
        require_monai(step, f"postprocessing::{position}")
        if step.get("keys") not in (PRED, [PRED]):
            raise ConfigError(f"postprocessing::{position}", f"works on {step.get('keys')}", 'use "keys": "pred"')
    require_monai(train_config["inferer"], "inferer")
    return inference_skeleton(
        {
            **{key: deepcopy(train_config[key]) for key in referenced_ids(train_config, _COPIED)},
            "network_def": deepcopy(train_config["network_def"]),
        },
        preprocessing=preprocessing,
        inferer=train_config["inferer"],
        postprocessing=[
            {"_target_": "monai.transforms.Activationsd", "keys": PRED, "softmax": True},
            {
                "_target_": "monai.transforms.Invertd",
                "keys": PRED,
                "transform": "@preprocessing",
                "orig_keys": IMAGE,
                "nearest_interp": False,
                "to_tensor": True,
            },
            {"_target_": "monai.transforms.AsDiscreted", "keys": PRED, "argmax": True},
            *extra,
            {
                "_target_": "monai.transforms.SaveImaged",
                "keys": PRED,
                "output_dir": "@output_dir",
                "output_postfix": "seg",
                "output_dtype": "$np.uint8" if len(train_config["labels"]) <= 256 else "$np.uint16",
                "resample": False,
                "separate_folder": False,
            },
        ],
    )


def inference_skeleton(
    parts: Mapping[str, Any], *, preprocessing: list[Any], inferer: Any, postprocessing: list[Any]
) -> dict[str, Any]:
    """What every inference configuration of volumes has, around what differs.

    Args:
        parts: ``network_def`` and what the transforms refer to.
        preprocessing: transforms, or references to them.
        inferer: its definition.
        postprocessing: transforms.
    """
    return {
        "imports": ["$import glob"],
        "bundle_root": ".",
        "device": "$torch.device('cuda:0' if torch.cuda.is_available() else 'cpu')",
        "dataset_dir": "/workspace/data",
        "output_dir": "$@bundle_root + '/eval'",
        "datalist": "$sorted(glob.glob(@dataset_dir + '/*.nii.gz') + glob.glob(@dataset_dir + '/*.nii'))",
        **parts,
        "network": "$@network_def.to(@device)",
        "preprocessing": {"_target_": "monai.transforms.Compose", "transforms": preprocessing},
        "dataset": {
            "_target_": "monai.data.Dataset",
            "data": "$[{'image': image} for image in @datalist]",
            "transform": "@preprocessing",
        },
        "dataloader": {"_target_": "monai.data.DataLoader", "dataset": "@dataset", "batch_size": 1, "num_workers": 0},
        "inferer": deepcopy(inferer),
        "postprocessing": {"_target_": "monai.transforms.Compose", "transforms": postprocessing},
        "checkpointloader": {
            "_target_": "monai.handlers.CheckpointLoader",
            "load_path": "$@bundle_root + '/models/model.pt'",
            "load_dict": {"model": "@network"},
            "map_location": "@device",
        },
        "handlers": ["@checkpointloader", {"_target_": "monai.handlers.StatsHandler", "iteration_log": False}],
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


def _transforms(value: Any, where: str) -> list[Any]:
    if isinstance(value, Mapping) and str(value.get("_target_", "")).rsplit(".", 1)[-1] == "Compose":
        value = value.get("transforms")
    if not isinstance(value, list) or not all(isinstance(step, Mapping) and "_target_" in step for step in value):
        raise ConfigError(where, "is not a list of transforms", 'write [{"_target_": …, "keys": …}, …]')
    return value


def for_image(transform: Mapping[str, Any], where: str) -> dict[str, Any] | None:
    """A transform reduced to the image; None if it concerns the label only."""
    step = deepcopy(dict(transform))
    name = step["_target_"].rsplit(".", 1)[-1]
    keys = step.get("keys", [])
    keys = [keys] if isinstance(keys, str) else keys
    if IMAGE not in keys:
        if any(key != "label" for key in keys) or not keys:
            raise ConfigError(where, f"{name} works on {keys or 'no keys'}", 'use "image" and "label"')
        return None
    if name.startswith("Rand"):
        raise ConfigError(where, f"{name} is random", "keep random transforms out of the shared preprocessing")
    if step.get("source_key", IMAGE) != IMAGE or any(parameter in step for parameter in _LABEL_PARAMETERS):
        raise ConfigError(where, f"{name} depends on the label, which inference does not have", "use the image")
    for parameter in _PER_KEY & step.keys():
        if len(keys) > 1 and isinstance(step[parameter], list) and len(step[parameter]) == len(keys):
            step[parameter] = step[parameter][keys.index(IMAGE)]
    step["keys"] = IMAGE
    step.pop("allow_missing_keys", None)
    if name in ("LoadImaged", "LoadImageD", "LoadImageDict"):
        step.pop("reader", None)  # ours adds checks; MONAI's default reads the same voxels where medkd is absent
    require_monai(step, where)
    return step


def require_monai(value: Any, where: str) -> None:
    """Refuse anything that an installation of MONAI alone does not have.

    Raises:
        ConfigError: naming it.
    """
    if isinstance(value, Mapping):
        target = value.get("_target_")
        if isinstance(target, str) and "." in target and target.split(".")[0] not in ("monai", "torch"):
            raise ConfigError(where, f"uses {target}, which only medkd has", "use a MONAI or torch class")
        for key, part in value.items():
            require_monai(part, f"{where}::{key}")
    elif isinstance(value, list):
        for position, part in enumerate(value):
            require_monai(part, f"{where}::{position}")
    elif isinstance(value, str) and value.startswith("$") and "medkd" in value:
        raise ConfigError(where, "its expression uses medkd", "use MONAI, torch or numpy")


def referenced_ids(train_config: Mapping[str, Any], parts: Sequence[str]) -> list[str]:
    """Further top-level ids that the copied parts refer to, and what those refer to.

    Raises:
        ConfigError: naming an id that is not defined.
    """
    from monai.bundle.reference_resolver import ReferenceResolver

    defined = {"device", "bundle_root", "dataset_dir", "output_dir", "network_def", "inferer"}
    found: list[str] = []
    waiting = [train_config[part] for part in parts if part in train_config]
    while waiting:
        for text in _strings(waiting.pop()):
            for reference in ReferenceResolver.match_refs_pattern(text):
                name = reference.split("::", 1)[0]
                if name in defined or name in found:
                    continue
                if name not in train_config:
                    raise ConfigError(f"@{name}", "is not defined in the training configuration", "define it")
                found.append(name)
                waiting.append(train_config[name])
    return found


def _strings(value: Any) -> list[str]:
    if isinstance(value, Mapping):
        return [text for part in value.values() for text in _strings(part)]
    if isinstance(value, list):
        return [text for part in value for text in _strings(part)]
    return [value] if isinstance(value, str) else []
