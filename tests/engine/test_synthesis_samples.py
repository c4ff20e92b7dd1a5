"""Sheets, measures and the stop of a diverging generator; the stage that fills a pool; the pool on disk."""

from __future__ import annotations

import csv
import json
from functools import partial

import numpy as np
import pytest
import torch
from contract.small import histogan as small
from engine import toy
from ignite.engine import Events
from PIL import Image
from torch import nn

from medkd.data.picture_grid import as_pixels, from_pixels, picture_grid
from medkd.data.synthetic_pool import read_pool, selected_items, write_pool
from medkd.engine import MetricsLog
from medkd.engine.synthesis_samples import LAST_GOOD_FILE, SynthesisSamples
from medkd.engine.synthetic_pool_stage import SyntheticPoolStage
from medkd.errors import ConfigError, InputError, TrainingError
from medkd.methods.histogan import HistoGAN
from medkd.methods.selective_augmentation import SelectiveAugmentation, select

NAMES = ["a", "b", "c"]


def real_items(count: int = 12) -> list[dict]:
    return small.items("labeled", labeled=True, seed=3) * (count // 6)


def run(tmp_path, *, epochs: int = 2, spoil=None, **options):
    method = toy.method(HistoGAN)
    samples = SynthesisSamples(tmp_path, real_items(), names=NAMES, columns=4, **{"least_diversity": 0.0, **options})
    handlers = [samples, MetricsLog(tmp_path, tensorboard=False)]
    trainer = toy.trainer(method, toy.streams(HistoGAN), epochs=epochs, handlers=handlers)
    if spoil is not None:
        trainer.add_event_handler(Events.ITERATION_COMPLETED, spoil)
    return trainer, samples


def test_each_epoch_leaves_a_sheet_and_measures(tmp_path):
    trainer, samples = run(tmp_path)
    trainer.run()
    for epoch in (1, 2):
        with Image.open(tmp_path / "samples" / f"epoch-{epoch:04d}.png") as sheet:
            assert sheet.size == (4 * (64 + 2) + 2, 6 * (64 + 2) + 2)
    assert set(samples.measures) == {"fid", "kid", "density", "coverage", "diversity"}
    with (tmp_path / "metrics.csv").open() as file:
        logged = {row["name"] for row in csv.DictReader(file) if row["split"] == "validation"}
    assert logged == set(samples.measures)
    assert toy.same_state(trainer.method.generator.train(), trainer.method.generator)
    assert trainer.method.training


def test_looking_changes_nothing_in_training(tmp_path):
    looked, _ = run(tmp_path)
    looked.run()
    plain = toy.trainer(toy.method(HistoGAN), toy.streams(HistoGAN), epochs=2)
    plain.run()
    assert toy.same_state(looked.method, plain.method)


def blacken(trainer, *, after: int) -> None:
    if trainer.state.epoch > after:
        with torch.no_grad():
            for parameter in trainer.method.ema.parameters():
                parameter.zero_()


def test_a_generator_that_collapses_is_stopped_with_the_last_good_one(tmp_path, caplog):
    trainer, _ = run(tmp_path, epochs=8, spoil=partial(blacken, after=2), patience=2, least_diversity=0.01)
    trainer.run()
    assert trainer.state.epoch == 4
    assert trainer.stopped_early
    good = torch.load(tmp_path / LAST_GOOD_FILE, weights_only=True)
    assert all(torch.equal(value, good[name]) for name, value in trainer.network.state_dict().items())
    assert any(value.abs().sum() > 0 for value in good.values())
    assert "diverged" in caplog.text
    assert [look["good"] for look in json.loads((tmp_path / "samples" / "looks.json").read_text())] == [1, 1, 0, 0]


def test_a_generator_that_was_never_good_is_an_error_with_its_numbers(tmp_path):
    trainer, _ = run(tmp_path, epochs=8, spoil=partial(blacken, after=0), patience=2, least_diversity=0.01)
    with pytest.raises(TrainingError, match=r"never made usable images \(fid .* diversity"):
        trainer.run()


def test_a_failed_step_names_the_last_good_generator(tmp_path, caplog):
    def spoil(trainer) -> None:
        if trainer.state.epoch == 2:
            with torch.no_grad():
                trainer.method.critic.is_real.weight.fill_(float("nan"))

    trainer, _ = run(tmp_path, epochs=4, spoil=spoil)
    with pytest.raises(TrainingError):
        trainer.run()
    assert LAST_GOOD_FILE in caplog.text
    good = torch.load(tmp_path / LAST_GOOD_FILE, weights_only=True)
    assert all(torch.equal(value, good[name]) for name, value in trainer.network.state_dict().items())


def test_a_class_without_images_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"\[4, 4, 4, 0\]"):
        SynthesisSamples(tmp_path, real_items(), names=[*NAMES, "d"])


