"""``train`` on a tiny real cohort: the run folder, resuming, refusals."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from medkd.data import demo_mri
from medkd.errors import CheckpointError, ConfigError, InputError, TrainingPaused
from medkd.workflows.overrides import apply_overrides, nearest_key
from medkd.workflows.run_folder import hold_run_folder
from medkd.workflows.train import train

BUNDLE = "act_net_brain_segmentation"
SUPERVISED = {"_target_": "medkd.methods.supervised.Supervised", "student": "@network_def"}
TINY = {
    "epoch_length": 3,
    "train::trainer::max_epochs": 2,
    "teacher_epochs": 1,
    "val_interval": 1,
    "batch_size": 2,
    "network_def::channels": [4, 8],
    "network_def::strides": [2],
    "teacher_def::channels": [4, 8, 16],
    "teacher_def::strides": [2, 2],
}


@pytest.fixture(scope="module")
def cohort(tmp_path_factory) -> Path:
    return demo_mri(tmp_path_factory.mktemp("cohort"), labeled=2, unlabeled=2, validation=1, test=1).parent


@pytest.fixture(scope="module")
def settings(cohort) -> dict[str, object]:
    return {**TINY, "dataset_dir": str(cohort)}


@pytest.fixture(scope="module")
def finished(settings, tmp_path_factory) -> Path:
    return train(BUNDLE, settings, run_dir=tmp_path_factory.mktemp("runs") / "run", device="cpu")


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return torch.load(run_dir / "bundle" / "models" / "model.pt", weights_only=True)


def same(a: Path, b: Path) -> bool:
    first, second = weights(a), weights(b)
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_a_run_folder_holds_what_the_interface_promises(finished):
    for name in ("config.json", "format_version", "environment.json", "log.txt", "metrics.csv", "report.html"):
        assert (finished / name).is_file(), name
    for name in ("last.pt", "best.pt"):
        assert (finished / "checkpoints" / name).is_symlink()
        assert (finished / "checkpoints" / name).exists()
    for name in ("configs/inference.json", "configs/metadata.json", "models/model.pt", "LICENSE", "docs/README.md"):
        assert (finished / "bundle" / name).is_file(), name
    assert list(finished.glob("events.out.tfevents.*"))
    with (finished / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["split"] for row in rows} == {"train", "validation"} or {row["split"] for row in rows} == {"validation"}
    assert "val_mean_dice" in {row["name"] for row in rows}
    config = json.loads((finished / "config.json").read_text())
    assert config["labels"] == "$@cases.labels"
    assert config["train"]["trainer"]["max_epochs"] == 2


def test_an_overlay_beside_the_configuration_is_merged_and_words_come_last(settings, tmp_path):
    run = train(BUNDLE, {**settings, "batch_size": 1}, overlays=["supervised"], run_dir=tmp_path / "run", device="cpu")
    config = json.loads((run / "config.json").read_text())
    assert config["train"]["method"] == SUPERVISED
    assert config["run"] == ["$@train::trainer.run()"]
    assert config["batch_size"] == 1
    assert not (run / "teacher").exists()


def test_an_unknown_overlay_is_refused_and_the_known_ones_are_named(settings, tmp_path):
    with pytest.raises(ConfigError, match=r"overlay superwised: is not a file; beside train.json there are \["):
        train(BUNDLE, settings, overlays=["superwised"], run_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def stop_at(monkeypatch, iteration: int) -> None:
    """Send SIGTERM to ourselves in one iteration of the student's training."""
    from medkd.methods.act_net import ACTNet

    step = ACTNet.step

    def stopping(self, batch, ctx):
        if ctx.iteration == iteration:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, batch, ctx)

    monkeypatch.setattr(ACTNet, "step", stopping)


