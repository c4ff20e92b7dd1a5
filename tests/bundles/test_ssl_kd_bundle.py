"""SSL-KD's bundle: four stages in order on two networks, one scaling in all of them, resumed bit-exactly."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from bundle_copies import BUNDLES
from monai.bundle import ConfigParser
from PIL import Image

from medkd.data.fundus import crop_fundus
from medkd.errors import ConfigError
from medkd.workflows.train import merged_config, train, training_file

SSL_KD = "ssl_kd_retinopathy_classification"
STAGES = ("self_supervised", "teacher", "distillation", "train")
TINY = {
    "image_size": 32,
    "batch_size": 2,
    "contrastive_batch_size": 3,
    "epoch_length": 2,
    "self_supervised_epochs": 1,
    "teacher_epochs": 1,
    "distillation_epochs": 1,
    "val_interval": 1,
    "train#trainer#max_epochs": 2,
    "amp": False,
    "teacher_def#block": "basic",
    "teacher_def#layers": [1, 1, 1, 1],
    "teacher_def#block_inplanes": [4, 4, 4, 4],
    "projector_def#in_features": 4,
    "network_def#init_features": 4,
    "network_def#growth_rate": 4,
    "network_def#block_config": [1, 1],
}


def photograph(number: int) -> np.ndarray:
    """A mottled disc off the center of a black 60 x 80 image, brighter where the number is odd."""
    rows, columns = np.mgrid[:60, :80]
    distance = np.hypot(rows - 30, columns - 38 - number % 3)
    mottled = np.random.default_rng(number).uniform(-60, 60, (6, 8)).repeat(10, axis=0).repeat(10, axis=1)
    color = np.array([150, 100, 80]) + 30 * (number % 2) + mottled[..., None] * np.array([1.0, 0.6, 0.4])
    return np.where(distance[..., None] < 27, color, 4).astype(np.uint8)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("eyes")
    datalist: dict[str, object] = {"name": "eyes", "labels": {"0": "not referable", "1": "referable"}}
    number = 0
    for section, count in (("training", 4), ("unlabeled", 4), ("validation", 2), ("test", 2)):
        cases = []
        for _ in range(count):
            Image.fromarray(photograph(number)).save(root / f"{number}.png")
            label = {} if section == "unlabeled" else {"label": number % 2}
            cases.append({"image": f"{number}.png", "patient": f"p{number}", **label})
            number += 1
        datalist[section] = cases
    (root / "datalist.json").write_text(json.dumps(datalist))
    return root


@pytest.fixture(scope="module")
def run(cohort, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "ssl_kd"
    return train(BUNDLES / SSL_KD, {**TINY, "dataset_dir": str(cohort)}, run_dir=folder, device="cpu")


def parsed(cohort: Path, folder: Path) -> ConfigParser:
    parser = ConfigParser(merged_config([training_file(BUNDLES / SSL_KD)]))
    for name, value in {**TINY, "dataset_dir": str(cohort), "bundle_root": str(folder), "run_dir": str(folder)}.items():
        parser[name] = value
    return parser


def shipped(run: Path) -> dict[str, torch.Tensor]:
    return torch.load(run / "bundle" / "models" / "model.pt", weights_only=True)


def test_every_stage_leaves_its_checkpoint_and_the_student_ships(run):
    folders = [run / stage / "checkpoints" for stage in STAGES[:-1]] + [run / "checkpoints"]
    assert all((folder / "last.pt").exists() for folder in folders)
    assert "class_layers.out.weight" in shipped(run)


def test_an_interrupted_run_ends_in_the_same_weights(run, cohort, tmp_path):
    cut = Path(shutil.copytree(run, tmp_path / "cut", symlinks=True))
    shutil.rmtree(cut / "checkpoints")
    shutil.rmtree(cut / "distillation")
    shutil.rmtree(cut / "bundle")
    train(BUNDLES / SSL_KD, {**TINY, "dataset_dir": str(cohort)}, run_dir=cut, resume=True, device="cpu")
    before, after = shipped(run), shipped(cut)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_stages_share_their_networks_and_their_scaling(cohort, tmp_path):
    """The released code fine-tunes the teacher on normalized images and lets it label unnormalized ones."""
    parser = parsed(cohort, tmp_path)
    methods = {stage: parser.get_parsed_content(f"{stage}#method") for stage in STAGES}
    assert methods["self_supervised"].encoder is methods["teacher"].student is methods["distillation"].teacher
    assert methods["distillation"].student is methods["train"].student is parser.get_parsed_content("network_def")
    config = merged_config([training_file(BUNDLES / SSL_KD)])
    for stage in STAGES[1:]:
        assert "+ @normalization +" in config[stage]["preprocessing"]["transforms"], stage
    first = config["self_supervised"]["preprocessing"]["transforms"][3]
    assert {**first, "keys": "image"} == config["normalization"][0]
    assert config["teacher_weights"] is config["student_weights"] is None  # no ImageNet unless asked for


def test_views_of_an_image_differ_and_no_stage_without_labels_sees_one(cohort, tmp_path):
    parser = parsed(cohort, tmp_path)
    batch = next(iter(parser.get_parsed_content("self_supervised#streams")))["unlabeled"]
    assert set(batch) == {"image", "second_view"}
    assert batch["image"].shape == (3, 3, 32, 32)
    assert not torch.equal(batch["image"], batch["second_view"])
    assert len(parser.get_parsed_content("self_supervised#dataset")) == 8
    assert set(next(iter(parser.get_parsed_content("distillation#streams")))["unlabeled"]) == {"image"}


def test_photographs_are_brought_to_one_diameter_without_medkd(cohort, tmp_path):
    """The bundle's MONAI transforms do what medkd.data.fundus does, so that inference needs MONAI alone."""
    found = parsed(cohort, tmp_path).get_parsed_content("labeled_images")[1]["image"]
    expected = crop_fundus(photograph(1), 32).astype(np.float32)
    assert found.shape == (3, 32, 32)
    found = np.moveaxis(np.asarray(found), 0, -1) * 235 + 20
    inside, same = expected.max(axis=2) > 60, found.max(axis=2) > 60
    assert (inside & same).sum() > 0.9 * (inside | same).sum()
    assert np.median(np.abs(found - expected)[inside & same]) < 2


def test_data_without_unlabeled_images_is_one_clear_line(cohort, tmp_path):
    datalist = json.loads((cohort / "datalist.json").read_text())
    datalist["unlabeled"] = []
    (tmp_path / "labeled_only.json").write_text(json.dumps(datalist))
    settings = {**TINY, "dataset_dir": str(cohort), "datalist": str(tmp_path / "labeled_only.json")}
    with pytest.raises(ConfigError, match="empty") as refused:
        train(BUNDLES / SSL_KD, settings, run_dir=tmp_path / "run", device="cpu")
    assert "\n" not in str(refused.value)
