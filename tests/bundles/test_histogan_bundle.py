"""The HistoGAN bundle: all four stages by the command's own function, their files, and the overlay."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from medkd.data.synthetic_pool import read_pool
from medkd.workflows.train import train

pytestmark = pytest.mark.filterwarnings("ignore")

NAME = "histogan_histopathology_classification"
QUICK = {
    "size_px": 32,
    "batch_size": 4,
    "epoch_length": 2,
    "max_epochs": 1,
    "val_interval": 1,
    "gan_width": 2,
    "gan_batch_size": 4,
    "gan_epochs": 1,
    "gan_epoch_length": 2,
    "candidates": 8,
    "selection#rule#rules": ["distance"],  # a classifier of two steps need not agree with any image
}


@pytest.fixture(scope="module")
def patches(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("patches")
    rng = np.random.default_rng(0)
    listed: dict[str, list[dict]] = {"training": [], "validation": []}
    for section, count in (("training", 8), ("validation", 4)):
        for number in range(count):
            name, label = f"{section}-{number}.png", number % 2
            pixels = rng.integers(60 + 60 * label, 160 + 60 * label, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name)
            listed[section].append({"image": name, "label": label, "patient": f"{section}-{number}"})
    content = {"name": "tiny", "modality": "H&E", "labels": {"0": "normal", "1": "tumor"}, **listed}
    (root / "datalist.json").write_text(json.dumps(content))
    return root


@pytest.fixture(scope="module")
def done(patches, tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "histogan"
    return train(NAME, {**QUICK, "dataset_dir": str(patches)}, run_dir=run_dir, device="cpu")


def test_all_stages_leave_their_files(done):
    for name in (
        "judge/metrics.csv",
        "gan/metrics.csv",
        "samples/epoch-0001.png",
        "pool/contact_sheet.png",
        "report.html",
    ):
        assert (done / name).is_file(), name
    rows = read_pool(done / "pool")
    assert len(rows) == 16
    assert [sum(row["kept"] for row in rows if row["label"] == label) for label in (0, 1)] == [2, 2]
    assert 'id="synthetic"' in (done / "report.html").read_text()


def test_a_resumed_run_repeats_no_stage_and_writes_the_same_pool(done, patches):
    files = sorted((done / "pool").rglob("*.*"))
    before = [file.read_bytes() for file in files]
    weights = {file: file.read_bytes() for file in done.rglob("*.pt") if not file.is_symlink()}
    train(NAME, {**QUICK, "dataset_dir": str(patches)}, run_dir=done, resume=True, device="cpu")
    assert [file.read_bytes() for file in files] == before
    for file, content in weights.items():
        if file.parent.name == "checkpoints":
            assert file.read_bytes() == content, file


def test_the_slide_classifier_learns_from_a_pool_by_one_overlay(done, patches, tmp_path):
    options = {"dataset_dir": str(patches), "pool_dir": str(done / "pool"), "batch_size": 4, "epoch_length": 2}
    options |= {"teacher_epochs": 1, "train#trainer#max_epochs": 1, "slide#size": 32}
    run_dir = train(
        "tissue_classification", options, overlays=["selective_augmentation"], run_dir=tmp_path / "run", device="cpu"
    )
    assert list(run_dir.rglob("model.pt"))
    assert torch.load(next(run_dir.rglob("model.pt")), weights_only=True)
