"""CycleGAN's step against a loop written by hand, its resumption, and what it refuses."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import torch
from contract.small import cyclegan as small
from engine import toy
from ignite.engine import Events
from torch import nn

from medkd.engine import Method, StepContext
from medkd.errors import ConfigError
from medkd.methods.cyclegan import CycleGAN
from medkd.methods.unit import UNIT
from medkd.nets.ema import ema_copy, update_ema
from medkd.schedules import ema_decay

EPOCHS = 2


def context() -> StepContext:
    return StepContext(torch.device("cpu"), 1, 1, 0.0, torch.Generator().manual_seed(0))


def by_hand(built: CycleGAN) -> tuple[nn.ModuleDict, nn.ModuleDict, nn.Module]:
    """The paper's order: the generators step first, then the critics on the translations made before."""
    generators, critics = built.generators, built.critics
    ema = ema_copy(generators)
    options = {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-4}
    optimizers = [torch.optim.SGD(part.parameters(), **options) for part in (generators, critics)]
    schedules = [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.95) for optimizer in optimizers]
    loader = toy.streams(CycleGAN)
    batches = iter(loader)
    to_t, to_s = generators["to_target"], generators["to_source"]
    for update in range(EPOCHS * len(loader)):
        batch = next(batches)
        s, t = (batch[name]["image"].as_subclass(torch.Tensor) for name in ("source", "target"))
        fake_t, fake_s = to_t(s), to_s(t)
        loss = (critics["target"](fake_t) - 1).pow(2).mean() + (critics["source"](fake_s) - 1).pow(2).mean()
        loss = loss + 10 * ((to_s(fake_t) - s).abs().mean() + (to_t(fake_s) - t).abs().mean())
        loss = loss + 5 * ((to_t(t) - t).abs().mean() + (to_s(s) - s).abs().mean())
        optimizers[0].zero_grad()
        loss.backward()
        optimizers[0].step()
        optimizers[1].zero_grad()
        for domain, real, fake in (("source", s, fake_s.detach()), ("target", t, fake_t.detach())):
            critic = critics[domain]
            (0.5 * ((critic(real) - 1).pow(2).mean() + critic(fake).pow(2).mean())).backward()
        optimizers[1].step()
        for schedule in schedules:
            schedule.step()
        update_ema(ema, generators, ema_decay(update, 0.9))
    return generators, critics, ema


def test_training_equals_a_loop_written_by_hand_in_the_papers_order():
    arguments = {"pool_size": 0, "decay": 0.9}
    trained = toy.method(CycleGAN, **arguments)
    toy.trainer(trained, toy.streams(CycleGAN), epochs=EPOCHS).run()
    for own, expected in zip(
        (trained.generators, trained.critics, trained.ema), by_hand(toy.method(CycleGAN, **arguments)), strict=True
    ):
        for parameter, other in zip(own.parameters(), expected.parameters(), strict=True):
            torch.testing.assert_close(parameter, other, atol=1e-6, rtol=0)


class StopHereError(Exception):
    pass


def run_until(method_class: type[Method], folder: Path, stop_at: int, *, resume: bool, **arguments) -> Method:
    built = toy.method(method_class, norm=True, collapse_steps=2, **arguments)
    trainer = toy.trainer(built, toy.streams(method_class), epochs=2, folder=folder, resume=resume)

    def stop(engine):
        if engine.state.iteration == stop_at:
            raise StopHereError

    trainer.add_event_handler(Events.ITERATION_COMPLETED, stop)
    with contextlib.suppress(StopHereError):
        trainer.run()
    return built


@pytest.mark.parametrize(("method_class", "arguments"), [(CycleGAN, {"pool_size": 3}), (UNIT, {})])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(method_class, arguments, tmp_path):
    whole = run_until(method_class, tmp_path / "whole", -1, resume=False, **arguments)
    run_until(method_class, tmp_path / "cut", 5, resume=False, **arguments)
    resumed = run_until(method_class, tmp_path / "cut", -1, resume=True, **arguments)
    assert toy.same_state(whole, resumed)
    if method_class is CycleGAN:
        assert len(resumed.pools["source"]) == len(resumed.pools["target"]) == 3


