"""ACT-Net's terms and its paper's networks."""

from __future__ import annotations

import pytest
import torch
from engine import toy

from medkd.engine import StepContext
from medkd.losses.consistency import probability_mse
from medkd.losses.distillation import softened_mse
from medkd.losses.segmentation import dice_ce_loss
from medkd.methods.act_net import ACTNet
from medkd.nets.unet import act_net_student, act_net_teacher, unet
from medkd.schedules import sigmoid_ramp_up


def context(progress: float) -> StepContext:
    return StepContext(torch.device("cpu"), 1, 1, progress, torch.Generator().manual_seed(0))


def test_terms_equal_a_hand_written_step_without_noise():
    built = toy.method(ACTNet, noise_std=0.0)
    batch = next(iter(toy.streams(ACTNet)))
    terms = built.losses(batch, context(0.5))
    image = torch.cat([batch["labeled"]["image"], batch["unlabeled"]["image"]]).as_subclass(torch.Tensor)
    logits, label = built.student(image), batch["labeled"]["label"]
    assert terms["segmentation_loss"].item() == pytest.approx(dice_ce_loss(logits[:2], label).item())
    kd_loss = built.kd_weight * softened_mse(logits, built.teacher(image), 20.0)
    assert terms["kd_loss"].item() == pytest.approx(kd_loss.item())
    consistency = 0.1 * sigmoid_ramp_up(0.5, 1.0) * probability_mse(logits[2:], built.co_teacher(image[2:]))
    assert terms["consistency_loss"].item() == pytest.approx(consistency.item(), abs=1e-9)
    assert terms["kd_gradient_norm"] > 0


def test_student_and_co_teacher_see_different_noise():
    built = toy.method(ACTNet, noise_std=0.5, noise_limit=1.0, start_frac=0.0)
    seen = {}
    for name in ("student", "co_teacher", "teacher"):
        built.get_submodule(name).register_forward_pre_hook(lambda m, args, name=name: seen.update({name: args[0]}))
    batch = next(iter(toy.streams(ACTNet)))
    built.losses(batch, context(0.5))
    unlabeled = batch["unlabeled"]["image"]
    assert torch.equal(seen["teacher"][2:], unlabeled)
    assert not torch.equal(seen["student"][2:], unlabeled)
    assert not torch.equal(seen["student"][2:], seen["co_teacher"])
    assert (seen["co_teacher"] - unlabeled).abs().max() <= 1.0


def test_the_co_teacher_term_waits_for_its_start():
    built = toy.method(ACTNet)
    batch = next(iter(toy.streams(ACTNet)))
    assert built.losses(batch, context(0.0))["consistency_loss"] == 0


def test_the_papers_networks_have_the_stated_sizes():
    with torch.device("meta"):
        sizes = [sum(p.numel() for p in make().parameters()) for make in (act_net_teacher, act_net_student)]
    assert sizes == [124_371_268, 482_388]
    assert round(sizes[0] / sizes[1]) == 258


@pytest.mark.parametrize("dims", [2, 3])
def test_unets_keep_the_grid_and_can_be_scripted(dims):
    network = unet(3, 4, out_channels=3, spatial_dims=dims).eval()
    image = torch.randn(1, 1, *[8] * dims)
    assert network(image).shape == (1, 3, *[8] * dims)
    torch.testing.assert_close(torch.jit.script(network)(image), network(image))


def test_too_shallow_a_unet_is_refused():
    with pytest.raises(ValueError, match="levels"):
        unet(1, 8, out_channels=2)


def test_the_co_teacher_can_be_deployed():
    built = toy.method(ACTNet, deploy_co_teacher=True)
    assert built.deployed is built.co_teacher
