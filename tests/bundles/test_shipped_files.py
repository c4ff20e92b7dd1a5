"""What lies in the shipped bundles: complete, consistent, trusted, and derived where it is said to be."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch
from bundle_copies import BUNDLES, CLASSIFIER, CMEDL, EVERY_NAME, HISTOGAN, LE_UDA, SEGMENTERS, SSL_KD, TRANSLATOR
from monai.bundle import ConfigParser

from medkd.data.cards import load_card
from medkd.data.demo import LABELS
from medkd.deploy.bundle import load_bundle
from medkd.deploy.inference_config import inference_config
from medkd.deploy.metadata import SCHEMA, channel_names, check_metadata, license_text
from medkd.deploy.slide_bundle import read_slide_entry
from medkd.deploy.trust import inspect_config, list_code, read_config, require_trust
from medkd.errors import ConfigError
from medkd.workflows.bundles import copy_bundle, list_bundles

COMMON = ["evaluate", "multi_gpu_train"]
OVERLAYS = {
    **{name: [*COMMON, "supervised"] for name in SEGMENTERS},
    CLASSIFIER: [*COMMON, "generative_meta_curriculum", "selective_augmentation", "supervised"],
    HISTOGAN: COMMON,
    SSL_KD: [*COMMON, "small", "supervised"],
    TRANSLATOR: [*COMMON, "unit"],
    CMEDL: [
        *COMMON, "dense_fcn", "equal_teacher", "mrrn", "small", "supervised", "unit", "weak_teacher",
    ],
    LE_UDA: [*COMMON, "baselines", "mt_uda"],
}  # fmt: skip
WITH_OVERLAY = [(name, overlay) for name, overlays in OVERLAYS.items() for overlay in overlays]
WEIGHTS_LIMIT = 2**20  # bytes; what is larger does not belong into a repository
PARAMETERS = {
    "act_net_brain_segmentation": {"network_def": 10_486, "teacher_def": 2_639_596},
    "act_net_cardiac_segmentation": {"network_def": 482_388, "teacher_def": 124_371_268},
    CLASSIFIER: {"network_def": 222_738, "teacher_def": 2_796_002},
    TRANSLATOR: {"network_def": 11_365_633, "autoencoder": 11_127_937},
    CMEDL: {"network_def": 13_394_242},
    LE_UDA: {"student_def": 28_956_229, "generator_def": 11_365_633},
    HISTOGAN: {"network_def": 51_812},
    SSL_KD: {"network_def": 26_476_418, "teacher_def": 23_512_130},
}
SECTIONS = [
    "Overview",
    "Data",
    "Training configuration",
    "Memory",
    "Input",
    "Output",
    "Performance",
    "MONAI Bundle Commands",
    "Limitations",
    "Citation",
    "License",
]


def read(bundle: str, file: str) -> Any:
    return json.loads((BUNDLES / bundle / file).read_text(encoding="utf-8"))


def test_every_shipped_bundle_is_tested():
    assert sorted(folder.name for folder in BUNDLES.iterdir() if folder.is_dir()) == EVERY_NAME
    assert [bundle.name for bundle in list_bundles()] == EVERY_NAME


@pytest.mark.parametrize("name", EVERY_NAME)
def test_files_are_those_the_model_zoo_asks_for(name):
    files = {file.relative_to(BUNDLES / name).as_posix() for file in (BUNDLES / name).rglob("*") if file.is_file()}
    configs = {f"configs/{config}.json" for config in ("metadata", "train", "inference", *OVERLAYS[name])}
    further = {"configs/slide.json", "models/model.pt"} if name == CLASSIFIER else set()
    assert files == configs | {"configs/logging.conf", "docs/README.md", "eval/schema.json", "LICENSE"} | further
    assert (BUNDLES / name / "LICENSE").read_text(encoding="utf-8") == license_text()
    assert read(name, "eval/schema.json") == SCHEMA
    if name == CLASSIFIER:
        return
    with pytest.raises(ConfigError, match=r"no models/model\.pt"):
        load_bundle(BUNDLES / name)


def test_shipped_weights_are_small_and_those_the_metadata_names():
    assert (BUNDLES / CLASSIFIER / "models" / "model.pt").stat().st_size < WEIGHTS_LIMIT
    bundle = load_bundle(BUNDLES / CLASSIFIER)  # refuses other weights
    assert set(bundle.metadata["weights_sha256"]) == {"model.pt"}
    assert bundle.fold == 0


def test_slide_entry_is_that_of_the_recipe():
    metadata, recipe = read(CLASSIFIER, "configs/metadata.json"), read(CLASSIFIER, "configs/train.json")
    labels = {str(value): title for value, title in channel_names(metadata).items()}
    assert metadata["slide"] == ConfigParser({**recipe, "labels": labels}).get_parsed_content("slide")
    task = read_slide_entry(metadata, BUNDLES / CLASSIFIER / "configs" / "metadata.json")
    assert task.size == metadata["network_data_format"]["inputs"]["image"]["spatial_shape"][0]


def test_stated_performance_is_that_of_the_shipped_weights():
    result = json.loads((BUNDLES.parent / "benchmarks" / "results" / f"{CLASSIFIER}.json").read_text())
    shipped = result["shipped"]
    stated = read(CLASSIFIER, "configs/metadata.json")["eval_metrics"]
    assert stated == {f"auc{key}": shipped["all"][name] for key, name in
                      (("", "auc"), ("_low_95", "low"), ("_high_95", "high"))}  # fmt: skip
    text = (BUNDLES / CLASSIFIER / "docs" / "README.md").read_text(encoding="utf-8")
    for arm in ("teacher", "kd", "supervised"):
        own = result["arms"][arm]["all"]
        assert f"{own['auc']:.3f} [{own['low']:.3f}, {own['high']:.3f}]" in text, arm
    assert f"{shipped['all']['auc']:.3f} [{shipped['all']['low']:.3f}, {shipped['all']['high']:.3f}]" in text


@pytest.mark.parametrize("name", EVERY_NAME)
def test_json_is_printed_as_the_model_zoo_prints_it(name):
    for file in (BUNDLES / name).rglob("*.json"):
        text = file.read_text(encoding="utf-8")
        assert text == json.dumps(json.loads(text), indent=4, ensure_ascii=False) + "\n", file


@pytest.mark.parametrize("name", EVERY_NAME)
def test_inference_is_derived_from_training(name):
    labels = {str(value): title for value, title in channel_names(read(name, "configs/metadata.json")).items()}
    derived = inference_config({**read(name, "configs/train.json"), "labels": labels})
    assert read(name, "configs/inference.json") == derived, (
        "train.json changed: write configs/inference.json anew, as docs/README.md of the bundle says"
    )


@pytest.mark.parametrize("name", EVERY_NAME)
def test_metadata_describes_the_network(name):
    metadata = read(name, "configs/metadata.json")
    check_metadata(metadata, name)
    assert metadata["version"] in metadata["changelog"]
    assert "not a medical device" in metadata["intended_use"].lower()
    for key in ("name", "task", "authors", "copyright", "data_source", "label_classes"):
        assert metadata[key]
    network_data = metadata["network_data_format"]
    with torch.device("meta"):
        built = ConfigParser(read(name, "configs/inference.json")).get_parsed_content("network_def")
    first = next(parameter for parameter in built.parameters() if parameter.ndim > 1)
    assert network_data["inputs"]["image"]["num_channels"] == first.shape[1]
    assert network_data["outputs"]["pred"]["num_channels"] == len(channel_names(metadata))


def test_labels_are_those_of_the_data():
    brain, cardiac = (channel_names(read(name, "configs/metadata.json")) for name in SEGMENTERS)
    assert brain == dict(LABELS)
    assert cardiac == {int(value): title for value, title in load_card("acdc").labels.items()}


@pytest.mark.parametrize(("name", "network"), [(name, key) for name, sizes in PARAMETERS.items() for key in sizes])
def test_networks_have_the_size_the_documents_state(name, network):
    recipe = read(name, "configs/train.json")
    labels = channel_names(read(name, "configs/metadata.json"))
    with torch.device("meta"):
        built = ConfigParser({**recipe, "labels": labels}).get_parsed_content(network)
    parameters = sum(parameter.numel() for parameter in built.parameters())
    assert parameters == PARAMETERS[name][network]
    assert f"{parameters:,}" in (BUNDLES / name / "docs" / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", EVERY_NAME)
@pytest.mark.parametrize("config", ["train", "inference"])
def test_configurations_need_no_trust(name, config):
    require_no_trust(name, [config])


@pytest.mark.parametrize(("name", "overlay"), WITH_OVERLAY)
def test_overlays_need_no_trust(name, overlay):
    require_no_trust(name, ["train", overlay])


def test_slide_overlay_needs_no_trust():
    require_no_trust(CLASSIFIER, ["inference", "slide"])


def require_no_trust(name, overlays):
    config = read_config(*[BUNDLES / name / "configs" / f"{overlay}.json" for overlay in overlays])
    assert [code for code in inspect_config(config, "+".join(overlays)) if code.problem] == []
    require_trust(BUNDLES / name, config, source=name, trust=None)


@pytest.mark.parametrize("name", EVERY_NAME)
def test_nothing_in_the_folder_is_beyond_the_allow_list(name):
    assert [code for code in list_code(BUNDLES / name) if code.problem] == []


def _ids(value: Any, prefix: str = "") -> set[str]:
    """The ids of a configuration, without what a bundle is free to choose."""
    chosen = ("network_def", "teacher_def", "augmentation", "preprocessing", "optimizer", "labels")
    if not isinstance(value, dict):
        return {prefix}
    return {prefix}.union(
        *[_ids(part, f"{prefix}::{key}") if key not in chosen else {f"{prefix}::{key}"} for key, part in value.items()]
    )


def test_bundles_have_the_same_ids():
    overlays = OVERLAYS[SEGMENTERS[0]]
    for file in ("train", "inference", *overlays):
        first, second = (_ids(read(name, f"configs/{file}.json")) for name in SEGMENTERS)
        assert first == second, file
    for overlay in overlays:
        assert read(SEGMENTERS[0], f"configs/{overlay}.json") == read(SEGMENTERS[1], f"configs/{overlay}.json")
    for file, own in (("train", {"patch_size", "spacing_mm"}), ("inference", {"patch_size", "spacing_mm"})):
        segmenter, classifier = (set(read(name, f"configs/{file}.json")) for name in (SEGMENTERS[0], CLASSIFIER))
        assert segmenter - classifier == own, file


@pytest.mark.parametrize("name", EVERY_NAME)
def test_readme_has_the_sections_and_names_files_that_exist(name):
    text = (BUNDLES / name / "docs" / "README.md").read_text(encoding="utf-8")
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    assert [section for section in SECTIONS if not any(section in heading for heading in headings)] == []
    for file in set(re.findall(r"\b(?:configs|eval)/[\w.]+(?:json|conf)", text)):
        assert (BUNDLES / name / file).is_file(), file


def test_copied_bundle_is_the_shipped_one(tmp_path):
    made = copy_bundle(EVERY_NAME[0], tmp_path / "mine")
    source = BUNDLES / EVERY_NAME[0]
    files = sorted(file.relative_to(source) for file in source.rglob("*") if file.is_file())
    assert files == sorted(file.relative_to(made) for file in made.rglob("*") if file.is_file())
    assert all((source / file).read_bytes() == (made / file).read_bytes() for file in files)