def test_critics_see_pooled_translations_and_generators_do_not():
    built = toy.method(CycleGAN, pool_size=1)
    seen = []
    built.critics["target"].register_forward_pre_hook(lambda module, given: seen.append(given[0].detach()))
    batch = next(iter(toy.streams(CycleGAN, batch_size=1)))
    old = torch.full((1, 1, 8, 8), 0.25)
    for place in range(30):
        built.pools["target"].set_extra_state(old)
        built.step(batch, StepContext(torch.device("cpu"), 1, 1, 0.0, torch.Generator().manual_seed(place)))
    by_generators, real, by_critics = seen[0::3], seen[1::3], seen[2::3]
    assert not any(torch.equal(image, old) for image in by_generators)
    assert all(torch.equal(image, batch["target"]["image"].as_subclass(torch.Tensor)) for image in real)
    assert 6 < sum(torch.equal(image, old) for image in by_critics) < 24


def test_no_identity_term_without_its_weight():
    source, target = torch.zeros(1, 1, 8, 8), torch.ones(1, 1, 8, 8)
    assert "identity_loss" in toy.method(CycleGAN).generator_terms(source, target, context()).terms
    terms = toy.method(CycleGAN, identity_weight=0.0).generator_terms(source, target, context()).terms
    assert set(terms) == {"adversarial_loss", "cycle_loss"}


def test_either_direction_can_be_deployed():
    built = toy.method(CycleGAN, direction="to_source")
    assert built.deployed is built.ema["to_source"]
    assert toy.method(CycleGAN).deployed is not built.ema["to_target"]


def test_streams_of_different_channels_are_refused_in_one_line():
    batch = {"source": {"image": torch.zeros(2, 3, 8, 8)}, "target": {"image": torch.zeros(2, 1, 8, 8)}}
    with pytest.raises(ConfigError) as caught:
        toy.method(CycleGAN).step(batch, context())
    assert str(caught.value) == (
        "streams: source images have 3 channel(s), target images 1; give both streams images of the same channels"
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"generators": nn.ModuleDict({"to_target": nn.Identity()})}, "generators: has ['to_target']"),
        ({"critics": nn.ModuleDict({"source": nn.Identity(), "other": nn.Identity()})}, "critics: has"),
        ({"direction": "both"}, "direction: 'both' is unknown"),
    ],
)
def test_missing_networks_and_unknown_directions_are_refused(change, words):
    with pytest.raises(ConfigError) as caught:
        CycleGAN(**{**small.arguments(CycleGAN, norm=False, seed=0), **change})
    assert str(caught.value).startswith(words)


def test_a_collapsed_critic_is_reported_once_in_training(caplog):
    built = toy.method(CycleGAN, collapse_steps=2)
    with torch.no_grad():
        for generator in built.generators.values():  # translations that anything tells from an image
            generator[-2].bias.fill_(10.0)
            generator[-2].weight.zero_()
        for name, critic in built.critics.items():
            built.critics[name] = Brightness(critic)
    trainer = toy.trainer(built, toy.streams(CycleGAN), epochs=2)
    trainer.run()
    assert trainer.state.output["source_critic_accuracy"] >= 0.95
    assert [record.getMessage()[:31] for record in caplog.records if "fools" in record.getMessage()] == [
        "the critic of the source images",
        "the critic of the target images",
    ]


class Brightness(nn.Module):
    """Takes every bright image for a made one."""

    def __init__(self, critic: nn.Module) -> None:
        super().__init__()
        self.critic = critic

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return 0.001 * self.critic(image) + (image.mean(dim=(1, 2, 3), keepdim=True) < 0.8)
