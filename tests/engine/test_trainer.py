"""The engine against hand-written loops, and its refusals."""

from __future__ import annotations

import pytest
import torch
from engine import toy
from ignite.engine import Events

from medkd.engine import Method, MethodTrainer, PauseOnSignal
from medkd.errors import ConfigError, TrainingError
from medkd.methods.kd import KD
from medkd.methods.mean_teacher import MeanTeacher
from medkd.methods.supervised import Supervised


class TwoPlayers(Method):
    """Two roles whose losses share a graph, for testing."""

    roles = ("generators", "critics")
    streams = ("labeled",)

    def __init__(self) -> None:
        super().__init__()
        self.generators = toy.network(seed=1)
        self.critics = toy.network(seed=2)

    def step(self, batch, ctx):
        image = batch["labeled"]["image"]
        made = self.generators(image)
        judged = self.critics(made.softmax(1)[:, :1])
        ctx.update({"generators": judged.mean(), "critics": (judged - 1).square().mean()})
        return {"loss": judged.mean().detach()}


def test_supervised_equals_a_hand_written_loop():
    built, other = toy.method(Supervised), toy.method(Supervised)
    toy.trainer(built, toy.streams(Supervised), epochs=2, clip_norm=0.5).run()

    loader = iter(toy.streams(Supervised))
    optimizer = torch.optim.SGD(other.student.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.95)
    for _ in range(2 * 3):
        batch = next(loader)["labeled"]
        loss = other.segmentation_loss(other.student(torch.as_tensor(batch["image"])), batch["label"])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(other.student.parameters(), 0.5)
        optimizer.step()
        schedule.step()
    assert toy.same_state(built, other)


def test_each_role_moves_by_its_own_loss_alone():
    built, other = TwoPlayers(), TwoPlayers()
    toy.trainer(built, toy.streams(TwoPlayers), epochs=1, epoch_length=1).run()

    image = torch.as_tensor(next(iter(toy.streams(TwoPlayers)))["labeled"]["image"])
    made = other.generators(image)
    judged = other.critics(made.softmax(1)[:, :1])
    pairs = (("generators", judged.mean()), ("critics", (judged - 1).square().mean()))
    gradients = [torch.autograd.grad(loss, other.role_parameters(role), retain_graph=True) for role, loss in pairs]
    for (role, _), gradient in zip(pairs, gradients, strict=True):
        for parameter, g in zip(other.role_parameters(role), gradient, strict=True):
            parameter.grad = g
        torch.optim.SGD(other.role_parameters(role), lr=0.05, momentum=0.9, weight_decay=1e-4).step()
    assert toy.same_state(built, other)


@pytest.mark.parametrize("accumulate", [2, 3, 4])
def test_accumulation_equals_the_mean_over_the_window_even_a_short_one(accumulate):
    built = toy.method(Supervised, segmentation_loss=toy.per_sample_loss)
    other = toy.method(Supervised, segmentation_loss=toy.per_sample_loss)
    toy.trainer(built, toy.streams(Supervised), epochs=1, epoch_length=7, accumulate=accumulate).run()

    loader = iter(toy.streams(Supervised))
    optimizer = torch.optim.SGD(other.student.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.95)
    batches = [next(loader)["labeled"] for _ in range(7)]
    for start in range(0, 7, accumulate):
        window = batches[start : start + accumulate]
        image, label = (torch.cat([torch.as_tensor(b[key]) for b in window]) for key in ("image", "label"))
        optimizer.zero_grad()
        other.segmentation_loss(other.student(image), label).backward()
        optimizer.step()
        schedule.step()
    for a, b in zip(built.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


def test_optimizers_that_do_not_match_the_roles_are_refused():
    built = toy.method(Supervised)
    good = torch.optim.SGD(built.student.parameters(), lr=0.1)
    loader = toy.streams(Supervised)
    with pytest.raises(ConfigError, match=r"missing \['student'\], surplus \['critic'\]"):
        MethodTrainer("cpu", 1, loader, built, {"critic": good})
    with pytest.raises(ConfigError, match="not its own"):
        MethodTrainer("cpu", 1, loader, built, torch.optim.SGD(toy.network().parameters(), lr=0.1))
    with pytest.raises(ConfigError, match="amp"):
        MethodTrainer("cpu", 1, loader, built, good, amp="int8")


def test_wrong_streams_are_refused_in_one_line():
    with pytest.raises(ConfigError, match=r"MeanTeacher misses \['unlabeled'\]") as caught:
        toy.trainer(toy.method(MeanTeacher), toy.streams(Supervised))
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"cannot use \['unlabeled'\]"):
        toy.trainer(toy.method(Supervised), toy.streams(MeanTeacher))


