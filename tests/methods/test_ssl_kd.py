"""SimCLR and SSLKD: their steps against loops by hand, and what the released code got wrong."""

from __future__ import annotations

import contextlib

import pytest
import torch
from contract.small import ssl_kd as small
from engine import toy
from ignite.engine import Events
from methods.hand_loop import assert_same_parameters, by_hand, trained
from torch import nn
from torch.nn import functional

from medkd.data import Stream, Streams
from medkd.engine.context import StepContext
from medkd.errors import ConfigError
from medkd.losses.classification import cross_entropy_loss
from medkd.losses.contrastive import nt_xent
from medkd.methods.ssl_kd import SSLKD, SimCLR
from medkd.methods.supervised import Supervised
from medkd.nets.projection import projection_head

STEPS = 6
METHODS = pytest.mark.parametrize("method_class", [SimCLR, SSLKD])


def context() -> StepContext:
    return StepContext(torch.device("cpu"), 1, 1, 0.0, torch.Generator().manual_seed(0))


def unlabeled(count: int = 6) -> dict[str, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    image = 2 + 3 * torch.randn(count, 3, 8, 8, generator=generator)
    return {"unlabeled": {"image": image, "second_view": image.flip(-1)}}


def norms(network: nn.Module) -> list[nn.BatchNorm2d]:
    return [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]


def test_simclr_equals_a_loop_written_by_hand():
    built = trained(toy.method(SimCLR), STEPS)
    fresh = toy.method(SimCLR)
    whole = nn.Sequential(*list(fresh.encoder)[:-1], fresh.projector)

    def losses(batch, progress, generator):
        images = batch["unlabeled"]
        return {"encoder": nt_xent(whole(images["image"]), whole(images["second_view"]), 0.5)}

    by_hand(SimCLR, {"encoder": whole}, STEPS, losses)
    assert_same_parameters(nn.Sequential(*list(built.encoder)[:-1], built.projector), whole)


def test_hard_labels_are_binary_cross_entropy_on_the_thresholded_teacher():
    """Two logits are the released code's one: z = z1 - z0, and argmax is sigmoid > 0.5."""
    method = SSLKD(nn.Sequential(small.classifier()), small.classifier(6, seed=1))
    method.student.append(nn.Linear(toy.CLASSES, 2))
    method.teacher.append(nn.Linear(toy.CLASSES, 2))
    batch = unlabeled(16)
    with torch.no_grad():
        method.teacher[-1].bias -= method.teacher(batch["unlabeled"]["image"]).mean(dim=0)
    loss = method.losses(batch, context())["kd_loss"]
    one, two = (net(batch["unlabeled"]["image"]) for net in (method.student, method.teacher))
    target = (torch.sigmoid(two[:, 1] - two[:, 0]) > 0.5).float()
    assert 0 < target.mean() < 1
    expected = functional.binary_cross_entropy_with_logits(one[:, 1] - one[:, 0], target)
    torch.testing.assert_close(loss, expected)


def test_distillation_equals_a_loop_written_by_hand():
    built = trained(toy.method(SSLKD), STEPS)
    fresh = toy.method(SSLKD)
    teacher = fresh.teacher.eval()

    def losses(batch, progress, generator):
        image = batch["unlabeled"]["image"]
        return {"student": functional.cross_entropy(fresh.student(image), teacher(image).argmax(1))}

    by_hand(SSLKD, {"student": fresh.student}, STEPS, losses)
    assert_same_parameters(built.student, fresh.student)


def test_soft_labels_vanish_exactly_where_student_and_teacher_agree():
    network = small.classifier()
    method = SSLKD(network, network, hard_labels=False, temperature=2.0)
    assert method.losses(unlabeled(), context())["kd_loss"].item() == 0
    other = SSLKD(network, small.classifier(6, seed=1), hard_labels=False)
    logits, target = (net(unlabeled()["unlabeled"]["image"]) for net in (network, other.teacher))
    expected = functional.kl_div(logits.log_softmax(1), target.softmax(1), reduction="batchmean")
    torch.testing.assert_close(other.losses(unlabeled(), context())["kd_loss"], expected)


def test_teacher_labels_in_eval_mode_and_its_batch_statistics_never_move():
    """The released code leaves it in train mode, where an image's label depends on its neighbors."""
    method = toy.method(SSLKD, norm=True)
    method.train()
    assert method.student.training
    assert not method.teacher.training
    before = [norm.running_mean.clone() for norm in norms(method.teacher)]
    labels = method.teacher(unlabeled()["unlabeled"]["image"])
    alone = torch.cat([method.teacher(image[None]) for image in unlabeled()["unlabeled"]["image"]])
    torch.testing.assert_close(labels, alone)
    for _ in range(3):
        method.losses(unlabeled(), context())
    assert all(torch.equal(norm.running_mean, old) for norm, old in zip(norms(method.teacher), before, strict=True))

    method.teacher.train()  # as released: frozen parameters do not stop it
    method.teacher.requires_grad_(False)
    method.losses(unlabeled(), context())
    assert not torch.equal(norms(method.teacher)[0].running_mean, before[0])


def test_no_gradient_reaches_the_teacher():
    method = toy.method(SSLKD)
    method.losses(unlabeled(), context())["kd_loss"].backward()
    assert all(parameter.grad is None for parameter in method.teacher.parameters())
    assert all(parameter.grad is not None for parameter in method.student.parameters())


def test_the_last_layer_of_the_encoder_stays_as_it_was_and_is_no_part_of_the_contrast():
    """The released code contrasts the outputs of the ImageNet classifier instead."""
    built, fresh = trained(toy.method(SimCLR), STEPS), toy.method(SimCLR)
    assert toy.same_state(built.encoder[-1], fresh.encoder[-1])
    assert not torch.equal(built.encoder[0].weight, fresh.encoder[0].weight)
    before = fresh.losses(unlabeled(), context())["contrastive_loss"]
    nn.init.zeros_(fresh.encoder[-1].weight)
    assert fresh.losses(unlabeled(), context())["contrastive_loss"] == before
    assert fresh.projector(torch.zeros(1, 16)).shape == (1, 6)


def test_accuracy_of_a_single_output_is_not_reported():
    """As released, top-1 over one output is index 0, so it gave the share of negatives."""
    output = toy.method(SSLKD).step(unlabeled(), context())
    assert set(output) == {"loss", "kd_loss", "teacher_largest_class"}
    assert 1 / toy.CLASSES <= output["teacher_largest_class"] <= 1


def test_the_fine_tuning_stages_start_from_the_networks_trained_before():
    """Four stages on two networks: what one ends with is what the next begins with."""
    teacher, student = small.classifier(seed=1), small.classifier(seed=2)
    first = SimCLR(teacher, projection_head(16, 6))
    toy.trainer(first, toy.streams(SimCLR), epochs=1).run()
    item = {"image": torch.randn(3, 8, 8), "label": 1}
    labeled = Streams(length_of="labeled", labeled=Stream([item] * 4, 2))
    toy.trainer(Supervised(teacher, segmentation_loss=cross_entropy_loss), labeled, epochs=1).run()
    kept = {name: value.clone() for name, value in teacher.state_dict().items()}
    distilled = SSLKD(student, first.deployed)
    streams = Streams(length_of="unlabeled", unlabeled=Stream(small.items("unlabeled", labeled=False, seed=0), 2))
    toy.trainer(distilled, streams, epochs=1).run()
    assert all(torch.equal(value, kept[name]) for name, value in teacher.state_dict().items())
    assert distilled.deployed is student


class StopHereError(Exception):
    pass


@METHODS
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(method_class, tmp_path):
    def run(folder, stop_at, *, resume):
        built = toy.method(method_class, norm=True)
        trainer = toy.trainer(built, toy.streams(method_class), epochs=2, folder=folder, resume=resume)

        def stop(engine):
            if engine.state.iteration == stop_at:
                raise StopHereError

        trainer.add_event_handler(Events.ITERATION_COMPLETED, stop)
        with contextlib.suppress(StopHereError):
            trainer.run()
        return built

    whole = run(tmp_path / "whole", -1, resume=False)
    run(tmp_path / "cut", 5, resume=False)
    assert toy.same_state(whole, run(tmp_path / "cut", -1, resume=True))


def test_missing_views_and_classifiers_are_one_clear_line():
    method = toy.method(SimCLR)
    batch = {"unlabeled": {"image": torch.zeros(2, 3, 8, 8)}}
    with pytest.raises(ConfigError, match="second_view"):
        method.losses(batch, context())
    with pytest.raises(ConfigError, match="no linear layer"):
        SimCLR(nn.Sequential(nn.Conv2d(3, 2, 1)), projection_head(2))
    with pytest.raises(ConfigError, match="no module 'fc'"):
        SimCLR(small.classifier(), projection_head(16), classifier="fc")
