"""HistoGAN's step against a loop written by hand, on its real networks."""

from __future__ import annotations

import copy

import pytest
import torch
from contract.small import histogan as small
from engine import toy
from ignite.engine import Events

from medkd.engine import StepContext
from medkd.methods.histogan import HistoGAN
from medkd.nets.conditional_gan import ConditionalCritic, ConditionalGenerator, class_codes


def built(seed: int = 0) -> HistoGAN:
    return HistoGAN(**small.arguments(HistoGAN, norm=True, seed=seed), decay=0.9)


def test_a_step_is_the_hinge_game_with_class_terms():
    method = built()
    generator, critic = copy.deepcopy(method.generator), copy.deepcopy(method.critic)
    real, label = torch.randn(4, 3, 8, 8).tanh(), torch.tensor([0, 1, 2, 0])
    seen: dict[str, torch.Tensor] = {}
    context = StepContext(torch.device("cpu"), 1, 1, 0.0, torch.Generator().manual_seed(3))
    context.apply_update = seen.update
    output = method.step({"labeled": {"image": real, "label": label[:, None]}}, context)

    made = generator(class_codes(label, small.LATENT, small.CLASSES, torch.Generator().manual_seed(3)))
    (on_real, of_real), (on_made, of_made) = critic(real), critic(made)
    nll = torch.nn.functional.nll_loss
    for_critic = (1 - on_real).clamp_min(0).mean() + (1 + on_made).clamp_min(0).mean()
    for_critic = for_critic + nll(of_real.log_softmax(1), label)
    for_generator = -on_made.mean() + nll(of_made.log_softmax(1), label)
    torch.testing.assert_close(seen["generator"], for_generator)
    torch.testing.assert_close(seen["critic"], for_critic)
    torch.testing.assert_close(output["loss"], for_generator.detach())
    assert toy.same_state(method.ema, method.generator)  # the first average is a copy


def test_the_average_lags_behind_and_is_what_ships():
    method = built()
    trainer = toy.trainer(method, toy.streams(HistoGAN), epochs=2)
    trainer.run()
    assert trainer.network is method.ema
    assert not any(p.requires_grad for p in method.ema.parameters())
    pairs = zip(method.ema.parameters(), method.generator.parameters(), strict=True)
    assert all(not torch.equal(average, raw) for average, raw in pairs)


def test_training_resumes_bit_exactly_with_the_real_networks(tmp_path):
    def trainer(epochs: int, resume: bool, folder):
        torch.manual_seed(0)
        networks = ConditionalGenerator(3, 16, width=2, latent=4), ConditionalCritic(3, 16, width=2)
        method = HistoGAN(*networks, classes=3, latent=4)
        loader = toy.streams(HistoGAN, batch_size=4)
        for stream in loader.streams.values():
            stream.dataset.transform = Enlarge()
        return toy.trainer(method, loader, epochs=epochs, folder=folder, resume=resume)

    whole = trainer(3, False, tmp_path / "whole")
    whole.run()
    part = trainer(3, False, tmp_path / "part")
    part.add_event_handler(Events.ITERATION_COMPLETED(once=3), interrupt)
    with pytest.raises(KeyboardInterrupt):
        part.run()
    again = trainer(3, True, tmp_path / "part")
    again.run()
    assert toy.same_state(whole.method, again.method)
    assert all(torch.isfinite(p).all() for p in whole.method.parameters())


def interrupt(trainer) -> None:
    raise KeyboardInterrupt


class Enlarge:
    def __call__(self, item):
        return {**item, "image": torch.nn.functional.interpolate(item["image"][None], scale_factor=2)[0]}