def test_a_frozen_teacher_stays_in_eval_mode_and_bit_identical():
    built = toy.method(KD, norm=True)
    before = {key: value.clone() for key, value in built.teacher.state_dict().items()}
    toy.trainer(built, toy.streams(KD), epochs=1).run()
    assert built.student.training
    assert not built.teacher.training
    assert all(torch.equal(before[key], value) for key, value in built.teacher.state_dict().items())


def test_a_non_finite_loss_stops_before_the_update_and_names_the_cases():
    built = toy.method(Supervised)
    loader = toy.streams(Supervised, noise=False)
    loader.streams["labeled"].dataset.data[3]["image"][0, 0, 0] = float("nan")
    with pytest.raises(TrainingError, match="case-0-3") as caught:
        toy.trainer(built, loader).run()
    assert caught.value.exit_code == 4
    assert all(torch.isfinite(p).all() for p in built.parameters())


def test_a_handler_that_listens_to_errors_does_not_swallow_them():
    from medkd.engine import Progress

    loader = toy.streams(Supervised, noise=False)
    loader.streams["labeled"].dataset.data[3]["image"][0, 0, 0] = float("nan")
    with pytest.raises(TrainingError):
        toy.trainer(toy.method(Supervised), loader, handlers=[Progress()]).run()


def test_an_exploding_run_stops_and_keeps_the_last_good_checkpoint(tmp_path):
    built = toy.method(Supervised)
    trainer = toy.trainer(built, toy.streams(Supervised), folder=tmp_path, epochs=30)
    for group in trainer.optimizer.param_groups:
        group["lr"] = group["initial_lr"] = 1e30
    trainer.lr_schedulers["student"].base_lrs = [1e30]
    with pytest.raises(TrainingError):
        trainer.run()
    from medkd.engine.checkpoint import list_checkpoints, read_checkpoint

    for path in list_checkpoints(tmp_path):
        assert all(torch.isfinite(value).all() for value in read_checkpoint(path)["method"].values())


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_mixed_precision_trains_close_to_full_precision(amp):
    results = []
    for precision in (False, amp):
        built = toy.method(Supervised)
        toy.trainer(built, toy.streams(Supervised), amp=precision, channels_last=True).run()
        results.append(torch.cat([p.detach().flatten() for p in built.parameters()]))
    assert torch.isfinite(results[1]).all()
    assert not torch.equal(*results)
    torch.testing.assert_close(*results, atol=2e-2, rtol=0)


def test_model_completed_fires_once_per_iteration_with_a_loss():
    from monai.engines.utils import IterationEvents

    seen = []
    trainer = toy.trainer(toy.method(Supervised), toy.streams(Supervised), epochs=2)
    trainer.add_event_handler(IterationEvents.MODEL_COMPLETED, lambda e: seen.append(float(e.state.output["loss"])))
    trainer.run()
    assert len(seen) == 2 * 3
    assert trainer.network is trainer.method.student
    assert trainer.optimizer is trainer.optimizers["student"]


def test_a_finished_run_stays_as_it_is():
    built = toy.method(Supervised)
    trainer = toy.trainer(built, toy.streams(Supervised), epochs=1)
    trainer.run()
    before = [p.clone() for p in built.parameters()]
    trainer.run()
    assert all(torch.equal(a, b) for a, b in zip(before, built.parameters(), strict=True))


def test_no_data_is_an_error_not_an_empty_run():
    built = toy.method(Supervised)
    trainer = MethodTrainer("cpu", 1, [], built, torch.optim.SGD(built.student.parameters(), lr=0.1))
    with pytest.raises(ConfigError, match="not one batch"):
        trainer.run()


def test_mean_teacher_is_a_copy_after_the_first_step_then_an_average():
    built = toy.method(MeanTeacher, start_frac=0.0)
    trainer = toy.trainer(built, toy.streams(MeanTeacher), epochs=1, epoch_length=1)
    trainer.run()
    assert toy.same_state(built.teacher, built.student)
    assert all(p.grad is None and not p.requires_grad for p in built.teacher.parameters())


def test_pausing_without_checkpoints_says_what_is_missing():
    import os
    import signal

    trainer = toy.trainer(toy.method(Supervised), toy.streams(Supervised), handlers=[PauseOnSignal()])
    trainer.add_event_handler(Events.ITERATION_STARTED, lambda e: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(ConfigError, match="Checkpoints"):
        trainer.run()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def test_soft_targets_of_a_teacher_reach_unlabeled_images():
    built = toy.method(KD)
    batch = next(iter(toy.streams(KD)))
    terms = built.losses({"labeled": batch["labeled"]}, None)
    both = built.losses(batch, None)
    assert terms["segmentation_loss"].item() == pytest.approx(both["segmentation_loss"].item(), abs=1e-6)
    assert terms["kd_loss"].item() != pytest.approx(both["kd_loss"].item(), abs=1e-6)
