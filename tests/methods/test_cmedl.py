"""CMEDL: its terms, where its gradients go, and the inputs it refuses."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from contract.small import cmedl as small
from engine import toy
from ignite.engine import Events
from torch import nn

from medkd.engine import StepContext
from medkd.errors import ConfigError, TrainingError
from medkd.losses.contextual import contextual_loss
from medkd.losses.segmentation import dice_ce_loss
from medkd.methods.cmedl import CMEDL
from medkd.methods.unit import UNIT
from medkd.nets.translators import VAETranslator


def context() -> StepContext:
    return StepContext(torch.device("cpu"), 1, 1, 0.0, torch.Generator().manual_seed(0))


def batch(*, size: int = 2) -> dict[str, dict[str, torch.Tensor]]:
    drawn = torch.Generator().manual_seed(5)
    return {
        name: {
            "image": torch.rand(size, 1, 8, 8, generator=drawn) * 2 - 1,
            "label": torch.randint(toy.CLASSES, (size, 1, 8, 8), generator=drawn),
        }
        for name in CMEDL.streams
    }


def terms_of(built: CMEDL, made=None) -> dict[str, dict[str, torch.Tensor]]:
    made = made or batch()
    translations = built.i2i.generator_terms(made["student"]["image"], made["teacher"]["image"], context())
    return built.role_terms(made, translations, context())


def gradients(built: CMEDL, role: str, loss: torch.Tensor) -> list[torch.Tensor | None]:
    parameters = built.role_parameters(role)
    return list(torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True))


def reached(built: CMEDL, loss: torch.Tensor) -> set[str]:
    return {role for role in built.roles if any(g is not None and g.any() for g in gradients(built, role, loss))}


def test_terms_equal_their_definitions():
    built, made = toy.method(CMEDL, hint_weight=2.0, contextual_weight=3.0), batch()
    terms = terms_of(built, made)
    own, other = made["student"], made["teacher"]
    pseudo = built.i2i.translate(own["image"], to="target")
    student, teacher = built.student, built.teacher

    def loss(network: nn.Module, image: torch.Tensor, label: torch.Tensor) -> float:
        return dice_ce_loss(network(image), label).item()

    on_pseudo = loss(teacher, pseudo, own["label"])
    assert terms["student"]["student_segmentation_loss"].item() == loss(student, own["image"], own["label"])
    assert terms["teacher"]["teacher_segmentation_loss"].item() == loss(teacher, other["image"], other["label"])
    assert terms["teacher"]["teacher_pseudo_segmentation_loss"].item() == on_pseudo
    assert terms["generators"]["generator_segmentation_loss"].item() == pytest.approx(5 * on_pseudo)
    features = [built.feature_network(image) for image in (pseudo, other["image"])]
    assert terms["generators"]["contextual_loss"].item() == pytest.approx(3 * contextual_loss(*features).item())
    squares = sum(
        (student[:depth](own["image"]) - teacher[:depth](pseudo)).square().mean().item() for depth in (3, len(student))
    )
    assert terms["student"]["hint_loss"].item() == pytest.approx(2 * squares)


def test_the_hint_reaches_the_student_alone_by_default():
    built = toy.method(CMEDL)
    hint = terms_of(built)["student"]["hint_loss"]
    assert reached(built, hint) == {"student"}
    for role in ("teacher", "generators", "critics"):
        assert all(gradient is None for gradient in gradients(built, role, hint)), role


@pytest.mark.parametrize("others", [("teacher",), ("generators",), ("teacher", "generators")])
def test_the_hint_is_added_to_the_roles_it_is_to_reach(others):
    built = toy.method(CMEDL, hint_reaches=("student", *others))
    terms = terms_of(built)
    assert {role for role in built.roles if "hint_loss" in terms[role]} == {"student", *others}
    for role in others:
        assert role in reached(built, terms[role]["hint_loss"])


def test_without_stop_gradient_the_teacher_moves_otherwise():
    def teacher_after(reaches: tuple[str, ...]) -> torch.Tensor:
        built = toy.method(CMEDL, hint_reaches=reaches, hint_weight=10.0)
        toy.trainer(built, toy.streams(CMEDL), epochs=1, epoch_length=1).run()
        return built.teacher[0].weight.detach()

    assert not torch.equal(teacher_after(("student",)), teacher_after(("student", "teacher")))


def test_segmentation_through_the_generator_reaches_teacher_and_generator_only():
    built = toy.method(CMEDL)
    terms = terms_of(built)
    assert reached(built, terms["generators"]["generator_segmentation_loss"]) == {"teacher", "generators"}
    assert reached(built, terms["generators"]["contextual_loss"]) == {"generators"}
    assert reached(built, terms["teacher"]["teacher_segmentation_loss"]) == {"teacher"}


def test_teacher_and_generator_do_not_depend_on_the_student():
    def others_after(seed: int) -> CMEDL:
        built = toy.method(CMEDL, student=small.segmenter(norm=False, seed=seed))
        toy.trainer(built, toy.streams(CMEDL), epochs=1, epoch_length=3).run()
        return built

    first, second = others_after(1), others_after(2)
    assert toy.same_state(first.teacher, second.teacher)
    assert toy.same_state(first.i2i, second.i2i)
    assert not toy.same_state(first.student, second.student)


def test_one_step_equals_a_hand_written_loop():
    built = toy.method(CMEDL, i2i=small.i2i(0, pool_size=0))
    by_hand = copy.deepcopy(built)
    loader = toy.streams(CMEDL)
    toy.trainer(built, loader, epochs=1, epoch_length=1).run()
    loader.seek(0)
    _by_hand(by_hand, next(iter(loader)))
    for (name, ours), theirs in zip(built.named_parameters(), by_hand.parameters(), strict=True):
        if not name.startswith("i2i.ema"):
            torch.testing.assert_close(ours, theirs, atol=1e-7, rtol=1e-6, msg=name)


def _by_hand(m: CMEDL, given: dict[str, dict[str, torch.Tensor]]) -> None:
    """The update written as papers write it, with frozen networks and detached inputs instead of routed gradients."""
    x, y, u, v = (given[s][k].as_subclass(torch.Tensor) for s in CMEDL.streams for k in ("image", "label"))
    g, f = m.i2i.generators["to_target"], m.i2i.generators["to_source"]
    on_x, on_u = m.i2i.critics["source"], m.i2i.critics["target"]
    teacher, student = m.teacher, m.student
    optimizers = {
        role: torch.optim.SGD(m.role_parameters(role), lr=0.05, momentum=0.9, weight_decay=1e-4) for role in m.roles
    }
    m.zero_grad()
    fake_u, fake_x = g(x), f(u)
    loss = ((on_u(fake_u) - 1) ** 2).mean() + ((on_x(fake_x) - 1) ** 2).mean()
    loss = loss + 10 * ((f(fake_u) - x).abs().mean() + (g(fake_x) - u).abs().mean())
    loss = loss + 5 * ((g(u) - u).abs().mean() + (f(x) - x).abs().mean())
    loss = loss + contextual_loss(m.feature_network(fake_u), m.feature_network(u))
    loss = loss + 5 * dice_ce_loss(teacher(fake_u), y)
    loss.backward()
    optimizers["student"].zero_grad()
    optimizers["teacher"].zero_grad()
    optimizers["critics"].zero_grad()

    pseudo, back = fake_u.detach(), fake_x.detach()
    (0.5 * (((on_x(x) - 1) ** 2).mean() + (on_x(back) ** 2).mean())).backward()
    (0.5 * (((on_u(u) - 1) ** 2).mean() + (on_u(pseudo) ** 2).mean())).backward()
    (dice_ce_loss(teacher(u), v) + dice_ce_loss(teacher(pseudo), y)).backward()
    hint = 0.0
    for depth in (3, len(student)):
        with torch.no_grad():
            wanted = teacher[:depth](pseudo)
        hint = hint + ((student[:depth](x) - wanted) ** 2).mean()
    (dice_ce_loss(student(x), y) + hint).backward()
    for optimizer in optimizers.values():
        optimizer.step()


def test_a_resumed_run_is_bit_exact(tmp_path):
    class StopHereError(Exception):
        pass

    def stop(engine) -> None:
        if engine.state.iteration == 5:
            raise StopHereError

    def run(folder, *, seed: int = 0, resume: bool = False, cut: bool = False) -> CMEDL:
        built = toy.method(CMEDL, norm=True, seed=seed)
        trainer = toy.trainer(built, toy.streams(CMEDL), epoch_length=3, folder=folder, resume=resume)
        if cut:
            trainer.add_event_handler(Events.ITERATION_COMPLETED, stop)
        with contextlib.suppress(StopHereError):
            trainer.run()
        return built

    straight = run(tmp_path / "straight")
    run(tmp_path / "cut", cut=True)
    resumed = run(tmp_path / "cut", seed=9, resume=True)
    for (name, ours), theirs in zip(straight.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    pools = [built.i2i.pools["target"].get_extra_state() for built in (straight, resumed)]
    assert len(pools[0]) == 3
    assert torch.equal(*pools)


def test_unit_serves_as_the_translator():
    def critic() -> nn.Module:
        return nn.Sequential(nn.Conv2d(1, 4, 4, stride=2, padding=1), nn.LeakyReLU(0.2), nn.Conv2d(4, 1, 3, padding=1))

    torch.manual_seed(0)
    i2i = UNIT(
        nn.ModuleDict({name: VAETranslator(width=2, blocks=1) for name in ("to_target", "to_source")}),
        nn.ModuleDict({name: critic() for name in ("source", "target")}),
    )
    built = toy.method(CMEDL, i2i=i2i)
    before = [parameter.clone() for parameter in built.parameters()]
    trainer = toy.trainer(built, toy.streams(CMEDL), epochs=1, epoch_length=1)
    trainer.run()
    assert {"reconstruction_loss", "contextual_loss", "hint_loss"} <= set(trainer.state.output)
    pairs = zip(before, built.named_parameters(), strict=True)
    still = {name for old, (name, new) in pairs if torch.equal(old, new) and not name.startswith("i2i.ema")}
    assert all(name.startswith("feature_network") for name in still), still


def test_checkpoints_hold_every_network_once():
    built = toy.method(CMEDL)
    assert not [name for name in built.state_dict() if name.startswith(("generators", "critics"))]
    numbers = [id(p) for role in built.roles for p in built.role_parameters(role)]
    assert len(numbers) == len(set(numbers))


def test_switched_off_terms_are_left_out():
    built = toy.method(CMEDL, hint_weight=0.0, contextual_weight=0.0, generator_segmentation_weight=0.0)
    built.feature_network.register_forward_pre_hook(lambda *_: pytest.fail("the feature network was used"))
    names = {name for role in terms_of(built).values() for name in role}
    assert not names & {"hint_loss", "contextual_loss", "generator_segmentation_loss"}


def test_fewer_real_images_than_pseudo_images_serve_again():
    made = batch(size=3)
    made["teacher"] = {key: value[:2] for key, value in made["teacher"].items()}
    assert torch.isfinite(terms_of(toy.method(CMEDL), made)["generators"]["contextual_loss"])


def test_the_student_alone_ships():
    built = toy.method(CMEDL)
    assert built.deployed is built.student


def test_no_hooks_are_left_on_the_networks():
    built = toy.method(CMEDL)
    terms_of(built)
    assert not any(module._forward_hooks for module in built.modules())


@pytest.mark.parametrize("stream", CMEDL.streams)
def test_a_modality_without_labels_is_named(stream):
    made = batch()
    del made[stream]["label"]
    with pytest.raises(ConfigError, match=f"stream '{stream}': its cases have no labels"):
        toy.method(CMEDL).step(made, context())


def test_different_channel_counts_are_named():
    made = batch()
    made["teacher"]["image"] = made["teacher"]["image"].repeat(1, 2, 1, 1)
    with pytest.raises(ConfigError, match=r"student's images have 1 channel\(s\), the teacher's 2"):
        toy.method(CMEDL).step(made, context())


def test_hinted_layers_of_different_shapes_are_named():
    built = toy.method(CMEDL, teacher_layers=("0", "2"), student_layers=("0", "4"))
    with pytest.raises(ConfigError, match=r"student's '4' gives \(2, 3, 8, 8\), the teacher's '2' \(2, 4, 8, 8\)"):
        built.step(batch(), context())


def test_nan_in_the_contextual_loss_names_the_images():
    class Broken(nn.Module):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return image / 0 * 0

    made = batch()
    made["student"]["case"], made["teacher"]["case"] = ["a-1", "a-2"], ["b-1", "b-2"]
    with pytest.raises(TrainingError, match=r"(?s)iteration 1: contextual loss.*student: a-1, a-2; teacher: b-1, b-2"):
        toy.method(CMEDL, feature_network=Broken()).step(made, context())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"student_layers": ("0", "9")}, "student_layers: Sequential has no '9'"),
        ({"teacher_layers": None}, "teacher_layers: Sequential names no hint_layers"),
        ({"student_layers": ("0",)}, "1 of the student, 2 of the teacher"),
        ({"hint_reaches": ("teacher",)}, "hint_reaches"),
        ({"hint_reaches": ("student", "critics")}, "hint_reaches"),
        ({"i2i": nn.Identity()}, "i2i: Identity does not translate"),
    ],
)
def test_what_cannot_be_built_is_refused_in_one_line(arguments, message):
    with pytest.raises(ConfigError, match=message) as caught:
        toy.method(CMEDL, **arguments)
    assert "\n" not in str(caught.value)
