"""The look at a translator in training."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from contract.small import cyclegan as small
from engine import toy
from monai.data import Dataset, MetaTensor

from medkd.data.translate_slices import translate_slices
from medkd.engine.handlers import MetricsLog
from medkd.engine.translation_samples import SAMPLES_FILE, TranslationSamples
from medkd.errors import ConfigError
from medkd.methods.cyclegan import CycleGAN
from medkd.methods.supervised import Supervised


def domain(count: int, seed: int) -> Dataset:
    generator = torch.Generator().manual_seed(seed)
    affine = torch.diag(torch.tensor([1.0, 1.0, 3.0, 1.0], dtype=torch.float64))
    volumes = [torch.rand(1, 8, 12, 3, generator=generator) * 2 - 1 for _ in range(count)]
    return Dataset([{"image": MetaTensor(v, affine=affine), "case": f"case-{n}"} for n, v in enumerate(volumes)])


def test_slices_their_translations_and_the_way_back_are_kept(tmp_path):
    source, target = domain(5, 0), domain(1, 1)
    samples = TranslationSamples(tmp_path, source, target, domains=("MR", "CT"), samples=2)
    built = toy.method(CycleGAN)
    trainer = toy.trainer(built, toy.streams(CycleGAN), epochs=1, handlers=[samples, MetricsLog(tmp_path)])
    trainer.run()
    with np.load(tmp_path / SAMPLES_FILE, allow_pickle=False) as kept:
        assert kept["domains"].tolist() == ["MR", "CT"]
        assert kept["cases_to_target"].tolist() == ["case-0", "case-2"]
        assert kept["cases_to_source"].tolist() == ["case-0"]
        image, translated, returned = kept["to_target_1"].astype(np.float32)
    middle = source[2]["image"].as_tensor()[..., 1:2]
    there = translate_slices(middle, built.ema["to_target"])
    for found, expected in (
        (image, middle),
        (translated, there),
        (returned, translate_slices(there, built.ema["to_source"])),
    ):
        np.testing.assert_allclose(found, expected[0, :, :, 0].T.flip(0, 1).numpy(), atol=1e-3)
    text = (tmp_path / "metrics.csv").read_text()
    assert "validation,cycle_mae_source" in text
    assert "validation,cycle_mae_target" in text
    assert built.training


def test_an_empty_domain_leaves_its_pictures_out(tmp_path):
    samples = TranslationSamples(tmp_path, Dataset([]), domain(1, 1))
    toy.trainer(toy.method(CycleGAN), toy.streams(CycleGAN), epochs=1, handlers=[samples]).run()
    with np.load(tmp_path / SAMPLES_FILE, allow_pickle=False) as kept:
        assert kept["cases_to_target"].size == 0
        assert "to_source_0" in kept


def test_a_method_without_generators_is_refused_unless_it_holds_a_translator(tmp_path):
    batches = toy.streams(Supervised)
    handlers = [TranslationSamples(tmp_path, domain(1, 0), domain(1, 1))]
    trainer = toy.trainer(toy.method(Supervised), batches, epochs=1, handlers=handlers)
    with pytest.raises(ConfigError, match="translates nothing"):
        trainer.run()
    inside = CycleGAN(**small.arguments(CycleGAN, norm=False, seed=0))
    handlers = [TranslationSamples(tmp_path, domain(1, 0), domain(1, 1), translator=inside)]
    toy.trainer(toy.method(Supervised), batches, epochs=1, handlers=handlers).run()
    assert (tmp_path / SAMPLES_FILE).is_file()
