"""AdaptSegNet's step against the three backward passes of the paper."""

from __future__ import annotations

import logging

import torch
from contract.small import adapt_seg_net as small
from engine import toy
from methods.hand_loop import assert_same_parameters, by_hand, trained
from torch.nn.functional import binary_cross_entropy_with_logits

from medkd.losses.segmentation import dice_ce_loss
from medkd.methods.adapt_seg_net import AdaptSegNet

SOURCE, TARGET = 0.0, 1.0  # the release's classes


def bce(logits: torch.Tensor, domain: float) -> torch.Tensor:
    return binary_cross_entropy_with_logits(logits, torch.full_like(logits, domain))


def test_steps_equal_a_hand_written_loop():
    built = trained(toy.method(AdaptSegNet, adversarial_weight=0.1), 4)
    networks = small.arguments(AdaptSegNet, norm=False, seed=0)
    student, critic = networks["student"], networks["critics"]

    def losses(batch, progress, generator):
        logits = student(batch["source"]["image"])
        source, target = logits.softmax(1), student(batch["target"]["image"]).softmax(1)
        fooled = dice_ce_loss(logits, batch["source"]["label"]) + 0.1 * bce(critic(target), SOURCE)
        judged = bce(critic(source.detach()), SOURCE) / 2 + bce(critic(target.detach()), TARGET) / 2
        return {"student": fooled, "critics": judged}

    by_hand(AdaptSegNet, networks, 4, losses)
    assert_same_parameters(built.student, student)
    assert_same_parameters(built.critics, critic)


def test_the_adversarial_term_calls_target_predictions_source():
    """Lowering the student's adversarial loss must lower the critic's logit, since source is class 0."""
    built = toy.method(AdaptSegNet)
    image = torch.randn(2, 1, 8, 8)
    logit = built.critics(built.student(image).softmax(1))
    from medkd.losses.adversarial import domain_bce

    (toward_source,) = torch.autograd.grad(domain_bce(logit, is_source=True), logit)
    assert (toward_source > 0).all()


def test_a_critic_that_is_always_right_is_reported_once(caplog):
    built = toy.method(AdaptSegNet, adversarial_weight=0.0, collapse_steps=2)
    with torch.no_grad():
        for layer in built.critics.modules():
            if isinstance(layer, torch.nn.Conv2d):
                layer.weight.zero_()
                layer.bias.zero_()
    built.watch.accuracy = 0.5  # a critic that says one thing of everything has this
    with caplog.at_level(logging.WARNING):
        trained(built, 6)
    assert len([record for record in caplog.records if "critic of segmentations" in record.getMessage()]) == 1


def test_the_critic_learns_nothing_from_the_students_loss():
    built = trained(toy.method(AdaptSegNet, adversarial_weight=1e3), 1)
    calm = trained(toy.method(AdaptSegNet, adversarial_weight=0.0), 1)
    assert toy.same_state(built.critics, calm.critics)
    assert not toy.same_state(built.student, calm.student)