def test_a_run_asked_to_stop_resumes_to_the_same_weights(finished, settings, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_at(patch, 4)
        with pytest.raises(TrainingPaused, match="--resume") as caught:
            train(BUNDLE, settings, run_dir=tmp_path / "run", device="cpu")
    assert caught.value.exit_code == 75
    assert not (tmp_path / "run" / "bundle").exists()
    train(BUNDLE, settings, run_dir=tmp_path / "run", device="cpu", resume=True)
    assert same(finished, tmp_path / "run")
    ours, theirs = ((run / "metrics.csv").read_text() for run in (finished, tmp_path / "run"))
    assert ours == theirs


def test_resuming_a_finished_run_changes_nothing(finished, settings):
    before = {name: value.clone() for name, value in weights(finished).items()}
    train(BUNDLE, settings, run_dir=finished, device="cpu", resume=True)
    assert all(torch.equal(before[name], value) for name, value in weights(finished).items())


def test_another_config_or_datalist_is_refused_with_the_difference(finished, settings, cohort, tmp_path):
    with pytest.raises(ConfigError, match="batch_size was 2 and is 3"):
        train(BUNDLE, {**settings, "batch_size": 3}, run_dir=finished, device="cpu", resume=True)
    content = json.loads((cohort / "datalist.json").read_text())
    content["unlabeled"] = content["unlabeled"][:1]
    (cohort / "shorter.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="datalist was"):
        train(
            BUNDLE, {**settings, "datalist": str(cohort / "shorter.json")}, run_dir=finished, device="cpu", resume=True
        )
    before = (cohort / "datalist.json").read_text()
    try:
        (cohort / "datalist.json").write_text(json.dumps(content))
        with pytest.raises(ConfigError, match=r"datalist changed: unlabeled: 1 removed"):
            train(BUNDLE, settings, run_dir=finished, device="cpu", resume=True)
    finally:
        (cohort / "datalist.json").write_text(before)


def test_a_used_folder_is_refused(finished, settings, tmp_path):
    with pytest.raises(ConfigError, match="--resume"):
        train(BUNDLE, settings, run_dir=finished, device="cpu")
    (tmp_path / "thesis.doc").write_text("mine")
    with pytest.raises(ConfigError, match="not a run folder"):
        train(BUNDLE, settings, run_dir=tmp_path, device="cpu", overwrite=True)
    assert (tmp_path / "thesis.doc").read_text() == "mine"
    with pytest.raises(ConfigError, match="no run to resume"):
        train(BUNDLE, settings, run_dir=tmp_path / "new", device="cpu", resume=True)


def test_two_processes_never_share_a_run_folder(finished, settings):
    with hold_run_folder(finished), pytest.raises(ConfigError, match="another process"):
        train(BUNDLE, settings, run_dir=finished, device="cpu", resume=True)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"epoch": 5}, "did you mean train::trainer::max_epochs"),
        ({"train::trainer::max_epoch": 5}, "did you mean train::trainer::max_epochs"),
        ({"batchsize": 5}, "did you mean batch_size"),
        ({"train::trainer::not_an_argument": 5}, "not in this configuration"),
        ({"dataset_dir": "/nowhere/at/all"}, "is not a folder"),
        (
            {"train::method": {"_target_": "medkd.methods.supervised.Supervised", "student": "@network_def"}},
            "cannot use",
        ),
    ],
)
def test_bad_settings_are_one_line_and_nothing_is_trained(overrides, message, settings, tmp_path):
    with pytest.raises(ConfigError, match=message) as caught:
        train(BUNDLE, {**settings, **overrides}, run_dir=tmp_path / "run", device="cpu")
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2
    assert not (tmp_path / "run" / "bundle").exists()


def test_an_argument_of_a_component_may_be_added():
    config = {"optimizer": {"_target_": "torch.optim.SGD", "lr": 0.1}}
    apply_overrides(config, {"optimizer::nesterov": True})
    assert config["optimizer"]["nesterov"] is True
    assert nearest_key(config, "optimiser#lr") == "optimizer::lr"


def test_a_datalist_without_labels_is_refused(cohort, settings, tmp_path):
    content = json.loads((cohort / "datalist.json").read_text())
    content["unlabeled"] += [{"image": e["image"], "patient": e["patient"]} for e in content.pop("training")]
    (cohort / "unlabeled.json").write_text(json.dumps(content))
    with pytest.raises((ConfigError, InputError), match="label"):
        train(BUNDLE, {**settings, "datalist": str(cohort / "unlabeled.json")}, run_dir=tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()


def test_a_foreign_config_needs_trust(tmp_path):
    (tmp_path / "configs").mkdir()
    marker = tmp_path / "owned"
    config = {"run_dir": "x", "resume": False, "initialize": [f"$__import__('os').system('touch {marker}')"], "run": []}
    (tmp_path / "configs" / "train.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="--trust"):
        train(tmp_path, run_dir=tmp_path / "run")
    assert not marker.exists()


def test_a_damaged_run_is_an_error_not_a_restart(settings, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_at(patch, 4)
        with pytest.raises(TrainingPaused):
            train(BUNDLE, settings, run_dir=tmp_path / "run", device="cpu")
    for path in (tmp_path / "run" / "checkpoints").glob("step-*.pt"):
        path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="no valid checkpoint"):
        train(BUNDLE, settings, run_dir=tmp_path / "run", device="cpu", resume=True)


@pytest.mark.slow
def test_two_processes_train_one_run(settings, tmp_path):
    arguments = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
    command = [sys.executable, "-W", "ignore", "-m", "medkd", "train", BUNDLE, *arguments, "--devices", "2"]
    done = subprocess.run([*command, "--run-dir", str(tmp_path / "run")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "bundle" / "models" / "model.pt").is_file()
