"""Validation, early stopping, the metrics log and progress."""

from __future__ import annotations

import csv
import logging
import math
from types import SimpleNamespace

import pytest
import torch
from engine import toy

from medkd.engine import Checkpoints, MetricsLog, Progress, SaveWeights, Validate
from medkd.errors import ConfigError
from medkd.methods.supervised import Supervised


class Evaluator:
    """Stands in for a MONAI evaluator: hands out one metric value per epoch."""

    def __init__(self, values):
        self.values = values
        self.state = SimpleNamespace(metrics={}, key_metric_name="val_mean_dice", epoch_length=1)

    def run(self, epoch):
        self.state.metrics = {"val_mean_dice": self.values[epoch - 1], "per_class": torch.tensor([0.1, 0.2])}


def run(values, folder, *, patience=None, metric=None):
    built = toy.method(Supervised)
    handlers = [Validate(Evaluator(values), patience=patience, metric=metric), MetricsLog(folder, every_iters=1)]
    trainer = toy.trainer(built, toy.streams(Supervised), epochs=len(values), handlers=[*handlers, Checkpoints(folder)])
    trainer.run()
    return trainer


def test_a_non_finite_first_metric_never_becomes_the_best(tmp_path):
    trainer = run([math.nan, 0.2, math.inf, 0.5, 0.4], tmp_path)
    assert trainer.state.best_metric == 0.5
    assert trainer.state.best_metric_epoch == 4
    assert (tmp_path / "best.pt").resolve().name.startswith(f"step-{4 * 3:08d}-")
    assert (tmp_path / "last.pt").resolve().name.startswith(f"step-{5 * 3:08d}-")


def test_the_best_checkpoint_outlives_pruning(tmp_path):
    run([0.9, 0.1, 0.1, 0.1, 0.1], tmp_path)
    assert (tmp_path / "best.pt").resolve().name.startswith("step-00000003-")
    assert len(list(tmp_path.glob("step-*.pt"))) == 3


def test_training_stops_when_nothing_gets_better_and_stays_stopped(tmp_path):
    trainer = run([0.5, 0.4, 0.4, 0.9, 0.9], tmp_path, patience=2)
    assert trainer.state.epoch == 3
    assert trainer.finished
    again = toy.trainer(toy.method(Supervised), toy.streams(Supervised), epochs=5, folder=tmp_path, resume=True)
    again.run()
    assert again.state.iteration == 9


def test_an_unknown_metric_is_named(tmp_path):
    with pytest.raises(ConfigError, match="val_mean_dice"):
        run([0.5], tmp_path, metric="dice")


def test_metrics_csv_has_terms_rates_and_validation(tmp_path):
    run([0.5, 0.6], tmp_path)
    with (tmp_path / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["iteration", "epoch", "split", "name", "value"]
    assert {row["name"] for row in rows if row["split"] == "train"} == {"loss", "segmentation_loss", "lr_student"}
    validation = [(row["iteration"], row["name"], row["value"]) for row in rows if row["split"] == "validation"]
    assert validation == [("3", "val_mean_dice", "0.5"), ("6", "val_mean_dice", "0.6")]
    assert list(tmp_path.glob("events.out.tfevents.*"))


def test_resuming_cuts_metrics_csv_back_to_the_checkpoint(tmp_path):
    run([0.5], tmp_path / "a")
    log = tmp_path / "a" / "metrics.csv"
    log.write_text(log.read_text() + "9,3,train,loss,0.1\n10,4,tr")
    trainer = toy.trainer(
        toy.method(Supervised),
        toy.streams(Supervised),
        epochs=1,
        handlers=[MetricsLog(tmp_path / "a", every_iters=1, tensorboard=False)],
    )
    trainer.state.iteration = 2
    trainer.state.epoch = 0
    trainer.run()
    with log.open(newline="") as file:
        iterations = [int(row["iteration"]) for row in csv.DictReader(file)]
    assert iterations == sorted(iterations)
    assert set(iterations) == {1, 2, 3}


def test_plain_progress_says_terms_and_time_left(caplog):
    with caplog.at_level(logging.INFO):
        toy.trainer(
            toy.method(Supervised), toy.streams(Supervised), epochs=1, handlers=[Progress("student", seconds=0.0)]
        ).run()
    line = caplog.messages[-1]
    assert "student: iteration 3 of 3" in " ".join(caplog.messages)
    assert "segmentation" in " ".join(caplog.messages)
    assert "left" in " ".join(caplog.messages)
    assert line


def test_progress_draws_a_bar_on_a_terminal(monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    progress = Progress("student")
    trainer = toy.trainer(toy.method(Supervised), toy.streams(Supervised), epochs=1, handlers=[progress])
    trainer.run()
    assert progress._bar is None


def test_weights_are_saved_plain_and_even_after_a_finished_run_resumes(tmp_path):
    def train(resume):
        built = toy.method(Supervised)
        handlers = [SaveWeights(tmp_path / "models" / "model.pt")]
        toy.trainer(
            built, toy.streams(Supervised), epochs=1, folder=tmp_path / "c", resume=resume, handlers=handlers
        ).run()
        return built

    built = train(resume=False)
    (tmp_path / "models" / "model.pt").unlink()
    train(resume=True)
    state = torch.load(tmp_path / "models" / "model.pt", weights_only=True)
    assert all(torch.equal(state[name], value) for name, value in built.student.state_dict().items())
