"""MT-UDA: its terms, its two teachers, and what ships."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from engine import toy
from ignite.engine import Events

from medkd.engine import StepContext
from medkd.errors import ConfigError
from medkd.losses.consistency import probability_mse, self_information_consistency
from medkd.losses.domain_consistency import Renderings, StudentLogits, inter_domain_consistency
from medkd.losses.segmentation import dice_ce_loss
from medkd.methods.mt_uda import MTUDA
from medkd.schedules import sigmoid_ramp_up


def context(progress: float, *, updates: int = 0) -> StepContext:
    return StepContext(torch.device("cpu"), 1, 1, progress, torch.Generator().manual_seed(0), updates=updates)


def plain(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.as_subclass(torch.Tensor)


def batches():
    for batch in toy.streams(MTUDA, noise=False, seed=0):
        yield {stream: {key: plain(items[key]) for key in items if key != "case"} for stream, items in batch.items()}


def one_batch() -> dict[str, dict[str, torch.Tensor]]:
    return next(batches())


def train(*, epochs: int = 3, **arguments):
    built = toy.method(MTUDA, norm=True, **arguments)
    toy.trainer(built, toy.streams(MTUDA), epochs=epochs).run()
    return built


def test_inter_domain_consistency_sums_the_oracle_over_its_four_pairs():
    k = torch.arange(160, dtype=torch.float64)
    a, b = (2 * torch.sin(0.37 * k)).reshape(2, 5, 4, 4), (2 * torch.cos(0.23 * k)).reshape(2, 5, 4, 4)
    image = torch.zeros(2, 1, 4, 4)
    views = Renderings(image, image, image, image, image, image, image, image, image)
    loss = inter_domain_consistency(StudentLogits(a, a, a, a, a), torch.cat([b, b, b]), views)
    assert loss.item() == pytest.approx(4 * 0.2152082158, abs=1e-8)


def test_terms_equal_a_hand_written_step():
    built = toy.method(MTUDA, noise_std=0.0)
    for teacher in (built.intra_teacher, built.inter_teacher):
        for parameter in teacher.parameters():
            parameter.mul_(1.1)
    batch = one_batch()
    terms = built.losses(batch, context(0.5))
    labeled, source, target = batch["labeled"], batch["source"], batch["target"]
    student, intra, inter = built.student, built.intra_teacher, built.inter_teacher
    supervised = sum(dice_ce_loss(student(labeled[key]), labeled["label"]) for key in ("image", "cycled"))
    semantic = sum(probability_mse(student(x), intra(x)) for x in (source["image"], target["translated"]))
    structural = sum(
        self_information_consistency(student(seen), inter(target_style))
        for seen, target_style in (
            (source["image"], source["translated"]),
            (source["cycled"], source["translated"]),
            (target["translated"], target["image"]),
            (target["translated"], target["cycled"]),
        )
    )
    ramp = sigmoid_ramp_up(0.5, 1.0)
    assert terms["segmentation_loss"].item() == pytest.approx(supervised.item(), rel=1e-6)
    assert terms["intra_consistency_loss"].item() == pytest.approx(1.0 * ramp * semantic.item(), rel=1e-5)
    assert terms["inter_consistency_loss"].item() == pytest.approx(0.1 * ramp * structural.item(), rel=1e-5)
    assert semantic > 0
    assert structural > 0


def test_training_equals_a_hand_written_loop():
    built = toy.method(MTUDA, noise_std=0.0, start_frac=0.0, copy_updates=1)
    student = copy.deepcopy(built.student)
    intra, inter = copy.deepcopy(student), copy.deepcopy(student)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.95)
    steps = 4
    for step, batch in zip(range(steps), batches(), strict=False):
        labeled, source, target = batch["labeled"], batch["source"], batch["target"]
        ramp = sigmoid_ramp_up(step / steps, 1.0)
        seen = {"s": source["image"], "c": source["cycled"], "t": target["translated"]}
        own = {name: student(image) for name, image in seen.items()}
        with torch.no_grad():
            like_source = {"s": intra(source["image"]), "t": intra(target["translated"])}
            like_target = {"s": inter(source["translated"]), "t": inter(target["image"]), "c": inter(target["cycled"])}
        loss = dice_ce_loss(student(labeled["image"]), labeled["label"])
        loss = loss + dice_ce_loss(student(labeled["cycled"]), labeled["label"])
        loss = loss + ramp * sum(probability_mse(own[name], like_source[name]) for name in "st")
        pairs = (("s", "s"), ("c", "s"), ("t", "t"), ("t", "c"))
        loss = loss + 0.1 * ramp * sum(self_information_consistency(own[a], like_target[b]) for a, b in pairs)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        decay = min(1 - 1 / (max(0, step - 1) + 1), 0.99)
        for teacher in (intra, inter):
            for average, parameter in zip(teacher.parameters(), student.parameters(), strict=True):
                average.data.mul_(decay).add_(parameter.data, alpha=1 - decay)
    toy.trainer(built, toy.streams(MTUDA, noise=False, seed=0), epochs=1, epoch_length=steps).run()
    for mine, theirs in ((student, built.student), (intra, built.intra_teacher), (inter, built.inter_teacher)):
        for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


def test_one_decay_makes_the_teachers_bit_identical():
    built = train(copy_updates=2)
    for a, b in zip(built.intra_teacher.parameters(), built.inter_teacher.parameters(), strict=True):
        assert torch.equal(a, b)
    moved = zip(built.student.parameters(), built.intra_teacher.parameters(), strict=True)
    assert any(not torch.equal(a, b) for a, b in moved)


def test_two_decays_make_two_teachers():
    built = train(copy_updates=2, intra_decay=0.3, inter_decay=0.99)
    pairs = list(zip(built.intra_teacher.parameters(), built.inter_teacher.parameters(), strict=True))
    assert any(not torch.equal(a, b) for a, b in pairs)


def test_teachers_are_copies_of_the_student_for_the_first_updates():
    built = train(epochs=1, copy_updates=30)
    assert toy.same_state(built.student, built.intra_teacher)
    assert toy.same_state(built.student, built.inter_teacher)


def test_teachers_normalize_by_their_own_batch_and_keep_the_students_statistics():
    built = toy.method(MTUDA, norm=True)
    built.train()
    assert built.intra_teacher.training
    assert built.inter_teacher.training
    assert not built.generator.training
    trained = train(epochs=1)
    for student, teacher in zip(trained.student.buffers(), trained.inter_teacher.buffers(), strict=True):
        assert torch.equal(student, teacher)


def test_consistency_is_exactly_zero_before_its_start_and_jumps_in():
    built = toy.method(MTUDA)
    for parameter in built.intra_teacher.parameters():
        parameter.add_(0.1)
    batch = one_batch()
    before, after = built.losses(batch, context(0.19)), built.losses(batch, context(0.2))
    assert before["intra_consistency_loss"] == 0
    assert before["inter_consistency_loss"] == 0
    assert after["intra_consistency_loss"] > 0
    assert sigmoid_ramp_up(0.2, 1.0) == pytest.approx(0.0407622040)


@pytest.mark.parametrize(("left_out", "kept"), [("intra", "inter"), ("inter", "intra")])
def test_a_teacher_of_weight_zero_is_never_asked(left_out, kept):
    built = toy.method(MTUDA, **{f"{left_out}_weight": 0.0})
    asked = []
    for name in ("intra", "inter"):
        built.get_submodule(f"{name}_teacher").register_forward_hook(lambda *_, name=name: asked.append(name))
    terms = built.losses(one_batch(), context(0.5))
    assert asked == [kept]
    assert terms[f"{left_out}_consistency_loss"] == 0


def test_only_the_teachers_see_noise_and_it_comes_from_the_step_alone():
    built = toy.method(MTUDA)
    seen = {}
    for name in ("student", "intra_teacher", "inter_teacher"):
        built.get_submodule(name).register_forward_pre_hook(lambda m, args, name=name: seen.update({name: args[0]}))
    batch = one_batch()
    views = Renderings.of(batch)
    built.losses(batch, context(0.5))
    first = dict(seen)
    assert torch.equal(first["student"], torch.cat(views.of_student))
    assert 0 < (first["intra_teacher"] - torch.cat(views.of_intra_teacher)).abs().max() <= 0.2 + 1e-6
    assert 0 < (first["inter_teacher"] - torch.cat(views.of_inter_teacher)).abs().max() <= 0.2 + 1e-6
    torch.rand(3)  # the global source of randomness plays no part
    built.losses(batch, context(0.5))
    assert torch.equal(first["intra_teacher"], seen["intra_teacher"])


def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path):
    def run(folder, *, stop_at: int = -1, resume: bool = False):
        built = toy.method(MTUDA, norm=True, copy_updates=2, inter_decay=0.9)
        trainer = toy.trainer(built, toy.streams(MTUDA), folder=folder, resume=resume)

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


def test_what_ships_is_the_generator_and_the_student_without_teachers():
    built = train(epochs=1)
    shipped = built.deployed.eval()
    names = {name.split(".")[0] for name in shipped.state_dict()}
    assert names == {"generator", "segmenter"}
    image = torch.randn(2, 1, 8, 8)
    del built.intra_teacher, built.inter_teacher
    built.eval()
    assert torch.equal(shipped(image), built.student(built.generator(image)))
    assert not any(parameter.requires_grad for parameter in built.generator.parameters())


@pytest.mark.parametrize(
    ("stream", "key", "words"),
    [("labeled", "label", "images without labels"), ("labeled", "cycled", "lack"), ("target", "translated", "lack")],
)
def test_a_missing_label_or_rendering_is_one_clear_line(stream, key, words):
    batch = {name: dict(items) for name, items in one_batch().items()}
    del batch[stream][key]
    with pytest.raises(ConfigError, match=words) as refused:
        toy.method(MTUDA).losses(batch, context(0.5))
    assert stream in str(refused.value)
    assert "\n" not in str(refused.value)


def test_streams_of_different_channel_counts_are_one_clear_line():
    batch = {name: dict(items) for name, items in one_batch().items()}
    batch["target"]["image"] = torch.zeros(2, 3, 8, 8)
    with pytest.raises(ConfigError, match=r"differ in channels: .*source 1.*target 3"):
        toy.method(MTUDA).losses(batch, context(0.5))
