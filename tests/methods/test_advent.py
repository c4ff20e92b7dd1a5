"""MinEnt and AdvEnt: the release's constants and loops."""

from __future__ import annotations

import inspect

import numpy as np
import torch
from contract.small import adapt_seg_net as small
from engine import toy
from methods.hand_loop import assert_same_parameters, by_hand, trained
from torch.nn.functional import binary_cross_entropy_with_logits

from medkd.losses.segmentation import dice_ce_loss
from medkd.methods.advent import AdvEnt, MinEnt


def test_defaults_are_the_papers():
    assert inspect.signature(MinEnt).parameters["entropy_weight"].default == 0.001
    assert inspect.signature(AdvEnt).parameters["adversarial_weight"].default == 0.001


def test_min_ent_equals_a_hand_written_loop():
    built = trained(toy.method(MinEnt, entropy_weight=0.3), 4)
    student = toy.network()

    def losses(batch, progress, generator):
        p = student(batch["target"]["image"]).softmax(1)
        entropy = -(p * torch.log2(p)).sum(1).mean() / np.log2(toy.CLASSES)
        return {"student": dice_ce_loss(student(batch["source"]["image"]), batch["source"]["label"]) + 0.3 * entropy}

    by_hand(MinEnt, {"student": student}, 4, losses)
    assert_same_parameters(built.student, student)


def test_adv_ent_equals_a_hand_written_loop():
    built = trained(toy.method(AdvEnt, adversarial_weight=0.1), 4)
    networks = small.arguments(AdvEnt, norm=False, seed=0)
    student, critic = networks["student"], networks["critics"]

    def information(logits):
        p = logits.softmax(1)
        return -p * torch.log2(p + 1e-30) / np.log2(toy.CLASSES)

    def bce(logits, domain):
        return binary_cross_entropy_with_logits(logits, torch.full_like(logits, domain))

    def losses(batch, progress, generator):
        logits = student(batch["source"]["image"])
        source, target = information(logits), information(student(batch["target"]["image"]))
        fooled = dice_ce_loss(logits, batch["source"]["label"]) + 0.1 * bce(critic(target), 0.0)
        return {
            "student": fooled,
            "critics": bce(critic(source.detach()), 0.0) / 2 + bce(critic(target.detach()), 1.0) / 2,
        }

    by_hand(AdvEnt, networks, 4, losses)
    assert_same_parameters(built.student, student)
    assert_same_parameters(built.critics, critic)


def test_minimizing_entropy_alone_favors_the_majority_class():
    """The trap of every method that minimizes entropy: rare classes are given up."""
    torch.manual_seed(0)
    logits = torch.nn.Parameter(torch.randn(1, 3, 16, 16) * 0.3 + torch.tensor([0.5, 0.0, 0.0]).reshape(1, 3, 1, 1))
    shared = torch.nn.Parameter(torch.zeros(3))  # what a network's last bias is
    from medkd.losses.entropy import normalized_entropy

    optimizer = torch.optim.SGD([shared], lr=5.0)
    before = (logits.argmax(1) == 0).float().mean()
    for _ in range(100):
        optimizer.zero_grad()
        normalized_entropy(logits.detach() + shared.reshape(1, 3, 1, 1)).backward()
        optimizer.step()
    after = ((logits + shared.reshape(1, 3, 1, 1)).argmax(1) == 0).float().mean()
    assert 0.5 < before < 0.9
    assert after == 1
