"""UNIT's terms against a step written by hand."""

from __future__ import annotations

import pytest
import torch
from contract.small import cyclegan as plain
from contract.small import unit as small
from engine import toy
from torch import nn

from medkd.engine import StepContext
from medkd.engine.trainer import seed_everything
from medkd.errors import ConfigError
from medkd.methods.unit import UNIT

EPOCHS = 2


def by_hand(built: UNIT) -> tuple[nn.ModuleDict, nn.ModuleDict]:
    """Written with an encoder and a decoder for each domain, as the paper is."""
    a, b = built.generators["to_target"], built.generators["to_source"]
    encode_s, decode_t, encode_t, decode_s = a.encoder, a.decoder, b.encoder, b.decoder
    options = {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-4}
    optimizers = [torch.optim.SGD(part.parameters(), **options) for part in (built.generators, built.critics)]
    schedules = [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.95) for optimizer in optimizers]
    loader = toy.streams(UNIT)
    batches = iter(loader)
    for iteration in range(1, EPOCHS * len(loader) + 1):
        batch = next(batches)
        source = torch.Generator().manual_seed(seed_everything(7, iteration, 0))
        s, t = (batch[name]["image"].as_subclass(torch.Tensor) for name in ("source", "target"))

        def noisy(mean, source=source):
            return mean + torch.randn(mean.shape, generator=source)

        mean_s, mean_t = encode_s(s), encode_t(t)
        code_s, code_t = noisy(mean_s), noisy(mean_t)
        fake_s, fake_t = decode_s(code_t), decode_t(code_s)
        again_s, again_t = encode_t(fake_t), encode_s(fake_s)
        loss = 10 * ((decode_s(code_s) - s).abs().mean() + (decode_t(code_t) - t).abs().mean())
        loss = loss + 0.01 * (mean_s.square().mean() + mean_t.square().mean())
        loss = loss + 10 * ((decode_s(noisy(again_s)) - s).abs().mean() + (decode_t(noisy(again_t)) - t).abs().mean())
        loss = loss + 0.01 * (again_s.square().mean() + again_t.square().mean())
        critic_loss = torch.zeros(())
        for domain, real, fake in (("source", s, fake_s), ("target", t, fake_t)):
            critic = built.critics[domain]
            loss = loss + sum((logits - 1).square().mean() for logits in critic(fake))
            critic_loss = critic_loss + sum((logits - 1).square().mean() for logits in critic(real))
            critic_loss = critic_loss + sum(logits.square().mean() for logits in critic(fake.detach()))
        for part, term in ((built.generators, loss), (built.critics, critic_loss)):
            gradients = torch.autograd.grad(term, list(part.parameters()))
            for parameter, gradient in zip(part.parameters(), gradients, strict=True):
                parameter.grad = gradient
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
    return built.generators, built.critics


def test_training_equals_a_loop_written_by_hand():
    trained = toy.method(UNIT)
    toy.trainer(trained, toy.streams(UNIT), epochs=EPOCHS).run()
    for own, expected in zip((trained.generators, trained.critics), by_hand(toy.method(UNIT)), strict=True):
        for parameter, other in zip(own.parameters(), expected.parameters(), strict=True):
            torch.testing.assert_close(parameter, other, atol=1e-6, rtol=0)


def test_translation_and_deployment_use_the_mean_of_the_latent_code():
    built = toy.method(UNIT).eval()
    image = torch.randn(2, 1, 8, 8)
    expected = built.generators["to_target"].decode(built.generators["to_target"].encode(image))
    assert torch.equal(built.translate(image, to="target"), expected)
    assert torch.equal(built.deployed(image), expected)


def test_noise_comes_from_the_steps_generator_alone():
    built, image = toy.method(UNIT), torch.randn(2, 1, 8, 8)

    def loss(seed: int) -> float:
        context = StepContext(torch.device("cpu"), 1, 1, 0.0, torch.Generator().manual_seed(seed))
        return float(built.generator_terms(image, image, context).terms["reconstruction_loss"].detach())

    assert loss(0) == loss(0)
    assert loss(0) != loss(1)


def test_a_generator_without_a_latent_code_is_refused():
    arguments = {
        **small.arguments(UNIT, norm=False, seed=0),
        **{"generators": plain.arguments(UNIT, norm=False, seed=0)["generators"]},
    }
    with pytest.raises(ConfigError, match="no encode and decode"):
        UNIT(**arguments)
