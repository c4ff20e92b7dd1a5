"""LE-UDA: its feature critics, their three optimizers, and what ships."""

from __future__ import annotations

import contextlib
import logging

import pytest
import torch
from engine import toy
from ignite.engine import Events
from torch import nn

from medkd.engine import StepContext
from medkd.errors import ConfigError
from medkd.losses.adversarial import critic_accuracy
from medkd.methods.le_uda import LEUDA
from medkd.methods.mt_uda import MTUDA
from medkd.schedules import sigmoid_ramp_up


def context(progress: float, update=lambda losses: None) -> StepContext:
    return StepContext(
        torch.device("cpu"), 1, 1, progress, torch.Generator().manual_seed(0), updates=40, apply_update=update
    )


def plain(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.as_subclass(torch.Tensor)


def one_batch() -> dict[str, dict[str, torch.Tensor]]:
    batch = next(iter(toy.streams(LEUDA, noise=False)))
    return {stream: {key: plain(items[key]) for key in items if key != "case"} for stream, items in batch.items()}


def perturbed(**arguments) -> LEUDA:
    """Teachers that differ from the student, as they do in the middle of a run."""
    built = toy.method(LEUDA, noise_std=0.0, **arguments)
    for teacher, factor in ((built.intra_teacher, 1.2), (built.inter_teacher, 0.8)):
        for parameter in teacher.parameters():
            parameter.mul_(factor)
    return built


def features(network: nn.Sequential, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs of the tapped layers of the toy network: last and first."""
    first = network[0](image)
    return network(image), first


def test_a_step_equals_a_hand_written_one():
    built, losses = perturbed(), {}
    batch = one_batch()
    source, target = batch["source"], batch["target"]
    expected = {}
    both = (source["image"], target["translated"])
    for side, teacher, seen, shown in (
        ("intra", built.intra_teacher, both, both),
        (
            "inter",
            built.inter_teacher,
            (source["image"], source["cycled"], target["translated"]),
            (source["translated"], target["image"], target["cycled"]),
        ),
    ):
        critics = built.get_submodule(f"{side}_critics")
        fake, real = features(built.student, torch.cat(seen)), features(teacher, torch.cat(shown))
        fooling = sum(w * (c(f) - 1).square().mean() for w, c, f in zip((1e-3, 2e-4), critics, fake, strict=True))
        judging = [
            0.5 * ((c(r) - 1).square().mean() + c(f).square().mean())
            for c, r, f in zip(critics, real, fake, strict=True)
        ]
        accuracy = [critic_accuracy(c(r), c(f)) for c, r, f in zip(critics, real, fake, strict=True)]
        expected[f"{side}_adversarial_loss"] = sigmoid_ramp_up(0.6, 1.0) * fooling.item()
        expected[f"{side}_critic_loss"] = sum(judging).item() / 2
        expected[f"{side}_critic_accuracy"] = sum(accuracy).item() / 2
    plain = toy.method(MTUDA, noise_std=0.0)
    plain.load_state_dict({k: v for k, v in built.state_dict().items() if k in plain.state_dict()})
    expected |= {name: term.item() for name, term in plain.losses(batch, context(0.6)).items()}
    terms = built.step(batch, context(0.6, losses.update))
    for name, value in expected.items():
        assert terms[name].item() == pytest.approx(value, rel=1e-4), name
    student = sum(v for k, v in expected.items() if k.endswith("_loss") and "critic" not in k)
    assert losses["student"].item() == pytest.approx(student, rel=1e-5)
    assert losses["intra_critics"].item() == pytest.approx(expected["intra_critic_loss"], rel=1e-5)
    assert losses["inter_critics"].item() == pytest.approx(expected["inter_critic_loss"], rel=1e-5)


def test_each_loss_reaches_its_own_networks_only():
    built, losses = perturbed(), {}
    built.step(one_batch(), context(0.6, losses.update))
    for role in ("intra_critics", "inter_critics"):
        for other in set(built.roles) - {role}:
            parameters = built.role_parameters(other)
            found = torch.autograd.grad(losses[role], parameters, retain_graph=True, allow_unused=True)
            assert all(gradient is None for gradient in found), (role, other)
    for teacher in (built.intra_teacher, built.inter_teacher):
        assert all(parameter.grad is None and not parameter.requires_grad for parameter in teacher.parameters())


def test_without_adversarial_weights_the_student_is_that_of_mt_uda():
    built = toy.method(LEUDA, noise_std=0.0, adversarial_weights=(0.0, 0.0), copy_updates=2)
    plain = toy.method(MTUDA, noise_std=0.0, copy_updates=2)
    assert toy.same_state(built.student, plain.student)
    for method_class, method in ((LEUDA, built), (MTUDA, plain)):
        toy.trainer(method, toy.streams(method_class, noise=False), epochs=2).run()
    assert toy.same_state(built.student, plain.student)


def test_the_student_fools_nobody_before_the_start_while_the_critics_learn():
    built = toy.method(LEUDA)
    before = [parameter.clone() for parameter in built.intra_critics.parameters()]
    trainer = toy.trainer(built, toy.streams(LEUDA), epochs=1, epoch_length=1)
    trainer.run()
    assert trainer.state.output["intra_adversarial_loss"] == 0
    assert any(not torch.equal(a, b) for a, b in zip(before, built.intra_critics.parameters(), strict=True))


def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path):
    """Two teachers, three optimizers and the watch over the critics."""

    def run(folder, *, stop_at: int = -1, resume: bool = False):
        built = toy.method(LEUDA, norm=True, copy_updates=2, inter_decay=0.9)
        trainer = toy.trainer(built, toy.streams(LEUDA), folder=folder, resume=resume)

        def stop(engine):
            if engine.state.iteration == stop_at:
                raise KeyboardInterrupt

        trainer.add_event_handler(Events.ITERATION_COMPLETED, stop)
        with contextlib.suppress(KeyboardInterrupt):
            trainer.run()
        return built

    whole = run(tmp_path / "whole")
    run(tmp_path / "cut", stop_at=6)
    assert toy.same_state(whole, run(tmp_path / "cut", resume=True))


class Knowing(nn.Module):
    """A critic that tells the student from its teacher without looking: every first answer is real, every second not.

    It is asked for the student's own sake first, then about the teacher, then about the student.
    """

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.asked = 0

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        self.asked += 1
        answer = 1.0 if self.asked % 3 == 2 else 0.0
        return (features.mean() * 0 + answer).reshape(1) * self.weight


def knowing(steps: int) -> LEUDA:
    critics = {name: nn.ModuleList([Knowing(), Knowing()]) for name in ("intra_critics", "inter_critics")}
    return toy.method(LEUDA, collapse_steps=steps, **critics)


def test_critics_that_are_always_right_are_warned_of_once(caplog):
    built = knowing(3)
    with caplog.at_level(logging.WARNING):
        for step in range(6):
            terms = built.step(one_batch(), context(0.5 + step / 100))
            if step < 2:
                assert not caplog.records
    assert terms["intra_critic_accuracy"] == 1
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2  # one for each pair of critics
    assert all("3 steps in a row" in line and "\n" not in line for line in said)


def test_critics_are_not_watched_while_nobody_tries_to_fool_them(caplog):
    built = knowing(1)
    with caplog.at_level(logging.WARNING):
        built.step(one_batch(), context(0.0))
    assert not caplog.records


def test_layers_critics_and_weights_must_be_of_one_number():
    with pytest.raises(ConfigError, match="2 layers, 2 intra_critics, 2 inter_critics and 1 adversarial_weights"):
        toy.method(LEUDA, adversarial_weights=(1e-3,))


def test_an_unknown_layer_is_named():
    built = toy.method(LEUDA, layers=("2", "decoder"))
    with pytest.raises(ValueError, match="decoder"):
        built.step(one_batch(), context(0.5))


def test_what_ships_has_neither_teachers_nor_critics():
    built = toy.method(LEUDA)
    names = {name.split(".")[0] for name in built.deployed.state_dict()}
    assert names == {"generator", "segmenter"}
    assert not any(name.startswith("_shipped") for name in built.state_dict())


def test_labels_are_needed():
    batch = {name: dict(items) for name, items in one_batch().items()}
    del batch["labeled"]["label"]
    with pytest.raises(ConfigError, match="list source cases with labels under training"):
        toy.method(LEUDA).step(batch, context(0.5))
