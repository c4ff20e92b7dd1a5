"""From what a run has trained to the bundle that ships it: metadata and a page for each task."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from monai.bundle import ConfigParser

from medkd.data.datalists import Datalist
from medkd.deploy.bundle import write_bundle
from medkd.deploy.classifier import classification_metadata
from medkd.deploy.metadata import segmentation_metadata
from medkd.deploy.translator import translation_metadata


def deploy(out: Path, config: Mapping[str, Any], datalist: Datalist, weights: Mapping[str, torch.Tensor]) -> Path:
    """Write weights of a configuration's ``network_def`` as a MONAI inference bundle."""
    recipe = {**config, "labels": {str(index): name for index, name in datalist.label_names.items()}}
    return write_bundle(
        out,
        train_config=recipe,
        weights=weights,
        metadata=deployed_metadata(recipe, datalist),
        readme=_readme(config, datalist),
        overwrite=True,
    )


def deployed_metadata(recipe: Mapping[str, Any], datalist: Datalist) -> dict[str, Any]:
    """metadata.json of the network a run has trained."""
    if recipe.get("task") == "classification":
        return _classifier_metadata(recipe, datalist)
    if recipe.get("task") == "translation":
        return _translator_metadata(recipe, datalist)
    method = _method_name(recipe)
    network = _segmenter(recipe)
    levels = next((network[name] for name in ("filters", "channels", "widths") if name in network), None)
    levels = _resolved(recipe, levels)
    multiple = 2 ** ((len(levels) if isinstance(levels, list | tuple) else 5) - 1)
    return segmentation_metadata(
        name=f"{datalist.name or 'medical image'} segmentation ({method} student)",
        task="segmentation",
        description=f"A segmentation network trained with {method} by medkd.",
        labels=recipe["labels"],
        modality=str(datalist.modality or "unknown"),
        spatial_shape=[f"{2 * multiple}*n"] * int(_resolved(recipe, network.get("spatial_dims", 2))),
        in_channels=int(_resolved(recipe, network.get("in_channels", 1))),
        **({} if recipe.get("fold") is None else {"fold": recipe["fold"]}),
    )


def _segmenter(recipe: Mapping[str, Any]) -> Mapping[str, Any]:
    """The definition of the network that segments: network_def, or its ``segmenter`` behind a translator."""
    definition: Any = recipe["network_def"]
    while isinstance(definition, str) or "segmenter" in definition:
        if isinstance(definition, str):
            definition = ConfigParser(dict(recipe))[definition.removeprefix("@")]
        else:
            definition = definition["segmenter"]
    found: Mapping[str, Any] = definition
    return found


def _resolved(recipe: Mapping[str, Any], value: Any) -> Any:
    """A value of a configuration that may be a reference or an expression."""
    return ConfigParser({**recipe, "resolved": value}).get_parsed_content("resolved")


def _classifier_metadata(recipe: Mapping[str, Any], datalist: Datalist) -> dict[str, Any]:
    method = _method_name(recipe)
    # How slides are tiled for it, without expressions: whoever reads metadata.json evaluates nothing.
    slide = ConfigParser(dict(recipe)).get_parsed_content("slide") if "slide" in recipe else None
    return classification_metadata(
        labels=recipe["labels"],
        side=int(slide["size"]) if slide else _resized_to(recipe),
        name=f"{datalist.name or 'image'} classification ({method} student)",
        task="classification",
        description=f"A classification network trained with {method} by medkd.",
        modality=str(datalist.modality or "unknown"),
        **({} if slide is None else {"slide": slide}),
        **({} if recipe.get("fold") is None else {"fold": recipe["fold"]}),
    )


def _resized_to(recipe: Mapping[str, Any]) -> list[int | str]:
    """The (height, width) that the last step with a ``spatial_size`` leaves; any multiple of 32 where there is none."""
    steps = [step for part in ("loading", "normalization") for step in recipe.get(part, [])]
    sizes = [_resolved(recipe, step["spatial_size"]) for step in steps if "spatial_size" in step]
    if not sizes:
        return ["32*n", "32*n"]
    size = sizes[-1]
    return [size, size] if isinstance(size, int) else [int(side) for side in size]


def _translator_metadata(recipe: Mapping[str, Any], datalist: Datalist) -> dict[str, Any]:
    parser = ConfigParser(dict(recipe))
    source, target = (str(parser.get_parsed_content(name)) for name in ("source_domain", "target_domain"))
    return translation_metadata(
        source=source,
        target=target,
        in_hounsfield=recipe["output_range"] is not None,
        name=f"{datalist.name or 'medical image'} translation ({_method_name(recipe)}, {source} to {target})",
        task="translation",
        description=f"A network that translates {source} into {target}, slice by slice, trained with medkd.",
        **({} if recipe.get("fold") is None else {"fold": recipe["fold"]}),
    )


def _method_name(config: Mapping[str, Any]) -> str:
    """The class of the method that the main stage trains, which may be a reference to another id."""
    method = config["train"]["method"]
    while isinstance(method, str):
        method = ConfigParser(dict(config))[method.removeprefix("@")]
    return str(method["_target_"]).rsplit(".", 1)[-1]


def _translator_readme(config: Mapping[str, Any], datalist: Datalist) -> str:
    parser = ConfigParser(dict(config))
    names = [str(parser.get_parsed_content(name)) for name in ("source_domain", "target_domain")]
    counts = [
        sum(len(datalist.section(section, domain=name)) for section in ("training", "unlabeled")) for name in names
    ]
    source, target = names
    unit = "its unit" if config["output_range"] is not None else "intensities from -1 to 1"
    return f"""# {datalist.name or "Images"}: {source} to {target} ({_method_name(config)})

A network that turns {source} volumes into {target}-like ones, slice by slice, in {unit}. Trained with medkd on
{counts[0]} {source} and {counts[1]} {target} volumes that were not paired. **A research model, not a medical device:**
what it shows is likely for {target}, not measured; it can invent and remove lesions.

## Run it

    python -m monai.bundle run --config_file configs/inference.json --bundle_root . --dataset_dir FOLDER
    medkd predict . SCAN.nii.gz --out translations

The first command needs medkd installed too, since the network is medkd's. Both write `<name>_translated.nii.gz` in the
scan's own geometry.
"""


def _readme(config: Mapping[str, Any], datalist: Datalist) -> str:
    if config.get("task") == "translation":
        return _translator_readme(config, datalist)
    counts = {name: len(datalist.section(name)) for name in ("training", "unlabeled", "validation", "test")}
    method = _method_name(config)
    labels = "\n".join(f"- {index}: {name}" for index, name in datalist.label_names.items())
    task = str(config.get("task", "segmentation"))
    commands = (
        ("    medkd slide predict . SLIDE.svs --out predictions\n" if "slide" in config else "")
        + "    medkd predict . FOLDER --out predictions\n"
        "    medkd evaluate . --datalist datalist.json --out evaluation"
        if task == "classification"
        else "    medkd predict . SCAN.nii.gz --out predictions\n"
        "    medkd evaluate . --datalist datalist.json --out evaluation"
    )
    return f"""# {datalist.name or task.capitalize()} ({method} student)

A {task} network trained with medkd's {method}. **A research model, not a medical device.**

Trained on {counts["training"]} labeled and {counts["unlabeled"]} unlabeled cases; {counts["validation"]} cases for
validation and {counts["test"]} for the test were held out. The run folder beside this bundle has its report.

Labels:

{labels}

## Run it

    python -m monai.bundle run --config_file configs/inference.json --bundle_root . --dataset_dir FOLDER
{commands}
"""