class Judged(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.features = nn.Conv2d(3, 5, 3)
        self.drop, self.head = nn.Dropout(0.5), nn.Linear(5, 3)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.head(self.drop(self.features(image).mean(dim=(2, 3))))


def stage(tmp_path, **options) -> SyntheticPoolStage:
    torch.manual_seed(0)
    judge = SelectiveAugmentation(Judged(), ["features"], passes=3)
    rule = partial(select, keep=0.3, rules=["distance"])
    generator = small.Generator(norm=True)
    return SyntheticPoolStage(
        tmp_path, generator, judge, rule, real_items(), names=NAMES, latent=small.LATENT, per_class=7, **options
    )


def test_a_pool_holds_every_candidate_with_its_scores_and_is_the_same_again(tmp_path):
    folder = stage(tmp_path / "one").run()
    rows = read_pool(folder)
    assert [sum(row["kept"] for row in rows if row["class"] == name) for name in NAMES] == [3, 3, 3]
    assert len(rows) == 21
    for row in rows:
        assert {"confidence", "entropy", "distance", "predicted"} <= set(row)
        furthest = max(other["distance"] for other in rows if other["kept"] and other["label"] == row["label"])
        assert row["kept"] == (row["distance"] <= furthest)
        with Image.open(folder / row["file"]) as picture:
            assert (picture.mode, picture.size) == ("RGB", (8, 8))
    again = stage(tmp_path / "two").run()
    for file in folder.rglob("*.*"):
        assert file.read_bytes() == (again / file.relative_to(folder)).read_bytes(), file


def test_chosen_images_become_training_items(tmp_path):
    items = selected_items(stage(tmp_path).run())
    assert len(items) == 9
    assert {item["patient"] for item in items} == {"generated"}
    assert len({item["case"] for item in items}) == 9
    assert len(selected_items(tmp_path, everything=True)) == 21


def test_damaged_empty_and_absent_pools_are_refused(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        read_pool(tmp_path)
    image, label = torch.zeros(2, 3, 8, 8), torch.tensor([0, 1])
    write_pool(tmp_path, image, label, NAMES, scores={"distance": torch.zeros(2)}, kept=[])
    with pytest.raises(InputError, match="no image was chosen"):
        selected_items(tmp_path)
    table = tmp_path / "scores.csv"
    for bad in ("file,label\na.png,x\n", "file,label,class,kept\n../a.png,0,a,1\n"):
        table.write_text(bad)
        with pytest.raises(InputError, match="is damaged"):
            selected_items(tmp_path)


def test_a_smaller_pool_leaves_no_images_of_the_one_before(tmp_path):
    for count in (4, 2):
        image, label = torch.zeros(count, 3, 8, 8), torch.zeros(count, dtype=torch.int64)
        write_pool(tmp_path, image, label, NAMES, scores={"distance": torch.arange(count) * 1.0}, kept=[0])
    assert len(list((tmp_path / "images").glob("*.png"))) == 2


def test_pixels_go_there_and_back_and_are_framed():
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, -1, -1)
    assert np.array_equal(as_pixels(from_pixels(pixels)), pixels.permute(0, 2, 3, 1).numpy())
    with pytest.raises(ValueError, match="one size"):
        picture_grid([np.zeros((1, 8, 8, 3), np.uint8), np.zeros((1, 9, 8, 3), np.uint8)])
